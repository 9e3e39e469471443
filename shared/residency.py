"""Where a request's tokens may be.

Rule: a zone is a path of words joined by `-`, widest first: `eu`, `eu-north1`, `eu-north1-a`. A policy names zones and
allows everything inside them, so `eu` allows `eu-north1` but not `europe`. Nothing named: anywhere. Case says nothing.
Pure.
"""

import re

from shared.messages import Residency

MAX_ZONES = 32

_ZONE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def allows(residency: Residency, zone: str) -> bool:
    """Whether tokens under this policy may be in `zone`."""
    if not residency.zones:
        return True
    zone = zone.lower()
    return any(zone == wide or zone.startswith(wide + "-") for wide in map(str.lower, residency.zones))


def parse(policy: str) -> Residency:
    """A policy written as zones split by commas; empty or `any` for anywhere.

    Raises ValueError naming the zone that is none. A policy of commas only is an error, never "anywhere".
    """
    if policy.strip().lower() in ("", "any"):
        return Residency()
    zones = tuple(dict.fromkeys(check_zone(zone) for zone in policy.split(",")))
    if len(zones) > MAX_ZONES:
        raise ValueError(f"a residency policy names at most {MAX_ZONES} zones, this one {len(zones)}")
    return Residency(zones)


def check_zone(zone: str) -> str:
    """`zone` in lower case. Raises ValueError when it is none."""
    cleaned = zone.strip().lower()
    if not _ZONE.fullmatch(cleaned):
        raise ValueError(f"{zone!r} is no zone: use words of letters and digits joined by '-', such as eu-north1; "
                         "several zones are split by commas")
    return cleaned


def intersect(first: Residency, second: Residency) -> Residency | None:
    """The policy that allows what both allow; None when no zone is allowed by both."""
    if not first.zones or not second.zones:
        return first if first.zones else second
    zones = [zone.lower() for zone in first.zones if allows(second, zone)]
    zones += [zone.lower() for zone in second.zones if allows(first, zone)]
    return Residency(tuple(dict.fromkeys(zones))) if zones else None
