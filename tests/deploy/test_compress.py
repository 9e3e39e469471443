"""`tokenmill compress`: a folder that can be served, and every mistake as one sentence."""

import json
from pathlib import Path

import pytest

from gateway.model_files import load_card, load_tokenizer
from kernels.checkpoint import open_checkpoint
from tests.deploy.test_cli import _run
from tests.models import default_folder


@pytest.mark.slow
def test_the_default_model_in_four_bits_is_58_percent_smaller_and_speaks_the_same_words(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run("compress", str(default_folder()), "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["bytes"] / (done["weights"] * 2) == pytest.approx(0.421, abs=0.001)
    assert done == json.loads((out / "compression.json").read_text())
    assert open_checkpoint(out).kind("layers.29.mlp.down.weight") == "INT4_G64"
    was, now = load_card(default_folder()), load_card(out)
    same = ("vocabulary", "stop_token_ids", "bos_token_id", "eos_token_id", "add_bos", "chat_template")
    assert [getattr(was, key) for key in same] == [getattr(now, key) for key in same]
    text = "Rain fell on 3 roofs."
    assert load_tokenizer(out).encode(text).ids == load_tokenizer(default_folder()).encode(text).ids


@pytest.mark.parametrize(("options", "why"), [
    (("--recipe", "magic"), "recipe 'magic' is unknown: choose rtn"),
    (("--bits", "5"), "5 bits in groups of 64 cannot be written"),
    (("--group", "128"), "576 inputs are no whole groups of 128: choose 32 or 64"),
])  # fmt: skip
def test_a_wrong_option_is_one_sentence(tmp_path: Path, options: tuple[str, ...], why: str) -> None:
    result = _run("compress", str(default_folder()), "--out", str(tmp_path / "out"), *options)
    assert result.exit_code == 1
    assert why in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = _run("compress", str(default_folder()), "--out", str(tmp_path))
    assert result.exit_code == 1 and "choose an empty folder" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
