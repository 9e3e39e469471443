"""Whether a drafter pays for itself; one that does not is left alone for a while.

What drafts save is known from the steps themselves. What a drafter costs is not: beside its price it takes the bus, and
on the same machine the processor, from steps that have no drafts of it. So steps with it and without it are compared.

    efficiency = seconds that plain steps would have taken for the tokens that came, over the seconds that passed

Rules: measured, never guessed. A drafter is followed for a window of steps; if it seems to gain little, a short trial
without it says what plain steps are worth now. Each trial that it wins makes the next one come after twice as long. It
is left when it loses two trials one after the other, or when the time it saved is worth less than its own. Once left it
is tried again after a while, each time in vain after twice as long, and soon when a new stream comes, of which nothing
is known.
Pure.
"""

from typing import Literal

WINDOW_STEPS = 192
TRIAL_STEPS = 32
RETRY_STEPS = 64
# after a change, until drafts flow or have stopped flowing
SETTLE_STEPS = 6
# whoever gains this much is not put on trial
PLAIN_GAIN = 1.25
# to be left a drafter has to lose this much, to be taken back gain this much
LOSS = 0.99
GAIN = 1.02
LOSSES = 2
MOST_WINDOWS = 32  # between two trials
FIRST_PATIENCE = 256
LONGEST_PATIENCE = 16384
# a new stream is reason to try again, but not within so many steps
NEWS_STEPS = 128
BASELINE_MEMORY = 0.5

State = Literal["following", "trial without", "left", "trial with"]


class Payback:
    """`observe` each step without prompts that a drafter may hear of; `following` says whether it does."""

    def __init__(self) -> None:
        self.state: State = "following"
        self.gain = 0.0  # efficiency with it over that without, as judged last; 0: never judged
        self.why = ""  # it was left: slower, or dear
        self.times_left = 0
        self._baseline = 0.0  # efficiency without it; 0: unknown
        self._losses = 0
        self._windows = 0  # since the last trial
        self._windows_between = 1
        self._patience = FIRST_PATIENCE
        self._waited = 0
        self._news = False
        self._with = 0.0  # efficiency of the window before a trial
        self._saved_s = self._drafter_usd = self._worker_usd_per_s = 0.0
        self._start_over()

    @property
    def following(self) -> bool:
        return self.state in ("following", "trial with")

    def new_drafter(self) -> None:
        """Another drafter is followed from here: nothing is known of it."""
        baseline, times_left = self._baseline, self.times_left
        self.__init__()  # type: ignore[misc]
        self._baseline, self.times_left = baseline, times_left

    def new_stream(self) -> None:
        """A stream came that may be of another kind."""
        self._news = True

    def spend(self, drafter_usd: float) -> None:
        """The drafter worked for so much money."""
        self._drafter_usd += drafter_usd

    def observe(self, streams: int, tokens: int, seconds: float, plain_s: float, worker_usd_per_hour: float = 0.0
                ) -> bool:
        """A step and the wait before it gave `tokens`; without drafts one of as many streams takes `plain_s`.

        Whether `following` changed.
        """
        self._steps += 1
        if self._steps <= 0:
            return False
        worth = tokens / streams * plain_s
        self._worth_s += worth
        self._seconds += seconds
        self._saved_s += worth - seconds
        self._worker_usd_per_s = worker_usd_per_hour / 3600
        before = self.following
        match self.state:
            case "following" if self._steps >= WINDOW_STEPS:
                self._end_window()
            case "trial without" if self._steps >= TRIAL_STEPS:
                self._learn_baseline()
                self._judge()
            case "left":
                self._wait()
            case "trial with" if self._steps >= RETRY_STEPS:
                self._end_retry()
        return before != self.following

    def _end_window(self) -> None:
        self._with = self._efficiency
        self._windows += 1
        plain = self._baseline or 1.0
        dear = self._is_dear()
        self._saved_s = self._drafter_usd = 0.0
        if dear:
            self._lose("dear")
        elif self._with > PLAIN_GAIN * plain:
            self.gain, self._losses = self._with / plain, 0
        elif self._windows >= self._windows_between or self._with < plain:
            self._enter("trial without")
        if self.state == "following":
            self._start_over(settle=False)

    def _judge(self) -> None:
        self.gain = self._over_plain()
        self._windows = 0
        if self.gain < LOSS:
            self._windows_between = 1
            self._lose("slower")
        else:
            self._losses = 0
            self._windows_between = min(2 * self._windows_between, MOST_WINDOWS)
        if self.state == "trial without":
            self._enter("following")

    def _is_dear(self) -> bool:
        """Whether its time costs more than it saves. Without prices nothing is dear."""
        return self._worker_usd_per_s > 0.0 and self._drafter_usd > max(0.0, self._saved_s) * self._worker_usd_per_s

    def _lose(self, why: str) -> None:
        self._losses += 1
        if self._losses >= LOSSES:
            self._leave(why)

    def _leave(self, why: str) -> None:
        self.why = why
        self.times_left += 1
        self._losses = self._waited = 0
        self._enter("left")

    def _wait(self) -> None:
        self._waited += 1
        if self._steps >= TRIAL_STEPS:
            self._learn_baseline()
            self._start_over(settle=False)
        if self._waited >= self._patience or (self._news and self._waited >= NEWS_STEPS):
            self._news = False
            self._saved_s = self._drafter_usd = 0.0
            self._enter("trial with")

    def _end_retry(self) -> None:
        self._with = self._efficiency
        self.gain = self._over_plain()
        if self.gain > GAIN and not self._is_dear():
            self._windows, self._windows_between = 0, 1
            self._patience = max(FIRST_PATIENCE, self._patience // 2)
            self._enter("following")
            return
        self._patience = min(2 * self._patience, LONGEST_PATIENCE)
        self._waited = 0
        self._enter("left")

    def _learn_baseline(self) -> None:
        seen = self._efficiency
        self._baseline += (BASELINE_MEMORY if self._baseline else 1.0) * (seen - self._baseline)

    def _over_plain(self) -> float:
        """What the drafter gained; 1 while plain steps are worth nothing that could be measured."""
        return self._with / self._baseline if self._baseline else 1.0

    @property
    def _efficiency(self) -> float:
        return self._worth_s / self._seconds if self._seconds > 0.0 else 1.0

    def _enter(self, state: State) -> None:
        self.state = state
        self._start_over()

    def _start_over(self, settle: bool = True) -> None:
        self._steps = -SETTLE_STEPS if settle else 0
        self._worth_s = self._seconds = 0.0
