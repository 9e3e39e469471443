"""Bad input is refused before anything happens; the library compiles once; nothing is left behind."""

import asyncio
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kernels.checkpoint import Raw, open_checkpoint
from kernels.native import build as building
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder, StepInputs
from tests.kernels.tiny import Tiny, write_tiny_gguf

pytestmark = pytest.mark.skipif(building.available() is not None, reason=str(building.available()))

BLOCKS = 4


def int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


GOOD = StepInputs(
    tokens=int32(1, 2, 3),
    positions=int32(0, 1, 16),
    sequence_starts=int32(0, 2, 3),
    block_tables=int32(0, -1, 1, 2).reshape(2, 2),
    sample_rows=int32(1, 2),
    temperature=np.zeros(2, np.float32),
    top_k=int32(0, 0),
    top_p=np.ones(2, np.float32),
    min_p=np.zeros(2, np.float32),
    seeds=np.zeros(2, np.uint64),
)


BAD_INPUTS: list[tuple[dict[str, object], str]] = [
    ({"tokens": int32(1, 256, 3)}, "token 256 is outside the vocabulary of 256"),
    ({"tokens": int32(1, -1, 3)}, "token -1"),
    ({"positions": int32(0, 1, 1024)}, "position 1024 is outside the context of 1024"),
    ({"positions": int32(-1, 1, 16)}, "position -1"),
    ({"positions": int32(1, 1, 16)}, "ascending position order"),
    ({"positions": int32(0, 32, 16)}, "needs 3 blocks; its table has 2"),
    ({"positions": int32(0, 16, 16)}, "block id -1 is outside 0..3"),
    ({"block_tables": int32(4, -1, 1, 2).reshape(2, 2)}, "block id 4"),
    ({"block_tables": int32(0, 1, 2)}, "block_tables must have the shape"),
    ({"sequence_starts": int32(0, 2, 4)}, "sequence_starts"),
    ({"sequence_starts": int32(1, 2, 3)}, "sequence_starts"),
    ({"sequence_starts": int32(0, 4, 3)}, "sequence_starts"),
    ({"sequence_starts": int32()}, "sequence_starts"),
    ({"sample_rows": int32(1, 3)}, "sample_rows"),
    ({"sample_rows": int32(2, 1)}, "sample_rows"),
    ({"positions": int32(0, 1)}, "positions must have the shape"),
    ({"temperature": np.array([0, np.nan], np.float32)}, "sample 1"),
    ({"top_k": int32(-1, 0)}, "sample 0"),
    ({"tokens": np.array([1.5, 2, 3])}, "tokens must be int32"),
    ({"seeds": np.zeros(3, np.uint64)}, "seeds must have the shape"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf")


@pytest.fixture
def decoder(tiny: Path) -> NativeDecoder:
    return NativeDecoder(open_checkpoint(tiny), blocks=BLOCKS, threads=2)


@pytest.mark.parametrize("change,words", BAD_INPUTS)
def test_bad_inputs_are_refused_and_change_nothing(
    decoder: NativeDecoder, change: dict[str, object], words: str
) -> None:
    expected = decoder.logits(GOOD)
    with pytest.raises(ValueError, match=words):
        decoder.step(replace(GOOD, **change))
    assert (decoder.logits(GOOD) == expected).all()


def test_it_has_the_face_of_a_decoder(tiny: Path) -> None:
    decoder: Decoder = NativeDecoder.load(tiny.parent, kv_bytes=1 << 20)
    assert (decoder.vocabulary_size, decoder.context_length, decoder.block_size_tokens) == (256, 1024, 16)
    assert decoder.blocks == (1 << 20) // (2 * 2 * 2 * 16 * 2 * 16)  # K and V, layers, ...
    assert decoder.recipe == "int8-g32/1"


def test_a_kv_cache_too_small_for_one_block_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="raise kv_bytes"):
        NativeDecoder.load(tiny, kv_bytes=100)


def test_widths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(heads=4, head_dim=8), linear=Kind.F32)
    with pytest.raises(ValueError, match="head_dim is 8; the native step needs a multiple of 16"):
        NativeDecoder.load(path)


def test_a_closed_decoder_says_so(decoder: NativeDecoder) -> None:
    decoder.close()
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.step(GOOD)


def test_a_fork_is_told_to_load_its_own(decoder: NativeDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="after the fork"):
            decoder.step(GOOD)
    assert decoder.step(GOOD).shape == (2,)


def test_calls_from_several_threads_take_turns(decoder: NativeDecoder) -> None:
    expected = decoder.step(GOOD).tolist()
    found: list[list[int]] = []
    callers = [
        threading.Thread(target=lambda: found.extend(decoder.step(GOOD).tolist() for _ in range(20))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [expected] * 60


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="thread states are read from /proc")
async def test_the_helpers_of_an_idle_decoder_sleep_and_wake_again(tiny: Path) -> None:
    before = set(os.listdir("/proc/self/task"))
    decoder = NativeDecoder(open_checkpoint(tiny), blocks=BLOCKS, threads=3)
    helpers = set(os.listdir("/proc/self/task")) - before
    assert len(helpers) == 2
    expected = decoder.step(GOOD).tolist()

    def states() -> set[str]:
        stats = (Path(f"/proc/self/task/{helper}/stat").read_text() for helper in helpers)
        return {stat.rsplit(")", 1)[1].split()[0] for stat in stats}

    async with asyncio.timeout(20):
        while states() != {"S"}:
            await asyncio.sleep(0)
    assert decoder.step(GOOD).tolist() == expected


def test_the_library_is_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    compiled = []

    def compile_nothing(compiler: tuple[str, ...], flags: list[str], scratch: Path) -> Path:
        compiled.append(flags)
        (scratch / "step.so").write_bytes(b"library")
        return scratch / "step.so"

    monkeypatch.setattr(building, "_compile", compile_nothing)
    starts = [threading.Thread(target=building.build) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    library = building.build()
    assert len(compiled) == 1
    assert library.read_bytes() == b"library"
    assert library.is_relative_to(tmp_path / "native")
    assert sorted(path.name for path in library.parent.iterdir()) == ["lock", "step.so"]
    assert building.build("portable") != library or building.best_instructions() == "portable"


def test_without_a_compiler_the_reason_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(building, "_compiler", lambda: None)
    assert "pip install ziglang" in str(building.available())
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        building.build()


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(building, "_compiler", lambda: ("sh", "-c", "echo no such flag >&2; exit 1"))
    with pytest.raises(RuntimeError, match="no such flag"):
        building.build()
    assert not list(tmp_path.rglob("step.so"))


def test_unknown_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="avx2, portable"):
        building.build("abacus")
    monkeypatch.setenv("TOKENMILL_INSTRUCTIONS", "slide rule")
    with pytest.raises(ValueError, match="'slide rule'; there are amx, avx512"):
        building.build()


@pytest.mark.parametrize("best", building.INSTRUCTIONS)
def test_the_best_instructions_the_cpu_has_are_taken(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    monkeypatch.setattr(building, "_cpu_features", lambda: {"sse4_2", *building.INSTRUCTIONS[best]})
    assert building.best_instructions() == best


def test_a_cpu_with_half_of_a_set_gets_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_cpu_features", lambda: {*building.INSTRUCTIONS["amx"]} - {"avx512_vnni"})
    assert building.best_instructions() == "avx2"
    assert building.missing_features("amx") == {"avx512_vnni"}


def test_a_compiler_too_old_for_the_best_gets_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "c++"
    old.write_text('#!/bin/sh\ncase "$*" in *amx*) exit 1;; esac\n')
    old.chmod(0o755)
    monkeypatch.setattr(building, "_cpu_features", lambda: {*building.INSTRUCTIONS["amx"]})
    assert building._best_known_to((str(old),)) == "avx512"
    assert building._best_known_to(("false",)) == "avx2"
    assert building._best_known_to(("true",)) == "amx"


def test_the_environment_may_choose_what_the_cpu_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    compiled = []

    def compile_nothing(compiler: tuple[str, ...], flags: list[str], scratch: Path) -> Path:
        compiled.append([flag for flag in flags if flag.startswith("-m")])
        (scratch / "step.so").write_bytes(b"library")
        return scratch / "step.so"

    monkeypatch.setattr(building, "_compile", compile_nothing)
    monkeypatch.setattr(building, "_cpu_features", lambda: {*building.INSTRUCTIONS["avx512"]})
    building.build()
    for named in ("avx2", "portable"):
        monkeypatch.setenv("TOKENMILL_INSTRUCTIONS", named)
        building.build()
    vnni = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    assert compiled == [["-mavx2", "-mfma", "-mf16c", *vnni], ["-mavx2", "-mfma", "-mf16c"], []]
    monkeypatch.setenv("TOKENMILL_INSTRUCTIONS", "amx")
    with pytest.raises(RuntimeError, match="this CPU lacks amx_int8, amx_tile"):
        building.build()
    assert len(compiled) == 3


class Watched:
    """A checkpoint that converts every matrix, and counts how many of them are held at once."""

    def __init__(self, path: Path, broken: str = "") -> None:
        self._checkpoint = open_checkpoint(path)
        self.config, self.path = self._checkpoint.config, path
        self.names, self.shape, self.kind = self._checkpoint.names, self._checkpoint.shape, self._checkpoint.kind
        self._broken = broken
        self._made: list[weakref.ref[NDArray[np.uint8]]] = []
        self.most = 0

    def raw(self, name: str) -> Raw:
        if name == self._broken:
            raise OSError(f"{name}: the disk is gone")
        kind, rows = self._checkpoint.raw(name)
        if len(self.shape(name)) == 2:
            rows = rows.copy()
            self._made.append(weakref.ref(rows))
            self.most = max(self.most, sum(made() is not None for made in self._made))
        return Raw(kind, rows)

    def tensor(self, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(name)


def test_a_model_is_loaded_matrix_by_matrix(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    watched = Watched(path)
    decoder = NativeDecoder(watched, blocks=BLOCKS, threads=2)
    assert watched.most == 1
    expected = NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=2).step(GOOD)
    assert decoder.step(GOOD).tolist() == expected.tolist()


@pytest.mark.parametrize("broken", ["layers.1.mlp.down.weight", "layers.1.mlp_norm.weight"])
def test_a_tensor_that_cannot_be_read_is_what_the_caller_hears_of(tmp_path: Path, broken: str) -> None:
    with pytest.raises(OSError, match=f"{broken}: the disk is gone"):
        NativeDecoder(Watched(write_tiny_gguf(tmp_path / "model.gguf"), broken), blocks=BLOCKS, threads=2)
