"""A KV cache in int8 or fp8 keeps every promise of the fp16 one, in half the memory and close to its answers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.native.build import INSTRUCTIONS, available, missing_features
from kernels.native.decoder import RECIPE, NativeDecoder, block_bytes
from kernels.native.specification import SpecifiedDecoder, as_fp8, as_int8, spread
from tests.kernels.test_native_step import BLOCKS, PROMPT, TABLE, same_bits, step_of, whole
from tests.kernels.tiny import Tiny, write_tiny_gguf

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

BYTES = ["int8", "fp8"]
SHAPES = [
    Tiny(heads=6, kv_heads=2, head_dim=64, layers=1),
    Tiny(heads=5, kv_heads=1, head_dim=32, hidden=96, ffn=160),
    Tiny(heads=2, kv_heads=1, head_dim=48, hidden=32, ffn=32, layers=1),  # spread in three parts of 16
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf")


def opened(path: Path, kv_format: str, instructions: str | None = None, threads: int = 2) -> NativeDecoder:
    return NativeDecoder(
        open_checkpoint(path), blocks=BLOCKS, threads=threads, instructions=instructions, kv_format=kv_format
    )


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("kv_format", BYTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_specification_s_to_the_bit(
    tmp_path: Path, instructions: str, kv_format: str, shape: Tiny
) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    path = write_tiny_gguf(tmp_path / "model.gguf", shape)
    specified = SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS, kv_format=kv_format)
    assert same_bits(whole(opened(path, kv_format, instructions)), whole(specified))


@pytest.mark.parametrize("kv_format", BYTES)
@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_cut_nor_threads_change_a_bit(tiny: Path, kv_format: str, chunk: int, threads: int) -> None:
    expected = whole(opened(tiny, kv_format))
    decoder = opened(tiny, kv_format, threads=threads)
    parts = [
        decoder.logits(step_of((PROMPT[at : at + chunk], at, TABLE), samples=range(len(PROMPT[at : at + chunk]))))
        for at in range(0, len(PROMPT), chunk)
    ]
    assert same_bits(np.concatenate(parts), expected)


@pytest.mark.parametrize("kv_format", BYTES)
def test_what_a_block_held_before_and_neighbours_change_no_bit(tiny: Path, kv_format: str) -> None:
    expected = whole(opened(tiny, kv_format))
    decoder = opened(tiny, kv_format)
    for block in range(BLOCKS):
        decoder.write_block(block, np.full(decoder.block_bytes, 255, np.uint8))  # NaN wherever a number can be NaN
    others = [(PROMPT[::-1][:9], 0, (0,)), (PROMPT[3:30], 0, (1, 3))]
    found = decoder.logits(step_of(others[0], (PROMPT, 0, TABLE), others[1], samples=range(9, 9 + len(PROMPT))))
    assert same_bits(found, expected)


@pytest.mark.parametrize("kv_format", ["fp16", *BYTES])
def test_a_block_read_out_and_written_elsewhere_is_the_same_block(tiny: Path, kv_format: str) -> None:
    decoder, other = opened(tiny, kv_format), opened(tiny, kv_format, threads=1)
    whole(decoder)
    moved = (7, 0, 9)
    for source, target in zip(TABLE, moved, strict=True):
        data = np.empty(decoder.block_bytes, np.uint8)
        decoder.read_block(source, data)
        other.write_block(target, data)
    next_token = [(PROMPT[-1:], len(PROMPT), TABLE)], [(PROMPT[-1:], len(PROMPT), moved)]
    assert same_bits(decoder.logits(step_of(*next_token[0])), other.logits(step_of(*next_token[1])))


def test_blocks_of_another_size_and_of_a_closed_decoder_are_refused(tiny: Path) -> None:
    decoder = opened(tiny, "int8")
    with pytest.raises(ValueError):
        decoder.write_block(0, np.zeros(5, np.uint8))
    memory = np.empty(decoder.block_bytes, np.uint8)
    with pytest.raises(IndexError):
        decoder.read_block(BLOCKS, memory)
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.read_block(0, memory)


def test_each_format_is_a_recipe_and_has_its_price_in_memory(tiny: Path) -> None:
    config = open_checkpoint(tiny).config
    found = {kind: opened(tiny, kind) for kind in ("fp16", "int8", "fp8")}
    assert [decoder.recipe for decoder in found.values()] == [RECIPE, f"{RECIPE}+kv-int8", f"{RECIPE}+kv-fp8"]
    for kind, decoder in found.items():
        assert decoder.block_bytes == block_bytes(config, kind)
        assert decoder._library.mill_block_bytes(decoder._model) == decoder.block_bytes
    assert found["fp8"].block_bytes * 2 == found["fp16"].block_bytes
    assert NativeDecoder.load(tiny, kv_bytes=1 << 20, kv_format="fp8").blocks == (1 << 20) // found["fp8"].block_bytes
    with pytest.raises(ValueError, match="int8, fp8"):
        opened(tiny, "int4")


@pytest.mark.parametrize("kv_format", BYTES)
def test_the_answers_are_near_those_of_fp16(tiny: Path, kv_format: str) -> None:
    exact, found = whole(opened(tiny, "fp16")), whole(opened(tiny, kv_format))
    assert not same_bits(found, exact)
    error = np.abs(found - exact).mean() / np.abs(exact).mean()
    assert error < {"int8": 0.05, "fp8": 0.2}[kv_format], error


HEADS = st.integers(0, 2**32).map(
    lambda seed: (
        np.random.default_rng(seed).standard_normal((3, 48)) * 10.0 ** np.random.default_rng(seed).integers(-3, 3)
    ).astype(np.float32)
)


@settings(max_examples=100, deadline=None)
@given(HEADS)
def test_spreading_keeps_dot_products_and_lengths_up_to_a_power_of_two(heads: NDArray[np.float32]) -> None:
    queries, keys = spread(heads), spread(heads[::-1], is_key=True)
    assert np.allclose((queries * keys).sum(-1), (heads * heads[::-1]).sum(-1), rtol=1e-4, atol=1e-4 * (heads**2).sum())
    assert np.allclose((keys**2).sum(-1), (heads[::-1] ** 2).sum(-1), rtol=1e-4)  # w = 16: half of its stages each


@settings(max_examples=100, deadline=None)
@given(HEADS)
def test_a_stored_number_is_the_nearest_of_its_format(heads: NDArray[np.float32]) -> None:
    integers = as_int8(heads)
    numbers, steps = integers[:, :-1], integers[:, -1:]
    assert (np.abs(numbers) <= 127).all() and (np.abs(numbers).max(-1) == 127).all()
    assert (np.abs(numbers * steps - heads) <= 0.5001 * steps).all()
    eighth = as_fp8(heads)
    found = eighth[:, :-1] * eighth[:, -1:]
    known = np.array([sign * value for value in _every_fp8() for sign in (1, -1)], np.float32)
    nearest = np.abs(known - np.clip(heads, -448, 448)[..., None]).min(-1)
    assert np.isin(found, known).all()
    assert (np.abs(found - np.clip(heads, -448, 448)) == nearest).all()


def _every_fp8() -> list[float]:
    return [
        fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for fraction in range(8)
        if (exponent, fraction) != (15, 7)
    ]
