"""Which proposed tokens are worth verifying.

Rules: a proposal is used only where it continues what was really committed, so a stale or lying drafter costs rows and
never a token; how many drafted rows a step takes is one choice for the whole batch, and is made in tokens a second.
Pure.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from shared.messages import Proposal
from shared.tokens import unpack
from worker.sequence import Key
from worker.survival import UNSAID

PROPOSALS_PER_STREAM = 32
LONGEST_PROPOSAL = 256
# a condition less likely than this is waited for; guessing it too halves the share of drafts that agree (47 to 25 %)
LEAST_CONDITION = 0.2
# what drafts cost is taken for so much more, lest an error of the estimate turn a small gain into a loss
CAUTION = 1.1
# a batch in which one or two right drafts a stream would save less than this is not speculated: there is so little to
# save that the drafter's own work beside the step would turn it into a loss. It is again from a little above
LEAST_SAVING = 1.25
AGAIN_SAVING = 1.35
HOPED_FOR = (1, 2)


class Draft(NamedTuple):
    """A continuation: `tokens` behind the first `base` tokens of the stream, `assumed` of them a condition."""

    base: int
    assumed: int
    tokens: list[int]
    stated: list[int]  # of each of `tokens`, what the drafter says of it: 0 to 255, or UNSAID
    likely: float = 1.0  # that the condition comes true, as the drafter says


class Found(NamedTuple):
    """What a proposal has behind a text: tokens, and what its drafter says of each."""

    tokens: list[int]
    stated: list[int]


class DraftBook:
    """The proposals for streams that are open. Bounded; what no longer fits falls out when it is looked at."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._streams: dict[Key, list[Draft]] = {}
        self.wanted = 0  # times that a stream could take drafts
        self.used = 0  # drafts that fitted the stream when wanted
        self.foreseen = 0  # of those, ones whose condition had come true: another outcome than the likeliest
        self.prepared = 0  # times that a stream went on and outcomes of that had been prepared for
        self.hits = 0  # of those, the one that came was among them
        self.stale = 0  # proposals that fell out unused

    def open(self, key: Key) -> None:
        self._streams.setdefault(key, [])

    def close(self, key: Key) -> None:
        self._streams.pop(key, None)

    def offer(self, proposal: Proposal) -> bool:
        """Keep a proposal for its stream. False when the stream is not open or the tokens cannot be."""
        drafts = self._streams.get(Key(proposal.request_id, proposal.attempt))
        if drafts is None or len(proposal.assumed) % 4 or len(proposal.tokens) % 4 or proposal.base_length < 0:
            return False
        tokens = unpack(proposal.assumed) + unpack(proposal.tokens)
        if not tokens or len(tokens) > LONGEST_PROPOSAL or max(tokens) >= self._vocabulary_size:
            return False
        if len(drafts) >= PROPOSALS_PER_STREAM:
            drafts.pop(0)
            self.stale += 1
        assumed = len(proposal.assumed) // 4
        stated = list(proposal.confidence) if len(proposal.confidence) == len(tokens) else [UNSAID] * len(tokens)
        likely = prod(proposal.confidence[:assumed]) / 255 ** assumed if proposal.confidence else 1.0
        drafts.append(Draft(proposal.base_length, assumed, tokens, stated, likely))
        return True

    def best(self, key: Key, committed: Sequence[int], most: int) -> Found | None:
        """Up to `most` tokens that a proposal has behind exactly `committed`, if one has.

        Of several the youngest; of one age, one whose condition came true before one that still guesses it. A condition
        that is unlikely is not guessed at all.
        """
        self.wanted += 1
        drafts = self._streams.get(key)
        if not drafts:
            return None
        length = len(committed)
        kept = []
        # those for this very text were made when all was known
        prepared = any(draft.base < length for draft in drafts)
        chosen: Draft | None = None
        rank = (-1, False)
        for draft in drafts:
            behind = length - draft.base
            if behind < 0:
                kept.append(draft)
            elif behind < len(draft.tokens) and committed[draft.base:] == draft.tokens[:behind]:
                kept.append(draft)
                met = behind >= draft.assumed
                if (met or draft.likely >= LEAST_CONDITION) and (draft.base, met) > rank:
                    chosen, rank = draft, (draft.base, met)
        self.stale += len(drafts) - len(kept)
        self._streams[key] = kept
        if prepared:
            self.prepared += 1
            self.hits += any(draft.base < length for draft in kept)
        if chosen is None:
            return None
        self.used += 1
        start = length - chosen.base
        self.foreseen += 0 < chosen.assumed <= start
        return Found(chosen.tokens[start:start + most], chosen.stated[start:start + most])


def can_pay(streams: int, seconds: Callable[[int], float], now: bool = False) -> bool:
    """Whether a few right drafts for each stream would save enough; `seconds`: what a step of so many rows takes.

    `now`: they did so far. It takes more to begin than to go on, so that one stream more or less does not change it.
    """
    least = LEAST_SAVING if now else AGAIN_SAVING
    plain_s = seconds(streams)
    return any((1 + drafts) * plain_s >= least * seconds(streams * (1 + drafts)) for drafts in HOPED_FOR)


def rows_worth_verifying(candidates: Sequence[Sequence[float]], sure_tokens: int, seconds: Callable[[int], float],
                         budget: int) -> list[int]:
    """How many drafts of each candidate to verify, so that expected tokens a second are highest.

    `candidates`: of each stream's draft, how likely the stream gets as far as each token. `sure_tokens` come out of a
    step anyway; `seconds(n)`: what it takes with n drafts. Rows come in blocks, so that a row that does not pay may be
    followed by one that does: of all numbers of rows the best is taken, of equals the smallest. At most `budget`.
    """
    worth = sorted(((survival, -place, -index) for index, candidate in enumerate(candidates)
                    for place, survival in enumerate(candidate)), reverse=True)[:budget]
    tokens, plain_s = float(sure_tokens), seconds(0)
    best_rate, best = tokens / plain_s, 0
    for count, (survival, _, _) in enumerate(worth, 1):
        tokens += survival
        if (rate := tokens / (plain_s + CAUTION * (seconds(count) - plain_s))) > best_rate:
            best_rate, best = rate, count
    taken = [0] * len(candidates)
    for _, _, index in worth[:best]:
        taken[-index] += 1
    return taken
