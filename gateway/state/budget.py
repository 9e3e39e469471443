"""What is asked of the ledger, and what it grants. Pure; money in nano-dollars."""

from typing import NamedTuple

from msgspec import Struct


class Budget(Struct, frozen=True):
    """What a tenant may spend; None: as much as it likes."""

    per_day: int | None = None
    per_month: int | None = None

    def __bool__(self) -> bool:
        return not (self.per_day is self.per_month is None)


class Granted(NamedTuple):
    """What a gateway may spend under `lease`, beside what it had of it: 0 when not enough is left.

    `left`: of the budget, beside what all gateways hold; `held`: what they hold. Which `period` is the tighter one.
    """

    lease: str
    amount: int
    left: int
    held: int
    period: str
