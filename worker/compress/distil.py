"""A drafter out of its own target.

    1 write    the target answers prompts, most of them at temperature 1, and says what it thought of each token
    2 trim     the head keeps the ids that were said most
    3 train    some of the target's layers, on those texts and thoughts; then where the drafter itself went on with them
    4 measure  how many drafts of the result are accepted, on prompts that it has not learned from

Rules:
- What is learned depends on the plan alone (`plan.json`): prompts, seed, counts. Each shard of text and each step of
  training is a function of its number, so whoever is killed goes on where it was and ends with the same bytes. What was
  asked for in minutes becomes counts as soon as the first shard and the first steps have shown how long they take.
- A half-written file never bears its final name.
"""

import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.step import Decoder
from shared.clock import stopwatch
from worker.compress.acceptance import agreement, tokens_a_step
from worker.compress.learning import continued, head_rows, losses_of, most_said, rate
from worker.compress.student import Student, export
from worker.compress.writing import Document, Job, Lessons, lessons, write

FORMAT = 1
HELD_OUT_TEXTS = 16
# every so many-th text is written greedily, the others at temperature 1
GREEDY_EVERY = 4
# shares of the minutes
WRITE_SHARE, TRAIN_SHARE = 0.3, 0.5
# steps that are timed before the rest is planned; learning has not risen to its peak by then
TIMED_STEPS = 4
CLIP = 1.0
SAVE_S = 30.0
DRAFTS = (4, 8)
FACTORS = (0.0, 0.5, 0.7, 0.85, 1.0, 1.15)

Report = Callable[[str, int, int, str], None]  # what is done, so far, in all, figures


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for. Counts of 0 are found out from `minutes`."""

    layers: tuple[int, ...]  # of the target, in order
    vocabulary: int = 8192  # rows of the head
    seed: int = 0
    text_tokens: int = 160  # of an answer, at most
    texts: int = 0
    steps: int = 0
    minutes: float = 20.0
    shard: int = 32  # texts that are written together
    batch: int = 8  # texts of a training step
    peak_rate: float = 5e-4
    on_policy: float = 0.1  # the share of the steps, the last ones, that learn from the drafter's own continuations
    top: int = 32  # of the target's probabilities that are kept
    half: bool = False  # train in bfloat16 where that is safe


class Prompts(NamedTuple):
    """Token ids, and those that end an answer."""

    training: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    stops: Sequence[int]


class Plan(msgspec.Struct, kw_only=True):
    """A run: what makes its result what it is. Counts of 0 are not known yet."""

    format: int = FORMAT
    recipe: Recipe
    target: str  # digest of its weights
    prompts: str  # digest
    texts: int = 0
    steps: int = 0


class Acceptance(msgspec.Struct, frozen=True):
    """Of drafts behind the target's own text. Each kind of text, and each factor of the draft temperature, apart."""

    text: str  # greedy, or temperature 1
    draft_temperature: float
    rate: float  # drafts that are what the target says, each behind a right text
    tokens_a_step: dict[str, float]  # by drafts verified in a step
    tokens: int


class Certificate(msgspec.Struct, kw_only=True):
    """What was made, of what, how, and how good it is. Times in seconds, sizes in bytes."""

    format: int = FORMAT
    kind: str = "drafter"
    recipe: Recipe
    target: str
    prompts: str
    texts: str  # digest of what the target wrote
    held_out: str
    training_texts: int
    training_tokens: int
    steps: int
    losses: list[float]  # at ten places
    overlaps: list[float]
    vocabulary: int
    coverage: float  # of the tokens of held-out answers, the share that the head knows
    files: dict[str, int]
    active_weights: int  # that one token reads
    target_weights: int
    device: str
    copied: list[Acceptance]  # the layers as they were
    acceptance: list[Acceptance]
    seconds: dict[str, float]  # in this process, by phase


class Text(NamedTuple):
    """Documents with their jobs, and what the target thought of each token it said."""

    jobs: list[Job]
    documents: list[Document]
    lessons: list[Lessons]


class OtherRun(ValueError):
    """The folder belongs to a run with another plan."""


def ends_of(layers: int, wanted: int) -> tuple[int, ...]:
    """The first and the last layers: as many of each, the odd one first."""
    if not 1 <= wanted <= layers:
        raise ValueError(f"the target has {layers} layers: copy 1 to {layers}, not {wanted}")
    first = -(-wanted // 2)
    return (*range(first), *range(layers - (wanted - first), layers))


class Distillation:
    """One run in one folder: `work/` holds what a later run goes on from."""

    def __init__(self, target: Path, out: Path, recipe: Recipe, prompts: Prompts, device: str, report: Report,
                 save_s: float = SAVE_S) -> None:
        """Raises OtherRun for a folder with another plan, CheckpointError for a target that cannot be read."""
        self._checkpoint: Checkpoint = open_checkpoint(target)
        self._out, self._work = out, out / "work"
        self._recipe, self._prompts, self._device, self._report = recipe, prompts, device, report
        self._save_s = save_s
        self._began = stopwatch()
        self._seconds: dict[str, float] = {}
        fresh = Plan(recipe=recipe, target=_file_digest(self._checkpoint.path), prompts=_digest(prompts),
                     texts=recipe.texts, steps=recipe.steps)
        self._done = out / "certificate.json"
        if self._done.is_file():
            _check_same(out, msgspec.json.decode(self._done.read_bytes(), type=Certificate), fresh)
            self.plan = fresh
            return
        self._work.mkdir(parents=True, exist_ok=True)
        self.plan = _known_plan(self._work / "plan.json", fresh)

    def run(self) -> Certificate:
        """All of it; what was done before is not done again."""
        if self._done.is_file():
            return msgspec.json.decode(self._done.read_bytes(), type=Certificate)
        decoder = _decoder(self._checkpoint, self._device)
        held_out = self._timed("write", lambda: self._held_out(decoder))
        text = self._timed("write", lambda: self._written(decoder))
        head_ids = most_said(text.documents, self._recipe.vocabulary, self._checkpoint.config.vocabulary,
                             self._prompts.stops)
        torch.manual_seed(self._recipe.seed)
        student = Student(self._checkpoint, self._recipe.layers, head_ids).to(self._device)
        files = export(student, self._work / "copied")
        copied = self._timed("measure", lambda: self._accepted(self._work / "copied", held_out, (1.0,)))
        losses = self._timed("train", lambda: self._trained(student, decoder, text))
        files = export(student, self._out)
        acceptance = self._timed("measure", lambda: self._accepted(self._out, held_out, FACTORS))
        config = student.config
        matrices = sum(parameter.numel() for parameter in student.parameters() if parameter.dim() == 2)
        places: list[int] = np.linspace(0, len(losses) - 1, min(10, len(losses))).astype(int).tolist()
        certificate = Certificate(
            recipe=self._recipe, target=self.plan.target, prompts=self.plan.prompts, texts=_digest(text.documents),
            held_out=_digest(held_out.documents), training_texts=len(text.documents),
            training_tokens=sum(len(one.tokens) - one.first for one in text.documents), steps=self.plan.steps,
            losses=[round(losses[at][0], 4) for at in places], overlaps=[round(losses[at][1], 4) for at in places],
            vocabulary=config.head_size, coverage=_coverage(held_out.documents, head_ids), files=files,
            active_weights=matrices, target_weights=_active(self._checkpoint), device=self._device, copied=copied,
            acceptance=acceptance, seconds={name: round(took, 1) for name, took in self._seconds.items()})
        _write_file(self._done, msgspec.json.format(msgspec.json.encode(certificate), indent=1))
        shutil.rmtree(self._work)
        return certificate

    # --- 1. write ----------------------------------------------------------------------------------------------------

    def _held_out(self, decoder: Decoder) -> Text:
        """Answers to prompts nobody learns from: each greedy and at temperature 1."""
        prompts = self._prompts.held_out[:HELD_OUT_TEXTS // 2]
        jobs = [Job(prompt, temperature, _seed(self._recipe.seed, 1, number))
                for number, prompt in enumerate(prompts) for temperature in (0.0, 1.0)]
        return Text(jobs, self._kept("held-out", lambda: (write(decoder, jobs, self._recipe.text_tokens,
                                                                 self._prompts.stops), []))[0], [])

    def _written(self, decoder: Decoder) -> Text:
        """All shards of text; the first says how many there is time for."""
        text = Text([], [], [])
        shard, shard_texts = 0, self._recipe.shard
        while not self.plan.texts or len(text.documents) < self.plan.texts:
            count = min(shard_texts, self.plan.texts - len(text.documents)) if self.plan.texts else shard_texts
            jobs = [self._job(len(text.documents) + number) for number in range(count)]
            began = stopwatch()
            documents, thoughts = self._kept(f"text-{shard:05}", partial(self._shard, decoder, jobs))
            if not self.plan.texts:
                left = self._recipe.minutes * 60 * WRITE_SHARE - (began - self._began)
                self.plan.texts = shard_texts * max(1, int(left / max(1e-3, stopwatch() - began)))
                self._save_plan()
            text.jobs.extend(jobs)
            text.documents.extend(documents)
            text.lessons.extend(thoughts)
            tokens = sum(len(one.tokens) - one.first for one in text.documents)
            self._report("write", len(text.documents), self.plan.texts, f"{tokens:,} tokens")
            shard += 1
        return text

    def _job(self, number: int) -> Job:
        prompt = self._prompts.training[number % len(self._prompts.training)]
        greedy = number % GREEDY_EVERY == GREEDY_EVERY - 1
        return Job(prompt, 0.0 if greedy else 1.0, _seed(self._recipe.seed, 0, number))

    def _shard(self, decoder: Decoder, jobs: Sequence[Job]) -> tuple[list[Document], list[Lessons]]:
        documents = write(decoder, jobs, self._recipe.text_tokens, self._prompts.stops)
        return documents, lessons(decoder, documents, self._recipe.top, self._device)

    def _kept(self, name: str, make: Callable[[], tuple[list[Document], list[Lessons]]]
              ) -> tuple[list[Document], list[Lessons]]:
        """What `make` gives, from the file of this name if it was made before."""
        path = self._work / f"{name}.npz"
        if not path.is_file():
            documents, thoughts = make()
            buffer = io.BytesIO()
            np.savez(buffer, lengths=np.array([len(one.tokens) for one in documents], np.int64),
                     firsts=np.array([one.first for one in documents], np.int64),
                     tokens=np.concatenate([one.tokens for one in documents]),
                     ids=np.concatenate([one.ids for one in thoughts]) if thoughts else np.empty((0, 0), np.int32),
                     logp=np.concatenate([one.logp for one in thoughts]) if thoughts else np.empty((0, 0), np.float16))
            _write_file(path, buffer.getvalue())
        with np.load(path) as kept:
            firsts, ends = kept["firsts"].tolist(), np.cumsum(kept["lengths"]).tolist()
            documents = [Document(tokens, first) for tokens, first in
                         zip(np.split(kept["tokens"], ends[:-1]), firsts, strict=True)]
            if not kept["ids"].size:
                return documents, []
            cuts = np.cumsum([len(one.tokens) - one.first for one in documents])[:-1]
            return documents, [Lessons(ids, logp) for ids, logp in
                               zip(np.split(kept["ids"], cuts), np.split(kept["logp"], cuts), strict=True)]

    # --- 3. train ----------------------------------------------------------------------------------------------------

    def _trained(self, student: Student, decoder: Decoder, text: Text) -> list[tuple[float, float]]:
        """Loss and overlap of each step."""
        recipe = self._recipe
        optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=0.0)
        state = self._work / "state.pt"
        losses: list[tuple[float, float]] = []
        if state.is_file():
            kept = torch.load(state, map_location=self._device)
            student.load_state_dict(kept["student"])
            optimizer.load_state_dict(kept["optimizer"])
            losses = kept["losses"]
        row_of = head_rows(student, self._device)
        saved = began = stopwatch()
        first = len(losses)
        while not self.plan.steps or len(losses) < self.plan.steps:
            step = len(losses)
            for group in optimizer.param_groups:
                group["lr"] = recipe.peak_rate * rate(step, self.plan.steps)
            documents, thoughts = self._batch(student, decoder, text, step)
            with _precision(recipe.half, self._device):
                loss, overlap = losses_of(student, documents, thoughts, row_of)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            optimizer.step()
            losses.append((float(loss.detach()), float(overlap)))
            now = stopwatch()
            if not self.plan.steps and len(losses) - first >= TIMED_STEPS:
                # the steps in which the drafter goes on by itself take about four times as long
                each = (now - began) / (len(losses) - first) * (1 + 3 * recipe.on_policy)
                left = recipe.minutes * 60 * (WRITE_SHARE + TRAIN_SHARE) - (now - self._began)
                self.plan.steps = len(losses) + max(1, int(left / each))
                self._save_plan()
            if now - saved >= self._save_s:
                _save(state, student, optimizer, losses)
                saved = stopwatch()
            recent = losses[-20:]
            self._report("train", len(losses), self.plan.steps,
                         f"loss {sum(one[0] for one in recent) / len(recent):.3f}, "
                         f"overlap {sum(one[1] for one in recent) / len(recent):.3f}")
        return losses

    def _batch(self, student: Student, decoder: Decoder, text: Text,
               step: int) -> tuple[list[Document], list[Lessons]]:
        """The texts of this step: a function of its number."""
        recipe = self._recipe
        random = np.random.default_rng((recipe.seed, 2, step))
        chosen = random.choice(len(text.documents), min(recipe.batch, len(text.documents)), replace=False).tolist()
        documents, thoughts = [text.documents[at] for at in chosen], [text.lessons[at] for at in chosen]
        if not self.plan.steps or step < self.plan.steps * (1 - recipe.on_policy):
            return documents, thoughts
        with _precision(recipe.half, self._device):
            own = continued(student, documents, random, self._device)
        return own, lessons(decoder, own, recipe.top, self._device)

    # --- 4. measure --------------------------------------------------------------------------------------------------

    def _accepted(self, folder: Path, text: Text, factors: Sequence[float]) -> list[Acceptance]:
        """As the drafter service computes it: the native step on the written checkpoint."""
        longest = max(len(one.tokens) for one in text.documents)
        decoder = _decoder(open_checkpoint(folder), self._device, tokens=longest)
        found = []
        for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
            those = [at for at, job in enumerate(text.jobs) if job.temperature == temperature]
            for factor in factors if temperature else (1.0,):
                agreed = agreement(decoder, [text.documents[at] for at in those], [text.jobs[at] for at in those],
                                   factor)
                every = np.concatenate(agreed)
                found.append(Acceptance(name, factor, round(float(every.mean()), 4),
                                        {str(drafts): round(tokens_a_step(agreed, drafts), 3) for drafts in DRAFTS},
                                        len(every)))
                self._report("measure", len(found), 1 + len(factors), f"{name}: {every.mean():.0%} accepted")
        return found

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        began = stopwatch()
        try:
            return work()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + stopwatch() - began

    def _save_plan(self) -> None:
        _write_file(self._work / "plan.json", msgspec.json.format(msgspec.json.encode(self.plan), indent=1))


def _decoder(checkpoint: Checkpoint, device: str, tokens: int = 0) -> Decoder:
    """Whoever computes this checkpoint on the device. `tokens`: only so long a text is wanted of it."""
    blocks = -(-tokens // 16) if tokens else None
    if device == "cpu":
        from kernels.native.build import available
        from kernels.native.decoder import NativeDecoder, block_bytes

        if available() is None:
            blocks = blocks or (256 << 20) // block_bytes(checkpoint.config, "fp16")
            native: Decoder = NativeDecoder(checkpoint, blocks=blocks)
            return native
    from kernels.decoder import TorchDecoder

    kv_bytes = (8 << 30) if device == "cuda" else (256 << 20)
    decoder: Decoder = TorchDecoder(checkpoint, blocks=blocks, kv_bytes=kv_bytes, device=device)
    return decoder


def _precision(half: bool, device: str) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16, enabled=half)
    return context


def _save(path: Path, student: Student, optimizer: torch.optim.Optimizer, losses: list[tuple[float, float]]) -> None:
    buffer = io.BytesIO()
    torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, buffer)
    _write_file(path, buffer.getvalue())


def _known_plan(path: Path, fresh: Plan) -> Plan:
    """The plan of the run that was begun here, or this one. Raises OtherRun when they differ."""
    if not path.is_file():
        _write_file(path, msgspec.json.format(msgspec.json.encode(fresh), indent=1))
        return fresh
    known = msgspec.json.decode(path.read_bytes(), type=Plan)
    _check_same(path.parent.parent, known, fresh)
    return known


def _check_same(folder: Path, known: Plan | Certificate, fresh: Plan) -> None:
    """Raises OtherRun unless what was begun or finished in `folder` is what is asked for now."""
    for what in ("format", "recipe", "target", "prompts"):
        if getattr(known, what) != getattr(fresh, what):
            raise OtherRun(f"{folder} holds a run with another {what}: go on with that one, choose another --out, or "
                           "delete the folder")


def _write_file(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def _seed(seed: int, kind: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} {kind} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _digest(what: object) -> str:
    """Of prompts, or of documents."""
    return hashlib.blake2b(msgspec.json.encode(_plain(what)), digest_size=16).hexdigest()


def _plain(what: Any) -> Any:
    if isinstance(what, np.ndarray):
        return what.tolist()
    return [_plain(one) for one in what] if isinstance(what, list | tuple) else what


def _file_digest(path: Path) -> str:
    """Of a checkpoint's weights."""
    found = hashlib.blake2b(digest_size=16)
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")]):
        with file.open("rb") as source:
            while chunk := source.read(1 << 20):
                found.update(chunk)
    return found.hexdigest()


def _coverage(documents: Sequence[Document], head_ids: Sequence[int]) -> float:
    said = np.concatenate([tokens[first:] for tokens, first in documents])
    return round(float(np.isin(said, np.array(head_ids)).mean()), 4)


def _active(checkpoint: Checkpoint) -> int:
    """Weights that one token reads: every matrix but the embedding's other rows."""
    shapes = [checkpoint.shape(name) for name in checkpoint.names() if name != "embedding.weight"]
    if checkpoint.config.tied_head:
        shapes.append(checkpoint.shape("embedding.weight"))
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
