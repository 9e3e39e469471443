"""Every kind of quantised weights in GGUF is served as it lies: its authors' numbers, and the same bits everywhere."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.native.build import INSTRUCTIONS, available, missing_features
from kernels.native.decoder import NativeDecoder
from kernels.native.grids import taken_apart
from kernels.native.specification import SpecifiedDecoder, read_weights
from kernels.native.uncompiled import UncompiledDecoder
from tests.kernels.blocks import KINDS, WIDE, random_blocks, stored_as
from tests.kernels.test_native_step import BLOCKS, same_bits, step_of
from tests.kernels.tiny import write_tiny_gguf

PROMPT = [token % WIDE.vocabulary for token in range(5, 5 + 7 * 21, 7)]
TABLE = (3, 1)
compiled = pytest.mark.skipif(available() is not None, reason=str(available()))


def logits(decoder: NativeDecoder | SpecifiedDecoder | UncompiledDecoder | TorchDecoder) -> np.ndarray:
    return decoder.logits(step_of((PROMPT, 0, TABLE), samples=range(len(PROMPT))))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_what_their_authors_say(kind: str) -> None:
    rows = random_blocks(kind, 9, 512)
    expected = quants.dequantize(rows, Kind[kind])
    weights = np.array([read_weights(kind, rows).row(output) for output in range(9)])
    # theirs adds a minimum with a rounding of its own, and only there
    assert np.abs(weights - expected).max() <= 2e-7 * np.abs(expected).max()
    if taken_apart(kind, rows).minima is None:
        assert np.array_equal(weights, expected)


@compiled
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_step_is_the_specification_to_the_bit(tmp_path: Path, kind: str, instructions: str) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored_as(kind))
    expected = logits(SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS))
    assert np.isfinite(expected).all() and np.ptp(expected) > 0.1
    native = NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=2, instructions=instructions)
    assert same_bits(logits(native), expected)
    alone = [native.logits(step_of(([token], at, TABLE))) for at, token in enumerate(PROMPT)]
    assert same_bits(np.concatenate(alone), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler_too(tmp_path: Path, kind: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored_as(kind))
    expected = logits(SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS))
    assert same_bits(logits(UncompiledDecoder(open_checkpoint(path), blocks=BLOCKS, threads=1)), expected)


def every_exponent(outputs: int, inputs: int) -> np.ndarray:
    """MXFP4 blocks of the exponents 0, 1, 2, ..., 255 and of every nibble."""
    blocks = random_blocks("MXFP4", outputs, inputs).reshape(outputs, -1, 17)
    blocks[..., 0] = np.arange(blocks[..., 0].size).reshape(outputs, -1) % 256
    return blocks.reshape(outputs, -1)


def test_every_exponent_of_mxfp4_is_what_its_authors_say() -> None:
    rows = every_exponent(9, 1024)
    with np.errstate(over="ignore"):  # 12 * 2^127 is beyond float32
        weights = np.array([read_weights("MXFP4", rows).row(output) for output in range(9)])
        assert np.array_equal(weights, quants.dequantize(rows, Kind.MXFP4))


@compiled
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_no_exponent_of_mxfp4_changes_a_bit(tmp_path: Path, instructions: str) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    head = every_exponent(WIDE.vocabulary, WIDE.hidden).reshape(WIDE.vocabulary, -1, 17)
    head[..., 0] %= 240  # sums of larger weights leave the range of float32
    head[5, :, 0] = 0  # an output of numbers that are not normal
    stored = {"output.weight": (head.reshape(WIDE.vocabulary, -1), Kind.MXFP4)}
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored)
    expected = logits(SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS))
    assert np.isfinite(expected).all()
    assert 0 < np.abs(expected[:, 5]).max() < 1e-35
    native = NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=2, instructions=instructions)
    assert same_bits(logits(native), expected)
    assert same_bits(logits(UncompiledDecoder(open_checkpoint(path), blocks=BLOCKS, threads=1)), expected)


@compiled
@pytest.mark.parametrize("kind", ["MXFP4", "Q4_K", "Q6_K"])
def test_it_is_the_model_that_the_reference_computes(tmp_path: Path, kind: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored_as(kind))
    reference = logits(TorchDecoder(open_checkpoint(path), blocks=BLOCKS))
    found = logits(NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=2))
    error = np.sqrt(np.mean((found - reference) ** 2) / np.mean(reference**2))
    print(error)
    assert error < 0.03  # activations in int8


@compiled
def test_kinds_may_be_mixed_as_quantisers_mix_them(tmp_path: Path) -> None:
    finer = ("blk.0.attn_v.weight", "blk.0.ffn_down.weight", "token_embd.weight")
    stored = stored_as("Q4_K") | {name: stored_as("Q6_K")[name] for name in finer}
    stored["blk.0.attn_k.weight"] = stored_as("Q5_0")["blk.0.attn_k.weight"]
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored)
    expected = logits(SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS))
    assert same_bits(logits(NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=3)), expected)
    assert same_bits(logits(UncompiledDecoder(open_checkpoint(path), blocks=BLOCKS, threads=1)), expected)
