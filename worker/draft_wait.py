"""Whether the engine holds a step back for drafts that are on their way.

Drafts made from the newest tokens arrive while the next step runs already, so that step goes without them or with older
ones. Waiting gives every step fresh drafts and costs the wait.
Rule: measured, never guessed. Steps are counted in windows, each with one answer for all of its steps; a short trial of
the other answer now and then decides by tokens a second. With no drafter, no history or many streams the wait is zero.
Whoever did not answer a wait in time is not waited for again until it has answered a step: a drafter that dies in
mid-stream costs one wait.
Pure.
"""

# beyond so many streams a step is long and full anyway, and holding it back is paid for by all of them
MOST_STREAMS = 8
WINDOW_STEPS = 16
TRIAL_STEPS = 8
# the other answer is tried after this many windows, each time it loses after twice as many
FIRST_PATIENCE = 1
LONGEST_PATIENCE = 256
# a trial has to win by this much to change the answer
MARGIN = 1.03
# a wait lasts this many times what drafts usually take, and never longer than a step
SLACK = 2.0
LATENCY_MEMORY = 0.2


class DraftWait:
    """`seconds` before each step, `observe` after it, `answered` when fresh drafts came."""

    def __init__(self) -> None:
        self.waiting = False  # the answer of the present window
        self.latency_s = 0.0  # from telling the drafter to its fresh drafts; 0 while unknown
        self._silent = False  # the last wait was in vain, and nothing has come since
        self._trial = False
        self._rate_before = 0.0
        self._patience = FIRST_PATIENCE
        self._windows = 0
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0

    def seconds(self, streams: int, step_s: float) -> float:
        """How long the next step may be held back."""
        if not self.waiting or self._silent or not self.latency_s or not 0 < streams <= MOST_STREAMS:
            return 0.0
        return min(SLACK * self.latency_s, step_s)

    def answered(self, latency_s: float) -> None:
        """Fresh drafts came so long after the drafter was told."""
        known = self.latency_s or latency_s
        self.latency_s = max(known + LATENCY_MEMORY * (latency_s - known), 1e-6)
        self._silent = False

    def missed(self) -> None:
        """A wait was in vain."""
        self._silent = True

    def observe(self, streams: int, tokens: int, seconds: float) -> None:
        """A step and the wait before it gave so many tokens in so many seconds."""
        if not self.latency_s or streams > MOST_STREAMS:
            return
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        if self._steps < (TRIAL_STEPS if self._trial else WINDOW_STEPS):
            return
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._steps = self._tokens = 0
        self._seconds = 0.0
        if self._trial:
            self._judge(rate)
        else:
            self._windows += 1
            if self._windows >= self._patience:
                self._rate_before = rate
                self._trial = True
                self.waiting = not self.waiting

    def _judge(self, rate: float) -> None:
        self._trial = False
        self._windows = 0
        if rate > MARGIN * self._rate_before:
            self._patience = FIRST_PATIENCE
        else:
            self.waiting = not self.waiting
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
