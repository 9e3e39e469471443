"""Paged attention: the reference's result, and a row's bits that depend on its own context only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import reference, triton_attention, triton_kv, tuning
from kernels.verify import nan_filled_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 20
SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


@dataclass(frozen=True)
class Cache:
    """Sequences in a paged cache; what none of them owns is NaN."""

    keys: Tensor
    values: Tensor
    tables: Tensor

    def attend(
        self, rows: list[tuple[int, int]], longest: int | None = None, operator=triton_attention, **more: Any
    ) -> Tensor:
        """Attention of rows (sequence, position); a row's query depends on nothing but the row."""
        columns = zip(*rows, strict=True)
        sequences, positions = (torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in columns)
        seeds = [torch.Generator().manual_seed(1000 * sequence + position + 1) for sequence, position in rows]
        queries = torch.stack([3 * torch.randn(HEADS, HEAD_DIM, generator=seed) for seed in seeds])
        queries = queries.to(self.keys.dtype).to(DEVICE)
        where = (self.tables, sequences, positions)
        return operator.paged_attention(queries, self.keys, self.values, *where, SCALE, longest, **more)


def cache_of(contexts: list[int], block_size: int = 4, kind: torch.dtype = torch.float32) -> Cache:
    """Each sequence's keys and values depend on its number only, not on blocks or neighbours."""
    counts = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(7))
    shape = (len(order), block_size, KV_HEADS, HEAD_DIM)
    keys, values = (torch.full(shape, torch.nan, dtype=kind) for _ in range(2))
    tables = torch.full((len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        first = sum(counts[:sequence])
        blocks = order[first : first + count]
        tables[sequence, :count] = blocks
        content = torch.randn(2, 1000, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(sequence))
        at = torch.arange(context)
        for cache, elements in zip((keys, values), content, strict=True):
            cache[blocks[at // block_size], at % block_size] = elements[:context].to(kind)
    return Cache(keys.to(DEVICE), values.to(DEVICE), tables.to(DEVICE))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_is_that_of_the_reference(kind: torch.dtype) -> None:
    cache = cache_of([300, 3, 65], kind=kind)
    rows = [(0, 298), (0, 299), (1, 2), (2, 63), (2, 64)]
    # The specification has no interpreter's or tensor core's rounding of weights to 16 bits.
    tolerance = {} if kind == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    assert_close(cache.attend(rows), cache.attend(rows, operator=reference), **tolerance)


def test_a_row_has_the_same_bits_alone_in_a_draft_and_in_a_prompt() -> None:
    cache = cache_of([300, 40])
    alone = {row: cache.attend([row])[0] for row in [(0, 255), (0, 256), (0, 257), (1, 39)]}
    # Drafts across windows of rows that are read together, and a sequence that comes back.
    together = [(1, 7), (0, 254), (0, 255), (0, 256), (0, 257), (0, 3), (1, 39), (0, 299), (1, 5)]
    result = cache.attend(together)
    for row, bits in alone.items():
        assert torch.equal(bits, result[together.index(row)])


def test_what_stands_behind_a_row_changes_no_bit() -> None:
    rows = [(0, 255), (0, 20)]
    assert torch.equal(cache_of([256]).attend(rows), cache_of([600, 30]).attend(rows))


def test_the_block_size_of_the_cache_changes_no_bit() -> None:
    rows = [(0, 299), (1, 69)]
    assert torch.equal(cache_of([300, 70], block_size=4).attend(rows), cache_of([300, 70], block_size=16).attend(rows))


def test_knowing_the_longest_context_changes_no_bit() -> None:
    cache = cache_of([300, 70])
    rows = [(0, 269), (1, 69)]
    assert torch.equal(cache.attend(rows), cache.attend(rows, longest=270))


def test_a_small_workspace_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of([70])
    rows = [(0, 3), (0, 69), (0, 40)]
    at_once = cache.attend(rows)
    monkeypatch.setattr(tuning, "ATTENTION_WORKSPACE_BYTES", 1)
    assert torch.equal(cache.attend(rows), at_once)


def test_more_splits_than_are_combined_at_once_match_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of([420])
    monkeypatch.setattr(tuning, "ATTENTION_SPLIT", 64)
    monkeypatch.setattr(tuning, "ATTENTION_COMBINE", tuning.ATTENTION_COMBINE._replace(block=2))
    rows = [(0, 419), (0, 127)]
    assert_close(cache.attend(rows), cache.attend(rows, operator=reference))


def test_sinks_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ATTENTION_SPLIT", 64)
    cache = cache_of([200, 3])
    sinks = torch.tensor([-30.0, 0.0, 1.0, 3.0, 10.0, 60.0], device=DEVICE)
    rows = [0, 0, 1, 1], [198, 199, 2, -1]
    sequences, positions = (torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in rows)
    queries = torch.randn(4, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for window in (0, 20):
        found, expected = (
            operator.paged_attention(
                queries, cache.keys, cache.values, cache.tables, sequences, positions, SCALE, None, window, sinks
            )
            for operator in (triton_attention, reference)
        )
        assert_close(found, expected)
        assert torch.equal(found[3], torch.zeros_like(found[3]))


def test_a_padding_row_gets_zeros_and_disturbs_nobody() -> None:
    cache = cache_of([9])
    result = cache.attend([(0, 8), (0, -1)])
    assert torch.equal(result[0], cache.attend([(0, 8)])[0])
    assert torch.equal(result[1], torch.zeros_like(result[1]))


@pytest.mark.parametrize("window", [0, 70])
def test_one_launch_gives_the_bits_of_two_and_leaves_its_counters_at_zero(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(tuning, "ATTENTION_SPLIT", 64)
    monkeypatch.setattr(tuning, "ATTENTION_COMBINE", tuning.ATTENTION_COMBINE._replace(block=2))
    cache = cache_of([300, 40])
    rows = [(0, 250), (0, 299), (1, -1), (1, 39), (0, 63), (0, -1)]
    counters = torch.zeros(len(rows) * KV_HEADS, dtype=torch.int32, device=DEVICE)
    together = cache.attend(rows, window=window)
    assert torch.equal(cache.attend(rows, window=window, counters=counters), together)
    assert not counters.any()
    assert_close(together, cache.attend(rows, window=window, operator=reference))


@pytest.mark.parametrize("window", [0, 5])
def test_a_sink_takes_its_share_and_gives_nothing(window: int) -> None:
    cache, rows = cache_of([300, 40]), [(0, 299), (1, -1), (1, 39)]
    sinks = torch.linspace(-3.0, 9.0, HEADS, device=DEVICE)
    got = cache.attend(rows, sinks=sinks, window=window)
    assert_close(got, cache.attend(rows, sinks=sinks, window=window, operator=reference))
    assert not got[1].any()
    assert (got[:, -1].abs().sum(-1)[[0, 2]] < cache.attend(rows, window=window)[:, -1].abs().sum(-1)[[0, 2]]).all()
    counters = torch.zeros(len(rows) * KV_HEADS, dtype=torch.int32, device=DEVICE)
    assert torch.equal(cache.attend(rows, sinks=sinks, window=window, counters=counters), got)


@pytest.mark.parametrize(
    ("kind", "scaled"), [(torch.int8, True), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)]
)
def test_caches_of_eight_bits_are_written_and_read_as_the_reference_does(kind: torch.dtype, scaled: bool) -> None:
    contexts, block_size = [70, 5], 4
    blank = torch.zeros(21, block_size, KV_HEADS, HEAD_DIM, device=DEVICE).to(kind)
    tables = torch.full((2, 18), -1, dtype=torch.int32, device=DEVICE)
    tables[0], tables[1, :2] = torch.arange(20, 2, -1), torch.tensor([1, 2])
    rows = [(sequence, at) for sequence, context in enumerate(contexts) for at in range(context)]
    where = [torch.tensor(column, device=DEVICE) for column in zip(*rows, strict=True)]
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(len(rows), KV_HEADS, HEAD_DIM, generator=generator).half().to(DEVICE) for _ in range(2))
    caches, results = [], []
    for module, writer in ((triton_attention, triton_kv), (reference, reference)):
        cache = blank.clone(), blank.clone()
        scales = tuple(torch.full(blank.shape[:3], torch.nan, device=DEVICE) for _ in range(2)) if scaled else None
        writer.write_kv(keys, values, *cache, tables, *where, scales)
        caches.append([part.float() for part in cache] + list(scales or ()))
        queries = torch.randn(3, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(4)).half().to(DEVICE)
        asked = torch.tensor([0, 0, 1], device=DEVICE), torch.tensor([69, 11, 4], device=DEVICE)
        results.append(module.paged_attention(queries, *cache, tables, *asked, SCALE, scales=scales))
    for got, expected in zip(*caches, strict=True):
        assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert_close(*results, rtol=4e-3, atol=2e-3)


def test_whole_numbers_without_scales_and_scales_without_codes_are_refused() -> None:
    cache, counters = cache_of([5]), torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"caches of torch\.float32 have no scales"):
        cache.attend([(0, 4)], scales=(counters, counters))
    whole = Cache(cache.keys.nan_to_num().to(torch.int8), cache.values.nan_to_num().to(torch.int8), cache.tables)
    queries, row = torch.zeros(1, HEADS, HEAD_DIM, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"caches of torch\.int8 need scales"):
        triton_attention.paged_attention(queries, whole.keys, whole.values, whole.tables, row, row, SCALE)
    with pytest.raises(ValueError, match=r"caches of torch\.int8 need scales"):
        triton_kv.write_kv(queries[:, :2], queries[:, :2], whole.keys, whole.values, whole.tables, row, row)


def test_windows_with_splits_between_them_are_combined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ATTENTION_SPLIT", 64)
    cache, rows = cache_of([300]), [(0, 3), (0, 299)]
    counters = torch.zeros(len(rows) * KV_HEADS, dtype=torch.int32, device=DEVICE)
    got = cache.attend(rows, window=5, counters=counters)
    assert torch.equal(got, cache.attend(rows, window=5))
    assert_close(got, cache.attend(rows, window=5, operator=reference))
    assert not counters.any()


def test_too_few_counters_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rows of 2 KV heads need as many counters, not 1"):
        cache_of([5]).attend([(0, 4)], counters=torch.zeros(1, dtype=torch.int32, device=DEVICE))


def test_query_heads_that_cannot_share_kv_heads_are_refused() -> None:
    cache = cache_of([5])
    queries = torch.zeros(1, 5, HEAD_DIM, device=DEVICE)
    row = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads evenly"):
        triton_attention.paged_attention(queries, cache.keys, cache.values, cache.tables, row, row, SCALE)
