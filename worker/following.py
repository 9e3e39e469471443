"""Which drafter hears of this worker's streams, what it is told, and which of its answers are for us.

Rules: one drafter at a time, kept while it lives; a stream whose residency shuts the drafter's zone out is never
mentioned to it, and what is said is addressed to its zone; nobody asks a drafter anything.
A drafter that is new, or new again (another epoch), is told every stream from its start. While drafts cannot pay
nothing is told but the ends; what was missed follows at once when they can.
An answer counts if it is from the drafter we follow, for this start of ours, and for a text that we told it: by length
and by digest. What is late, stale, repeated or another's falls out here, before it costs anything. Pure.
"""

import math
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from shared import subjects
from shared.messages import Close, Commit, DrafterStatus, Drafts, Follow, Open, Proposal
from shared.residency import allows
from shared.tokens import count, digest, pack
from worker.drafts import PROPOSALS_PER_STREAM
from worker.events import Advanced, Ended, Event, Started
from worker.outbox import Outgoing
from worker.sequence import Key, Sequence

Line = Open | Commit | Close

# a Follow that grows beyond this goes on in the next
FOLLOW_BYTES = 480_000
EVENT_BYTES = 160
# an answer to what was told longer ago is of no use: a drafter as far away as the moon is not followed
REMEMBERED_COMMITS = 64
# how fast the measured lead rises and falls, per answer: a proposal too short is lost, one too long costs some bytes
LEAD_RISE, LEAD_FALL = 0.3, 0.03
# a drafter that works more than this share of the time is taken last
BUSY = 0.9


class Told:
    """What the drafter knows of a stream."""

    __slots__ = ("answers", "digest", "length", "texts")

    def __init__(self, packed: bytes) -> None:
        self.length = count(packed)
        self.digest = digest(packed)
        self.texts = {self.length: self.digest}  # that it may answer to, oldest first
        self.answers: dict[int, set[tuple[bytes, bytes]]] = {}  # by base: what it assumed, and what it said

    def extend(self, packed: bytes) -> None:
        self.length += count(packed)
        self.digest = digest(packed, self.digest)
        self.texts[self.length] = self.digest
        if len(self.texts) > REMEMBERED_COMMITS:
            oldest = next(iter(self.texts))
            del self.texts[oldest]
            self.answers.pop(oldest, None)


class Following:
    """The drafters in sight and the one that was chosen."""

    def __init__(self, worker: str, epoch: int, zone: str, vocabulary: str, max_draft_tokens: int,
                 silence_s: float) -> None:
        self.chosen: DrafterStatus | None = None
        self.alien = 0  # proposals of other drafters, for other starts of ours, for streams that are not open
        self.strange = 0  # for a text that is not ours
        self.repeated = 0
        self._worker = worker
        self._epoch = epoch
        self._zone = zone
        self._vocabulary = vocabulary
        self._max_draft_tokens = max_draft_tokens
        self._silence_s = silence_s
        self._heard: dict[str, tuple[DrafterStatus, float]] = {}
        self._open: dict[Key, Told] = {}
        self._closing: list[tuple[DrafterStatus, list[Key]]] = []  # drafters that were left since the last step
        self._reopen = False
        self._behind = False  # something was not told
        self._seq = 0
        self._worked_until = 0.0  # if it worked without a pause since it was chosen
        self._lead = 0.0  # tokens by which streams had gone on when an answer came, lately

    @property
    def name(self) -> str:
        return self.chosen.id if self.chosen is not None else ""

    @property
    def usd_per_hour(self) -> float:
        """What the drafter that is followed costs; 0 where it says what no price is."""
        usd = self.chosen.price_usd_per_hour if self.chosen is not None else 0.0
        return usd if math.isfinite(usd) and usd >= 0.0 else 0.0

    @property
    def lead_tokens(self) -> int:
        """By so many tokens streams have gone on when an answer comes."""
        return math.ceil(self._lead - 0.25)

    def hear(self, status: DrafterStatus, now: float) -> None:
        """A drafter's heartbeat. A late one of the start before, which may have been in another zone, says nothing."""
        known = self._heard.get(status.id)
        if known is not None and status.epoch < known[0].epoch and now - known[1] <= self._silence_s:
            return
        self._heard[status.id] = (status, now)
        self.choose(now)

    def choose(self, now: float) -> None:
        """Keep the drafter if it is well, else take the nearest that fits; of those the one with the least to do."""
        self._heard = {name: entry for name, entry in self._heard.items() if now - entry[1] <= self._silence_s}
        fitting = {status.id: status for status, _ in self._heard.values() if self._fits(status)}
        present = self.chosen
        if present is not None and present.id in fitting and fitting[present.id].epoch == present.epoch:
            return
        best = min(fitting.values(), default=None,
                   key=lambda status: (-nearness(status.zone, self._zone), status.busy > BUSY, status.following,
                                       status.id))
        heard = self._heard.get(present.id) if present is not None else None
        # also to one that fell silent: it may live and only its heartbeats be lost
        if present is not None and self._open and (heard is None or heard[0].epoch == present.epoch):
            self._closing.append((present, list(self._open)))
        if best is None or present is None or best.id != present.id:
            self._lead = 0.0
        self.chosen = best
        self._worked_until = now
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
                       if sequence.admitted_at is not None and self.may_hear(sequence)]
            # an epoch is also raised by a drafter that still knows the streams of before
            over: list[Line] = [Close(event.sequence.key.request_id, event.sequence.key.attempt)
                                for event in events if isinstance(event, Ended) and self.may_hear(event.sequence)]
            return told + self._pack(self.chosen, over + opening)
        lines: list[Line] = []
        for event in events:
            match event:
                case Advanced(sequence, index, tokens) if sequence.key in self._open:
                    lines.append(self._commit(sequence.key, sequence.prompt_length + index, tokens))
                case Started(sequence) if self.may_hear(sequence):
                    lines.append(self._opening(sequence, sequence.resumed_length))
                case Ended(sequence) if sequence.key in self._open:
                    del self._open[sequence.key]
                    lines.append(Close(sequence.key.request_id, sequence.key.attempt))
        return told + self._pack(self.chosen, lines)

    def admit(self, drafts: Drafts, length_of: Callable[[str], int | None], now: float) -> Drafts | None:
        """What is for us of an answer, None if nothing is. `length_of`: tokens of a live request by now.

        Of its seconds count, in all, no more than have passed until `now` since the drafter was chosen.
        """
        chosen = self.chosen
        if (chosen is None or drafts.drafter != chosen.id or drafts.epoch < chosen.epoch
                or drafts.worker_epoch not in (0, self._epoch)):
            self.alien += len(drafts.proposals)
            return None
        proposals = tuple(proposal for proposal in drafts.proposals if self._is_ours(proposal, length_of))
        if not proposals:
            return None
        # of its time what it spent on these
        seconds = drafts.seconds * len(proposals) / len(drafts.proposals)
        # false also of what is no number
        seconds = min(seconds, max(0.0, now - self._worked_until)) if seconds > 0.0 else 0.0
        self._worked_until += seconds
        return replace(drafts, proposals=proposals, seconds=seconds)

    def may_hear(self, sequence: Sequence) -> bool:
        """Whether the drafter that is followed may be told of this stream, and could help it."""
        if self.chosen is None or sequence.pooling is not None:
            return False
        return allows(sequence.request.residency, self.chosen.zone)

    def _is_ours(self, proposal: Proposal, length_of: Callable[[str], int | None]) -> bool:
        told = self._open.get(Key(proposal.request_id, proposal.attempt))
        if told is None:
            self.alien += 1
            return False
        base = proposal.base_length
        if proposal.digest and told.texts.get(base) != proposal.digest:
            self.strange += 1
            return False
        if base in told.texts:
            answers = told.answers.setdefault(base, set())
            answer = (proposal.assumed, proposal.tokens)
            if answer in answers or len(answers) >= PROPOSALS_PER_STREAM:
                self.repeated += 1
                return False
            answers.add(answer)
        if not proposal.assumed and (length := length_of(proposal.request_id)) is not None:
            late = max(0, length - base)
            self._lead += (LEAD_RISE if late > self._lead else LEAD_FALL) * (late - self._lead)
        return True

    def _fits(self, status: DrafterStatus) -> bool:
        return status.state == "ready" and (not status.vocabulary or status.vocabulary == self._vocabulary)

    def _end(self, sequence: Sequence) -> list[Line]:
        """The last of a stream that is open: the rest of its text, which later streams may repeat, and its close."""
        if sequence.key not in self._open:
            # one that was told of another epoch of this drafter may still be known there
            unsure = self._reopen and self.may_hear(sequence)
            return [Close(sequence.key.request_id, sequence.key.attempt)] if unsure else []
        rest = self._catch_up(sequence)
        del self._open[sequence.key]
        return [*rest, Close(sequence.key.request_id, sequence.key.attempt)]

    def _catch_up(self, sequence: Sequence) -> list[Line]:
        """What the drafter does not know of a stream that was admitted."""
        told = self._open.get(sequence.key)
        if told is None:
            admitted = sequence.admitted_at is not None and self.may_hear(sequence)
            return [self._opening(sequence)] if admitted else []
        if told.length == len(sequence.tokens):
            return []
        return [self._commit(sequence.key, told.length, sequence.tokens[told.length:])]

    def _commit(self, key: Key, base: int, tokens: list[int]) -> Commit:
        """`tokens` came behind the `base` that the drafter knows."""
        told, packed = self._open[key], pack(tokens)
        before = told.digest
        told.extend(packed)
        return Commit(key.request_id, key.attempt, base, packed, before)

    def _opening(self, sequence: Sequence, length: int | None = None) -> Open:
        packed = pack(sequence.tokens[:length])
        self._open[sequence.key] = Told(packed)
        request = sequence.request
        return Open(request.request_id, request.attempt, packed, request.tenant,
                    sequence.prompt_length, request.sampling, self._max_draft_tokens, sequence.traceparent,
                    request.prediction)

    def _farewell(self) -> list[Outgoing]:
        closing, self._closing = self._closing, []
        return [message for drafter, keys in closing
                for message in self._pack(drafter, [Close(key.request_id, key.attempt) for key in keys])]

    def _pack(self, drafter: DrafterStatus, lines: list[Line]) -> list[Outgoing]:
        packed: list[Outgoing] = []
        part: list[Line] = []
        size = 0
        for line in lines:
            weight = EVENT_BYTES + _size(line)
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
                        Follow(self._worker, self._epoch, self._seq, tuple(lines), self._zone, self.lead_tokens))


def nearness(zone: str, other: str) -> int:
    """How many words two zones have in common, widest first; one more for the very same zone."""
    words, others = zone.lower().split("-"), other.lower().split("-")
    common = 0
    while common < min(len(words), len(others)) and words[common] == others[common]:
        common += 1
    return common + (words == others)


def _size(line: Line) -> int:
    match line:
        case Open():
            return len(line.tokens) + len(line.prediction)
        case Commit():
            return len(line.tokens)
    return 0
