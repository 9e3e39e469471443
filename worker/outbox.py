"""Events of a step as messages: one for each gateway, one for all routers.

Rule: sequence numbers are given when a message is made, not when it leaves. One that is lost on the way out leaves a
gap, and by the gap its receiver knows. Pure.
"""

from typing import NamedTuple

from msgspec.structs import replace

from shared import subjects
from shared.blocks import HASH_BYTES, join_hashes
from shared.messages import Accepted, Finished, KvEvents, KvSnapshot, Reply, StepReplies, Tokens, Wire
from shared.tokens import pack
from worker.kv_blocks import BlockPool
from worker.scheduler import Advanced, Ended, Event, Refused, Registered

# half a megabyte: a broker takes one, unless told otherwise
SNAPSHOT_PART_BYTES = 480_000
REMEMBERED_GATEWAYS = 1024


class Outgoing(NamedTuple):
    subject: str
    message: Wire


class Outbox:
    """The counters of one worker, and the messages they number."""

    def __init__(self, worker: str, epoch: int) -> None:
        self.worker = worker
        self.epoch = epoch
        self.kv_seq = 0
        self.replies_sent: dict[str, int] = {}

    def replies(self, events: list[Event], drafter: str) -> list[Outgoing]:
        """All replies of a step, one message per gateway."""
        per_gateway: dict[str, list[Reply]] = {}
        for event in events:
            match event:
                case Advanced(sequence, index, tokens):
                    key = sequence.key
                    reply: Reply = Tokens(key.request_id, key.attempt, index, pack(tokens))
                    gateway = sequence.request.gateway
                case Registered(sequence, cached_tokens):
                    key = sequence.key
                    reply = Accepted(key.request_id, key.attempt, self.worker, cached_tokens)
                    gateway = sequence.request.gateway
                case Ended(sequence, last):
                    reply, gateway = self._signed(last, drafter if sequence.drafted else ""), sequence.request.gateway
                case Refused(request, last):
                    reply, gateway = self._signed(last, ""), request.gateway
                case _:
                    continue
            per_gateway.setdefault(gateway, []).append(reply)
        return [self._to_gateway(gateway, replies) for gateway, replies in per_gateway.items()]

    def kv_events(self, pool: BlockPool) -> list[Outgoing]:
        """What changed in the cache since the last call, if anything did."""
        events = pool.take_events()
        if not events:
            return []
        self.kv_seq += 1
        return [Outgoing(subjects.worker_kv(self.worker), KvEvents(self.worker, self.epoch, self.kv_seq, events))]

    def snapshot(self, pool: BlockPool) -> list[Outgoing]:
        """The whole cache, behind the events that lead to it."""
        changes = self.kv_events(pool)
        names = pool.names()
        part_size = SNAPSHOT_PART_BYTES // HASH_BYTES
        parts = [names[start:start + part_size] for start in range(0, len(names), part_size)] or [[]]
        subject = subjects.worker_kv(self.worker)
        return changes + [
            Outgoing(subject, KvSnapshot(self.worker, self.epoch, self.kv_seq, join_hashes(part), index, len(parts)))
            for index, part in enumerate(parts)]

    def _to_gateway(self, gateway: str, replies: list[Reply]) -> Outgoing:
        seq = self.replies_sent.pop(gateway, 0) + 1
        self.replies_sent[gateway] = seq
        if len(self.replies_sent) > REMEMBERED_GATEWAYS:
            del self.replies_sent[next(iter(self.replies_sent))]
        return Outgoing(subjects.replies(gateway), StepReplies(self.worker, self.epoch, seq, tuple(replies)))

    def _signed(self, last: Reply, drafter: str) -> Reply:
        return replace(last, worker=self.worker, drafter=drafter) if isinstance(last, Finished) else last
