"""The keyed Gumbel noise, and what it means to sample: the specification that every other implementation must match.

Rule: token(t) = argmax over ids v of  logits[v] / T + G(seed, t, v).  The noise belongs to the token id and the
position, never to a row, a rank or a step, so that a draft can be verified by sampling again. Pure numpy; torch, Triton
and C++ follow it bit for bit up to `v`, and within rounding on `g`.

    position   how many tokens stand before this one: the first token after a prompt of n tokens has position n
    key        k0 = seed & 0xffffffff                 k1 = seed >> 32
    counter    c0 = token id    c1 = position & 0xffffffff    c2 = position >> 32    c3 = 0
    x          output word 0 of Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3")
    v          min((float32(x >> 8) + 0.5f) * 2^-24,  1 - 2^-24), every operation rounded to nearest even in float32.
               v lies in [2^-25, 1 - 2^-24]: never 0 or 1. Without the minimum x >> 8 = 2^24 - 1 would round to 1.
               Contracting the sum and the product into one fused operation gives the same bits.
    u          1 - v as a real number. It is not formed in float32, where the smallest v would vanish: small v is large
               noise, the end that decides, and keeps its full resolution up to g = 17.3.
    g          -log(-log1p(-v)). Here in float64, rounded once to float32, so that machines agree; float32 logarithms
               elsewhere may differ in the last places.

Choosing one token from float32 logits, in this order:

    1.  temperature below 1e-5: the largest logit wins. No noise, no masks (they would keep the largest anyway).
    2.  scaled = logits / T, one correctly rounded float32 division.
    3.  Ids are ranked by scaled, largest first, equal ones by id. Each mask works on what the one before has left:
        top_k (0: off) keeps the first k ranks.
        top_p (1: off) keeps the ranks before which less than top_p of the probability lies: softmax of scaled over what
        top_k left, summed in float64 in rank order. The first rank always stays.
        min_p (0: off) keeps ids at least min_p times as likely as the first: exp(scaled - max) >= min_p, in float64.
    4.  The largest float32 sum scaled + g among the kept ids wins, the lowest id among equal ones.

A logit of minus infinity (grammar, bias) is never chosen. Penalties and bias have shifted the logits before step 1.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

GREEDY_BELOW = 1e-5

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_LARGEST_V = np.float32(1 - 2**-24)

Floats = NDArray[np.float32]


def choose(logits: ArrayLike, seed: int, position: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           min_p: float = 0.0) -> int:
    """The token id at `position`, given the logits of all ids.

    Raises ValueError when every logit is masked, or one is NaN or plus infinity.
    """
    values = np.asarray(logits, np.float32)
    best = int(np.argmax(values))
    if not np.isfinite(values[best]):
        raise ValueError("no token can be chosen: logits hold NaN or +inf, or every one is masked")
    if temperature < GREEDY_BELOW:
        return best
    scaled = values / np.float32(temperature)
    kept = kept_ids(scaled, top_k, top_p, min_p)
    return int(kept[np.argmax(scaled[kept] + gumbel(seed, position, kept))])


def race(logits: ArrayLike, ids: ArrayLike, seed: int, position: int, places: int, temperature: float = 1.0,
         top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> tuple[NDArray[np.int64], Floats]:
    """Who is chosen, and who would be chosen without those before, at most `places`: ids and what is compared.

    `ids`: the token id of each logit, ascending. A trimmed head knows few, and the noise of an id is the same there.
    """
    values, names = np.asarray(logits, np.float32), np.asarray(ids, np.int64)
    if temperature < GREEDY_BELOW:
        kept, scores = np.flatnonzero(values > -np.inf), values[values > -np.inf]
    else:
        scaled = values / np.float32(temperature)
        kept = kept_ids(scaled, top_k, top_p, min_p)
        scores = scaled[kept] + gumbel(seed, position, names[kept])
    order = np.argsort(-scores, kind="stable")[:places]
    return names[kept[order]], scores[order]


def kept_ids(scaled: Floats, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> NDArray[np.int64]:
    """Step 3: the ids, in increasing order, that the masks leave of the temperature-scaled logits."""
    ids = np.flatnonzero(scaled > -np.inf)
    if (top_k <= 0 or top_k >= ids.size) and top_p >= 1.0:
        likely = _relative(scaled[ids]) >= min_p
        return ids[likely]
    ids = ids[np.argsort(-scaled[ids], kind="stable")]
    if top_k > 0:
        ids = ids[:top_k]
    relative = _relative(scaled[ids])
    keep = relative >= min_p
    if top_p < 1.0:
        cumulative = np.cumsum(relative)
        keep &= cumulative - relative < top_p * cumulative[-1]
        keep[0] = True
    return np.sort(ids[keep])


def gumbel(seed: int, position: int, token_ids: ArrayLike) -> Floats:
    """g for each token id."""
    v = uniform(seed, position, token_ids).astype(np.float64)
    return (-np.log(-np.log1p(-v))).astype(np.float32)


def uniform(seed: int, position: int, token_ids: ArrayLike) -> Floats:
    """v = 1 - u for each token id, exact to the bit. Small v is large noise."""
    x = philox(seed, token_ids, position & 0xFFFFFFFF, position >> 32, 0)[0]
    v = ((x >> np.uint64(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
    clamped: Floats = np.minimum(v, _LARGEST_V)
    return clamped


def choice_seed(seed: int, choice_index: int) -> int:
    """The seed of choice number `choice_index` of a request with n > 1; choice 0 has the request's own.

    Words 0 (low) and 1 (high) of Philox at counter (choice_index, 0, 0, 1): c3 = 1 keeps them apart from noise.
    """
    if choice_index == 0:
        return seed
    low, high, _, _ = philox(seed, [choice_index], 0, 0, 1)
    return int(low[0]) | int(high[0]) << 32


def philox(seed: int, c0: ArrayLike, c1: int, c2: int, c3: int) -> tuple[NDArray[np.uint64], ...]:
    """The four output words of Philox4x32-10 for each c0, each 32 bits wide in a uint64.

    Raises ValueError when the seed or a counter word is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is an unsigned 64-bit number, got {seed}")
    counters = np.asarray(c0)
    if min(c1, c2, c3) < 0 or max(c1, c2, c3) >= 2**32 or (
            counters.size and not 0 <= int(counters.min()) <= int(counters.max()) < 2**32):
        raise ValueError("token ids, and each half of a position, are unsigned 32-bit numbers")
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    a: Any = counters.astype(np.uint64)
    b, c, d = (np.full(a.shape, word, np.uint64) for word in (c1, c2, c3))
    for _ in range(10):
        first, second = _M0 * a, _M1 * c
        a, b, c, d = ((second >> _32) ^ b ^ np.uint64(k0), second & _LOW,
                      (first >> _32) ^ d ^ np.uint64(k1), first & _LOW)
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return a, b, c, d


def _relative(scaled: Floats) -> NDArray[np.float64]:
    """How likely each is, as a fraction of the likeliest."""
    wide = scaled.astype(np.float64)
    relative: NDArray[np.float64] = np.exp(wide - wide.max())
    return relative
