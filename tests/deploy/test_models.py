"""What lies in the cache is told as it is: what it takes, whether it can be served, and if not, what would help."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy import cli, models
from deploy import pull as pulling
from deploy.models import BASE_MIB, GIB, KV_MIB, RANK_MIB, look_at, memory_needed, shelf, too_large
from kernels.checkpoint import GgufCheckpoint, SafetensorsCheckpoint, open_checkpoint
from tests.kernels.tiny import write_tiny_folder
from tests.models import default_folder, default_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_model_is_told_with_its_size_and_precision() -> None:
    model = look_at(default_folder())
    assert model.problem == ""
    assert (model.family, model.precision, model.context_length) == ("llama", "Q4_1, embedding Q8_0", 8192)
    assert model.parameters == 134_515_008
    # the panels of Q4_1 and Q8_0 hold the blocks of the file and nothing else
    assert abs(model.memory_bytes - (KV_MIB + BASE_MIB << 20) - default_model().stat().st_size) < 4 << 20


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    needed = memory_needed(open_checkpoint(default_folder()))
    assert look_at(default_folder(), available_bytes=needed).problem == ""
    assert "needs about 0.5 GiB and 0.3 GiB are free here: take a smaller quantisation" in look_at(
        default_folder(), available_bytes=GIB // 3
    ).problem
    assert "for each of 3 workers" in too_large(needed, 2 * needed, workers=3)
    assert "fewer workers" in too_large(needed, 2 * needed, workers=3)


def test_no_weight_is_read_to_tell_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (SafetensorsCheckpoint, GgufCheckpoint):
        monkeypatch.setattr(kind, "raw", lambda self, name: pytest.fail(f"{name} was read"))
    assert look_at(default_folder()).precision == "Q4_1, embedding Q8_0"
    whole = open_checkpoint(write_tiny_folder(tmp_path / "tiny"))
    assert memory_needed(whole) - (KV_MIB + BASE_MIB << 20) == 4 * sum(
        math.prod(whole.shape(name)) for name in whole.names()
    )


def test_ranks_hold_each_weight_once_but_for_embedding_and_norms(tmp_path: Path) -> None:
    whole = open_checkpoint(write_tiny_folder(tmp_path / "tiny"))
    sizes = {name: math.prod(whole.shape(name)) for name in whole.names()}
    everywhere = sum(size for name, size in sizes.items() if "norm" in name or "embedding" in name)
    head = sizes["embedding.weight"]  # tied, so that ranks have rows of it once more
    expected = 4 * (sum(sizes.values()) + everywhere + head)
    assert memory_needed(whole, ranks=2) - (KV_MIB + 2 * RANK_MIB << 20) == expected


def test_a_model_that_cannot_be_shared_so_is_not_brought_up() -> None:
    result = CliRunner().invoke(cli.app, ["up", "--engine", "cpu", "--tensor-parallel", "4"])
    assert result.exit_code == 1
    assert "4 ranks cannot share 9 query heads on 3 KV heads evenly: choose --tensor-parallel 1 or 2 or 3 or 9" in (
        " ".join(result.stderr.split()))


def test_every_folder_is_listed_and_an_incomplete_one_says_what_it_lacks(cache: Path, tmp_path: Path) -> None:
    assert shelf() == []
    pulling.pull(str(default_model()))
    folder = write_tiny_folder(cache / "models" / "cut-short")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_bytes((default_folder() / "tokenizer.json").read_bytes())
    from gateway import model_files

    model_files.prepare(folder, folder)
    (cache / "models" / "empty").mkdir()
    first, second, third = shelf()
    assert (first.name, second.name) == ("cut-short", "empty")
    assert "lacks model-00001-of-00002.safetensors, model-00002-of-00002.safetensors; download" in first.problem
    assert "has no card.json of this version: run `tokenmill pull" in second.problem
    assert third.problem == ""


def test_a_mesh_that_does_not_fit_is_not_brought_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_memory", lambda: GIB)
    result = CliRunner().invoke(cli.app, ["up", "--engine", "cpu", "--workers", "3"])
    assert result.exit_code == 1
    assert "smollm2-135m-instruct needs about 0.5 GiB for each of 3 workers and 1.0 GiB are free here" in result.stderr


def test_the_command_lists_them_for_people_and_programs(cache: Path) -> None:
    pulling.pull(str(default_model()))
    (listed,) = json.loads(CliRunner().invoke(cli.app, ["models", "--json"]).stdout)
    assert listed["precision"] == "Q4_1, embedding Q8_0"
    shown = CliRunner().invoke(cli.app, ["models"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    assert "135M" in shown and "can be served" in shown and "qwen3" in shown
