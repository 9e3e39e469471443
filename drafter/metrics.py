"""What Prometheus sees of a drafter.

One registry per drafter, so that several can live in one process.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.telemetry import metrics_served


class Metrics:
    """All figures of one drafter."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.followed = Counter("mill_drafter_followed", "Follow messages taken in.", registry=own)
        self.proposals = Counter("mill_drafter_proposals", "Proposals sent.", registry=own)
        self.conditions = Counter("mill_drafter_conditional_proposals", "Of those, for an outcome of a step under way.",
                                  registry=own)
        self.proposed_tokens = Counter("mill_drafter_proposed_tokens", "Tokens in them.", registry=own)
        self.judged_tokens = Counter("mill_drafter_judged_tokens", "Guessed tokens that met the real one.",
                                     registry=own)
        self.right_tokens = Counter("mill_drafter_right_tokens", "Of those, equal to it.", registry=own)
        self.streams_ended = Counter("mill_drafter_streams_ended", "Streams no longer followed, by reason.", ["why"],
                                     registry=own)
        self.seconds = Counter("mill_drafter_seconds", "Time worked on proposals.", registry=own)
        self.bad_messages = Counter("mill_drafter_bad_messages", "Messages that could not be decoded.", registry=own)
        self.lost = Counter("mill_drafter_lost", "Messages that could not be handled.", ["cause"], registry=own)
        self.gaps = Gauge("mill_drafter_follow_gaps_total", "Times that Follow messages were missing.", registry=own)
        self.following = Gauge("mill_drafter_following", "Streams followed.", registry=own)
        self.context_tokens = Gauge("mill_drafter_context_tokens", "Tokens in these streams.", registry=own)
        self.diverged = Gauge("mill_drafter_diverged_total", "Streams that were not what their worker has.",
                              registry=own)
        self.busy = Gauge("mill_drafter_busy", "Share of the time that is worked, lately.", registry=own)

    def served(self, port: int, host: str = "127.0.0.1",
               ready: Callable[[], bool] = lambda: True) -> AbstractContextManager[None]:
        """Let Prometheus read these figures on `port` while the block runs, and probes ask; 0: nothing is served."""
        return metrics_served(self.registry, port, host, ready)
