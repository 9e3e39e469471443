"""A torch decoder whose matrices stay in the four bits they are stored in: what it keeps, and what it computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch.testing import assert_close

from kernels import ops
from kernels.checkpoint import Raw, open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.matrix import FOUR_BITS, Stacked, four_bits, multiply, stacked
from kernels.native.grids import BLOCK_BYTES
from kernels.ops import REFERENCE
from kernels.weight4 import Weight4, dequantised
from tests.kernels.blocks import WIDE, random_blocks, stored_as
from tests.kernels.steps import generate, lay_out, step_inputs
from tests.kernels.tiny import Tiny, write_tiny_gguf

CPU = torch.device("cpu")
PROMPT = np.random.default_rng(3).integers(0, 256, 9).tolist()


def raw_of(folder: Path, kind: str, shape: Tiny) -> tuple[TorchDecoder, Path]:
    """A decoder in four bits of a model all of whose matrices are random blocks of a kind."""
    path = write_tiny_gguf(folder / f"{kind}.gguf", shape, stored=stored_as(kind, shape))
    return TorchDecoder.load(path, blocks=8, dtype=torch.float16, four_bits=True), path


@pytest.mark.parametrize("kind", [kind for kind in FOUR_BITS if kind in BLOCK_BYTES])
def test_a_stored_matrix_keeps_every_weight(tmp_path: Path, kind: str) -> None:
    decoder, path = raw_of(tmp_path, kind, WIDE)
    checkpoint = open_checkpoint(path)
    name = "layers.0.mlp.down.weight"
    weight = four_bits(checkpoint.raw(name), CPU)
    assert checkpoint.kind(name) == kind
    expected = checkpoint.tensor(name)
    # float32 rounds the sum of a product and a minimum, which the other does not
    assert_close(dequantised(weight).float(), expected, rtol=2e-7, atol=float(expected.abs().max()) * 2e-7)
    layer = decoder.layers[0]
    assert isinstance(layer.o, Weight4) and isinstance(layer.mlp.down, Weight4)
    assert layer.o.nbytes < WIDE.hidden * WIDE.hidden * 2 * 0.45


def test_logits_are_those_of_the_dense_decoder(tmp_path: Path) -> None:
    shape = Tiny(layers=2)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", shape, linear=Kind.Q4_1)
    logits = []
    for more in ({}, {"four_bits": True}, {"four_bits": True, "ops": ops.triton()}):
        decoder = TorchDecoder.load(path, blocks=8, dtype=torch.float16, **more)
        [part] = lay_out([PROMPT], 1, decoder)
        logits.append(decoder.logits(step_inputs([(part, len(PROMPT))], sample=[[0, 4, 8]])))
    spread = float(np.abs(logits[0]).max())
    np.testing.assert_allclose(logits[1], logits[0], atol=spread * 5e-3)
    np.testing.assert_allclose(logits[2], logits[1], atol=spread * 5e-3)


def test_matrices_of_different_kinds_stand_side_by_side(tmp_path: Path) -> None:
    """As Q4_K_M files have them: v in another kind than q and k."""
    shape, inputs = WIDE, WIDE.hidden
    kv = shape.kv_heads * shape.head_dim
    stored = stored_as("Q4_K", shape)
    for layer in range(shape.layers):
        stored[f"blk.{layer}.attn_v.weight"] = (random_blocks("Q6_K", kv, inputs, 7), Kind.Q6_K)
    path = write_tiny_gguf(tmp_path / "mixed.gguf", shape, stored=stored)
    decoder = TorchDecoder.load(path, blocks=8, dtype=torch.float16, four_bits=True)
    qkv = decoder.layers[0].qkv
    assert isinstance(qkv, Stacked)
    assert [type(part) for part in qkv.parts][-1] is torch.Tensor
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1)).half()
    checkpoint = open_checkpoint(path)
    dense = torch.cat([checkpoint.tensor(f"layers.0.attention.{part}.weight") for part in "qkv"])
    expected = (x.double() @ dense.double().T).half()
    assert_close(multiply(REFERENCE, x, qkv), expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("outputs", "parts"), [((64, 128, 70), 1), ((70, 64), 2)])
def test_parts_of_one_kind_are_one_where_they_fill_tiles(outputs: tuple[int, ...], parts: int) -> None:
    raws = [random_blocks("Q4_0", count, 64, seed) for seed, count in enumerate(outputs)]
    weights = [four_bits(Raw("Q4_0", rows), CPU) for rows in raws]
    matrix = stacked(weights)
    assert (len(matrix.parts) if isinstance(matrix, Stacked) else 1) == parts
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).half()
    apart = torch.cat([REFERENCE.linear4(x, weight) for weight in weights], 1)
    assert torch.equal(multiply(REFERENCE, x, matrix), apart)


def test_a_stream_is_the_same_again_and_says_so_in_its_recipe(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Tiny(), linear=Kind.Q4_0)
    chosen = []
    for _ in range(2):
        decoder = TorchDecoder.load(path, blocks=8, dtype=torch.bfloat16, four_bits=True)
        parts = lay_out([PROMPT], 4, decoder)
        generate(decoder, parts, 4)
        chosen.append(parts[0].chosen)
    assert chosen[0] == chosen[1] and len(chosen[0]) == 4
    assert decoder.recipe == "bfloat16-w4"


def test_activations_of_32_bits_and_ranks_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Tiny())
    with pytest.raises(ValueError, match=r"meet activations of 16 bits on one rank, not torch\.float32 on 1"):
        TorchDecoder.load(path, blocks=8, four_bits=True)
