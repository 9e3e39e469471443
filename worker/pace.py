"""How often the drafter is told how the streams go on.

To be told costs a message, a wake-up of another process and its answer, which on the same machine are taken from the
step under way: a seventh of it with one stream of the default model on two cores. Where nothing that a drafter says
comes true it is enough to tell it now and then: it learns the whole text all the same, a few steps later.

Rule: after each step while drafts make up a good part of what streams say; less and less often while they do not. Many
streams that say much in a step are as good a reason as one that says the same in many steps.
Pure.
"""

# tokens that came without the help of drafts, and of how many steps one is told from there on
PACES = ((0, 1), (6, 2), (16, 4), (60, 8), (150, 16))


# drafts that make up this share of a step's tokens are help
HELP = 0.125


class Pace:
    """`tell` after each step."""

    def __init__(self) -> None:
        self._accepted = 0  # draft tokens, ever
        self._silent = 0
        self._untold = 0

    def tell(self, tokens: int, accepted_tokens: int, urgent: bool = False) -> bool:
        """Whether the drafter hears of this step, which brought `tokens`. `accepted_tokens`: drafts accepted, ever."""
        helped = accepted_tokens - self._accepted >= max(1.0, HELP * tokens)
        self._silent = 0 if helped else self._silent + tokens
        self._accepted = accepted_tokens
        self._untold += 1
        every = next(every for least, every in reversed(PACES) if self._silent >= least)
        if self._untold < every and not urgent:
            return False
        self._untold = 0
        return True
