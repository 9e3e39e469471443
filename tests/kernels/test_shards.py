"""Ranks that share a model make the numbers that one makes alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.config import DecoderConfig, Experts
from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder, block_bytes
from kernels.native.grids import SUPER_KINDS
from kernels.ranks import RankLost, Ranks
from kernels.shards import Shard, cuts, shard_config
from kernels.step import Logprobs, StepInputs
from tests.kernels.blocks import KINDS, WIDE, stored_as
from tests.kernels.families import FAMILIES
from tests.kernels.steps import mixed_sampling
from tests.kernels.test_native_step import same_bits, step_of
from tests.kernels.thread_ranks import together
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf

BLOCKS = 12
TABLE = (7, 2, 11, 0, 5, 9, 1)
PROMPT = np.random.default_rng(3).integers(0, 256, 70).tolist()
UNEVEN = Tiny(hidden=96, heads=6, kv_heads=3, ffn=160, vocabulary=250, seed=2)
# K kinds have blocks of 256 inputs
WIDE_UNEVEN = replace(WIDE, heads=12, kv_heads=3, vocabulary=250)
needs_compiler = pytest.mark.skipif(available() is not None, reason=str(available()))


def config(**sizes: int) -> DecoderConfig:
    shape = {"layers": 1, "hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 512, "vocabulary": 1000}
    return DecoderConfig(**(shape | sizes), context_length=64, norm_eps=1e-5, rope_base=1e4, rotary_dim=32,
                         rope_interleaved=False, tied_head=True)  # fmt: skip


def in_pieces(decoder: NativeDecoder) -> NDArray[np.float32]:
    """The logits of every row of PROMPT, run as 3, 66 and 1 rows."""
    found, start = [], 0
    for length in (3, 66, 1):
        rows = PROMPT[start : start + length]
        found.append(decoder.logits(step_of((rows, start, TABLE), samples=range(length))))
        start += length
    return np.concatenate(found)


@pytest.mark.parametrize("heads,kv_heads,ranks", [(8, 4, 2), (8, 4, 4), (8, 4, 3), (8, 4, 8), (9, 3, 2), (8, 1, 4)])
def test_every_output_belongs_to_one_rank_and_every_query_head_stands_with_its_kv_head(
    heads: int, kv_heads: int, ranks: int
) -> None:
    whole = config(heads=heads, kv_heads=kv_heads)
    shared = cuts(whole, ranks)
    for cut, count in ((shared.attention, heads * 32), (shared.hidden, 256), (shared.ffn, 512), (shared.head, 1000)):
        assert cut.starts[0] == 0
        assert cut.whole == count
        assert min(cut.widths) > 0
    for rank in range(ranks):
        own = shard_config(whole, rank, ranks)
        first = shared.attention.starts[rank] // 32
        assert own.heads * 32 == shared.attention.widths[rank]
        for head in range(own.heads):
            reads = shared.kv_heads[rank].start + head // own.heads_per_kv_head
            assert reads == (first + head) // whole.heads_per_kv_head


def test_a_model_that_cannot_be_shared_so_is_refused_with_what_can() -> None:
    with pytest.raises(ValueError, match=r"5 ranks cannot share 8 query heads on 4 KV heads evenly.* or 3 or 4 or 8"):
        cuts(config(), 5)
    with pytest.raises(ValueError, match="1 rank or more, not 0"):
        cuts(config(), 0)
    with pytest.raises(ValueError, match="trimmed head"):
        cuts(DecoderConfig(1, 64, 4, 2, 16, 128, 256, 64, 1e-5, 1e4, 16, False, False, head_ids=(1, 2)), 2)
    with pytest.raises(ValueError, match="mixture of experts"):
        cuts(replace(config(), experts=Experts(8, 2, 64, normalised=True)), 2)


def test_shards_hold_every_row_of_the_weights_they_share(tmp_path: Path) -> None:
    whole = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf", UNEVEN))
    parts = [Shard(whole, rank, 2) for rank in range(2)]
    inside = ("attention.q", "attention.v", "attention.o", "mlp.up", "mlp.down")
    for name in (*(f"layers.1.{part}.weight" for part in inside), "head.weight"):
        kinds, rows = zip(*(part.raw(name) for part in parts), strict=True)
        assert set(kinds) == {whole.kind(name)}
        assert (np.concatenate(rows) == whole.raw(name).rows).all()
        assert [part.shape(name)[0] for part in parts] == [len(each) for each in rows]
        assert (np.concatenate([part.tensor(name) for part in parts]) == whole.tensor(name).numpy()).all()
    for name in ("embedding.weight", "norm.weight", "layers.0.mlp_norm.weight"):
        assert (parts[1].raw(name).rows == whole.raw(name).rows).all()


@needs_compiler
@pytest.mark.parametrize(
    "family,size",
    [("llama", 2), ("llama_biased", 2), ("mistral", 2), ("qwen2", 4), ("qwen3", 2), ("nemotron", 2),
     ("nemotron_biased", 4)],
)  # fmt: skip
def test_ranks_make_the_bits_of_one_rank_in_every_family(tmp_path: Path, family: str, size: int) -> None:
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "model", FAMILIES[family]))
    alone = in_pieces(NativeDecoder(checkpoint, blocks=BLOCKS, threads=1))

    def part(ranks: Ranks) -> NDArray[np.float32]:
        return in_pieces(NativeDecoder(checkpoint, blocks=BLOCKS, threads=1 + ranks.rank % 2, ranks=ranks))

    for found in together(size, part):
        assert same_bits(found, alone)


@needs_compiler
@pytest.mark.parametrize("kind", [*KINDS, "F16", "BF16", "F32"])
def test_ranks_make_the_bits_of_one_rank_in_every_kind_of_weight_and_with_uneven_shares(
    tmp_path: Path, kind: str
) -> None:
    if kind in SUPER_KINDS or kind == "MXFP4":
        path = write_tiny_gguf(tmp_path / "model.gguf", WIDE_UNEVEN, stored=stored_as(kind, WIDE_UNEVEN))
    else:
        path = write_tiny_gguf(tmp_path / "model.gguf", UNEVEN, linear=Kind[kind])
    checkpoint = open_checkpoint(path)
    alone = in_pieces(NativeDecoder(checkpoint, blocks=BLOCKS, threads=2, kv_format="int8"))
    assert np.isfinite(alone).all() and np.ptp(alone) > 0.1

    def part(ranks: Ranks) -> NDArray[np.float32]:
        return in_pieces(NativeDecoder(checkpoint, blocks=BLOCKS, threads=2, kv_format="int8", ranks=ranks))

    for size in (2, 3):
        for found in together(size, part):
            assert same_bits(found, alone)


@needs_compiler
def test_what_rank_0_chooses_and_tells_is_what_one_rank_does(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))

    def asked() -> StepInputs:
        inputs = mixed_sampling(77)
        inputs.logprobs = Logprobs.asked([1, 4, 19], [-1, 7, -1], 5)
        return inputs

    expected = asked()
    tokens = NativeDecoder(checkpoint, blocks=BLOCKS, threads=1).step(expected)

    def part(ranks: Ranks) -> tuple[NDArray[np.int32], StepInputs] | None:
        decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=1, ranks=ranks)
        inputs = asked()
        if ranks.rank == 0:
            return decoder.step(inputs), inputs
        decoder.logits(mixed_sampling(0))
        return None

    found = together(2, part)[0]
    assert found is not None
    assert found[0].tolist() == tokens.tolist()
    for name in ("of_target", "ranks", "top_ids", "top"):
        assert (getattr(found[1].logprobs, name) == getattr(expected.logprobs, name)).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "nemotron"])
def test_the_torch_decoder_shares_its_work_the_same_way(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "model", FAMILIES[family]))
    inputs = step_of((PROMPT, 0, TABLE), samples=range(len(PROMPT)))
    alone = TorchDecoder(checkpoint, blocks=BLOCKS)
    expected = alone.logits(inputs)

    def part(ranks: Ranks) -> tuple[TorchDecoder, NDArray[np.float32]]:
        decoder = TorchDecoder(checkpoint, blocks=BLOCKS, ranks=ranks)
        return decoder, decoder.logits(inputs)

    for decoder, found in together(2, part):
        assert decoder.keys.shape[3] * 2 == alone.keys.shape[3]
        assert decoder.recipe == "float32-tp2"
        assert np.sqrt(np.mean((found - expected) ** 2)) < 1e-5 * np.sqrt(np.mean(expected**2))
        assert (found.argmax(-1) == expected.argmax(-1)).all()


@needs_compiler
def test_a_rank_that_goes_away_in_a_step_ends_it_with_an_error_at_the_others(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))

    def part(ranks: Ranks) -> str:
        decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=2, ranks=ranks)
        for _ in range(2):
            with pytest.raises(RankLost) as lost:
                decoder.logits(step_of((PROMPT[:5], 0, TABLE)))
        return str(lost.value)

    assert together(2, part, dies_at=5) == ["a thread has gone"] * 2


@needs_compiler
def test_the_memory_of_the_cache_is_that_of_all_ranks(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", UNEVEN)
    whole = open_checkpoint(path).config
    each = block_bytes(whole, "fp16")
    alone = NativeDecoder.load(path, kv_bytes=10 * each)

    def blocks(ranks: Ranks) -> tuple[int, int]:
        decoder = NativeDecoder.load(path, kv_bytes=10 * each, threads=1, ranks=ranks)
        return decoder.blocks, decoder.block_bytes

    assert alone.blocks == 10
    assert together(2, blocks) == [(10, each // 3), (10, each // 3 * 2)]
