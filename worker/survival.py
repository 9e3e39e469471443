"""How likely drafts are right, measured: by drafter, by place in the draft, and by what the drafter says of each token.

What a drafter says of a token (its confidence) stands for the length of the phrase that was met, and for whatever else
it knows. Here it is only a name: what tokens of that name and place turned out to be worth is what counts.

Rules:
- A token behind the first difference was never tried and teaches nothing.
- A stream that goes better or worse than its drafter's others shifts the odds of all its drafts: its `luck`.
- What is not tried for long drifts back to what was believed first, so that it is tried again one day.
Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence

# first confidences of the classes, in 255ths; what a drafter does not say is a class of its own
CONFIDENCES = (0, 51, 90, 128, 166, 204, 235)
UNSAID = -1
# first places of the classes
PLACES = (0, 1, 2, 4)
FIRST_UNSAID = 0.6
# a first belief counts as so many tokens, and what was seen long ago is forgotten over so many
FIRST_WEIGHT = 6.0
LONGEST_WEIGHT = 200.0
# what was not tried in a step comes back by this much of the way
DRIFT = 0.004
LUCK_RATE = 0.12
LUCK_DRIFT = 0.02
MOST_LUCK = 6.0
# drafters that are remembered: a worker follows one at a time and seldom changes
MOST_DRAFTERS = 8

_CLASSES = len(CONFIDENCES) + 1


class Survival:
    """The record of each drafter, by its name."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def reach(self, drafter: str, stated: Sequence[int], luck: float = 1.0) -> list[float]:
        """How likely the stream gets as far as each token of a draft, that token right: it falls along the draft.

        `stated`: what its drafter says of each token, 0 to 255 or UNSAID.
        """
        record = self._record(drafter)
        reach, found = 1.0, []
        for place, said in enumerate(stated):
            reach *= _shifted(record.probability[_cell(place, said)], luck)
            found.append(reach)
        return found

    def learn(self, drafter: str, stated: Sequence[int], agreed: int, luck: float = 1.0) -> float:
        """Of a verified draft the first `agreed` tokens were right, the next, if there is one, wrong; the new luck."""
        record = self._record(drafter)
        for place, said in enumerate(stated[:agreed + 1]):
            cell, right = _cell(place, said), place < agreed
            luck *= 1.0 + LUCK_RATE * (right - _shifted(record.probability[cell], luck))
            luck = min(MOST_LUCK, max(1.0 / MOST_LUCK, luck))
            record.learn(cell, right)
        return luck

    def pass_by(self, drafter: str, stated: Sequence[int], tried: int, luck: float = 1.0) -> float:
        """Of a draft only the first `tried` tokens were verified; the new luck."""
        if tried < len(stated):
            self._record(drafter).drift(_cell(tried, stated[tried]))
        return luck if tried else luck + LUCK_DRIFT * (1.0 - luck)

    def _record(self, drafter: str) -> "_Record":
        record = self._records.get(drafter)
        if record is None:
            record = self._records[drafter] = _Record()
            if len(self._records) > MOST_DRAFTERS:
                self._records.popitem(last=False)
        return record


class _Record:
    """What one drafter's tokens were worth, by cell."""

    def __init__(self) -> None:
        self.probability = [_first(number) for _ in PLACES for number in range(_CLASSES)]
        self._weight = [FIRST_WEIGHT] * len(self.probability)

    def learn(self, cell: int, right: bool) -> None:
        weight = self._weight[cell] = min(self._weight[cell] + 1.0, LONGEST_WEIGHT)
        self.probability[cell] += (right - self.probability[cell]) / weight

    def drift(self, cell: int) -> None:
        self.probability[cell] += DRIFT * (_first(cell % _CLASSES) - self.probability[cell])


def _first(number: int) -> float:
    """What a drafter that says so much is believed to mean: the middle of the class."""
    if number == 0:
        return FIRST_UNSAID
    ends = (*CONFIDENCES, 255)
    return (ends[number - 1] + ends[number]) / 510


def _cell(place: int, said: int) -> int:
    row = 0 if place == 0 else 1 if place == 1 else 2 if place < PLACES[3] else 3
    number = 0
    if said >= 0:
        number = len(CONFIDENCES)
        while CONFIDENCES[number - 1] > said:
            number -= 1
    return row * _CLASSES + number


def _shifted(probability: float, luck: float) -> float:
    good = probability * luck
    return good / (good + 1.0 - probability)
