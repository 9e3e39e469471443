"""What is done to the logits of a stream's sample rows, kept up token by token.

Rule: what `shared.adjust` says, for any row of a step: its counts are those of the committed tokens and of the drafts
before it, so a drafted row meets the same logits that it would meet without drafts. Only streams that ask for something
have an `Adjuster`; the others cost nothing here.
Pure.

    commit --tokens--> Adjuster --row(drafts before it)--> Builder --Adjustments--> decoder
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.adjust import mask_of
from kernels.step import Adjustments
from shared.adjust import biases
from shared.errors import BadRequest
from shared.messages import Adjust, Generate
from shared.tokens import unpack

Ids = NDArray[np.int32]

_NOTHING = np.zeros(0, np.int32)


def refusal(adjust: Adjust, vocabulary_size: int) -> BadRequest | None:
    """Why these cannot be applied; None when they can."""
    packed = (adjust.biased, adjust.allowed, *adjust.bad_words)
    if any(len(ids) % 4 for ids in packed) or len(adjust.biases) != len(adjust.biased) or not all(adjust.bad_words):
        return BadRequest("packed ids must take 4 bytes each, every biased id one bias, and a bad word one id or more")
    if max((max(unpack(ids)) for ids in packed if ids), default=0) >= vocabulary_size:
        return BadRequest(f"logit_bias, allowed_token_ids and bad words must hold ids below {vocabulary_size}")
    numbers = (adjust.repetition_penalty, adjust.frequency_penalty, adjust.presence_penalty, *biases(adjust).tolist())
    if not np.isfinite(numbers).all() or adjust.repetition_penalty <= 0:
        return BadRequest("penalties and biases must be finite, and repetition_penalty above 0")
    return None


class Adjuster:
    """One stream's. `tokens` of the methods: prompt and answer as far as committed."""

    def __init__(self, request: Generate, prompt_length: int, vocabulary_size: int) -> None:
        adjust = self.adjust = request.adjust or Adjust()
        self._prompt_length = prompt_length
        self._stops = sorted({id for id in request.stop_token_ids if id < vocabulary_size})
        self._bad_words = [unpack(word) for word in adjust.bad_words]
        order = np.argsort(unpack(adjust.biased))
        self._biased = np.array(unpack(adjust.biased), np.int32)[order]
        self._biases = biases(adjust)[order]
        self._allowed = mask_of(np.array(unpack(adjust.allowed)), vocabulary_size) if adjust.allowed else None
        self._repeats = adjust.repetition_penalty != 1.0
        self._counts_answer = self._repeats or bool(adjust.frequency_penalty or adjust.presence_penalty)
        self._places: dict[int, int] = {}  # of each counted id in the arrays
        self._ids = np.zeros(16, np.int32)
        self._counts = np.zeros(16, np.int32)
        self._counted = 0  # tokens of the stream that are in the counts

    def counts(self, tokens: Sequence[int], drafts: Sequence[int]) -> tuple[Ids, Ids]:
        """Ids that stand before the token behind `drafts`, and how often the answer has each."""
        if not self._counts_answer:
            return _NOTHING, _NOTHING
        for index in range(self._counted, len(tokens)):
            if index >= self._prompt_length:
                place = self._place(tokens[index])
                self._counts[place] += 1
            elif self._repeats:
                self._place(tokens[index])
        self._counted = len(tokens)
        known = len(self._places)
        if not drafts:
            return self._ids[:known].copy(), self._counts[:known].copy()
        fresh = {id: known + number for number, id in enumerate(dict.fromkeys(
            id for id in drafts if id not in self._places))}
        counts = np.concatenate((self._counts[:known], np.zeros(len(fresh), np.int32)))
        for id in drafts:
            counts[self._places.get(id, fresh.get(id, -1))] += 1
        return np.concatenate((self._ids[:known], np.array([*fresh], np.int32))), counts

    def unwanted(self, tokens: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """Ids that are not chosen behind `drafts` if there is another, ascending."""
        length = len(tokens) - self._prompt_length + len(drafts)
        found = set(self._stops) if length < self.adjust.min_tokens else set()
        for word in self._bad_words:
            before = len(word) - 1
            if length >= before and _tail(tokens, drafts, before) == word[:-1]:
                found.add(word[-1])
        return sorted(found)

    def shifts(self, unwanted: list[int]) -> tuple[Ids, NDArray[np.float32]]:
        """Ids and what is added to their logits: bias, and minus infinity for the unwanted."""
        if not unwanted:
            return self._biased, self._biases
        kept = ~np.isin(self._biased, unwanted)
        ids = np.concatenate((self._biased[kept], np.array(unwanted, np.int32)))
        return ids, np.concatenate((self._biases[kept], np.full(len(unwanted), -np.inf, np.float32)))

    def walls(self) -> NDArray[np.uint32] | None:
        """The mask of what may be chosen at all; None: everything."""
        return self._allowed

    def _place(self, id: int) -> int:
        place = self._places.setdefault(id, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate((old, np.zeros_like(old))) for old in (self._ids, self._counts))
        self._ids[place] = id
        return place


class Builder:
    """Gathers the adjusted rows of one step."""

    def __init__(self, vocabulary_size: int) -> None:
        self._words = -(-vocabulary_size // 32)
        self._samples: list[int] = []
        self._penalties: list[tuple[float, float, float]] = []
        self._counted: list[Ids] = []
        self._counts: list[Ids] = []
        self._shifted: list[Ids] = []
        self._shifts: list[NDArray[np.float32]] = []
        self._mask_of: list[int] = []
        self._masks: list[NDArray[np.uint32]] = []

    def add(self, sample: int, adjuster: Adjuster, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        """Row `sample` of the step's sampled rows: the token behind `tokens` and `drafts`."""
        adjust = adjuster.adjust
        self._samples.append(sample)
        self._penalties.append((adjust.repetition_penalty, adjust.frequency_penalty, adjust.presence_penalty))
        ids, counts = adjuster.counts(tokens, drafts)
        self._counted.append(ids)
        self._counts.append(counts)
        unwanted = adjuster.unwanted(tokens, drafts)
        walls = adjuster.walls()
        if walls is not None:
            self._mask_of.append(len(self._masks))
            self._masks.append(without(walls, unwanted))
            unwanted = []
        else:
            self._mask_of.append(-1)
        shifted, shifts = adjuster.shifts(unwanted)
        self._shifted.append(shifted)
        self._shifts.append(shifts)

    def build(self) -> Adjustments:
        """All of them."""
        penalties = np.array(self._penalties, np.float32)
        return Adjustments(
            samples=np.array(self._samples, np.int32), repetition=penalties[:, 0].copy(),
            frequency=penalties[:, 1].copy(), presence=penalties[:, 2].copy(), count_starts=_starts(self._counted),
            counted=np.concatenate(self._counted), counts=np.concatenate(self._counts),
            shift_starts=_starts(self._shifted), shifted=np.concatenate(self._shifted),
            shifts=np.concatenate(self._shifts), mask_of=np.array(self._mask_of, np.int32),
            masks=np.array(self._masks, np.uint32).reshape(len(self._masks), self._words))


def without(mask: NDArray[np.uint32], unwanted: list[int]) -> NDArray[np.uint32]:
    """The mask without these ids, or as it is when nothing would be left."""
    if not unwanted:
        return mask
    ids = np.array(unwanted)
    less = mask.copy()
    np.bitwise_and.at(less, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    return less if less.any() else mask


def _tail(tokens: Sequence[int], drafts: Sequence[int], count: int) -> list[int]:
    """The last `count` of `tokens` and `drafts` together."""
    if count <= len(drafts):
        return list(drafts[len(drafts) - count:])
    return [*tokens[len(tokens) - count + len(drafts):], *drafts]


def _starts(parts: list[Any]) -> Ids:
    return np.cumsum([0, *map(len, parts)]).astype(np.int32)
