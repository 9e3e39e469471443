"""Keeping count of every worker's cache events, and what to do when the count is lost.

Rules:
- An event batch is applied only as the successor of the last one. Anything else means that something is missing: the
  worker's blocks are dropped (a miss is cheap, a wrong hit is not) and a snapshot is wanted.
- What arrives while a snapshot is awaited is kept, and played after it from the snapshot's number on.
- A newer epoch is a worker that started again: its blocks are gone and its numbers start at 1. An older one is an echo.
- A status names the last number sent, so that a loss is noticed although no further event comes.
- A snapshot that does not come is asked for again, later each time, for as long as the worker lives.
- A status carries the digest of the worker's blocks behind that number. Once everything up to there is applied, the
  two are compared; a difference is drift, and drift is answered like a gap, less often each time it comes again.
Pure: the caller passes `now` and carries out the actions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.blocks import HASH_BYTES
from shared.messages import KvEvent, KvEvents, KvSnapshot

# a fleet's snapshots come all at once when a router starts: 16 MB for 10^6 blocks
RETRY_FIRST_S = 0.75
RETRY_MOST_S = 5.0
# batches kept while a snapshot is awaited: twenty seconds of fifty steps a second
MAX_KEPT = 1000
# parts of one snapshot: 4096 x 512 kB is more cache than any one worker has
MAX_PARTS = 4096
# after drift no digest is looked at for so long; a worker that contradicts itself must not cost a snapshot per status
DRIFT_PAUSE_FIRST_S = 1.0
DRIFT_PAUSE_MOST_S = 300.0


class ApplyEvents(NamedTuple):
    """Apply these changes to the worker's blocks, in order."""

    worker: str
    events: tuple[KvEvent, ...]


class ReplaceBlocks(NamedTuple):
    """The worker holds exactly these blocks (packed hashes)."""

    worker: str
    hashes: bytes


class DropBlocks(NamedTuple):
    """Nothing is known about the worker's blocks any more."""

    worker: str


class AskSnapshot(NamedTuple):
    """Send the worker a `SnapshotRequest`."""

    worker: str


class Compare(NamedTuple):
    """All that the worker had said when it named this digest is applied: call `drifted` when ours is another."""

    worker: str
    digest: bytes


Action = ApplyEvents | ReplaceBlocks | DropBlocks | AskSnapshot | Compare


@dataclass(slots=True)
class _Feed:
    """One worker's stream of events, as far as it was heard."""

    epoch: int
    seq: int = 0  # the last one applied
    awaiting: bool = False
    status_seq: int = 0  # what the previous status said
    kept: dict[int, tuple[KvEvent, ...]] = field(default_factory=dict)
    parts: dict[int, bytes] = field(default_factory=dict)
    parts_seq: int = -1
    parts_count: int = 0
    ask_at: float = 0.0
    retry_s: float = RETRY_FIRST_S
    digest: bytes = b""  # of the blocks behind event `digest_seq`, not compared yet
    digest_seq: int = 0
    trust_at: float = 0.0  # digests count from then on
    drift_pause_s: float = DRIFT_PAUSE_FIRST_S


class Resync:
    """The counts of all workers. Every method returns what there is to do, in order."""

    def __init__(self) -> None:
        self.gaps_total = 0
        self.drifts_total = 0
        self._feeds: dict[str, _Feed] = {}

    def on_events(self, message: KvEvents, now: float) -> list[Action]:
        """One batch of changes arrived."""
        feed = self._feeds.get(message.worker)
        actions: list[Action] = []
        if feed is None or message.epoch > feed.epoch:
            feed = self._begin(message.worker, message.epoch, actions)
        if message.epoch < feed.epoch or message.seq <= feed.seq:
            return actions
        if not feed.awaiting and message.seq == feed.seq + 1:
            feed.seq = message.seq
            actions.append(ApplyEvents(message.worker, message.events))
            return actions + _compare(message.worker, feed, now)
        if not feed.awaiting:
            actions += self._lose(message.worker, feed, now)
        feed.kept[message.seq] = message.events
        if len(feed.kept) > MAX_KEPT:
            del feed.kept[min(feed.kept)]
        return actions

    def on_snapshot(self, message: KvSnapshot, now: float) -> list[Action]:
        """A snapshot, or a part of one, arrived: asked for by us, by another router, or sent at a worker's start."""
        feed = self._feeds.get(message.worker)
        actions: list[Action] = []
        if feed is None or message.epoch > feed.epoch:
            feed = self._begin(message.worker, message.epoch, actions)
            feed.awaiting = True
            feed.ask_at = now + feed.retry_s
        if message.epoch < feed.epoch or not _is_sound(message):
            return actions
        if not feed.awaiting:
            if message.seq <= feed.seq:
                return actions
            # it knows events we never saw; no need to ask for what is arriving
            self.gaps_total += 1
            feed.awaiting = True
            feed.ask_at = now + feed.retry_s
            actions.append(DropBlocks(message.worker))
        if message.seq < feed.parts_seq:
            return actions
        if message.seq > feed.parts_seq or message.parts != feed.parts_count:
            feed.parts, feed.parts_seq, feed.parts_count = {}, message.seq, message.parts
        feed.parts[message.part] = message.hashes
        feed.ask_at = max(feed.ask_at, now + feed.retry_s)  # the rest is on its way
        if len(feed.parts) == feed.parts_count:
            actions += self._complete(message.worker, feed, now)
        return actions

    def on_status(self, worker: str, epoch: int, kv_seq: int, now: float, digest: bytes = b"") -> list[Action]:
        """A worker's heartbeat names the last event it sent, and the digest of its blocks behind that.

        Statuses and events overtake each other, so only what the *previous* status promised counts as missing.
        """
        feed = self._feeds.get(worker)
        actions: list[Action] = []
        if feed is None or epoch > feed.epoch:
            feed = self._begin(worker, epoch, actions)
            if kv_seq > 0:
                actions += self._await(worker, feed, now)
        elif epoch == feed.epoch:
            if not feed.awaiting and feed.seq < feed.status_seq:
                actions += self._lose(worker, feed, now)
            feed.status_seq = max(feed.status_seq, kv_seq)
        if digest and epoch == feed.epoch and kv_seq >= feed.seq:
            feed.digest, feed.digest_seq = digest, kv_seq
            actions += _compare(worker, feed, now)
        return actions

    def drifted(self, worker: str, now: float) -> list[Action]:
        """Our digest of the worker's blocks is not its own."""
        feed = self._feeds.get(worker)
        if feed is None:
            return []
        self.drifts_total += 1
        feed.trust_at = now + feed.drift_pause_s
        feed.drift_pause_s = min(2 * feed.drift_pause_s, DRIFT_PAUSE_MOST_S)
        return [DropBlocks(worker), *self._await(worker, feed, now)]

    def position(self, worker: str) -> tuple[int, int]:
        """Epoch and number of the last event applied; zeros for a worker unheard of."""
        feed = self._feeds.get(worker)
        return (feed.epoch, feed.seq) if feed is not None else (0, 0)

    def due(self, now: float) -> list[Action]:
        """Requests for snapshots that should have come by now."""
        return [self._ask(worker, feed, now) for worker, feed in self._feeds.items()
                if feed.awaiting and feed.ask_at <= now]

    def awaiting(self) -> Iterator[str]:
        """Workers whose snapshot has not come."""
        return (worker for worker, feed in self._feeds.items() if feed.awaiting)

    def forget(self, worker: str) -> list[Action]:
        """The worker is gone."""
        return [DropBlocks(worker)] if self._feeds.pop(worker, None) else []

    def _begin(self, worker: str, epoch: int, actions: list[Action]) -> _Feed:
        """A worker's first sign of life in this epoch: it has sent nothing yet, as far as we know."""
        if worker in self._feeds:
            actions.append(DropBlocks(worker))
        feed = self._feeds[worker] = _Feed(epoch)
        return feed

    def _lose(self, worker: str, feed: _Feed, now: float) -> list[Action]:
        self.gaps_total += 1
        return [DropBlocks(worker), *self._await(worker, feed, now)]

    def _await(self, worker: str, feed: _Feed, now: float) -> list[Action]:
        feed.awaiting = True
        feed.retry_s = RETRY_FIRST_S
        return [self._ask(worker, feed, now)]

    def _ask(self, worker: str, feed: _Feed, now: float) -> AskSnapshot:
        feed.ask_at = now + feed.retry_s
        feed.retry_s = min(2 * feed.retry_s, RETRY_MOST_S)
        return AskSnapshot(worker)

    def _complete(self, worker: str, feed: _Feed, now: float) -> list[Action]:
        """All parts are here: take them, then play what was kept behind them."""
        actions: list[Action] = [ReplaceBlocks(worker, b"".join(feed.parts[part] for part in range(feed.parts_count)))]
        feed.seq, feed.awaiting, feed.retry_s = feed.parts_seq, False, RETRY_FIRST_S
        kept, feed.kept, feed.parts, feed.parts_seq = feed.kept, {}, {}, -1
        for seq in sorted(kept):
            if seq == feed.seq + 1:
                feed.seq = seq
                actions.append(ApplyEvents(worker, kept[seq]))
            elif seq > feed.seq:
                feed.kept = {number: events for number, events in kept.items() if number > feed.seq}
                return actions + self._lose(worker, feed, now)
        return actions + _compare(worker, feed, now)


def _compare(worker: str, feed: _Feed, now: float) -> list[Action]:
    """The digest that was named for where we stand now, once."""
    if feed.awaiting or not feed.digest or feed.digest_seq != feed.seq or now < feed.trust_at:
        return []
    digest, feed.digest = feed.digest, b""
    return [Compare(worker, digest)]


def _is_sound(message: KvSnapshot) -> bool:
    return (0 <= message.part < message.parts <= MAX_PARTS and message.seq >= 0
            and len(message.hashes) % HASH_BYTES == 0)
