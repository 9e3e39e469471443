"""Service tiers: what a request is worth when there is not room for all, under OpenAI's names.

| tier       | in a router's queue                                     | in a worker                |
|------------|---------------------------------------------------------|----------------------------|
| `priority` | four shares where its tenant's default requests get one | goes first                 |
| `default`  | one share                                               |                            |
| `flex`     | waits until a slot is free and nobody else is waiting   | goes last, gives way first |

Between tenants the shares of a tier count times the tenant's weight.

Rule: a tier changes when a request is served, never what it answers. A tier of a later version counts as `default`.
Pure.
"""

from typing import Literal

Tier = Literal["priority", "default", "flex"]
TIERS: tuple[Tier, ...] = ("priority", "default", "flex")
DEFAULT: Tier = "default"
FLEX: Tier = "flex"
# of a tenant beside others
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0
# flex has none: it waits behind everybody, and shares with its like
_SHARES: dict[Tier, float] = {"priority": 4.0, "default": 1.0, "flex": 1.0}
# beyond what a client may ask for itself
_STEP = 1000
_PRIORITIES: dict[Tier, int] = {"priority": _STEP, "default": 0, "flex": -_STEP}


def known(name: str) -> Tier:
    """The tier of that name, or `default`."""
    return next((tier for tier in TIERS if tier == name), DEFAULT)


def tenants_weight(said: float) -> float:
    """The weight of a tenant as a message names it; what can be none counts as 1."""
    return said if LEAST_WEIGHT <= said <= MOST_WEIGHT else 1.0


def shares(tier: Tier) -> float:
    """Its weight beside other requests that wait."""
    return _SHARES[tier]


def priority(tier: Tier, own: int) -> int:
    """`Generate.priority` of a request whose client gave it `own`: tiers first, then the client's wish."""
    return _PRIORITIES[tier] + own
