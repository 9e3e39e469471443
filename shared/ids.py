"""Names of services and of their starts."""

import secrets

from shared.clock import Clock
from shared.subjects import check_id

LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that reads like another
LENGTH = 6  # 31**6: two of a hundred services share a name once in 180,000 fleets


def new_id(kind: str) -> str:
    """A name such as `worker-ab23cd`, fit to stand in a subject."""
    return check_id(f"{kind}-{''.join(secrets.choice(LETTERS) for _ in range(LENGTH))}")


def new_epoch(clock: Clock) -> int:
    """The number of this start: unix milliseconds, so that a later start of the same id has a larger one."""
    return int(clock.wall() * 1000)
