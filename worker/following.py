"""Which drafter hears of this worker's streams, and what it is told.

Rules: one drafter at a time, kept while it lives; a stream whose residency shuts the drafter's zone out is never
mentioned to it, and what is said is addressed to its zone; nobody asks a drafter anything.
A drafter that is new, or new again (another epoch), is told every stream from its start. While drafts cannot pay
nothing is told but the ends; what was missed follows at once when they can. Pure.
"""

from collections.abc import Iterable

from shared import subjects
from shared.messages import Close, Commit, DrafterStatus, Follow, Open
from shared.residency import allows
from shared.tokens import pack
from worker.outbox import Outgoing
from worker.scheduler import Advanced, Ended, Event, Started
from worker.sequence import Key, Sequence

Line = Open | Commit | Close

# a Follow that grows beyond this goes on in the next
FOLLOW_BYTES = 480_000
EVENT_BYTES = 160


class Following:
    """The drafters in sight and the one that was chosen."""

    def __init__(self, worker: str, epoch: int, zone: str, vocabulary: str, max_draft_tokens: int,
                 silence_s: float) -> None:
        self.chosen: DrafterStatus | None = None
        self._worker = worker
        self._epoch = epoch
        self._zone = zone
        self._vocabulary = vocabulary
        self._max_draft_tokens = max_draft_tokens
        self._silence_s = silence_s
        self._heard: dict[str, tuple[DrafterStatus, float]] = {}
        self._open: dict[Key, int] = {}  # tokens of each stream that the drafter knows
        self._closing: list[tuple[DrafterStatus, list[Key]]] = []  # drafters that were left since the last step
        self._reopen = False
        self._behind = False  # something was not told
        self._seq = 0

    @property
    def name(self) -> str:
        return self.chosen.id if self.chosen is not None else ""

    def hear(self, status: DrafterStatus, now: float) -> None:
        """A drafter's heartbeat. A late one of the start before, which may have been in another zone, says nothing."""
        known = self._heard.get(status.id)
        if known is not None and status.epoch < known[0].epoch and now - known[1] <= self._silence_s:
            return
        self._heard[status.id] = (status, now)
        self.choose(now)

    def choose(self, now: float) -> None:
        """Keep the drafter if it is well, else take the least busy one that fits, of this zone if there is one."""
        self._heard = {name: entry for name, entry in self._heard.items() if now - entry[1] <= self._silence_s}
        fitting = {status.id: status for status, _ in self._heard.values() if self._fits(status)}
        present = self.chosen
        if present is not None and present.id in fitting and fitting[present.id].epoch == present.epoch:
            return
        best = min(fitting.values(), default=None,
                   key=lambda status: (status.zone != self._zone, status.following, status.id))
        heard = self._heard.get(present.id) if present is not None else None
        # also to one that fell silent: it may live and only its heartbeats be lost
        if present is not None and self._open and (heard is None or heard[0].epoch == present.epoch):
            self._closing.append((present, list(self._open)))
        self.chosen = best
        self._open.clear()
        self._reopen = best is not None

    def follow(self, events: list[Event], live: Iterable[Sequence], pays: bool = True) -> list[Outgoing]:
        """What the drafter is told of a step. `live` is the state behind the last of `events`. `pays`: drafts can."""
        told = self._farewell()
        if self.chosen is None:
            return told
        if not pays or self._behind:
            self._behind = not pays
            ends = [line for event in events if isinstance(event, Ended) for line in self._end(event.sequence)]
            news = [line for sequence in live for line in self._catch_up(sequence)] if pays else []
            self._reopen = self._reopen and not pays
            return told + self._pack(self.chosen, ends + news)
        if self._reopen:
            self._reopen = False
            opening: list[Line] = [self._opening(sequence) for sequence in live
                       if sequence.admitted_at is not None and self._may_hear(sequence)]
            # an epoch is also raised by a drafter that still knows the streams of before
            over: list[Line] = [Close(event.sequence.key.request_id, event.sequence.key.attempt)
                                for event in events if isinstance(event, Ended) and self._may_hear(event.sequence)]
            return told + self._pack(self.chosen, over + opening)
        lines: list[Line] = []
        for event in events:
            match event:
                case Advanced(sequence, index, tokens) if sequence.key in self._open:
                    key = sequence.key
                    base = sequence.prompt_length + index
                    self._open[key] = base + len(tokens)
                    lines.append(Commit(key.request_id, key.attempt, base, pack(tokens)))
                case Started(sequence) if self._may_hear(sequence):
                    lines.append(self._opening(sequence, sequence.resumed_length))
                case Ended(sequence) if sequence.key in self._open:
                    del self._open[sequence.key]
                    lines.append(Close(sequence.key.request_id, sequence.key.attempt))
        return told + self._pack(self.chosen, lines)

    def _fits(self, status: DrafterStatus) -> bool:
        return status.state == "ready" and (not status.vocabulary or status.vocabulary == self._vocabulary)

    def _may_hear(self, sequence: Sequence) -> bool:
        return self.chosen is not None and allows(sequence.request.residency, self.chosen.zone)

    def _end(self, sequence: Sequence) -> list[Line]:
        """The last of a stream that is open: the rest of its text, which later streams may repeat, and its close."""
        if sequence.key not in self._open:
            # one that was told of another epoch of this drafter may still be known there
            unsure = self._reopen and self._may_hear(sequence)
            return [Close(sequence.key.request_id, sequence.key.attempt)] if unsure else []
        rest = self._catch_up(sequence)
        del self._open[sequence.key]
        return [*rest, Close(sequence.key.request_id, sequence.key.attempt)]

    def _catch_up(self, sequence: Sequence) -> list[Line]:
        """What the drafter does not know of a stream that was admitted."""
        known = self._open.get(sequence.key)
        if known is None:
            admitted = sequence.admitted_at is not None and self._may_hear(sequence)
            return [self._opening(sequence)] if admitted else []
        if known == len(sequence.tokens):
            return []
        self._open[sequence.key] = len(sequence.tokens)
        return [Commit(sequence.key.request_id, sequence.key.attempt, known, pack(sequence.tokens[known:]))]

    def _opening(self, sequence: Sequence, length: int | None = None) -> Open:
        tokens = sequence.tokens[:length]
        self._open[sequence.key] = len(tokens)
        request = sequence.request
        return Open(request.request_id, request.attempt, pack(tokens), request.tenant,
                    sequence.prompt_length, request.sampling, self._max_draft_tokens, sequence.traceparent)

    def _farewell(self) -> list[Outgoing]:
        closing, self._closing = self._closing, []
        return [message for drafter, keys in closing
                for message in self._pack(drafter, [Close(key.request_id, key.attempt) for key in keys])]

    def _pack(self, drafter: DrafterStatus, lines: list[Line]) -> list[Outgoing]:
        packed: list[Outgoing] = []
        part: list[Line] = []
        size = 0
        for line in lines:
            weight = EVENT_BYTES + (0 if isinstance(line, Close) else len(line.tokens))
            if part and size + weight > FOLLOW_BYTES:
                packed.append(self._message(drafter, part))
                part, size = [], 0
            part.append(line)
            size += weight
        if part:
            packed.append(self._message(drafter, part))
        return packed

    def _message(self, drafter: DrafterStatus, lines: list[Line]) -> Outgoing:
        self._seq += 1
        return Outgoing(subjects.drafter_follow(drafter.id, drafter.zone),
                        Follow(self._worker, self._epoch, self._seq, tuple(lines), self._zone))
