"""Everything a router knows, all of it hearsay.

Rule: soft state (law 6). It is told by statuses, cache events and other routers' placements, it is forgotten when a
worker falls silent, and a wrong entry costs a cache miss or a second try, never an error.
Pure: the caller passes `now` and sends the snapshot requests that methods return as worker names.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from router.block_table import Names, names_of
from router.expected_blocks import ExpectedBlocks
from router.outstanding import Outstanding
from router.placement import Candidate, expected_output
from router.prefix_index import PrefixIndex
from router.resync import Action, ApplyEvents, AskSnapshot, Compare, DropBlocks, ReplaceBlocks, Resync
from router.turnover import Turnover
from shared.blocks import BLOCK_SIZE_TOKENS
from shared.fleet import Fleet
from shared.messages import Cleared, Generate, KvEvents, KvMessage, Removed, Stored, WorkerStatus
from shared.parity import expected_answer

V = TypeVar("V")

# a model whose last worker left this recently is expected back
SERVED_LATELY_S = 60.0
# names kept of models without workers
MAX_REMEMBERED = 4096
# alarms kept until somebody takes them
MAX_ALARMS = 1024


class Alarm(NamedTuple):
    """Something about a worker that its operator should hear of.

    kv_blind     its block hashes are not ours: it is placed by load alone
    drift        its cache is not what its events told: dropped and asked for again
    recipe       its streams would not be those of its peers: none moves between them
    vocabulary   its token ids are not those of its peers
    """

    kind: str
    worker: str
    reason: str


class View:
    """Workers, their blocks, and what is on its way to them. `alarms` are for the caller to take and clear."""

    def __init__(self, silence_s: float, block_size_tokens: int = BLOCK_SIZE_TOKENS) -> None:
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self.resync = Resync()
        self._silence_s = silence_s
        self._block_size_tokens = block_size_tokens
        self._unreachable: set[str] = set()
        self._outstanding = Outstanding()
        self._expected = ExpectedBlocks()
        self._turnover = Turnover()
        self._models: dict[str, float] = {}  # model -> last heard of
        self._chain = b"", names_of(b"")  # what was looked up last, and its names
        self.blind: dict[str, str] = {}  # worker -> why its cache is not looked at
        self.alarms: list[Alarm] = []
        self._rooms: dict[str, int] = {}  # model -> blocks of its workers, until one comes or goes
        self._judged: dict[str, tuple[object, ...]] = {}  # worker -> what it said of itself when it was last judged

    def on_status(self, status: WorkerStatus, now: float) -> list[str]:
        """A worker's heartbeat. Returns the workers to ask for a snapshot."""
        if self.fleet.fold(status, now):
            self._forget_sent(status.id)
        if self.fleet.worker(status.id) is not status:
            return []
        self._unreachable.discard(status.id)
        self._outstanding.settle(status.id, now)
        _remember(self._models, status.model, now)
        self._judge(status)
        if status.id in self.blind:
            return []
        return self._carry_out(
            self.resync.on_status(status.id, status.epoch, status.kv_seq, now, status.kv_digest), now)

    def on_kv(self, message: KvMessage, now: float) -> list[str]:
        """Cache events or a snapshot. Returns the workers to ask for a snapshot.

        Those of a worker that has no status yet are passed over: its first status names the events that were missed.
        """
        if self.fleet.worker(message.worker) is None or message.worker in self.blind:
            return []
        if isinstance(message, KvEvents):
            return self._carry_out(self.resync.on_events(message, now), now)
        return self._carry_out(self.resync.on_snapshot(message, now), now)

    def on_placed(self, request: Generate, prompt_tokens: int, now: float) -> None:
        """A router, this one or another, sent `request` where its placement says."""
        placement = request.placement
        if placement is None or self.fleet.worker(placement.worker) is None:
            return
        tokens = max(0, prompt_tokens - placement.cached_tokens)
        self._outstanding.add(placement.worker, request.request_id, request.attempt, tokens, expected_output(request),
                              now)
        self._write(placement.worker, tokens)
        if placement.worker in self.blind:
            return
        self._expected.expect(self.index.slot(placement.worker), self._names_of(request.block_hashes),
                              placement.cached_tokens // self._block_size_tokens, now)

    def on_unheard(self, request: Generate, worker: str) -> None:
        """Nobody listened where `request` was sent: that worker gets nothing until it speaks again."""
        if self.fleet.worker(worker) is None:
            return
        self._unreachable.add(worker)
        self._outstanding.undo(worker, request.request_id, request.attempt)
        self._expected.forget(self.index.slot(worker))

    def candidates(self, hashes: bytes, now: float) -> list[Candidate]:
        """Every worker that is alive, with what it holds of this chain (packed hashes), by name."""
        chain = self._names_of(hashes)
        self._expected.expire(now)
        certain = self.index.longest_prefix(chain)
        cached = certain.copy()
        for slot, depth in self._expected.depths(chain).items():
            worker = self.index.worker(slot)
            if worker is not None and depth > cached.get(worker, 0):
                cached[worker] = depth
        alive = self.fleet.workers_heard_since(now - self._silence_s)
        return [Candidate(status, cached.get(status.id, 0), *self._outstanding.sent(status.id, now),
                          self._turnover.of(status.id, status.model), certain.get(status.id, 0))
                for status in alive if status.id not in self._unreachable]

    def served_lately(self, model: str, now: float) -> bool:
        """Whether some worker of `model` was heard within the last minute."""
        return now - self._models.get(model, float("-inf")) <= SERVED_LATELY_S

    def forget_silent(self, now: float) -> list[str]:
        """Forget workers unheard for too long; returns them."""
        silent = self.fleet.forget_silent(now, self._silence_s)
        for worker in silent:
            self._carry_out(self.resync.forget(worker), now)
            self._forget_sent(worker)
            self.index.forget(worker)
            self._unreachable.discard(worker)
            self.blind.pop(worker, None)
            self._judged.pop(worker, None)
            self._rooms.clear()
        return silent

    def snapshots_due(self, now: float) -> list[str]:
        """Workers whose snapshot should have come by now."""
        return self._carry_out(self.resync.due(now), now)

    @property
    def complete(self) -> bool:
        """Whether somebody was heard and nobody's snapshot is missing."""
        return bool(self.fleet.workers()) and not any(True for _ in self.resync.awaiting())

    def _names_of(self, hashes: bytes) -> Names:
        """Who is placed has just been looked up."""
        if hashes != self._chain[0]:
            self._chain = hashes, names_of(hashes)
        return self._chain[1]

    def _write(self, worker: str, tokens: int) -> None:
        """So many tokens are about to be computed there, and pushed out."""
        status = self.fleet.worker(worker)
        if status is not None:
            room = self._rooms.get(status.model)
            if room is None:
                room = self._rooms[status.model] = sum(
                    peer.blocks_total for peer in self.fleet.workers(status.model))
            self._turnover.write(worker, status.model, tokens / status.block_size_tokens, status.blocks_total, room)

    def _forget_sent(self, worker: str) -> None:
        self._outstanding.forget(worker)
        self._turnover.forget(worker)
        self._expected.forget(self.index.slot(worker))

    def _judge(self, status: WorkerStatus) -> None:
        """Whether its blocks are named as ours are, and whether its peers compute as it does. Once per claim."""
        claim = (status.epoch, status.model, status.recipe, status.vocabulary, status.block_size_tokens, status.parity,
                 status.blocks_total)
        if status.state == "starting" or self._judged.get(status.id) == claim:
            return
        self._judged[status.id] = claim
        self._rooms.clear()
        self.blind.pop(status.id, None)
        if reason := _hashes_differ(status, self._block_size_tokens):
            self.blind[status.id] = reason
            self._carry_out(self.resync.forget(status.id), 0.0)
            self._alarm("kv_blind", status.id, reason)
        peers = [peer for peer in self.fleet.workers(status.model) if peer.id != status.id]
        for kind in ("recipe", "vocabulary"):
            own = getattr(status, kind)
            others = {getattr(peer, kind) for peer in peers} - {"", own}
            if own and others:
                self._alarm(kind, status.id, f"{kind} {own}, its peers for {status.model} have "
                                             f"{', '.join(sorted(others))}")

    def _alarm(self, kind: str, worker: str, reason: str) -> None:
        if len(self.alarms) < MAX_ALARMS:
            self.alarms.append(Alarm(kind, worker, reason))

    def _carry_out(self, actions: Iterable[Action], now: float) -> list[str]:
        """Do to the index what the count says; returns the workers to ask for a snapshot."""
        asked = []
        for action in actions:
            match action:
                case AskSnapshot(worker):
                    asked.append(worker)
                case DropBlocks(worker):
                    self.index.clear(worker)
                case ReplaceBlocks(worker, hashes):
                    self.index.clear(worker)
                    self.index.store(worker, hashes)
                case ApplyEvents(worker, events):
                    for event in events:
                        match event:
                            case Stored(hashes):
                                self.index.store(worker, hashes)
                            case Removed(hashes):
                                self.index.remove(worker, hashes)
                            case Cleared():
                                self.index.clear(worker)
                case Compare(worker, digest):
                    ours = self.index.digest(worker)
                    if ours is not None and ours != int.from_bytes(digest, "little"):
                        self._alarm("drift", worker, "the digest of its blocks is not the one we keep")
                        asked += self._carry_out(self.resync.drifted(worker, now), now)
        return asked


def _hashes_differ(status: WorkerStatus, block_size_tokens: int) -> str:
    """Why blocks of this worker cannot be told by our hashes; empty when they can, or when it does not say."""
    if status.block_size_tokens != block_size_tokens:
        return f"blocks of {status.block_size_tokens} tokens, not {block_size_tokens}"
    if status.parity and status.parity != expected_answer(status.id, status.epoch, block_size_tokens):
        return "its block hashes differ from ours"
    return ""


def _remember(names: dict[str, V], name: str, value: V) -> None:
    """Keep the newest names, and not too many."""
    names.pop(name, None)
    names[name] = value
    if len(names) > MAX_REMEMBERED:
        del names[next(iter(names))]
