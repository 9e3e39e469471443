"""Which drafts a step verifies, and what they brought.

Rules: a grammar's forced tokens come first, since nobody has to guess them; drafts come into what is left of the
budget, where they are worth more than their rows cost. Drafts take only blocks that nobody holds.
Pure.
"""

from collections.abc import Callable, Iterable

from shared.messages import Proposal
from worker.drafts import DraftBook, Found, can_pay, rows_worth_verifying
from worker.sequence import Sequence
from worker.step import Step, Work
from worker.step_cost import StepCost
from worker.survival import Survival

Room = Callable[[Sequence, int], int]  # how many of so many rows of a sequence have a block


class Speculation:
    """The drafts of one scheduler's streams. The drafter is met by name; what it is like is learned here."""

    def __init__(self, max_draft_tokens: int, max_forced_tokens: int, vocabulary_size: int, cost: StepCost) -> None:
        self.drafts = DraftBook(vocabulary_size)
        self.survival = Survival()
        self.drafter = ""  # whose drafts come; nobody's at first
        self.drafter_usd_per_hour = 0.0
        self.paying = True  # whether the drafter pays for itself; the owner says so
        self.wanted = False  # whether drafts are wanted for the streams there are now
        self.draft_tokens = 0
        self.accepted_draft_tokens = 0
        self.late_draft_tokens = 0  # proposed for places that were taken when they came
        self.forced_tokens = 0  # that came with others, because a grammar left no choice
        self.accepted_by_place = [0] * max_draft_tokens
        self.verified_steps = 0  # drafts of a stream in a step
        self.saved_s = 0.0  # by accepted drafts, the rows and waits of all drafts taken off
        self._most = max_draft_tokens
        self._most_forced = max_forced_tokens
        self._cost = cost
        self._can_pay = True  # whether drafts could pay when that was last asked
        self._plain_s = 0.0  # of the step under way, without its drafts

    def meet(self, name: str, usd_per_hour: float, streams: int) -> None:
        """Another drafter is followed, or none, by so many streams: nothing is known of it."""
        self.drafter = name
        self.drafter_usd_per_hour = usd_per_hour
        self.paying = True
        self.decide(streams)

    def decide(self, streams: int) -> bool:
        """Whether a drafter is followed, pays for itself, and can for so many streams: `wanted`."""
        self.wanted = self._most > 0 and self.drafter != "" and self.paying
        if self.wanted:
            self.wanted = self._can_pay = can_pay(streams, self._cost.rows_s, self._can_pay)
        return self.wanted

    def offer(self, sequence: Sequence, proposal: Proposal, seconds: float) -> None:
        """Keep a proposal for `sequence`, on which the drafter spent `seconds`."""
        sequence.drafter = self.drafter
        sequence.drafter_s += seconds
        sequence.drafter_usd += seconds * self.drafter_usd_per_hour / 3600
        if self.drafts.offer(proposal) and not proposal.assumed:
            late = min(len(proposal.tokens) // 4, max(0, len(sequence.tokens) - proposal.base_length))
            sequence.late_drafts += late
            self.late_draft_tokens += late

    # --- parts of plan -----------------------------------------------------------------------------------------------

    def add_forced(self, works: Iterable[Work], budget: int, room: Room) -> None:
        """Drafts that a grammar leaves no choice about: they are right, so each saves a step; nobody has to draft."""
        for work in works:
            sequence = work.sequence
            if not work.samples or sequence.adjuster is None or sequence.adjuster.grammar is None:
                continue
            most = min(budget, self._most_forced, sequence.end_length - len(sequence.tokens) - 1)
            forced = sequence.adjuster.grammar.forced(most)
            forced = forced[:room(sequence, len(forced))]
            if forced:
                work.drafts, work.forced = forced, True
                work.rows += len(forced)
                budget -= len(forced)

    def add_drafts(self, works: Iterable[Work], budget: int, streams: int, room: Room, now: float) -> None:
        """Fill the budget with the drafts that are worth it to so many streams."""
        drafted: list[tuple[Work, Found]] = []
        for work in works:
            if not work.samples:
                continue
            sequence = work.sequence
            most = min(self._most, sequence.end_length - len(sequence.tokens) - 1)
            found = self.drafts.best(sequence.key, sequence.tokens, most) if most > 0 and not work.forced else None
            if found is not None and sequence.adjuster is not None and sequence.adjuster.grammar is not None:
                admitted = sequence.adjuster.grammar.admitted(found.tokens)
                found = Found(found.tokens[:admitted], found.stated[:admitted]) if admitted else None
            if found is not None:
                drafted.append((work, found))
        if not drafted or budget <= 0:
            return
        reach = [self.survival.reach(self.drafter, found.stated, work.sequence.luck) for work, found in drafted]
        worth = rows_worth_verifying(reach, streams, lambda drafts: self._cost.rows_s(streams + drafts) or 1.0, budget)
        for (work, found), taken in zip(drafted, worth, strict=True):
            sequence = work.sequence
            taken = room(sequence, taken)
            if taken:
                work.drafts, work.stated = found.tokens[:taken], found.stated[:taken]
                work.rows += taken
                sequence.verifying_steps += 1
                sequence.verified_from = now if sequence.verified_from is None else sequence.verified_from
            sequence.luck = self.survival.pass_by(self.drafter, found.stated, taken, sequence.luck)

    # --- parts of commit ---------------------------------------------------------------------------------------------

    def count_costs(self, step: Step, held_s: float) -> None:
        """What the step cost beyond a plain one falls on all its streams; what drafts save is added when they agree."""
        drafts = sum(len(work.drafts) for work in step.works if not work.forced)
        if not drafts and not held_s:
            return
        streams = step.streams
        extra_s = held_s + self._cost.rows_s(streams + drafts) - self._cost.rows_s(streams)
        for work in step.works:
            if work.samples:
                work.sequence.saved_s -= extra_s
        self.saved_s -= extra_s * streams
        self._plain_s = self._cost.rows_s(streams)

    def judge(self, work: Work, chosen: list[int]) -> int:
        """How many drafts agree with what was chosen in their place."""
        sequence, drafts = work.sequence, work.drafts
        agreed = 0
        while agreed < len(drafts) and drafts[agreed] == chosen[agreed]:
            agreed += 1
        if work.forced:
            self.forced_tokens += agreed
            return agreed
        for place in range(agreed):
            self.accepted_by_place[place] += 1
        sequence.luck = self.survival.learn(self.drafter, work.stated, agreed, sequence.luck)
        sequence.drafted += len(drafts)
        sequence.accepted_drafts += agreed
        sequence.accepted_counts[agreed] = sequence.accepted_counts.get(agreed, 0) + 1
        sequence.saved_s += agreed * self._plain_s
        self.saved_s += agreed * self._plain_s
        self.verified_steps += 1
        self.draft_tokens += len(drafts)
        self.accepted_draft_tokens += agreed
        return agreed
