"""How likely a small model's guess is right, by how far it was ahead.

A guess wins a race: the largest logit / temperature + noise (`kernels.step.Race`). The target runs the same race with
the same noise and its own logits, so what decides is by how much the guess was ahead of the next one: the margin. At
temperature 0 there is no noise and the margin is that of the logits.

Rule: what a margin means is learned, for greedy and noisy races apart; every token that comes is a lesson. So is how
often the one that came in second, or third, was the token instead.
Pure.
"""

from bisect import bisect_right
from math import exp

from drafter.survival import FIRST_WEIGHT, LONGEST_WEIGHT

# first margins of the classes but the lowest
CLASSES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# a guess that is not ahead at all is right so often, and the rest falls with the margin, before anything was seen
FIRST_AT_ZERO = 0.3
# how often the second, the third is the token when the first is not; at the start
FIRST_RECALL = (0.3, 0.12)
RECALL_MEMORY = 0.02


class Margins:
    """What races have turned out to mean."""

    def __init__(self) -> None:
        middles = [(low + high) / 2 for low, high in zip((0.0, *CLASSES), (*CLASSES, 8.0), strict=True)]
        first = [1.0 - (1.0 - FIRST_AT_ZERO) * exp(-middle) for middle in middles]
        self._probability = {noisy: list(first) for noisy in (False, True)}
        self._weight = {noisy: [FIRST_WEIGHT] * len(first) for noisy in (False, True)}
        self.recall = list(FIRST_RECALL)

    def of(self, margin: float, noisy: bool) -> float:
        """How often a guess with about this margin was right."""
        return self._probability[noisy][bisect_right(CLASSES, margin)]

    def learn(self, margin: float, noisy: bool, right: bool) -> None:
        """A guess with this margin met the token."""
        at = bisect_right(CLASSES, margin)
        weight = self._weight[noisy][at] = min(self._weight[noisy][at] + 1.0, LONGEST_WEIGHT)
        self._probability[noisy][at] += (right - self._probability[noisy][at]) / weight

    def missed(self, rank: int | None) -> None:
        """A guess was wrong; the token was number `rank` of the others, or none of them."""
        for other, recall in enumerate(self.recall):
            self.recall[other] = recall + RECALL_MEMORY * ((other == rank) - recall)
