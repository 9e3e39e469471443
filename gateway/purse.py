"""What one gateway may spend of one tenant's budget on one day without asking: its lease, as requests see it.

    reserve --> held --settle--> used, the rest is free again

Rules: what is held and what is free together are what is left of the lease, never more. What was delivered is settled
at its price also where the lease holds less, which `Books.settle` makes up for.
Pure. Money in nano-dollars, times in monotonic seconds.
"""

from gateway.state.budget import Budget, Granted
from gateway.tenants import Limits
from shared.errors import MillError, RateLimited
from shared.pricing import shown

# of the tightest limit: a gateway asks this often at least, and keeps no more than this from the others
LEASE_SHARE = 16
# of a budget: whoever passes one of these is told of in the log
SHARES = (0.5, 0.75, 0.9)
# how long an answer of the database that nothing is left holds, so that nobody can make a gateway ask all the time
REFUSED_S = 1.0


class BudgetSpent(RateLimited):
    """Coming back later helps on another day only."""

    type, code, retryable = "insufficient_quota", "insufficient_quota", False


class Purse:
    """One tenant on one day."""

    def __init__(self, tenant: str, day: str, now_s: float) -> None:
        self.tenant = tenant
        self.day = day
        self.lease = ""
        self.left = 0  # of the lease
        self.held = 0  # by requests under way
        self.unwritten = 0  # requests that were settled here and are not in the ledger yet
        self.owed = 0  # what they came to
        self.used_s = now_s
        self._passed: dict[str, float] = {}  # the largest share of each period that was told
        self._refusal: tuple[float, int, MillError] | None = None  # until when, from which amount on, and why

    @property
    def free(self) -> int:
        """What the next request may reserve."""
        return self.left - self.held

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be done under its lease."""
        return not self.held and not self.unwritten

    def reserve(self, amount: int, now_s: float) -> bool:
        """Set aside what a request may come to. False when it is not there: ask for more, and try again."""
        self.used_s = now_s
        if amount > self.free:
            return False
        self.held += amount
        return True

    def settle(self, reserved: int, amount: int) -> None:
        """A request that had `reserved` came to `amount`."""
        self.held -= reserved
        self.left = max(self.left - amount, self.held)
        self.unwritten += 1
        self.owed += amount

    def written(self, amount: int) -> None:
        """A request that came to `amount` is in the ledger."""
        self.unwritten -= 1
        self.owed -= amount

    def give_back(self, reserved: int) -> None:
        """A request that had `reserved` did not begin."""
        self.held -= reserved

    def wanted(self, amount: int, limits: Limits) -> int:
        """How much more to ask for, for a request of `amount`."""
        tightest = min(limit for limit in (limits.spend_per_day, limits.spend_per_month) if limit is not None)
        return max(amount - self.free, tightest // LEASE_SHARE)

    def granted(self, granted: Granted) -> None:
        """The lease is larger by so much."""
        if granted.amount:
            if granted.lease != self.lease:
                # the one before was given back, and with it all that was free
                self.lease, self.left = granted.lease, self.held
            self.left += granted.amount
            self._refusal = None

    def limit(self, granted: Granted, limits: Limits) -> int:
        """Of the period that is the tighter one."""
        return (limits.spend_per_day if granted.period == self.day else limits.spend_per_month) or 0

    def passed(self, granted: Granted, limits: Limits) -> float | None:
        """The share of the budget that all gateways have used or set aside, when it first passes one of `SHARES`.

        None: it was told, or there is nothing to tell.
        """
        limit = self.limit(granted, limits)
        used = 1.0 if not limit else 1.0 - (granted.left - granted.amount) / limit
        mark = max((share for share in SHARES if used >= share), default=0.0)
        if mark <= self._passed.get(granted.period, 0.0):
            return None
        self._passed[granted.period] = mark
        return mark

    def refuse(self, amount: int, granted: Granted, limits: Limits, now_s: float) -> MillError:
        """Why there is no room for `amount`; the same holds for a moment for all that is no smaller."""
        left = granted.left + max(0, self.free)
        limit = shown(self.limit(granted, limits), 2)
        what = (f"this request may come to ${shown(amount)}, and of this tenant's ${limit} for "
                f"{granted.period} ${shown(left)} is left")
        # here, and at other gateways: what the ledger knows as held, without our lease as it knows that
        under_way = self.held + max(0, granted.held - self.left - self.owed)
        if amount <= left + under_way:
            # all of it is back when what runs comes to nothing
            error: MillError = RateLimited(f"{what}, with ${shown(under_way)} set aside for requests under way: retry "
                                           "later", retry_after_s=REFUSED_S)
        else:
            error = BudgetSpent(f"{what}: ask for fewer tokens with max_tokens, or have the limit raised")
        self._refusal = (now_s + REFUSED_S, amount, error)
        return error

    def refused(self, amount: int, now_s: float) -> MillError | None:
        """What was just said of a request that was no larger."""
        if self._refusal is None or now_s >= self._refusal[0] or amount < self._refusal[1]:
            return None
        return self._refusal[2]


def budget_of(limits: Limits) -> Budget:
    """What the ledger is to keep to."""
    return Budget(limits.spend_per_day, limits.spend_per_month)
