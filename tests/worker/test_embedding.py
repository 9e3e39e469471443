"""Vectors of prompts: a function of the prompt alone, whatever the engine does beside."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder, Embedding, Hidden
from shared.errors import NoEligibleWorker
from shared.messages import Cancel, DrafterStatus, Failed, Finished, Generate
from tests.kernels.test_native_step import step_of
from tests.kernels.tiny import write_tiny_gguf
from tests.worker.builders import Bench, mock_decoder, plain, request
from worker.following import Following
from worker.mock_decoder import MockDecoder
from worker.pooling import Pooling

PROMPT = list(range(20, 57))


def embed(name: str = "e", prompt: list[int] | None = None, pooling: str = "mean", **other: object) -> Generate:
    return request(name, PROMPT if prompt is None else prompt, max_tokens=1, pooling=pooling, **other)


def bench(decoder: Decoder | None = None, **limits: int) -> Bench:
    return Bench(decoder or mock_decoder(), embeds=True, **{"step_tokens": 64, "max_running": 8} | limits)


def vector(made: Bench, name: str = "e") -> bytes:
    (end,) = made.ends[name, 1]
    assert isinstance(end, Finished) and (end.reason, end.completion_tokens) == ("stop", 0) and end.embedding
    return end.embedding


def rows_of(prompt: list[int], decoder: Decoder) -> NDArray[np.float32]:
    """What the decoder makes of each token, the whole prompt in one step."""
    assert isinstance(decoder, Embedding)
    inputs = step_of((prompt, 0, range(-(-len(prompt) // decoder.block_size_tokens))), samples=[])
    inputs.hidden = Hidden.asked(list(range(len(prompt))), decoder.hidden_size)
    decoder.step(inputs)
    return inputs.hidden.values


def normalised(row: NDArray[np.float64]) -> bytes:
    return (row / np.sqrt((row * row).sum())).astype("<f4").tobytes()


@pytest.mark.parametrize("length", [1, 2, 4, 5, 37])
def test_it_is_the_mean_of_all_rows_or_the_last_of_length_one(length: int) -> None:
    rows = rows_of(PROMPT[:length], mock_decoder()).astype(np.float64)
    for pooling, row in (("mean", rows.sum(0)), ("last", rows[-1])):
        made = bench()
        made.add(embed(prompt=PROMPT[:length], pooling=pooling))
        made.finish()
        assert vector(made) == normalised(row)
        assert not made.streams and made.scheduler.pool.available == made.scheduler.pool.blocks


@given(cuts=st.lists(st.integers(1, 36), max_size=6))
def test_however_the_prompt_was_cut_its_vector_has_the_same_bits(cuts: list[int]) -> None:
    values = np.random.default_rng(1).standard_normal((37, 16)).astype(np.float32)
    for kind in ("mean", "last"):
        pools = [Pooling(kind, 37), Pooling(kind, 37)]
        for pool, edges in zip(pools, ([0, 37], [0, *sorted(set(cuts)), 37]), strict=True):
            for start, end in pairwise(edges):
                wanted = pool.wanted(start, end - start)
                if wanted:
                    pool.take(values[start + wanted.start:start + wanted.stop])
        assert pools[0].embedding() == pools[1].embedding() and not pools[1].needs_all


def test_rows_of_no_direction_give_zeros_and_no_fault() -> None:
    pool = Pooling("mean", 2)
    pool.take(np.zeros((2, 4), np.float32))
    assert pool.embedding() == bytes(16)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("limits", [{"step_tokens": 8, "max_running": 4}, {"step_tokens": 64}])
def test_beside_streams_neither_changes_the_other(pooling: str, limits: dict[str, int]) -> None:
    alone = bench()
    alone.add(embed(pooling=pooling))
    alone.finish()
    made = bench(**limits)
    others = [request(f"r{number}", PROMPT[:number + 3], max_tokens=20) for number in range(3)]
    for other in others[:2]:
        made.add(other)
    for _ in range(3):
        made.step()
    made.add(embed(pooling=pooling))
    made.add(others[2])
    made.finish()
    assert vector(made) == vector(alone)
    assert all(made.streams[other.request_id, 1] == plain(other) for other in others)


def test_the_last_row_uses_the_cache_and_the_mean_computes_all() -> None:
    made = bench()
    for name, pooling in (("a", "mean"), ("b", "last"), ("c", "mean")):
        made.add(embed(name, pooling=pooling))
        made.finish()
    ends = {name: made.ends[name, 1][0] for name in "abc"}
    assert [end.cached_tokens for end in ends.values() if isinstance(end, Finished)] == [0, 36, 0]
    assert vector(made, "a") == vector(made, "c") != vector(made, "b")
    fresh = bench()
    fresh.add(embed("b", pooling="last"))
    fresh.finish()
    assert vector(fresh, "b") == vector(made, "b")
    # what an embedding has computed a stream finds
    made.add(request("r", [*PROMPT, 3], max_tokens=4))
    made.finish()
    (end,) = made.ends["r", 1]
    assert isinstance(end, Finished) and end.cached_tokens == 36


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_one_that_had_to_give_its_blocks_back_counts_no_row_twice(pooling: str) -> None:
    made = bench(mock_decoder(blocks=12), step_tokens=8, max_running=4)
    made.add(request("r", PROMPT[:6], max_tokens=26))
    for _ in range(3):
        made.step()
    made.add(embed(prompt=PROMPT[:30], pooling=pooling, priority=-1))
    made.finish()
    alone = bench()
    alone.add(embed(prompt=PROMPT[:30], pooling=pooling))
    alone.finish()
    assert vector(made) == vector(alone)


def test_preempted_in_the_middle_it_goes_on_where_it_was() -> None:
    made = bench(step_tokens=8, max_running=4)
    made.add(embed())
    for _ in range(3):
        made.step()
    (sequence,) = made.scheduler.running
    assert 0 < sequence.computed < len(PROMPT)
    made.scheduler._preempt(sequence)
    made.finish()
    alone = bench()
    alone.add(embed())
    alone.finish()
    assert vector(made) == vector(alone) and made.scheduler.preemptions == 1


def test_one_that_is_cancelled_or_not_possible_here_ends_as_such() -> None:
    made = bench(step_tokens=8)
    made.add(embed())
    made.step()
    made.scheduler.cancel(Cancel("e", 1), made.now)
    made.finish()
    (end,) = made.ends["e", 1]
    assert isinstance(end, Finished) and end.reason == "cancelled" and not end.embedding
    unable = Bench(mock_decoder())
    unable.add(embed())
    unable.finish()
    (refused,) = unable.ends["e", 1]
    assert isinstance(refused, Failed) and refused.code == NoEligibleWorker.code and refused.retryable


def test_a_prompt_may_fill_the_context_and_no_more() -> None:
    for length, fits in ((64, True), (65, False)):
        made = bench(mock_decoder(context_length=64))
        made.add(embed(prompt=[5] * length))
        made.finish()
        (end,) = made.ends["e", 1]
        assert isinstance(end, Finished if fits else Failed)


def test_no_drafter_hears_of_it() -> None:
    made = bench()
    following = Following("w", 1, "local", "", 8, 10.0)
    following.hear(DrafterStatus("d", 1), 0.0)
    assert following.chosen is not None
    made.add(embed())
    made.add(request("r"))
    assert {sequence.key.request_id for sequence in made.scheduler.live if following.may_hear(sequence)} == {"r"}


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_on_the_native_step_a_full_batch_changes_no_bit_of_a_vector(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    prompts = [[(7 * number + 3 * place) % 256 for place in range(5 + 6 * number)] for number in range(8)]

    def vectors(prompts: dict[str, list[int]], threads: int, pooling: str, **limits: int) -> dict[str, bytes]:
        made = bench(NativeDecoder(checkpoint, blocks=64, threads=threads), **limits)
        for name, prompt in prompts.items():
            made.add(embed(name, prompt, pooling))
        made.add(request("r", [1, 2, 3], max_tokens=12))
        made.finish()
        return {name: vector(made, name) for name in prompts}

    named = {f"e{number}": prompt for number, prompt in enumerate(prompts)}
    for pooling in ("mean", "last"):
        together = vectors(named, 2, pooling, step_tokens=48, max_running=8)
        for name, prompt in named.items():
            assert vectors({name: prompt}, 1, pooling, step_tokens=64) == {name: together[name]}
            rows = rows_of(prompt, NativeDecoder(checkpoint, blocks=64, threads=1)).astype(np.float64)
            total = np.zeros(rows.shape[1])
            for row in rows:
                total += row
            assert together[name] == normalised(total if pooling == "mean" else rows[-1])


def test_the_mock_can(tmp_path: Path) -> None:
    assert isinstance(MockDecoder(blocks=1), Embedding)
