"""A certificate says how far two checkpoints differ, how sure that is, and what it was measured on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploy import certify as certifying
from deploy.bench.departure import Departure
from deploy.certificate import Estimate, bootstrapped, compared
from deploy.certify import SHIPPED, TEXTS, CertifyFailed, certify, side_of, windows_of
from deploy.compress import compress
from gateway.tokenizer import Tokenizer
from tests.kernels.tiny import Tiny, write_tiny_folder
from tests.models import default_folder
from worker.compress.compressing import Recipe


def departure(seed: int, shift: float) -> Departure:
    """Of logits of eight positions, and the same moved by as much."""
    random = np.random.default_rng(seed)
    truth = random.standard_normal((8, 50)).astype(np.float32)
    found = Departure()
    found.add(truth, truth + random.standard_normal((8, 50)).astype(np.float32) * shift, np.arange(8, dtype=np.int32))
    return found


def test_an_interval_holds_the_truth_nineteen_times_of_twenty() -> None:
    random = np.random.default_rng(0)
    held = [estimate.low <= 3.0 <= estimate.high
            for estimate in (bootstrapped(random.normal(3.0, 1.0, 40)) for _ in range(300))]
    assert 0.9 < np.mean(held) < 0.98


def test_a_model_against_itself_differs_in_nothing() -> None:
    text = compared("same", "none", "", [departure(seed, 0.0) for seed in range(5)])
    assert text.kl == Estimate(0.0, 0.0, 0.0)
    assert text.perplexity_ratio == text.top1_agreement == Estimate(1.0, 1.0, 1.0)
    assert text.perplexity == text.baseline_perplexity


def test_figures_are_those_of_all_positions_and_come_again() -> None:
    windows = [departure(seed, 0.3) for seed in range(6)]
    text = compared("moved", "none", "", windows)
    whole = Departure()
    for window in windows:
        for name in ("same", "kl", "reference_nll", "other_nll"):
            getattr(whole, name).extend(getattr(window, name))
    figures = whole.figures()
    assert text.kl.value == pytest.approx(figures["kl_mean"])
    assert text.top1_agreement.value == pytest.approx(figures["top1_agreement"])
    assert text.perplexity == pytest.approx(figures["perplexity"])
    assert text.perplexity_ratio.value == pytest.approx(figures["perplexity_ratio"])
    for estimate in (text.kl, text.top1_agreement, text.perplexity_ratio):
        assert estimate.low < estimate.value < estimate.high
    assert text == compared("moved", "none", "", windows)


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="gives 3 windows; 4 are the least"):
        compared("short", "none", "", [departure(seed, 0.1) for seed in range(3)])
    with pytest.raises(ValueError, match=r"short has text for 1 to 255 positions, not for 256: choose other --tokens"):
        windows_of([1] * 300, 256, "short")


def test_shipped_texts_have_five_thousand_positions_each_and_a_licence() -> None:
    tokenizer = Tokenizer.load(default_folder())
    listed = (TEXTS / "README.md").read_text()
    for name in SHIPPED:
        assert len(windows_of(tokenizer.encode((TEXTS / name).read_text(), add_special=False), 5000, name)) == 20
        assert f"`{name}`" in listed


def small_model(folder: Path) -> Path:
    """A tiny random model that reads with the default model's tokenizer."""
    write_tiny_folder(folder, Tiny(vocabulary=49152))
    for name in ("tokenizer.json", "card.json"):
        shutil.copyfile(default_folder() / name, folder / name)
    return folder


def test_a_certificate_is_written_for_people_and_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certifying, "WINDOW", 64)
    text = tmp_path / "mine.txt"
    text.write_text((TEXTS / "prose.txt").read_text()[:3000])
    source, out = small_model(tmp_path / "source"), tmp_path / "out"
    compress(source, tmp_path / "eight", Recipe(bits=8), lambda *_: None)
    seen: list[tuple[int, int]] = []
    done = certify(tmp_path / "eight", source, out=out, tokens=250, text=text,
                   report=lambda at, total: seen.append((at, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    said = json.loads((out / "certificate.json").read_text())
    assert said == json.loads(certifying.encoded(done))
    (read,) = said["texts"]
    assert said["window_tokens"] == 64 and read["windows"] == 4 and read["positions"] == 4 * 63
    assert 0 < read["kl"]["low"] < read["kl"]["value"] < 0.1 and read["top1_agreement"]["value"] > 0.8
    assert set(said["model"]["kinds"]) == {"INT8", "BF16"} and set(said["baseline"]["kinds"]) == {"F32"}
    page = (out / "certificate.md").read_text()
    assert f"{read['perplexity']:.3f}" in page and read["blake2b"] in page and "itself is stored" not in page


def test_models_of_other_vocabularies_and_folders_without_a_card_are_one_sentence(tmp_path: Path) -> None:
    other = write_tiny_folder(tmp_path / "other")
    with pytest.raises(CertifyFailed):
        certify(other, default_folder(), out=tmp_path, tokens=100, text=None, report=lambda *_: None)
    card = json.loads((default_folder() / "card.json").read_text()) | {"vocabulary": "another"}
    (other / "card.json").write_text(json.dumps(card))
    with pytest.raises(CertifyFailed, match="different vocabularies"):
        certify(other, default_folder(), out=tmp_path, tokens=100, text=None, report=lambda *_: None)
    assert not (tmp_path / "certificate.json").exists()


def test_sizes_are_those_of_the_files() -> None:
    side = side_of(default_folder())
    assert side.weights == sum(side.kinds.values()) == 134_515_008
    assert side.bytes == (default_folder() / "model.gguf").stat().st_size
