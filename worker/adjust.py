"""What is done to the logits of a stream's sample rows, kept up token by token.

Rule: what `shared.adjust` says, for any row of a step: its counts are those of the committed tokens and of the drafts
before it, so a drafted row meets the same logits that it would meet without drafts. Only streams that ask for something
have an `Adjuster`; the others cost nothing here.
Pure.

    commit --tokens--> Adjuster --row(drafts before it)--> Builder --Adjustments--> decoder --fill--> GrammarState
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.adjust import mask_of
from kernels.step import Adjustments
from shared.adjust import LONGEST_BAD_WORD, biases
from shared.errors import BadRequest
from shared.messages import Adjust, Generate
from shared.tokens import unpack
from worker.grammar import GrammarState

Ids = NDArray[np.int32]
# each writes the masks of one stream's rows
Fills = Sequence[Callable[[], None]]

# each is looked for behind every row
MOST_BAD_WORDS = 256

_NOTHING = np.zeros(0, np.int32)


def refusal(adjust: Adjust, vocabulary_size: int) -> BadRequest | None:
    """Why these cannot be applied; None when they can."""
    packed = (adjust.biased, adjust.allowed, *adjust.bad_words)
    if any(len(ids) % 4 for ids in packed) or len(adjust.biases) != len(adjust.biased) or not all(adjust.bad_words):
        return BadRequest("packed ids must take 4 bytes each, every biased id one bias, and a bad word one id or more")
    if len(adjust.bad_words) > MOST_BAD_WORDS or max(map(len, adjust.bad_words), default=0) > 4 * LONGEST_BAD_WORD:
        return BadRequest(f"there may be {MOST_BAD_WORDS} bad words of {LONGEST_BAD_WORD} tokens at most: name fewer")
    if len(set(unpack(adjust.biased))) < len(adjust.biased) // 4:
        return BadRequest("every token has one bias at most")
    if max((max(unpack(ids)) for ids in packed if ids), default=0) >= vocabulary_size:
        return BadRequest(f"logit_bias, allowed_token_ids and bad words must hold ids below {vocabulary_size}")
    numbers = (adjust.repetition_penalty, adjust.frequency_penalty, adjust.presence_penalty, *biases(adjust).tolist())
    if not np.isfinite(numbers).all() or adjust.repetition_penalty <= 0:
        return BadRequest("penalties and biases must be finite, and repetition_penalty above 0")
    return None


class Adjuster:
    """One stream's. `tokens` of the methods: prompt and answer as far as committed."""

    def __init__(self, request: Generate, prompt_length: int, vocabulary_size: int,
                 grammar: GrammarState | None = None) -> None:
        self.grammar = grammar
        self.dead: set[int] = set()  # of the rows of the last step, those with nothing to choose
        adjust = self.adjust = request.adjust or Adjust()
        self._prompt_length = prompt_length
        stops = {id for id in request.stop_token_ids if id < vocabulary_size}
        # an end that is not to end the answer is not wanted either
        ends = grammar.end_ids.difference(request.stop_token_ids) if grammar is not None else set()
        words = [unpack(word) for word in adjust.bad_words]
        alone = {word[0] for word in words if len(word) == 1}
        self._unwanted_early, self._unwanted = sorted(stops | ends | alone), sorted(ends | alone)
        self._bad_words: dict[int, list[list[int]]] = {}  # of two ids or more, by the last but one
        for word in words:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)
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
        if self._counted < self._prompt_length:
            if self._repeats:
                self._place_all(tokens[:self._prompt_length])
            self._counted = self._prompt_length
        for index in range(self._counted, len(tokens)):
            place = self._place(tokens[index])
            self._counts[place] += 1
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
        always = self._unwanted_early if length < self.adjust.min_tokens else self._unwanted
        found = set()
        for word in self._bad_words.get(drafts[-1] if drafts else tokens[-1], ()):
            before = len(word) - 1
            if length >= before and _tail(tokens, drafts, before) == word[:-1]:
                found.add(word[-1])
        return sorted(found.union(always)) if found else always

    def shifts(self, unwanted: list[int]) -> tuple[Ids, NDArray[np.float32]]:
        """Ids and what is added to their logits: bias, and minus infinity for the unwanted."""
        if not unwanted:
            return self._biased, self._biases
        kept = ~np.isin(self._biased, unwanted)
        ids = np.concatenate((self._biased[kept], np.array(unwanted, np.int32)))
        return ids, np.concatenate((self._biases[kept], np.full(len(unwanted), -np.inf, np.float32)))

    @property
    def walled(self) -> bool:
        """Whether there are tokens that may not be chosen at all."""
        return self._allowed is not None or self.grammar is not None

    def fill(self, masks: NDArray[np.uint32], drafts: Sequence[int], unwanted: list[list[int]]) -> None:
        """Masks of the rows behind the committed tokens and behind each of `drafts`; `unwanted` ids of each row."""
        self.dead.clear()
        if self.grammar is not None:
            self.grammar.fill(masks, drafts)
            if self.grammar.broken:
                masks[:] = 0
        elif self._allowed is not None:
            masks[:] = self._allowed
        for row, mask in enumerate(masks):
            if self._allowed is not None:
                mask &= self._allowed
            if mask.any():
                mask[:] = without(mask, unwanted[row])
            else:
                # the step goes on for the others; `commit` ends this stream
                self.dead.add(row)
                mask[:] = ~np.uint32(0)

    def _place_all(self, ids: Sequence[int]) -> None:
        """The first there are."""
        self._ids = np.unique(np.array(ids, np.int32))
        self._counts = np.zeros_like(self._ids)
        self._places = {id: place for place, id in enumerate(self._ids.tolist())}

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
        self._masks = 0
        self._walled: list[_Walled] = []

    def add(self, sample: int, adjuster: Adjuster, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        """The rows behind `tokens` and behind each of `drafts`: number `sample`, `sample + 1`, ... of the sampled."""
        adjust = adjuster.adjust
        walled = _Walled(adjuster, drafts, self._masks, [])
        for row in range(len(drafts) + 1):
            before = drafts[:row]
            self._samples.append(sample + row)
            self._penalties.append((adjust.repetition_penalty, adjust.frequency_penalty, adjust.presence_penalty))
            ids, counts = adjuster.counts(tokens, before)
            self._counted.append(ids)
            self._counts.append(counts)
            unwanted = adjuster.unwanted(tokens, before)
            if adjuster.walled:
                self._mask_of.append(self._masks)
                self._masks += 1
                walled.unwanted.append(unwanted)
                unwanted = []
            else:
                self._mask_of.append(-1)
            shifted, shifts = adjuster.shifts(unwanted)
            self._shifted.append(shifted)
            self._shifts.append(shifts)
        if walled.unwanted:
            self._walled.append(walled)

    def build(self, fill_masks: Callable[[Fills], None]) -> Adjustments:
        """All of them. What a grammar permits is found out when the decoder asks for it, by `fill_masks`."""
        penalties = np.array(self._penalties, np.float32)
        masks = np.zeros((self._masks, self._words), np.uint32)
        fills = [partial(walled.adjuster.fill, masks[walled.first:walled.first + len(walled.unwanted)], walled.drafts,
                         walled.unwanted) for walled in self._walled]
        return Adjustments(
            samples=np.array(self._samples, np.int32), repetition=penalties[:, 0].copy(),
            frequency=penalties[:, 1].copy(), presence=penalties[:, 2].copy(), count_starts=_starts(self._counted),
            counted=np.concatenate(self._counted), counts=np.concatenate(self._counts),
            shift_starts=_starts(self._shifted), shifted=np.concatenate(self._shifted),
            shifts=np.concatenate(self._shifts), mask_of=np.array(self._mask_of, np.int32), masks=masks,
            fill=partial(fill_masks, fills) if fills else None)


class _Walled(NamedTuple):
    """Rows of one stream that have masks, from row `first` of them on; and what is not wanted in each."""

    adjuster: Adjuster
    drafts: Sequence[int]
    first: int
    unwanted: list[list[int]]


def fill_all(fills: Fills) -> None:
    """One after the other."""
    for fill in fills:
        fill()


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
