"""Events of a step as messages: one for each gateway, one for all routers.

Rules: sequence numbers are given when a message is made, not when it leaves. One that is lost on the way out leaves a
gap, and by the gap its receiver knows. The digest of the cache follows from the events told, so that a router which
took them all has the same; a snapshot tells the cache itself, and starts the digest anew from that. Pure.
"""

from typing import NamedTuple

from msgspec.structs import replace

from shared import subjects
from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES, fold, join_hashes
from shared.messages import (
    Accepted,
    Cleared,
    Finished,
    KvEvent,
    KvEvents,
    KvSnapshot,
    Removed,
    Reply,
    Scored,
    StepReplies,
    Stored,
    Tokens,
    Wire,
)
from shared.tokens import pack
from worker.events import Advanced, Ended, Event, Heard, PromptScored, Refused, Registered
from worker.kv_blocks import BlockPool
from worker.misses import MOST_REMEMBERED, Departed, miss_of, remembered
from worker.sequence import Sequence

# half a megabyte: a broker takes one, unless told otherwise
SNAPSHOT_PART_BYTES = 480_000
REMEMBERED_GATEWAYS = 1024


class Outgoing(NamedTuple):
    subject: str
    message: Wire


class Outbox:
    """The counters of one worker, and the messages they number."""

    def __init__(
        self,
        worker: str,
        epoch: int,
        recipe: str = "",
        block_size_tokens: int = BLOCK_SIZE_TOKENS,
        blocks: int = MOST_REMEMBERED,  # of the cache
    ) -> None:
        self.worker = worker
        self.epoch = epoch
        self.recipe = recipe
        self.kv_seq = 0
        self.wrong_digests = 0  # snapshots that showed the events before them to have been wrong
        self._digest = 0
        self._departed = Departed(remembered(blocks))
        self._block_size_tokens = block_size_tokens
        self.replies_sent: dict[str, int] = {}

    def replies(self, events: list[Event]) -> list[Outgoing]:
        """All replies of a step, one message per gateway."""
        per_gateway: dict[str, list[Reply]] = {}
        for event in together(events):
            reply, gateway = self._reply(event)
            if reply is not None:
                per_gateway.setdefault(gateway, []).append(reply)
        return [self._to_gateway(gateway, replies) for gateway, replies in per_gateway.items()]

    def _reply(self, event: Event) -> tuple[Reply | None, str]:
        """What a gateway hears of an event, and which gateway."""
        match event:
            case Advanced(sequence, index, tokens, logprobs):
                key = sequence.key
                return (Tokens(key.request_id, key.attempt, index, pack(tokens), logprobs),
                        sequence.request.gateway)
            case PromptScored(sequence, index, logprobs):
                key = sequence.key
                return Scored(key.request_id, key.attempt, index, logprobs), sequence.request.gateway
            case Registered(sequence, cached_tokens):
                key, placement = sequence.key, sequence.request.placement
                return (Accepted(key.request_id, key.attempt, self.worker, cached_tokens,
                                 placement.receipt if placement is not None else b""), sequence.request.gateway)
            case Ended(sequence, last):
                miss = miss_of(sequence, self._departed, self._block_size_tokens) or ""
                return self._signed(last, miss), sequence.request.gateway
            case Heard(request):
                receipt = request.placement.receipt if request.placement is not None else b""
                return Accepted(request.request_id, request.attempt, self.worker, receipt=receipt), request.gateway
            case Refused(request, last):
                return self._signed(last), request.gateway
            case _:
                return None, ""

    def kv_events(self, pool: BlockPool, now: float = 0.0) -> list[Outgoing]:
        """What changed in the cache since the last call, if anything did. `now`: monotonic seconds."""
        events = pool.take_events()
        if not events:
            return []
        self.kv_seq += 1
        self._departed.take_in(events, now)
        for event in events:
            self._take_in(event)
        return [Outgoing(subjects.worker_kv(self.worker), KvEvents(self.worker, self.epoch, self.kv_seq, events))]

    def snapshot(self, pool: BlockPool, now: float = 0.0) -> list[Outgoing]:
        """The whole cache, behind the events that lead to it."""
        changes = self.kv_events(pool, now)
        names = pool.names()
        digest = fold(join_hashes(names))
        self.wrong_digests += digest != self._digest
        self._digest = digest
        part_size = SNAPSHOT_PART_BYTES // HASH_BYTES
        parts = [names[start:start + part_size] for start in range(0, len(names), part_size)] or [[]]
        subject = subjects.worker_kv(self.worker)
        return changes + [
            Outgoing(subject, KvSnapshot(self.worker, self.epoch, self.kv_seq, join_hashes(part), index, len(parts)))
            for index, part in enumerate(parts)]

    @property
    def kv_digest(self) -> bytes:
        """Of all blocks that the events up to `kv_seq` leave."""
        return self._digest.to_bytes(HASH_BYTES, "little")

    def _take_in(self, event: KvEvent) -> None:
        match event:
            case Stored(hashes) | Removed(hashes):
                self._digest ^= fold(hashes)
            case Cleared():
                self._digest = 0

    def _to_gateway(self, gateway: str, replies: list[Reply]) -> Outgoing:
        seq = self.replies_sent.pop(gateway, 0) + 1
        self.replies_sent[gateway] = seq
        if len(self.replies_sent) > REMEMBERED_GATEWAYS:
            del self.replies_sent[next(iter(self.replies_sent))]
        return Outgoing(subjects.replies(gateway), StepReplies(self.worker, self.epoch, seq, tuple(replies),
                                                              self.recipe))

    def _signed(self, last: Reply, miss: str = "") -> Reply:
        return replace(last, worker=self.worker, miss=miss) if isinstance(last, Finished) else last


def together(events: list[Event]) -> list[Event]:
    """The same with each stream's tokens in one event, where the first of them stood."""
    kept: list[Event] = []
    begun: dict[Sequence, int] = {}  # where the tokens of a stream stand
    for event in events:
        if type(event) is Advanced:
            place = begun.setdefault(event.sequence, len(kept))
            if place < len(kept):
                before = kept[place]
                assert type(before) is Advanced
                kept[place] = Advanced(event.sequence, before.first, before.tokens + event.tokens,
                                       before.logprobs + event.logprobs)
                continue
        kept.append(event)
    return kept
