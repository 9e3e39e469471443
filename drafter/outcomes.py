"""Which ways the steps under way may end, likeliest first.

A step that verifies the tokens c0, c1, ... of a continuation ends in an outcome: so many of them agree, and then comes
another token. Whoever prepares what follows each likely outcome before it is known answers in time.

Rules: an outcome after n tokens has the probability that n agree, times that the next does not, times that of its token
among the others. Likely outcomes come first; of one place at most `cap`, so that their number falls with the place as
agreement does: the capped geometric fan-out of Saguaro (arXiv 2603.03251). Where the tokens' own probabilities are not
known, the chance that the one is missing among the first F falls as a power of F (same source): `power_law`.
Pure.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

MISS_DECAY = 0.5


class Outcome(NamedTuple):
    """`agreed` tokens of the continuation, then the other token number `rank` of that place."""

    agreed: int
    rank: int
    probability: float


def likely_outcomes(agreement: Sequence[float], others: Sequence[Sequence[float]], most: int, cap: int,
                    least: float = 0.0) -> list[Outcome]:
    """Up to `most` outcomes of at least probability `least`, likeliest first.

    `agreement[n]`: how likely token n is right if all before it are; `others[n]`: if it is not, how likely each of its
    alternatives is, likeliest first.
    """
    reach = 1.0
    heap: list[tuple[float, int, int]] = []
    weights = []
    for place, (right, tokens) in enumerate(zip(agreement, others, strict=False)):
        weights.append(reach * (1.0 - right))
        if tokens and cap > 0:
            heap.append((-weights[-1] * tokens[0], place, 0))
        reach *= right
        if reach < least:
            break
    heapq.heapify(heap)
    found: list[Outcome] = []
    while heap and len(found) < most:
        negative, place, rank = heapq.heappop(heap)
        if -negative < least:
            break
        found.append(Outcome(place, rank, -negative))
        if rank + 1 < min(cap, len(others[place])):
            heapq.heappush(heap, (-weights[place] * others[place][rank + 1], place, rank + 1))
    return found


def power_law(count: int, decay: float = MISS_DECAY) -> list[float]:
    """How likely each of the first `count` alternatives is the one, when nothing but their order is known."""
    missed = [(rank + 1.0) ** -decay for rank in range(count + 1)]
    return [before - after for before, after in pairwise(missed)]
