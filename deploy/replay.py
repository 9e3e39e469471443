"""`tokenmill replay`: a trace of traffic through the router's and the workers' own code, on a virtual clock.

Answers "what if": another policy, more workers, less cache, twice the traffic. `deploy.replay_trace` says what is read,
`deploy.replay_synthetic` what is made up, `deploy.replay_fleet` what is real and what is modelled.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deploy import replay_report as reporting
from deploy.replay_fleet import Fleet, Replay, infinite_reuse
from deploy.replay_trace import Arrival, Trace
from router.placement import POLICIES


class Page(NamedTuple):
    """A report and what its plots are drawn from."""

    report: reporting.Report
    ttft_ms: dict[str, list[float]]


def policies_named(names: str) -> list[str]:
    """`all`, or names with commas between them. Raises ValueError for one that does not exist."""
    wanted = list(POLICIES) if names == "all" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in POLICIES:
            raise ValueError(f"unknown policy {name!r}: use all, or some of {', '.join(POLICIES)}")
    return wanted


def replay(name: str, arrivals: Sequence[Arrival], policies: Sequence[str], fleet: Fleet, block_size_tokens: int = 64,
           speed: float = 1.0, report: Callable[[str, int, int], None] = lambda policy, done, requests: None) -> Page:
    """Play these requests once for each policy. `report` hears the policy, how many have ended, and of how many.

    `name` and `speed` are for the report: the arrivals are as they are (`replay_trace.read`, `replay_synthetic`).
    """
    trace = Trace(arrivals, block_size_tokens)
    requests = len(trace.arrivals)
    most = infinite_reuse(trace)
    found: dict[str, reporting.Figures] = {}
    ttft_ms: dict[str, list[float]] = {}
    for policy in policies:
        report(policy, 0, requests)
        begun_s = time.process_time()
        outcome = Replay(trace, fleet, policy).run(lambda done, policy=policy: report(policy, done, requests))  # type: ignore[misc]
        report(policy, requests, requests)
        found[policy] = reporting.figures(outcome, most, time.process_time() - begun_s)
        ttft_ms[policy] = [1e3 * one.ttft_s for one in outcome.served]
    return Page(reporting.Report(name, requests, fleet.workers, fleet.blocks, block_size_tokens, speed,
                                 fleet.device._asdict(), round(most, 4), found), ttft_ms)
