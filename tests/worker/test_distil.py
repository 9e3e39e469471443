"""A drafter is made of its own target: it learns, and its bytes are the same whoever was killed on the way."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kernels.checkpoint import open_checkpoint
from kernels.config import CheckpointError
from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from shared.settings import WorkerSettings
from tests.kernels.families import FAMILIES
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf
from worker.compress.acceptance import agreement, tokens_a_step
from worker.compress.distil import Certificate, Distillation, OtherRun, Prompts, Recipe, ends_of
from worker.compress.learning import continued, head_rows, losses_of, most_said, rate
from worker.compress.student import Student, export
from worker.compress.writing import Document, Job, lessons, write
from worker.runner import load_decoder

STOPS = (0, 1)
RECIPE = Recipe(layers=(0, 2), vocabulary=64, seed=3, text_tokens=24, texts=40, steps=16, batch=6, peak_rate=2e-3,
                on_policy=0.25, top=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two take longer for matrices so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompts(count: int, seed: int) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(2, 256) for _ in range(random.randint(2, 9))] for _ in range(count)]


PROMPTS = Prompts(prompts(40, 1), prompts(8, 2), STOPS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers that a Llama's GGUF has, with its order of rows."""
    return write_tiny_gguf(tmp_path_factory.mktemp("target") / "model.gguf", Tiny(layers=4, context_length=128))


class Killed(BaseException):
    """As by a signal."""


class Reports:
    """What was told, and death where it was asked for."""

    def __init__(self, dies_in: str = "", at: int = 0) -> None:
        self.told: list[tuple[str, int, int, str]] = []
        self._dies = (dies_in, at)

    def __call__(self, phase: str, done: int, total: int, figures: str) -> None:
        self.told.append((phase, done, total, figures))
        if (phase, done) == self._dies:
            raise Killed


def made(target: Path, out: Path, recipe: Recipe = RECIPE, report: Any = None, asked: Prompts = PROMPTS) -> Certificate:
    return Distillation(target, out, recipe, asked, "cpu", report or Reports(), save_s=0.0).run()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes() + (folder / "d2t.json").read_bytes()


@pytest.fixture(scope="module")
def whole(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Certificate, Reports]:
    """A run that nobody disturbed."""
    out, report = tmp_path_factory.mktemp("whole"), Reports()
    return out, made(target, out, report=report), report


def test_a_drafter_learns_what_its_target_would_say(target: Path, tmp_path: Path) -> None:
    """Of a target with random weights it can only learn by heart."""
    certificate = made(target, tmp_path, msgspec.structs.replace(RECIPE, on_policy=0.0, steps=60))
    assert sum(certificate.losses[-3:]) < 0.5 * sum(certificate.losses[:3])
    assert sum(certificate.overlaps[-3:]) > 1.3 * sum(certificate.overlaps[:3])


def test_acceptance_is_measured_greedy_and_at_several_draft_temperatures(
        whole: tuple[Path, Certificate, Reports]) -> None:
    _, certificate, _ = whole
    rates = {(row.text, row.draft_temperature): row.rate for row in certificate.acceptance}
    assert {(row.text, row.draft_temperature) for row in certificate.copied} <= set(rates)
    assert {temperature for text, temperature in rates if text == "temperature 1"} == {0.0, 0.5, 0.7, 0.85, 1.0, 1.15}
    assert all(1.0 <= row.tokens_a_step["4"] <= row.tokens_a_step["8"] <= 9.0 for row in certificate.acceptance)


def test_the_certificate_says_of_what_and_how_it_was_made(
        whole: tuple[Path, Certificate, Reports], target: Path) -> None:
    out, certificate, _ = whole
    assert msgspec.json.decode((out / "certificate.json").read_bytes(), type=Certificate) == certificate
    assert certificate.recipe == RECIPE
    assert (certificate.training_texts, certificate.steps, certificate.vocabulary) == (40, 16, 64)
    assert 0 < certificate.training_tokens <= 40 * 24
    assert 0 < certificate.coverage <= 1
    assert certificate.active_weights < certificate.target_weights
    assert certificate.files["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert len({certificate.target, certificate.prompts, certificate.texts, certificate.held_out}) == 4


def test_progress_is_told_to_its_end(whole: tuple[Path, Certificate, Reports]) -> None:
    _, _, report = whole
    ends = {phase: (done, total) for phase, done, total, _ in report.told}
    assert (ends["write"], ends["train"]) == ((40, 40), (16, 16))
    assert ends["measure"][0] == ends["measure"][1]


@pytest.mark.parametrize(("phase", "at"), [("write", 32), ("train", 1), ("train", 7), ("train", 14), ("measure", 3)])
def test_whoever_is_killed_goes_on_to_the_same_bytes(
        phase: str, at: int, target: Path, whole: tuple[Path, Certificate, Reports], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        made(target, tmp_path, report=Reports(phase, at))
    assert not (tmp_path / "certificate.json").exists()
    second = Reports()
    certificate = made(target, tmp_path, report=second)
    assert weights(tmp_path) == weights(whole[0])
    assert msgspec.structs.replace(certificate, seconds={}) == msgspec.structs.replace(whole[1], seconds={})
    if phase == "train" and at > 1:
        # what was done is not done again
        assert min(done for name, done, _, _ in second.told if name == "train") > at - 1
    assert made(target, tmp_path) == certificate


def test_a_folder_with_another_plan_is_left_alone(target: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        made(target, tmp_path, report=Reports("train", 2))
    before = sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.rglob("*"))
    other = msgspec.structs.replace(RECIPE, seed=4)
    with pytest.raises(OtherRun, match=r"another recipe.*another --out"):
        made(target, tmp_path, other)
    with pytest.raises(OtherRun, match="another prompts"):
        made(target, tmp_path, asked=PROMPTS._replace(training=prompts(40, 9)))
    assert sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.rglob("*")) == before


def test_a_folder_with_a_finished_run_answers_for_no_other(
        target: Path, whole: tuple[Path, Certificate, Reports], tmp_path: Path) -> None:
    out, certificate, _ = whole
    before = sorted(file.name for file in out.rglob("*"))
    other = write_tiny_gguf(tmp_path / "other.gguf", Tiny(layers=4, context_length=128, seed=7))
    with pytest.raises(OtherRun, match="another target"):
        made(other, out)
    with pytest.raises(OtherRun, match="another recipe"):
        made(target, out, msgspec.structs.replace(RECIPE, layers=(1, 3)))
    with pytest.raises(OtherRun, match=r"another prompts.*another --out"):
        made(target, out, asked=PROMPTS._replace(held_out=prompts(8, 9)))
    assert made(target, out) == certificate
    assert sorted(file.name for file in out.rglob("*")) == before


def test_minutes_become_counts_that_a_later_run_keeps(target: Path, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(RECIPE, texts=0, steps=0, minutes=0.05)
    with pytest.raises(Killed):
        made(target, tmp_path, recipe, Reports("train", 6))
    plan = json.loads((tmp_path / "work" / "plan.json").read_text())
    assert plan["texts"] >= 32 and plan["texts"] % 32 == 0
    assert plan["steps"] > 4
    certificate = made(target, tmp_path, recipe)
    assert (certificate.training_texts, certificate.steps) == (plan["texts"], plan["steps"])
    assert not (tmp_path / "work").exists()


def native(folder: Path, blocks: int = 64) -> Any:
    checkpoint = open_checkpoint(folder)
    return NativeDecoder(checkpoint, blocks=blocks) if available() is None else TorchDecoder(checkpoint, blocks=blocks)


def test_a_text_does_not_depend_on_what_is_written_beside_it(target: Path) -> None:
    jobs = [Job(prompt, float(number % 2) * 5.0, number) for number, prompt in enumerate(PROMPTS.training)]
    together = write(native(target, 300), jobs, 20, STOPS)
    for number in (0, 1, 33, 39):
        (alone,) = write(native(target), [jobs[number]], 20, STOPS)
        assert alone.tokens.tolist() == together[number].tokens.tolist()
        said = alone.tokens[alone.first:].tolist()
        assert alone.first == len(jobs[number].prompt)
        assert len(said) == 20 or said[-1] in STOPS
        assert not set(said[:-1]) & set(STOPS)
    with pytest.raises(ValueError, match="use shorter prompts"):
        write(native(target, 2), jobs[:1], 200, STOPS)


@pytest.mark.parametrize("rows", [7, 100])
def test_lessons_are_what_the_target_thought(target: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("worker.compress.writing", fromlist=["x"]).LESSON_ROWS, "cpu", rows)
    decoder = TorchDecoder(open_checkpoint(target), blocks=64)
    documents = write(decoder, [Job(prompt, 5.0, number) for number, prompt in enumerate(PROMPTS.training[:5])], 20,
                      STOPS)
    thoughts = lessons(decoder, documents, 4)
    student = Student(open_checkpoint(target), range(4), range(256))
    for document, thought in zip(documents, thoughts, strict=True):
        assert len(thought.ids) == len(document.tokens) - document.first
        tokens = torch.from_numpy(document.tokens[:-1].astype(np.int64))[None]
        logp = torch.log_softmax(student.logits(student(tokens))[0, document.first - 1:], -1)
        ours = logp.gather(1, torch.from_numpy(thought.ids.astype(np.int64))).detach().numpy()
        assert np.abs(ours - thought.logp).max() < 0.02
        assert (np.diff(thought.logp.astype(np.float32), axis=1) <= 0).all()


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in FAMILIES.items()])
def test_a_student_computes_and_exports_what_the_served_decoder_does(shape: Tiny, tmp_path: Path) -> None:
    """All layers and the whole vocabulary: what is exported is the target, but for the rounding to int8."""
    folder = write_tiny_folder(tmp_path / "target", shape)
    checkpoint = open_checkpoint(folder)
    if checkpoint.config.rope_factors is not None or checkpoint.config.rope_magnitude != 1.0:
        with pytest.raises(CheckpointError, match="scales its rope"):
            Student(checkpoint, range(shape.layers), range(shape.vocabulary))
        return
    if checkpoint.config.layer_norm:
        with pytest.raises(CheckpointError, match="is of a family that no drafter can be made of"):
            Student(checkpoint, range(shape.layers), range(shape.vocabulary))
        return
    if checkpoint.config.experts is not None:
        with pytest.raises(CheckpointError, match="is a mixture of experts"):
            Student(checkpoint, range(shape.layers), range(shape.vocabulary))
        return
    student = Student(checkpoint, range(shape.layers), range(shape.vocabulary))
    document = Document(np.array(prompts(1, 5)[0] * 4, np.int32), 1)
    target = TorchDecoder(checkpoint, blocks=16)
    thoughts = lessons(target, [document], shape.vocabulary)[0]
    logp = torch.log_softmax(student.logits(student(torch.from_numpy(document.tokens[None, :-1].astype(np.int64)))), -1)
    ours = logp[0].gather(1, torch.from_numpy(thoughts.ids.astype(np.int64))).detach().numpy()
    assert np.abs(ours - thoughts.logp).max() < 0.02
    export(student, tmp_path / "out")
    again = lessons(TorchDecoder(open_checkpoint(tmp_path / "out"), blocks=16), [document], shape.vocabulary)[0]
    assert (again.ids[:, 0] == thoughts.ids[:, 0]).mean() > 0.8
    assert np.abs(again.logp[:, 0] - thoughts.logp[:, 0]).mean() < 0.15


def test_a_target_is_its_own_best_drafter(target: Path) -> None:
    jobs = [Job(prompt, 5.0 * (number % 2), number) for number, prompt in enumerate(PROMPTS.training[:6])]
    decoder = native(target, 300)
    documents = write(decoder, jobs, 20, STOPS)
    assert all(one.all() for one in agreement(decoder, documents, jobs, 1.0))
    hot = [at for at, job in enumerate(jobs) if job.temperature]
    cold = agreement(decoder, [documents[at] for at in hot], [jobs[at] for at in hot], 0.0)
    assert not all(one.all() for one in cold)


def test_a_step_brings_the_right_drafts_in_a_row_and_one_more() -> None:
    right = np.array([True, True, False, True, True, True, True, False])
    assert tokens_a_step([right], 0) == 1.0
    assert tokens_a_step([right], 1) == 8 / 5
    assert tokens_a_step([right], 2) == 8 / 3
    assert tokens_a_step([right], 8) == 8 / 2
    assert tokens_a_step([right, ~right], 2) == 16 / 10


def test_the_head_keeps_what_was_said_most() -> None:
    documents = [Document(np.array([9, 9, 9, 5, 7, 5, 6, 7, 7], np.int32), 3)]
    assert most_said(documents, 4, 12, (1,)) == [1, 5, 6, 7]
    assert most_said(documents, 6, 12, (1,)) == [0, 1, 2, 5, 6, 7]
    assert most_said(documents, 99, 12, ()) == list(range(12))


def test_ids_that_the_head_lacks_teach_nothing_and_break_nothing(target: Path) -> None:
    decoder = native(target)
    documents = write(decoder, [Job([5, 6], 5.0, 1)], 16, STOPS)
    thoughts = lessons(decoder, documents, 8)
    known = sorted({int(id) for id in thoughts[0].ids[:5].ravel()})
    student = Student(open_checkpoint(target), (0, 1), known)
    loss, overlap = losses_of(student, documents, thoughts, head_rows(student, "cpu"))
    loss.backward()
    assert torch.isfinite(loss) and 0 <= float(overlap) <= 1
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())


def test_where_the_drafter_goes_on_by_itself_the_text_before_is_the_targets(target: Path) -> None:
    documents = write(native(target), [Job(prompt, 5.0, number) for number, prompt in enumerate(PROMPTS.training[:5])],
                      20, STOPS)
    student = Student(open_checkpoint(target), (0, 1), (3, 8, 20, 100))
    own = continued(student, documents, np.random.default_rng(1), "cpu")
    for before, after in zip(documents, own, strict=True):
        assert before.first <= after.first < len(before.tokens)
        assert after.tokens[:after.first].tolist() == before.tokens[:after.first].tolist()
        assert set(after.tokens[after.first:].tolist()) <= {3, 8, 20, 100}
        assert len(after.tokens) - after.first == 8
    again = continued(student, documents, np.random.default_rng(1), "cpu")
    assert [one.tokens.tolist() for one in again] == [one.tokens.tolist() for one in own]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [rate(step, 200) for step in range(200)]
    assert rates[0] < rates[10] < rates[19] == max(rates) == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(("total", "wanted", "layers"), [(30, 4, (0, 1, 28, 29)), (30, 3, (0, 1, 29)), (30, 1, (0,)),
                                                         (2, 2, (0, 1))])
def test_the_ends_of_a_model_are_copied(total: int, wanted: int, layers: Sequence[int]) -> None:
    assert ends_of(total, wanted) == layers
    with pytest.raises(ValueError, match=f"copy 1 to {total}"):
        ends_of(total, total + 1)


def test_a_drafter_is_not_served_in_the_place_of_a_model(whole: tuple[Path, Certificate, Reports]) -> None:
    with pytest.raises(ValueError, match=r"is a drafter's model.*serve the model that it was made of"):
        load_decoder(WorkerSettings(engine="cpu", model=str(whole[0])))


def test_layers_that_the_target_lacks_are_refused(target: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers 0\.\.3"):
        Student(open_checkpoint(target), (0, 4), (1, 2))
