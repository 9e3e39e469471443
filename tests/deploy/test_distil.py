"""`tokenmill distil`: prompts that are split for good, and every mistake as one sentence."""

import json
from pathlib import Path

import pytest

from deploy import distil_prompts
from deploy.distil import DistilFailed, _layers, distil, folder_for, summary
from drafter.small_model import vocabulary_of
from gateway.model_files import load_card
from kernels.checkpoint import open_checkpoint
from kernels.native.build import available
from tests.deploy.test_cli import _run
from tests.models import default_folder


def test_what_held_out_prompts_speak_of_appears_in_no_other() -> None:
    training, held_out = distil_prompts.questions(3)
    assert len(set(training)) == len(training) > 1000
    apart = distil_prompts.THINGS[::distil_prompts.HELD_OUT_EVERY]
    assert all(any(thing in question for thing in apart) for question in held_out)
    assert not {question for question in training if any(f" {thing}" in question for thing in apart)}
    assert distil_prompts.questions(3) == (training, held_out) != distil_prompts.questions(4)


def test_prompts_of_ones_own_are_split_too() -> None:
    training, held_out = distil_prompts.split([str(number) for number in range(20)])
    assert held_out == ["0", "8", "16"]
    assert not set(training) & set(held_out) and len(training) == 17
    with pytest.raises(ValueError, match="at least 8"):
        distil_prompts.split(["a"])


def test_layers_are_a_number_or_a_list() -> None:
    assert _layers("4", 30) == (0, 1, 28, 29)
    assert _layers("0,5,29", 30) == (0, 5, 29)
    for wrong, why in (("31", "copy 1 to 30"), ("a", "no number and no list"), ("3,2", "must ascend"),
                       ("0,30", "within 0..29"), ("2,2", "must ascend")):
        with pytest.raises(ValueError, match=why):
            _layers(wrong, 30)


def test_a_wrong_option_is_one_sentence() -> None:
    result = _run("distil", "default", "--device", "abacus")
    assert result.exit_code == 1
    assert "choose cpu or cuda" in result.output


def test_a_mistake_in_what_was_asked_for_is_one_sentence(tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one\n\ntwo\n")
    for layers, file, why in (("99", None, "copy 1 to 30"), ("2", few, "2 prompts are too few")):
        with pytest.raises(DistilFailed, match=why):
            distil(default_folder(), tmp_path / "out", layers=layers, prompts_file=file, device="cpu",
                   report=lambda *_: None)


def test_without_a_word_a_drafter_goes_beside_the_models_and_not_into_the_folder_where_one_stands(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout has a package of the name that was the default once."""
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    assert folder_for(tmp_path / "models" / "a-model") == tmp_path / "drafters" / "a-model"


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_a_drafter_of_the_default_model_has_all_that_a_drafter_needs(tmp_path: Path) -> None:
    """Two layers, two texts, one step: not good, but whole."""
    target, out = default_folder(), tmp_path / "drafter"
    certificate = distil(target, out, layers="2", prompts_file=None, device="cpu", report=lambda *_: None,
                         vocabulary=256, texts=2, steps=1, batch=2, text_tokens=12)
    config = open_checkpoint(out).config
    assert (config.layers, config.head_size, config.vocabulary) == (2, 256, 49152)
    assert json.loads((out / "d2t.json").read_text()) == sorted(config.head_ids or ())
    assert vocabulary_of(out) == load_card(target).vocabulary
    assert (certificate.training_texts, certificate.steps) == (2, 1)
    lines = summary(certificate)
    assert any("256 ids" in line for line in lines) and any("temperature 1" in line for line in lines)
