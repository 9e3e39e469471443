"""The AVX-512 and AMX paths give the specification's bits: on a CPU that has them, and emulated on any with AVX2."""

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from kernels.checkpoint import open_checkpoint
from kernels.native import build as building
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from tests.kernels.blocks import WIDE, stored_as
from tests.kernels.test_native_step import BLOCKS, PROMPT, TABLE, same_bits, step_of, whole
from tests.kernels.tiny import Tiny, write_tiny_gguf

EMULATION = Path(__file__).parent / "emulated_avx512.hpp"
EMULATION_CHECK = EMULATION.with_name("emulation_check.cpp")
FEWEST_ROWS_FOR_TILES = 12
KINDS = [
    (Kind.Q4_1, Kind.Q8_0),
    (Kind.Q8_0, Kind.Q4_0),
    (Kind.Q4_0, Kind.BF16),
    (Kind.F32, Kind.F16),
]

pytestmark = [
    pytest.mark.skipif(building.available() is not None, reason=str(building.available())),
    pytest.mark.skipif(
        bool(building.missing_features("avx2")), reason="the emulation of AVX-512 needs a CPU with AVX2, FMA and F16C"
    ),
]

Load = Callable[..., NativeDecoder]


@pytest.fixture(scope="module")
def emulated() -> Load:
    """Opens a model on emulated AMX, or on emulated AVX-512 when `tiles` are denied."""
    # Unoptimised: compiling is what takes the time. The digest stands for the header in the library's fingerprint.
    flags = ("-mavx2", "-mfma", "-mf16c", "-O0", "-Wno-psabi", "-include", str(EMULATION))
    digest = hashlib.blake2b(EMULATION.read_bytes(), digest_size=8).hexdigest()

    def load(path: Path, tiles: bool = True, kv_format: str = "fp16", threads: int = 2) -> NativeDecoder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "_instruction_flags", lambda name: (*flags, f"-DEMULATION={digest}"))
            if not tiles:
                patch.setenv("MILL_TILES_DENIED", "1")
            decoder = NativeDecoder(
                open_checkpoint(path), blocks=BLOCKS, threads=threads, instructions="amx", kv_format=kv_format
            )
        assert decoder.instructions == ("amx" if tiles else "avx512")
        return decoder

    return load


def tile_products(decoder: NativeDecoder) -> int:
    """How many products of tiles the emulation has done so far."""
    function = decoder._library.mill_tile_products
    function.restype = ctypes.c_long
    return int(function())


def specified(path: Path, kv_format: str = "fp16") -> SpecifiedDecoder:
    return SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS, kv_format=kv_format)


@pytest.mark.parametrize("linear,head", KINDS)
def test_emulated_logits_are_the_specification_s_to_the_bit(
    tmp_path: Path, emulated: Load, linear: Kind, head: Kind
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(layers=1, tied_head=False), linear=linear, head=head)
    expected = whole(specified(path))
    for tiles in (True, False):
        decoder = emulated(path, tiles)
        before = tile_products(decoder)
        assert same_bits(whole(decoder), expected)
        assert (tile_products(decoder) > before) == (tiles and linear is not Kind.F32)


@pytest.mark.parametrize("kind", ["Q5_1", "MXFP4", "Q4_K", "Q5_K", "Q6_K"])
def test_kinds_that_tiles_do_not_know_are_left_to_vnni(tmp_path: Path, emulated: Load, kind: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored_as(kind))
    prompt = [token % WIDE.vocabulary for token in PROMPT[:20]]
    inputs = step_of((prompt, 0, TABLE), samples=range(len(prompt)))
    decoder = emulated(path)
    before = tile_products(decoder)
    assert same_bits(decoder.logits(inputs), specified(path).logits(inputs))
    assert tile_products(decoder) == before


@pytest.mark.parametrize("linear", [Kind.Q4_1, Kind.Q8_0])
def test_no_number_of_rows_changes_a_bit(tmp_path: Path, emulated: Load, linear: Kind) -> None:
    # 77 outputs: a last panel that is not full. 96 inputs: an odd number of groups.
    shape = Tiny(layers=1, hidden=96, heads=2, kv_heads=1, ffn=32, vocabulary=77)
    path = write_tiny_gguf(tmp_path / "model.gguf", shape, linear=linear, head=linear)
    prompt = np.random.default_rng(1).integers(0, 77, 40).tolist()
    expected = specified(path).logits(step_of((prompt, 0, TABLE), samples=range(40)))
    for tiles in (True, False):
        decoder = emulated(path, tiles, threads=1)
        for rows in range(1, 41):
            before = tile_products(decoder)
            found = decoder.logits(step_of((prompt[:rows], 0, TABLE), samples=range(rows)))
            assert same_bits(found, expected[:rows]), rows
            assert (tile_products(decoder) > before) == (tiles and rows >= FEWEST_ROWS_FOR_TILES)


@pytest.mark.parametrize("linear", [Kind.Q4_1, Kind.Q8_0])
def test_experts_are_the_specification_s_whether_tiles_take_their_rows_or_not(
    tmp_path: Path, emulated: Load, linear: Kind
) -> None:
    # of four experts two for each row: 15 to 25 of 40 rows for an expert, and they begin anywhere among the pairs
    shape = Tiny(family="qwen3moe", qk_norm=True, layers=1, experts=4, experts_per_token=2, expert_ffn=32)
    path = write_tiny_gguf(tmp_path / "model.gguf", shape, linear=linear)
    expected = whole(specified(path))
    for tiles in (True, False):
        assert same_bits(whole(emulated(path, tiles)), expected)


@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
def test_a_cache_in_bytes_is_the_specification_s_too(tmp_path: Path, emulated: Load, kv_format: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(layers=1, heads=3, kv_heads=1, head_dim=32, hidden=32, ffn=32))
    assert same_bits(whole(emulated(path, kv_format=kv_format)), whole(specified(path, kv_format)))


def test_every_thread_lays_out_tiles_and_the_same_token_is_drawn(tmp_path: Path, emulated: Load) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(layers=1))
    inputs = step_of((PROMPT, 0, TABLE), samples=range(len(PROMPT)), temperature=0.9, top_k=40, seed=5)
    expected = NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=1, instructions="portable").step(inputs)
    assert emulated(path, threads=3).step(inputs).tolist() == expected.tolist()


def test_the_real_instructions_compile_without_warnings(tmp_path: Path) -> None:
    compiler = building._compiler()
    assert compiler is not None
    flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", *building._instruction_flags("amx")]
    done = subprocess.run(
        [*compiler, *flags, "-c", str(building.SOURCES / "linear.cpp"), "-o", str(tmp_path / "linear.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not Path("/usr/include/simde/x86/avx512.h").exists(),
    reason="no second emulation here: apt-get install libsimde-dev",
)
def test_the_emulation_agrees_with_simde_s(tmp_path: Path) -> None:
    compiler = building._compiler()
    assert compiler is not None
    program = tmp_path / "check"
    flags = ["-std=c++20", "-O0", "-w", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c", "-include", str(EMULATION)]
    subprocess.run([*compiler, *flags, str(EMULATION_CHECK), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
