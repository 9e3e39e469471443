"""How much a drafter may prepare beyond the likeliest continuation of each stream.

Rules: measured, never guessed. Rounds come so often and a proposal takes so long; whoever works more than its share of
the time between two rounds is late for the next one, and takes the time of a worker on the same machine. Time is what
the clock says, so that a machine which is busy otherwise counts as slow. What waits comes first: with a backlog nothing
is prepared.
Pure.
"""

# of the time between two rounds
SHARE = 0.25
# for whoever works in a thread of its own: a worker that waits for its drafts loses less than by having none
THREAD_SHARE = 0.9
MEMORY = 0.1
# for each stream, while nothing is measured
FIRST_BRANCHES = 1
# a round may take this long however close rounds are: an answer to the first streams only would be worse
LEAST_ROUND_S = 0.002
# rounds further apart than this say nothing about how often they come
PAUSE_S = 1.0


class Budget:
    """`begin` a round, ask for `seconds` and `branches`, `end` it."""

    def __init__(self, share: float = SHARE) -> None:
        self.share = share
        self.interval_s: float | None = None  # between two rounds
        self.proposal_s: float | None = None  # what one takes, with its share of taking in what was said
        self._began = 0.0
        self._asked = float("-inf")  # when the last round began for which somebody waits
        self._worked_s = 0.0
        self._counted_from: float | None = None

    def begin(self, now: float, asked: bool = True) -> None:
        """A round begins. `asked`: because somebody said something, and not only to catch up."""
        self._began = now
        if asked:
            if now - self._asked <= PAUSE_S:
                self.interval_s = _moved(self.interval_s, now - self._asked)
            self._asked = now

    @property
    def seconds(self) -> float:
        """Of work in this round; infinite while nothing is known."""
        return max(LEAST_ROUND_S, self.share * self.interval_s) if self.interval_s is not None else float("inf")

    def branches(self, streams: int, most: int, backlog: bool) -> int:
        """How many conditions to prepare for each of so many streams, at most `most`."""
        if backlog or streams <= 0:
            return 0
        if self.interval_s is None or self.proposal_s is None:
            return min(most, FIRST_BRANCHES)
        each_s = streams * self.proposal_s
        return max(0, min(most, int(self.share * self.interval_s / each_s) - 1)) if each_s > 0 else most

    def end(self, now: float, proposals: int) -> float:
        """The round gave so many proposals; how many seconds it took."""
        seconds = max(0.0, now - self._began)
        self._worked_s += seconds
        if proposals:
            self.proposal_s = _moved(self.proposal_s, seconds / proposals)
        return seconds

    def busy(self, now: float) -> float:
        """The share of the time since the last call that was worked, 0 to 1."""
        passed = now - self._counted_from if self._counted_from is not None else 0.0
        share = min(1.0, self._worked_s / passed) if passed > 0 else 0.0
        self._counted_from, self._worked_s = now, 0.0
        return share


def _moved(known: float | None, seen: float) -> float:
    return seen if known is None else known + MEMORY * (seen - known)
