"""The specification of sampling: known answers, distributions, masks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import noise

seeds = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("key", "counter", "expected"), [
    # known-answer vectors published with Random123
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_the_published_words(key, counter, expected):
    words = noise.philox(key[0] | key[1] << 32, [counter[0]], *counter[1:])
    assert tuple(int(word[0]) for word in words) == expected


def plain_philox_word(seed: int, c: tuple[int, int, int, int]) -> int:
    """Word 0 once more, in plain integers."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((second >> 32) ^ c[1] ^ k0, second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k1, first & 0xFFFFFFFF)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c[0]


@given(seeds, st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_v_follows_its_definition_bit_for_bit(seed, position, token):
    x = plain_philox_word(seed, (token, position & 0xFFFFFFFF, position >> 32, 0))
    v = min((np.float32(x >> 8) + np.float32(0.5)) * np.float32(2.0**-24), np.float32(1 - 2.0**-24))
    assert noise.uniform(seed, position, [token]).tobytes() == np.float32(v).tobytes()
    assert 2.0**-25 <= float(v) < 1.0
    assert float(noise.gumbel(seed, position, [token])[0]) == pytest.approx(-math.log(-math.log1p(-float(v))), rel=1e-6)


@pytest.mark.parametrize(("x", "v"), [(0, 2.0**-25), (0xFFFFFFFF, 1 - 2.0**-24)])
def test_the_ends_of_the_range_give_finite_noise(monkeypatch, x, v):
    monkeypatch.setattr(noise, "philox", lambda *_: (np.array([x], np.uint64),))
    assert noise.uniform(0, 0, [0]).tolist() == [v]
    assert np.isfinite(noise.gumbel(0, 0, [0])).all()


def test_known_values_never_change():
    # other implementations and recorded streams depend on these bits
    assert noise.uniform(42, 7, [0, 1, 49151]).view(np.uint32).tolist() == KNOWN_V
    assert [noise.choose(np.zeros(49152), 42, position) for position in range(4)] == KNOWN_CHOICES
    assert [noise.choice_seed(42, index) for index in range(3)] == KNOWN_SEEDS


KNOWN_V = [1061523552, 1063021302, 1047021314]
KNOWN_CHOICES = [12936, 32124, 10588, 5056]
KNOWN_SEEDS = [42, 6526683383576497442, 10929996121602175956]


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_v_is_uniform_over_ids_and_over_positions():
    over_ids = noise.uniform(1, 5, np.arange(65536))
    over_positions = np.concatenate([noise.uniform(1, position, np.arange(32)) for position in range(2048)])
    for v in (over_ids, over_positions):
        counts = np.histogram(v, bins=64, range=(0, 1))[0]
        assert chi_square(counts, v.size / 64) < 115  # 63 degrees of freedom: 1 in 10,000


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_tokens_come_with_their_softmax_probability(temperature):
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5], np.float32)
    wanted = np.exp(logits / temperature)
    wanted /= wanted.sum()
    drawn = [noise.choose(logits, 99, position, temperature) for position in range(6000)]
    counts = np.bincount(drawn, minlength=5)
    assert chi_square(counts, wanted * 6000) < 23.5  # 4 degrees of freedom: 1 in 10,000


def test_the_tail_of_the_noise_has_its_resolution():
    g = noise.gumbel(3, 0, np.arange(1 << 20))
    assert g.max() > 12
    # P(G > 10) = 4.54e-5: 47.6 expected of a million
    assert 20 < (g > 10).sum() < 80


@given(seeds, st.integers(0, 100000), st.lists(st.integers(0, 151935), min_size=1, max_size=50, unique=True))
def test_noise_belongs_to_the_id_and_not_to_its_place(seed, position, ids):
    alone = [float(noise.gumbel(seed, position, [token])[0]) for token in ids]
    assert noise.gumbel(seed, position, ids).tolist() == alone
    assert noise.gumbel(seed, position, ids[::-1]).tolist() == alone[::-1]


logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@given(logit_lists, seeds, st.integers(0, 10000))
def test_temperature_zero_takes_the_largest_and_the_lowest_id_of_equals(logits, seed, position):
    assert noise.choose(logits, seed, position, temperature=0.0) == logits.index(max(logits))


def plain_kept(scaled, top_k, top_p, min_p):
    """Step 3 once more, by the letter."""
    ranks = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if top_k:
        ranks = ranks[:top_k]
    weights = [math.exp(scaled[token] - scaled[ranks[0]]) for token in ranks]
    total, before, kept = math.fsum(weights), 0.0, []
    for token, weight in zip(ranks, weights, strict=True):
        if (not kept or top_p >= 1 or before / total < top_p) and weight >= min_p:
            kept.append(token)
        before += weight
    return sorted(kept)


@given(logit_lists, st.integers(0, 10), st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.9, 0.99, 1.0]),
       st.sampled_from([0.0, 0.03, 0.2, 1.0]))
def test_masks_keep_what_the_specification_says(logits, top_k, top_p, min_p):
    # steps of 1/8 make ties frequent and sums far from the thresholds' rounding
    scaled = (np.round(np.array(logits) * 8) / 8 + 0.0).astype(np.float32)
    assert noise.kept_ids(scaled, top_k, top_p, min_p).tolist() == plain_kept(scaled.tolist(), top_k, top_p, min_p)


@given(logit_lists, seeds, st.integers(0, 10000), st.integers(0, 10), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_a_choice_is_the_largest_noisy_logit_among_the_kept(logits, seed, position, top_k, top_p, min_p):
    scaled = np.array(logits, np.float32) / np.float32(0.8)
    kept = noise.kept_ids(scaled, top_k, top_p, min_p)
    chosen = noise.choose(logits, seed, position, 0.8, top_k, top_p, min_p)
    noisy = scaled + noise.gumbel(seed, position, np.arange(len(logits)))
    assert chosen in kept
    assert noisy[chosen] == noisy[kept].max()


def test_masked_ids_are_never_chosen_and_masking_all_is_an_error():
    logits = np.full(100, -np.inf, np.float32)
    logits[17] = -50.0
    assert {noise.choose(logits, 5, position, 2.0) for position in range(50)} == {17}
    with pytest.raises(ValueError, match="no token can be chosen"):
        noise.choose(np.full(4, -np.inf), 5, 0)
    with pytest.raises(ValueError, match="no token can be chosen"):
        noise.choose([0.0, math.nan], 5, 0)


@pytest.mark.parametrize(("seed", "position", "token"), [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, -1),
                                                         (0, 0, 2**32)])
def test_numbers_out_of_range_are_refused(seed, position, token):
    with pytest.raises(ValueError):
        noise.uniform(seed, position, [token])


@given(seeds)
def test_choices_of_one_request_have_seeds_of_their_own(seed):
    derived = [noise.choice_seed(seed, index) for index in range(128)]
    assert derived[0] == seed and len(set(derived)) == 128 and all(0 <= s < 2**64 for s in derived)
