"""The operators against the plainest arithmetic there is: float64, loops, and the numpy specification of the noise."""

import numpy as np
import pytest
import torch

from kernels import reference
from shared import noise

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_norm_divides_each_row_by_its_root_mean_square():
    x, weight = random(5, 77), random(77, seed=1)
    wide = x.double()
    expected = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-6, atol=1e-6)


def test_added_norm_is_the_norm_of_the_rounded_sum():
    x, residual, weight = random(3, 40).half(), random(3, 40, seed=1).half(), random(40, seed=2)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference.rms_norm(total, weight, 1e-5))
    assert normed.dtype == total.dtype == torch.float16


def test_rotation_of_a_pair_is_a_rotation_by_its_angle():
    frequencies = [0.5, 0.01]
    cosines, sines = reference.rotary_tables(frequencies, 2000)
    query = random(1, 1, 4)
    turned, _ = reference.rotary(query, query, torch.tensor([1234]), cosines, sines, True)
    for pair, frequency in enumerate(frequencies):
        before = complex(query[0, 0, 2 * pair], query[0, 0, 2 * pair + 1])
        after = before * np.exp(1j * 1234 * frequency)
        assert turned[0, 0, 2 * pair].item() == pytest.approx(after.real, abs=1e-6)
        assert turned[0, 0, 2 * pair + 1].item() == pytest.approx(after.imag, abs=1e-6)


def test_both_pair_styles_are_one_rotation_in_two_orders():
    cosines, sines = reference.rotary_tables([0.3, 0.02, 0.001], 50)
    queries, keys, positions = random(7, 4, 6), random(7, 2, 6, seed=1), torch.arange(7) * 7
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # adjacent pairs to halves
    q, k = reference.rotary(queries, keys, positions, cosines, sines, True)
    q_halves, k_halves = reference.rotary(queries[..., order], keys[..., order], positions, cosines, sines, False)
    assert torch.equal(q[..., order], q_halves)
    assert torch.equal(k[..., order], k_halves)


@pytest.mark.parametrize("interleaved", [True, False])
def test_elements_beyond_the_pairs_pass_and_position_0_turns_nothing(interleaved: bool):
    cosines, sines = reference.rotary_tables([0.3, 0.02], 50)
    queries = random(2, 3, 10)
    turned, _ = reference.rotary(queries, queries, torch.tensor([0, 9]), cosines, sines, interleaved)
    assert torch.equal(turned[..., 4:], queries[..., 4:])
    assert torch.equal(turned[0], queries[0])
    assert not torch.equal(turned[1], queries[1])


def test_swiglu_gates_and_survives_large_inputs():
    gate, up = torch.tensor([[-200.0, -1.0, 0.0, 1.0, 200.0]]), torch.tensor([[3.0, 3.0, 3.0, 3.0, 3.0]])
    gated = reference.swiglu(gate, up)[0].tolist()
    assert gated == pytest.approx([0.0, -3 / (1 + np.e), 0.0, 3 / (1 + np.exp(-1)), 600.0], abs=1e-6)


def test_a_clamped_swiglu_clamps_the_gate_above_and_up_on_both_sides():
    gate, up = torch.tensor([[-200.0, -1.0, 0.5, 50.0]]), torch.tensor([[3.0, -9.0, 9.0, 0.25]])
    gated = reference.clamped_swiglu(gate, up, 1.702, 2.0)[0].tolist()
    expected = [0.0, -1 / (1 + np.exp(1.702)) * -1.0, 0.5 / (1 + np.exp(-0.851)) * 3.0, 2 / (1 + np.exp(-3.404)) * 1.25]
    assert gated == pytest.approx(expected, abs=1e-6)


def test_writing_touches_exactly_the_slots_of_its_rows():
    keys, values = torch.full((6, 4, 2, 3), torch.nan), torch.full((6, 4, 2, 3), torch.nan)
    tables = torch.tensor([[5, 0, -1], [2, 4, 1]], dtype=torch.int32)
    k, v = random(4, 2, 3), random(4, 2, 3, seed=1)
    sequences, positions = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 9, -1])
    reference.write_kv(k, v, keys, values, tables, sequences, positions)
    for row, (block, slot) in enumerate([(5, 3), (0, 0), (1, 1)]):
        assert torch.equal(keys[block, slot], k[row])
        assert torch.equal(values[block, slot], v[row])
    assert torch.isfinite(keys).sum() == torch.isfinite(values).sum() == 3 * 2 * 3


class Cache:
    """Sequences of random keys and values in NaN-filled paged memory."""

    def __init__(self, lengths: list[int], block_size: int, kv_heads: int, head_dim: int) -> None:
        width = max(-(-length // block_size) for length in lengths)
        blocks = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(3))
        self.tables = blocks.view(len(lengths), width).int()
        self.keys = torch.full((blocks.numel(), block_size, kv_heads, head_dim), torch.nan)
        self.values = self.keys.clone()
        self.dense = []
        for sequence, length in enumerate(lengths):
            k = random(length, kv_heads, head_dim, seed=sequence)
            v = random(length, kv_heads, head_dim, seed=1000 + sequence)
            self.dense.append((k, v))
            owner = torch.full((length,), sequence)
            reference.write_kv(k, v, self.keys, self.values, self.tables, owner, torch.arange(length))
            self.tables[sequence, -(-length // block_size) :] = -1

    def attend(self, queries: torch.Tensor, sequences: list[int], positions: list[int]) -> torch.Tensor:
        return reference.paged_attention(
            queries, self.keys, self.values, self.tables, torch.tensor(sequences), torch.tensor(positions), 0.3
        )

    def naive(self, query: torch.Tensor, sequence: int, position: int) -> torch.Tensor:
        keys, values = (dense[: position + 1].double() for dense in self.dense[sequence])
        group = query.shape[0] // keys.shape[1]
        heads = []
        for head in range(query.shape[0]):
            weights = torch.softmax(keys[:, head // group] @ query[head].double() * 0.3, 0)
            heads.append(weights @ values[:, head // group])
        return torch.stack(heads).float()


@pytest.mark.parametrize(
    ("block_size", "kv_heads", "group", "head_dim"), [(16, 3, 3, 64), (7, 1, 4, 5), (300, 2, 1, 8)]
)
def test_attention_is_softmax_over_the_rows_own_past(block_size: int, kv_heads: int, group: int, head_dim: int):
    lengths = [1, 40, 256, 257, 700, 530]
    cache = Cache(lengths, block_size, kv_heads, head_dim)
    runs = [range(1), range(10, 40), range(255, 256), range(256, 257), range(500, 700), range(529, 530)]
    sequences = [sequence for sequence, run in enumerate(runs) for _ in run]
    positions = [position for run in runs for position in run]
    queries = random(len(positions), kv_heads * group, head_dim, seed=9)
    output = cache.attend(queries, sequences, positions)
    expected = [cache.naive(q, s, p) for q, s, p in zip(queries, sequences, positions, strict=True)]
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-5, atol=2e-6)


def test_a_sink_takes_its_share_of_the_softmax_and_gives_no_value():
    cache = Cache([300], 16, 2, 8)
    queries = random(2, 4, 8, seed=9)
    sinks = torch.tensor([-30.0, 0.0, 2.0, 60.0])
    where = cache.tables, torch.zeros(2, dtype=torch.int64), torch.tensor([5, 299])
    output = reference.paged_attention(queries, cache.keys, cache.values, *where, 0.3, sinks=sinks)
    for row, position in enumerate((5, 299)):
        keys, values = (dense[: position + 1].double() for dense in cache.dense[0])
        for head, sink in enumerate(sinks.double()):
            scores = torch.cat((keys[:, head // 2] @ queries[row, head].double() * 0.3, sink[None]))
            expected = torch.softmax(scores, 0)[:-1] @ values[:, head // 2]
            torch.testing.assert_close(output[row, head], expected.float(), rtol=1e-5, atol=1e-7)


def test_attention_of_a_row_does_not_depend_on_its_company():
    cache = Cache([600, 300], 16, 2, 8)
    queries = random(600, 4, 8, seed=9)
    whole = cache.attend(queries, [0] * 600, list(range(600)))
    for row in (0, 255, 256, 599):
        alone = cache.attend(queries[row : row + 1], [0], [row])
        beside = cache.attend(queries[[row, row]], [0, 1], [row, min(row, 299)])
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(beside[0], whole[row], rtol=1e-5, atol=1e-6)


def test_padding_rows_attend_to_nothing():
    cache = Cache([20, 20], 16, 2, 8)
    queries = random(3, 4, 8)
    output = cache.attend(queries, [0, 1, 1], [5, -1, 6])
    assert torch.equal(output[1], torch.zeros(4, 8))
    expected = [cache.naive(queries[0], 0, 5), cache.naive(queries[2], 1, 6)]
    torch.testing.assert_close(output[[0, 2]], torch.stack(expected))


SEEDS = [0, 1, 2**32, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
POSITIONS = [0, 1, 8191, 2**31, 2**32 + 5, 2**40]


def as_int64(seeds: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(seeds, np.uint64).view(np.int64))


def test_noise_equals_its_specification_bit_for_bit():
    v = reference.uniform(as_int64(SEEDS), torch.tensor(POSITIONS), 5000).numpy()
    g = reference.gumbel(as_int64(SEEDS), torch.tensor(POSITIONS), 5000).numpy()
    for row, (seed, position) in enumerate(zip(SEEDS, POSITIONS, strict=True)):
        assert np.array_equal(v[row], noise.uniform(seed, position, np.arange(5000)))
        # Logarithms of two libraries, rounded from float64: equal but for rare halves.
        np.testing.assert_array_max_ulp(g[row], noise.gumbel(seed, position, np.arange(5000)), maxulp=1)


def test_v_stays_below_one_at_the_largest_word(monkeypatch: pytest.MonkeyPatch):
    largest = torch.tensor([[2**32 - 1, 0]])
    monkeypatch.setattr(reference, "philox", lambda seeds, positions, vocabulary: largest)
    v = reference.uniform(torch.tensor([0]), torch.tensor([0]), 2)
    assert v[0].tolist() == [1 - 2**-24, 2**-25]
    assert torch.isfinite(reference.gumbel(torch.tensor([0]), torch.tensor([0]), 2)).all()


# (top_k, top_p, min_p)
MASKS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.0, 0.0),
    (0, 1.0, 0.2),
    (0, 1.0, 1.0),
    (40, 0.8, 0.05),
    (10_000, 0.5, 0.0),
]


@pytest.mark.parametrize("temperature", [0.0, 9e-6, 0.3, 1.0, 2.5])
def test_choice_equals_its_specification(temperature: float):
    rows, vocabulary = 60, 600
    logits = random(rows, vocabulary) * 4
    logits[:, 7::13] = logits[:, 3:4]  # many ties
    logits[:, 11::17] = -torch.inf
    masks = [MASKS[row % len(MASKS)] for row in range(rows)]
    temperatures = torch.full((rows,), temperature)
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*masks, strict=True))
    seeds, positions = [SEEDS[row % 6] + row // 6 * (row % 6 != 4) for row in range(rows)], torch.arange(rows) * 101
    masked = reference.mask_logits(logits, temperatures, top_k.int(), top_p, min_p)
    tokens = reference.sample(masked, temperatures, as_int64(seeds), positions)
    assert tokens.dtype == torch.int32
    for row in range(rows):
        expected = noise.choose(logits[row].numpy(), seeds[row], row * 101, temperature, *masks[row])
        assert tokens[row].item() == expected, (row, masks[row])


def test_masks_leave_other_rows_and_their_argument_alone():
    logits = random(3, 50)
    before = logits.clone()
    masked = reference.mask_logits(
        logits, torch.ones(3), torch.tensor([0, 2, 0]), torch.ones(3), torch.tensor([0.0, 0.0, 0.0])
    )
    assert torch.equal(logits, before)
    assert torch.equal(masked[[0, 2]], before[[0, 2]])
    assert torch.isfinite(masked[1]).sum() == 2


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    chosen = reference.sample(logits, torch.ones(20_000), torch.full((20_000,), 42), torch.arange(20_000))
    shares = torch.bincount(chosen.long(), minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.012)


def test_drafts_are_accepted_up_to_the_first_difference():
    tokens = torch.tensor([9, 1, 2, 3, 9, 4, 5, 9, 9, 7, 7])
    chosen = torch.tensor([1, 2, 8, 3, 0, 5, 6, 9, 7, 7, 7])
    starts = torch.tensor([0, 4, 7, 8, 11])
    assert reference.count_accepted(chosen, tokens, starts, 4).tolist() == [2, 0, 0, 2]
    assert reference.count_accepted(chosen[:2], tokens[:2], torch.tensor([0, 1, 2]), 1).tolist() == [0, 0]
