"""Models from Hugging Face: only what is needed, from where it stopped, and a sentence for what cannot be served."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import download
from deploy import pull as pulling
from deploy.hub import File, HubRefused, needed
from deploy.models import look_at
from tests.deploy.fake_hub import FakeHub, serving
from tests.kernels.tiny import Tiny, write_tiny_folder
from tests.models import default_folder

REPOSITORY = "somebody/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    shape = Tiny(vocabulary=49152, hidden=32, heads=2, kv_heads=1, ffn=32, layers=1)
    folder = write_tiny_folder(tmp_path / "tiny", shape)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["tokenizer.json"] = (default_folder() / "tokenizer.json").read_bytes()
    files |= {"pytorch_model.bin": b"a pickle", "README.md": b"a card", "consolidated.safetensors": b"as large"}
    with serving(FakeHub(REPOSITORY, files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_a_model_is_pulled_with_the_needed_files_only_and_is_told_how_far_it_is(cache: Path, hub: FakeHub) -> None:
    seen: list[tuple[int, int]] = []
    folder = pulling.pull(REPOSITORY, lambda what, done, total: seen.append((done, total)))
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors", "tokenizer.json"]
    total = sum(len(hub.files[name]) for name in hub.fetched())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    model = look_at(folder)
    assert (model.name, model.family, model.precision, model.problem) == (REPOSITORY, "llama", "F32", "")


def test_a_download_that_broke_off_goes_on_where_it_stopped(
    cache: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    hub.breaks_at = 3_000_000
    with pytest.raises(pulling.PullFailed, match="the same command goes on from there"):
        pulling.pull(REPOSITORY)
    hub.breaks_at = None
    before = len(hub.asked)
    folder = pulling.pull(REPOSITORY)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert hub.asked[before:] == [("config.json", ""), ("model.safetensors", "bytes=3000000-")]


def test_a_file_that_changed_at_its_source_is_begun_anew(
    cache: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    hub.breaks_at = 3_000_000
    with pytest.raises(pulling.PullFailed):
        pulling.pull(REPOSITORY)
    hub.breaks_at = None
    other = bytearray(hub.files["model.safetensors"])
    other[-4:] = b"\0\0\0\0"
    hub.files["model.safetensors"] = bytes(other)
    folder = pulling.pull(REPOSITORY)
    assert (folder / "model.safetensors").read_bytes() == bytes(other)
    assert not list(folder.glob("*.part*"))


def test_a_pulled_model_is_used_where_the_hub_cannot_be_asked(
    cache: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pulling.pull(REPOSITORY)
    asked = len(hub.asked)
    assert pulling.pull(REPOSITORY) == folder
    assert len(hub.asked) == asked
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pulling.pull(REPOSITORY) == folder


def test_a_new_revision_replaces_files_of_the_same_size(cache: Path, hub: FakeHub) -> None:
    pulling.pull(REPOSITORY)
    hub.commit = "f" * 40
    other = bytearray(hub.files["model.safetensors"])
    other[-4:] = b"\0\0\0\0"
    hub.files["model.safetensors"] = bytes(other)
    hub.sums["tokenizer.json"] = hashlib.sha256(hub.files["tokenizer.json"]).hexdigest()
    before = len(hub.asked)
    folder = pulling.pull(REPOSITORY)
    assert (folder / "model.safetensors").read_bytes() == bytes(other)
    assert {name for name, _ in hub.asked[before:]} == {"config.json", "model.safetensors"}


def test_a_file_with_another_sum_is_not_kept(cache: Path, hub: FakeHub) -> None:
    hub.sums["model.safetensors"] = "0" * 64
    with pytest.raises(pulling.PullFailed, match="another SHA-256"):
        pulling.pull(REPOSITORY)
    assert not list(cache.rglob("model.safetensors*"))


def test_a_family_that_cannot_be_served_is_refused_before_its_weights_come(cache: Path, hub: FakeHub) -> None:
    hub.files["config.json"] = hub.files["config.json"].replace(b'"llama"', b'"falcon"')
    with pytest.raises(pulling.PullFailed, match=f"{REPOSITORY} cannot be served: .*'falcon'; supported in"):
        pulling.pull(REPOSITORY)
    assert hub.fetched() == ["config.json"]
    assert not list((cache / "models").iterdir())


def test_an_unknown_repository_is_one_sentence(cache: Path, hub: FakeHub) -> None:
    with pytest.raises(pulling.PullFailed, match="Hugging Face knows no model 'somebody/else'"):
        pulling.pull("somebody/else")
    assert not list(cache.rglob("*--else*"))


def test_no_network_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(pulling.PullFailed, match="could not ask Hugging Face for 'somebody/tiny'"):
        pulling.pull(REPOSITORY)


def test_one_of_several_gguf_files_is_named_behind_a_colon(cache: Path, hub: FakeHub, tmp_path: Path) -> None:
    content = default_folder().joinpath("model.gguf").read_bytes()[:1000]
    hub.files = {"tiny-Q4_K_M.gguf": content, "tiny-Q8_0.gguf": content}
    with pytest.raises(pulling.PullFailed, match=r"name one, as in somebody/tiny:Q4_K_M; there are Q4_K_M, Q8_0"):
        pulling.pull(REPOSITORY)
    with pytest.raises(pulling.PullFailed, match=r"damaged near byte .*download it again"):
        pulling.pull(f"{REPOSITORY}:q8_0")
    assert hub.fetched() == ["tiny-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("names", "which", "said"),
    [
        (["pytorch_model.bin", "config.json"], "", "pickles only"),
        (["adapter.safetensors"], "", "no config.json"),
        (["README.md"], "", "neither safetensors nor GGUF"),
        (["a-Q4_0.gguf"], "Q8_0", "no GGUF files that end in 'Q8_0'; there are Q4_0"),
        (["a-Q4_0-00001-of-00002.gguf"], "a-Q4_0-00001-of-00002.gguf", "one part of a split GGUF"),
    ],
)
def test_what_holds_no_model_says_what_it_holds(names: list[str], which: str, said: str) -> None:
    with pytest.raises(HubRefused, match=said):
        needed("somebody/else", [File(name, 1) for name in names], which)


def test_shards_are_taken_with_their_index_and_nothing_beside_them() -> None:
    names = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
             "model-00002-of-00002.safetensors", "consolidated.safetensors", "original/consolidated.00.pth", "LICENSE"]
    taken = [file.name for file in needed("somebody/else", [File(name, 1) for name in names])]
    assert taken == ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                     "model-00002-of-00002.safetensors"]


def test_a_gguf_repository_of_one_file_needs_no_name() -> None:
    taken = needed("somebody/else", [File("model-q8_0.gguf", 1), File("config.json", 1)])
    assert [file.name for file in taken] == ["model-q8_0.gguf"]
