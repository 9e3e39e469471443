"""Which proposed tokens are worth verifying.

Rules: a proposal is used only where it continues what was really committed, so a stale or lying drafter costs rows and
never a token; how many drafted rows a step takes is one choice for the whole batch, and is made in tokens a second.
Pure.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from shared.messages import Proposal
from shared.tokens import unpack
from worker.sequence import Key

PROPOSALS_PER_STREAM = 32
LONGEST_PROPOSAL = 256
# a condition less likely than this is waited for; guessing it too halves the share of drafts that agree (47 to 25 %)
LEAST_CONDITION = 0.2
# how fast a stream's measured acceptance follows what happens, in verified drafts
ACCEPTANCE_MEMORY = 0.1
# a stream whose drafts were left out drifts back by this much a step, so that it is tried again one day
ACCEPTANCE_DRIFT = 0.02
FIRST_ACCEPTANCE = 0.6
# a batch whose step takes less than this many times what its rows cost is not speculated: of what a draft could save
# there is so little that an error of the estimate, or the drafter's own work beside the step, would turn it into a loss
LEAST_SAVING = 1.25


class Draft(NamedTuple):
    """A continuation: `tokens` behind the first `base` tokens of the stream, `assumed` of them a condition."""

    base: int
    assumed: int
    tokens: list[int]
    likely: float = 1.0  # that the condition comes true, as the drafter says


class DraftBook:
    """The proposals for streams that are open. Bounded; what no longer fits falls out when it is looked at."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._streams: dict[Key, list[Draft]] = {}
        self.wanted = 0  # times that a stream could take drafts
        self.used = 0  # drafts that fitted the stream when wanted
        self.foreseen = 0  # of those, ones whose condition had come true: an outcome that the drafter was prepared for
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
        likely = prod(proposal.confidence[:assumed]) / 255 ** assumed if proposal.confidence else 1.0
        drafts.append(Draft(proposal.base_length, assumed, tokens, likely))
        return True

    def best(self, key: Key, committed: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that a proposal has behind exactly `committed`. May be empty.

        Of several the youngest; of one age, one whose condition came true before one that still guesses it. A condition
        that is unlikely is not guessed at all.
        """
        self.wanted += 1
        drafts = self._streams.get(key)
        if not drafts:
            return []
        length = len(committed)
        kept = []
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
        if chosen is None:
            return []
        self.used += 1
        start = length - chosen.base
        self.foreseen += 0 < chosen.assumed <= start
        return chosen.tokens[start:start + most]


class Candidate(NamedTuple):
    """One stream's draft, before it is decided how much of it runs."""

    acceptance: float
    length: int


def updated_acceptance(acceptance: float, accepted: int, verified: int, memory: float = ACCEPTANCE_MEMORY) -> float:
    """The measured probability after `verified` drafts of which the first `accepted` agreed.

    Drafts behind the first difference were never tried: they say nothing.
    """
    for _ in range(accepted):
        acceptance += memory * (1.0 - acceptance)
    if accepted < verified:
        acceptance -= memory * acceptance
    return acceptance


def drifted_acceptance(acceptance: float) -> float:
    """The estimate of a stream whose draft was not tried in this step."""
    return acceptance + ACCEPTANCE_DRIFT * (FIRST_ACCEPTANCE - acceptance)


def can_pay(streams: int, step_s: float, row_s: float) -> bool:
    """Whether drafts that are all right would save enough: a plain step of so many streams takes `step_s`."""
    return step_s >= LEAST_SAVING * streams * row_s


def rows_worth_verifying(candidates: Sequence[Candidate], sure_tokens: int, step_s: float, row_s: float,
                         budget: int) -> list[int]:
    """How many drafts of each candidate to verify, so that expected tokens a second are highest.

    `sure_tokens` come out of a step anyway, which without drafts takes `step_s`; each draft adds `row_s`.
    Draft j of a stream counts only if all before it agree: its worth is acceptance ** j. The most promising row is
    taken while it is worth more than its time at the present rate. Takes at most `budget` rows.
    """
    worth = sorted(((candidate.acceptance ** (place + 1), index)
                    for index, candidate in enumerate(candidates) for place in range(candidate.length)), reverse=True)
    taken = [0] * len(candidates)
    tokens, seconds = float(sure_tokens), step_s
    for survival, index in worth[:budget]:
        if survival * seconds <= tokens * row_s:
            break
        tokens += survival
        seconds += row_s
        taken[index] += 1
    return taken
