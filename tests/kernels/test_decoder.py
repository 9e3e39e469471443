"""The torch decoder against a dense forward pass written out here, and against itself cut into other steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from kernels import ops
from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.step import Decoder
from shared import noise
from tests.kernels.steps import Paged, generate, lay_out, step_inputs
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf

torch.set_num_threads(1)

PROMPT = np.random.default_rng(1).integers(0, 256, 300).tolist()
OTHER = np.random.default_rng(2).integers(0, 256, 70).tolist()
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("decoder") / "tiny.gguf")


@pytest.fixture
def decoder(tiny: Path) -> TorchDecoder:
    """With caches full of NaN: whatever reads what nobody wrote is found out."""
    return poisoned(TorchDecoder.load(tiny, blocks=100))


def poisoned(decoder: TorchDecoder) -> TorchDecoder:
    decoder.keys.fill_(torch.nan)
    decoder.values.fill_(torch.nan)
    return decoder


def dense(checkpoint: Checkpoint, tokens: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one prompt in float64, without cache, blocks or batch."""
    config = checkpoint.config
    weight = {name: checkpoint.tensor(name).double() for name in [*checkpoint.names(), "head.weight"]}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.norm_eps) * weight[name]

    def turn(x: Tensor) -> Tensor:
        angles = torch.arange(len(tokens), dtype=torch.float64)[:, None] * torch.tensor(config.rope_frequencies())
        spin = torch.polar(torch.ones_like(angles), angles)[:, None]  # [tokens, 1, pairs]
        if config.rope_interleaved:
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * spin).flatten(-2)
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * spin
        return torch.cat((turned.real, turned.imag), -1)

    x = weight["embedding.weight"][tokens]
    unseen = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for layer in range(config.layers):
        own = f"layers.{layer}."
        normed = norm(x, own + "attention_norm.weight")
        q, k, v = (
            (normed @ weight[f"{own}attention.{part}.weight"].T).unflatten(-1, (-1, config.head_dim)) for part in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (part.repeat_interleave(config.heads_per_kv_head, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)
        x = x + attended.flatten(1) @ weight[own + "attention.o.weight"].T
        normed = norm(x, own + "mlp_norm.weight")
        gated = torch.nn.functional.silu(normed @ weight[own + "mlp.gate.weight"].T)
        x = x + (gated * (normed @ weight[own + "mlp.up.weight"].T)) @ weight[own + "mlp.down.weight"].T
    return norm(x, "norm.weight") @ weight["head.weight"].T


def all_logits(decoder: TorchDecoder, part: Paged, chunk: int) -> Tensor:
    """Logits after every token of a sequence, run in chunks."""
    pieces = []
    while part.done < len(part.tokens):
        rows = min(chunk, len(part.tokens) - part.done)
        pieces.append(torch.from_numpy(decoder.logits(step_inputs([(part, rows)], [range(rows)]))))
        part.done += rows
    return torch.cat(pieces)


def test_decoder_has_the_face_of_every_decoder(decoder: TorchDecoder):
    face: Decoder = decoder
    assert (face.vocabulary_size, face.context_length, face.block_size_tokens, face.blocks) == (256, 1024, 16, 100)
    assert face.recipe == "float32"


@pytest.mark.parametrize(
    "shape",
    [
        Tiny(),
        Tiny(heads=6, kv_heads=1, head_dim=32, tied_head=False, seed=1),
        Tiny(layers=1, heads=2, kv_heads=2, head_dim=64, rope_base=500.0, norm_eps=1e-2, seed=2),
    ],
)
def test_logits_are_those_of_a_dense_forward_pass(tmp_path: Path, shape: Tiny):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", shape)
    decoder = poisoned(TorchDecoder.load(path, blocks=40))
    (part,) = lay_out([PROMPT], 0, decoder)
    expected = dense(open_checkpoint(path), PROMPT).float()
    torch.testing.assert_close(all_logits(decoder, part, 300), expected, **CLOSE)
    assert expected.std() > 0.5  # the model says something


@pytest.mark.parametrize("chunk", [1, 16, 37, 256])
def test_chunking_changes_no_logit(decoder: TorchDecoder, tiny: Path, chunk: int):
    tokens = PROMPT[:40] if chunk == 1 else PROMPT
    (part,) = lay_out([tokens], 0, decoder)
    torch.testing.assert_close(all_logits(decoder, part, chunk), dense(open_checkpoint(tiny), tokens).float(), **CLOSE)


def test_prefill_decode_and_verification_mix_in_one_step(decoder: TorchDecoder, tiny: Path):
    prefilling, decoding, verifying = parts = lay_out([PROMPT, OTHER, OTHER[::-1]], 0, decoder)
    for part, done in ((prefilling, 100), (decoding, 69), (verifying, 60)):
        decoder.step(step_inputs([(Paged(part.tokens[:done], part.blocks), done)]))
        part.done = done
    logits = decoder.logits(step_inputs([(prefilling, 150), (decoding, 1), (verifying, 5)], [[], [0], range(5)]))
    expected = [dense(open_checkpoint(tiny), part.tokens).float() for part in parts]
    torch.testing.assert_close(torch.from_numpy(logits[0]), expected[1][69], **CLOSE)
    torch.testing.assert_close(torch.from_numpy(logits[1:]), expected[2][60:65], **CLOSE)
    rest = decoder.logits(step_inputs([(Paged(PROMPT, prefilling.blocks, done=250), 50)]))
    torch.testing.assert_close(torch.from_numpy(rest[0]), expected[0][-1], **CLOSE)


def test_sequences_may_share_the_blocks_of_a_common_prefix(decoder: TorchDecoder, tiny: Path):
    common = PROMPT[:48]
    first, second = common + OTHER[:30], common + OTHER[30:45]
    (donor,) = lay_out([first], 0, decoder)
    all_logits(decoder, donor, 64)
    heir = Paged(second, [*donor.blocks[:3], 98 if 98 not in donor.blocks else 97], done=48)
    logits = all_logits(decoder, heir, 64)
    torch.testing.assert_close(logits, dense(open_checkpoint(tiny), second).float()[48:], **CLOSE)


def test_freed_blocks_may_hold_anything(decoder: TorchDecoder, tiny: Path):
    (part,) = lay_out([PROMPT], 0, decoder)
    all_logits(decoder, part, 300)
    heir = Paged(OTHER, part.blocks[::-1])
    torch.testing.assert_close(all_logits(decoder, heir, 300), dense(open_checkpoint(tiny), OTHER).float(), **CLOSE)


def test_a_step_may_want_no_token(decoder: TorchDecoder):
    (part,) = lay_out([OTHER], 0, decoder)
    assert decoder.step(step_inputs([(part, 20)], [[]])).tolist() == []


def test_sampled_tokens_are_chosen_by_the_keyed_noise(decoder: TorchDecoder):
    settings = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (2.0, 50, 0.9, 0.02)]
    parts = lay_out([OTHER[: 10 + 3 * i] for i in range(5)], 0, decoder)
    for number, (part, values) in enumerate(zip(parts, settings, strict=True)):
        part.temperature, part.top_k, part.top_p, part.min_p = values
        part.seed = 2**64 - 1 - number
    inputs = step_inputs([(part, len(part.tokens)) for part in parts])
    tokens, logits = decoder.step(inputs), decoder.logits(inputs)
    for token, row, part, values in zip(tokens, logits, parts, settings, strict=True):
        assert token == noise.choose(row, part.seed, len(part.tokens), *values)
    assert tokens.dtype == np.int32


def test_a_drafted_token_is_verified_as_it_would_have_been_sampled(decoder: TorchDecoder):
    (plain,) = lay_out([OTHER], 8, decoder)
    plain.temperature, plain.seed = 1.0, 7
    generate(decoder, [plain], 8)
    (verified,) = lay_out([OTHER], 8, decoder, shuffle_seed=5)
    verified.tokens += plain.chosen[:7]
    verified.temperature, verified.seed = 1.0, 7
    chosen = decoder.step(step_inputs([(verified, 77)], [range(69, 77)]))
    assert chosen.tolist() == plain.chosen


def test_both_formats_of_one_model_give_the_same_logits(tmp_path: Path):
    shape = Tiny(tied_head=False)
    as_gguf = TorchDecoder.load(
        write_tiny_gguf(tmp_path / "tiny.gguf", shape, linear=Kind.F32, head=Kind.F32), blocks=20
    )
    as_folder = TorchDecoder.load(write_tiny_folder(tmp_path / "folder", shape), blocks=20)
    assert as_gguf.config.rope_interleaved and not as_folder.config.rope_interleaved
    logits = [all_logits(decoder, Paged(OTHER, list(range(5))), 100) for decoder in (as_gguf, as_folder)]
    torch.testing.assert_close(*logits, **CLOSE)
    torch.testing.assert_close(logits[1], dense(open_checkpoint(tmp_path / "folder"), OTHER).float(), **CLOSE)


def test_blocks_follow_from_the_bytes_for_them(tiny: Path):
    # 2 tensors x 2 layers x 2 heads x 16 elements x 4 bytes x 16 tokens = 8192 bytes a block
    assert TorchDecoder.load(tiny, kv_bytes=8192 * 7 + 8191).blocks == 7
    assert TorchDecoder.load(tiny, kv_bytes=8192 * 7, block_size_tokens=8).blocks == 14
    with pytest.raises(ValueError, match="takes 8192"):
        TorchDecoder.load(tiny, kv_bytes=8191)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("tokens", [1, 2, 256], "token id"),
        ("tokens", [1, 2, -1], "token id"),
        ("positions", [0, 1, 1024], "context of 1024"),
        ("positions", [0, 1, 16], "too short"),
        ("sequence_starts", [0, 2], "sequence starts"),
        ("sequence_starts", [0, 3, 3], "sequence starts"),
        ("sample_rows", [3], "sample rows"),
        ("sample_rows", [0, 2], "sample rows"),
        ("block_tables", [[100]], "block that is needed"),
        ("block_tables", [[-1]], "block that is needed"),
    ],
)
def test_a_malformed_step_is_refused_and_writes_nothing(
    decoder: TorchDecoder, name: str, value: list[int], reason: str
):
    inputs = step_inputs([(Paged([1, 2, 3], [0]), 3)])
    setattr(inputs, name, np.array(value, np.int32))
    with pytest.raises(ValueError, match=reason):
        decoder.step(inputs)
    assert torch.isnan(decoder.keys).all()


def test_the_same_decoder_runs_over_the_triton_kernels(decoder: TorchDecoder, tiny: Path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton = poisoned(TorchDecoder.load(tiny, blocks=10, block_size_tokens=4, device=device, ops=ops.triton()))
    assert triton.recipe == "float32-triton"
    parts = [Paged(OTHER[:5], [3, 1], temperature=1.0, seed=99), Paged(OTHER[5:8], [7])]
    inputs = step_inputs([(parts[0], 5), (parts[1], 3)], [[4], [0, 2]])
    np.testing.assert_allclose(triton.logits(inputs), decoder.logits(inputs), rtol=1e-4, atol=1e-4)
    assert triton.step(inputs).tolist() == decoder.step(inputs).tolist()


def test_table_of_a_cpu_is_the_reference_and_chosen_once():
    assert ops.table("cpu") is ops.REFERENCE
    assert ops.table("cpu") is ops.table("cpu")
