"""All streams of one gateway: replies in, actions out.

Rule: one pass over each message, no waiting. `gateway.failover` decides; here its actions become messages, tokens for a
handler to pick up, and figures. A handler waits on its call's `changed` and takes what has come.

    open() --Generate--> outbox        hear() --tokens--> Stream.take()        tick(): deadlines, deaths, silence
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import structlog
from msgspec.structs import replace

from gateway.failover import Action, Deliver, Fail, Finish, Limits, SendCancel, Senders, StreamState, Submit, Withdraw
from gateway.metrics import Metrics
from gateway.receipts import MOST_NOTES, Note
from gateway.record import Record
from shared import subjects
from shared.clock import Clock
from shared.errors import MillError, NoEligibleWorker, Overloaded, TooLarge
from shared.fleet import Fleet
from shared.messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    Generate,
    Queued,
    Reply,
    Scored,
    StepReplies,
    Tokens,
    WorkerStatus,
    demands,
    encode,
)
from shared.residency import allows
from shared.telemetry import ids_in

_REMEMBERED_CANCELS = 4096
_REMEMBERED_SENDERS = 4096
_REMEMBERED_LEAVING = 4096  # as long as somebody may ask for their last words: half a second
_CANCEL_AGAIN_S = 1.0  # cancels get lost too; a worker that still sends hears of it again, but not for every step
_BACK_SOON_S = 2.0

log = structlog.get_logger("gateway.streams")


class Outgoing(NamedTuple):
    """One message to publish."""

    subject: str
    data: bytes
    headers: Mapping[str, str]
    unheard: Callable[[], None] | None  # nobody listens there, or the bus is gone
    too_large: Callable[[ValueError], None] | None


class Wake(Protocol):
    """Who waits for a stream, as an `asyncio.Event` is woken. Must not raise."""

    def set(self) -> None:
        """There is something to take."""


class _Nobody:
    def set(self) -> None:
        """Whoever waited has gone."""


NOBODY = _Nobody()


class Stream:
    """One choice of one request. Written by `Streams`, read by the handler."""

    __slots__ = ("changed", "ended", "filed_under", "first_token_s", "headers", "heard_out", "last_token_s",
                 "last_word", "notes", "opened_s", "parting", "pending", "state", "submitted")

    def __init__(self, state: StreamState, headers: Mapping[str, str], changed: Wake, now_s: float) -> None:
        self.state = state
        self.headers = headers
        self.changed = changed
        self.pending: list[int] = []  # at most max_tokens of the request
        self.ended: Finished | MillError | None = None
        self.opened_s = now_s
        self.first_token_s: float | None = None
        self.last_token_s = now_s
        self.submitted = 0
        self.notes: list[Note] = []  # receipts of its attempts
        self.filed_under = ""  # the worker by which `Streams` finds it
        self.last_word: Finished | None = None  # of its worker, when it was ended here
        self.heard_out: Callable[[], None] | None = None  # to be called then
        self.parting = False  # stopped, and its worker has yet to say what drafts brought

    @property
    def alive(self) -> bool:
        """Whether a worker has shown that it works on this."""
        return self.state.state == "running" or bool(self.state.delivered)

    @property
    def worker(self) -> str:
        """Who works on it, or ended it; empty while nobody does."""
        if isinstance(self.ended, Finished) and self.ended.worker:
            return self.ended.worker
        return self.state.worker

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first worker did not have to compute; what later attempts found does not count."""
        if isinstance(self.ended, Finished) and self.state.attempt == 1:
            return max(self.state.cached_tokens, self.ended.cached_tokens)
        return self.state.cached_tokens

    def note(self, reply: Reply, sender: str) -> None:
        """Keep the receipt that came with a reply, the first of each attempt."""
        if not isinstance(reply, Accepted | Failed) or not reply.receipt:
            return
        if any(note.attempt == reply.attempt for note in self.notes):
            return
        self.notes.append(Note(reply.attempt, sender, reply.receipt))
        if len(self.notes) > MOST_NOTES:
            del self.notes[1]

    def take(self) -> list[int]:
        """The tokens that came since the last call."""
        taken, self.pending = self.pending, []
        return taken


class Streams:
    """The streams under way, by request id."""

    def __init__(self, gateway: str, limits: Limits, silence_s: float, clock: Clock, fleet: Fleet,
                 metrics: Metrics, record: Record | None = None) -> None:
        self.outbox: asyncio.Queue[Outgoing] = asyncio.Queue()  # bounded by the streams admitted
        self.some = asyncio.Event()  # set while there are streams
        self._gateway = gateway
        self._limits = limits
        self._silence_s = silence_s
        self._clock = clock
        self._fleet = fleet
        self._metrics = metrics
        self._record = record
        self._streams: dict[str, Stream] = {}
        self._by_worker: dict[str, dict[Stream, None]] = {}  # who works on what, in order
        self._parting: dict[str, Stream] = {}  # stopped streams whose handlers may wait for a last word
        self._leaving: OrderedDict[str, Stream] = OrderedDict()  # that are over here, but for their workers' last words
        self._mourners: dict[str, dict[Stream, None]] = {}  # by workers that they take for dead
        self._senders = Senders()
        self._replied_s: dict[str, float] = {}  # sender -> when it last replied: as good a sign of life as a status
        self._cancelled: OrderedDict[tuple[str, str, int], float] = OrderedDict()
        self._changed: dict[Wake, None] = {}  # who has something to take, in order
        self._waking = False
        self._blind_until_s = 0.0
        self._ticked_s: float | None = None

    def __len__(self) -> int:
        return len(self._streams)

    # --- the handler's side ------------------------------------------------------------------------------------------

    def open(self, request: Generate, headers: Mapping[str, str], changed: Wake, deadline_s: float) -> Stream:
        """Send `request` on its way. `changed` is set whenever there is something to take."""
        now_s = self._clock.now()
        stream = Stream(StreamState(request, self._limits, deadline_s), headers, changed, now_s)
        self._streams[request.request_id] = stream
        self.some.set()
        self._perform(stream, stream.state.start(now_s))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Stop it wherever it is. Nothing more will come."""
        if stream.state.state != "ended":
            self._leave(stream)
        self._perform(stream, stream.state.cancel())
        self._forget(stream)
        self._part(stream)

    def stop(self, stream: Stream) -> None:
        """As `cancel`, at a stop string. Where a drafter works `parting` is true until its worker's last word."""
        self._leave(stream)
        self._perform(stream, stream.state.cancel())
        self._forget(stream)
        worker = self._fleet.worker(stream.state.worker)
        if stream.ended is None and worker is not None and worker.drafter:
            stream.parting = True
            self._parting[stream.state.request.request_id] = stream

    def hear_out(self, stream: Stream, call: Callable[[], None]) -> bool:
        """Have `call` made when the worker of a stream that was ended here has said what it took; not if that is lost.

        False when no last word is to come.
        """
        if self._leaving.get(stream.state.request.request_id) is not stream:
            return False
        stream.heard_out = call
        return True

    def hear_no_more(self, stream: Stream) -> None:
        """Nobody asks what it took."""
        self._leaving.pop(stream.state.request.request_id, None)
        stream.heard_out = None

    def give_up(self, error: MillError) -> None:
        """End every stream with `error`."""
        for stream in list(self._streams.values()):
            self._perform(stream, stream.state.give_up(error))

    # --- the bus's side ----------------------------------------------------------------------------------------------

    def hear(self, message: StepReplies) -> None:
        """All replies of one step of one sender."""
        now_s = self._clock.now()
        sender, epoch = message.sender, message.epoch
        self._replied_s[sender] = now_s
        match self._senders.heard(sender, epoch, message.seq):
            case "gap":
                self._lost(sender, now_s)
            case "filled":
                self._each_on(sender, lambda state: state.found_reply(sender))
            case "restarted":
                self._each_on(sender, lambda state: state.worker_died(sender, now_s, back_in_epoch=epoch))
        known, recipe, between_tokens = self._fleet.worker(sender), message.recipe, self._metrics.between_tokens.note
        for reply in message.replies:
            stream = self._streams.get(reply.request_id)
            if stream is None:
                self._hear_last(reply, sender) if type(reply) is Finished else self._stop_stranger(reply, sender)
                continue
            self._changed[stream.changed] = None
            if type(reply) is Tokens and (fresh := stream.state.hear_next(reply, sender, now_s, recipe)) is not None:
                stream.pending += fresh
                # a stream's first tokens never come this way
                between_tokens(now_s - stream.last_token_s)
                stream.last_token_s = now_s
                continue
            stream.note(reply, sender)
            self._perform(stream, stream.state.hear(reply, sender, epoch, now_s, from_worker=known is not None,
                                                    recipe=recipe))
        if self._changed and not self._waking:
            # behind all messages that have arrived by now: what belongs together leaves in one write
            self._waking = True
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        changed, self._changed, self._waking = self._changed, {}, False
        for wake in changed:
            wake.set()

    def status(self, status: WorkerStatus) -> None:
        """What a worker says of itself: a new life forgets all streams, a count beyond ours means a lost message."""
        now_s = self._clock.now()
        if not self._streams:
            return
        for stream in list(self._mourners.get(status.id, ())):
            stream.state.lives(status.id, status.epoch)
            if status.id not in stream.state.mourned:
                _take_out(self._mourners, status.id, stream)
        self._each_on(status.id, lambda state: state.worker_died(status.id, now_s, back_in_epoch=status.epoch))
        if self._senders.told(status.id, status.epoch, status.replies_sent.get(self._gateway, 0)):
            self._lost(status.id, now_s)

    def tick(self, connected: bool) -> None:
        """Look at every stream's clock. `connected`: whether the bus is there.

        Nobody is declared dead while we could not have heard them: without a bus, or after this process stood still.
        """
        now_s = self._clock.now()
        stood_still = self._ticked_s is not None and now_s - self._ticked_s > self._silence_s / 2
        self._ticked_s = now_s
        if not connected or stood_still:
            self._blind_until_s = now_s + self._silence_s
        for stream in list(self._streams.values()):
            state = stream.state
            status = self._fleet.worker(state.worker) if state.worker else None
            if status is not None and now_s >= self._blind_until_s and self._silent(status, now_s):
                self._perform(stream, state.worker_died(state.worker, now_s))
                if status.id in state.mourned and state.state != "ended":
                    self._mourners.setdefault(status.id, {})[stream] = None
            self._perform(stream, state.tick(now_s, queueing=status is not None and status.waiting > 0))
        if not self._streams:
            self._ticked_s = None
            self._replied_s.clear()
        elif len(self._replied_s) > _REMEMBERED_SENDERS:
            self._replied_s = {who: at_s for who, at_s in self._replied_s.items() if now_s - at_s <= self._silence_s}

    # --- inside ------------------------------------------------------------------------------------------------------

    def _silent(self, status: WorkerStatus, now_s: float) -> bool:
        silent_s = self._fleet.silent_s(status, now_s) or 0.0
        return min(silent_s, now_s - self._replied_s.get(status.id, -math.inf)) > self._silence_s

    def _lost(self, sender: str, now_s: float) -> None:
        self._metrics.lost_messages.inc()
        log.warning("reply_lost", sender=sender)
        self._each_on(sender, lambda state: state.lost_reply(sender, now_s))

    def _each_on(self, worker: str, step: Callable[[StreamState], list[Action]]) -> None:
        for stream in list(self._by_worker.get(worker, ())):
            self._perform(stream, step(stream.state))

    def _hear_last(self, reply: Finished, sender: str) -> None:
        """A worker's last word on a stream that was stopped: how it ended is known already, what it took is not."""
        stream = self._parting.get(reply.request_id)
        if stream is not None and (reply.attempt, sender) == (stream.state.attempt, stream.state.worker):
            stream.ended = replace(reply, reason="stop")
            self._part(stream)
            stream.changed.set()
        stream = self._leaving.get(reply.request_id)
        if stream is not None and (reply.attempt, sender) == (stream.state.attempt, stream.state.worker):
            del self._leaving[reply.request_id]
            stream.last_word = reply
            if stream.heard_out is not None:
                stream.heard_out()

    def _leave(self, stream: Stream) -> None:
        """It was ended here: its worker will say what it took."""
        if stream.ended is None and stream.state.worker:
            self._leaving[stream.state.request.request_id] = stream
            if len(self._leaving) > _REMEMBERED_LEAVING:
                self._leaving.popitem(last=False)

    def _part(self, stream: Stream) -> None:
        if stream.parting:
            stream.parting = False
            del self._parting[stream.state.request.request_id]

    def _stop_stranger(self, reply: Reply, sender: str) -> None:
        if isinstance(reply, Accepted | Tokens | Scored):
            self._cancel_at(subjects.worker_cancel(sender), Cancel(reply.request_id, reply.attempt))
        elif isinstance(reply, Queued):
            self._cancel_at(subjects.router_cancel(sender), Cancel(reply.request_id, reply.attempt))

    def _file(self, stream: Stream) -> None:
        """Find it under the worker that has it now."""
        worker = stream.state.worker
        if worker != stream.filed_under:
            _take_out(self._by_worker, stream.filed_under, stream)
            stream.filed_under = worker
            if worker:
                self._by_worker.setdefault(worker, {})[stream] = None

    def _perform(self, stream: Stream, actions: list[Action]) -> None:
        """`actions` are what an input of its state gave."""
        self._file(stream)
        for action in actions:
            match action:
                case Deliver(tokens):
                    now_s = self._clock.now()
                    if stream.first_token_s is None:
                        stream.first_token_s = now_s
                    else:
                        self._metrics.between_tokens.note(now_s - stream.last_token_s)
                    stream.last_token_s = now_s
                    stream.pending += tokens
                case Submit(message, cause):
                    self._submit(stream, message, cause)
                case SendCancel(worker, message):
                    self._cancel_at(subjects.worker_cancel(worker), message)
                case Withdraw(router, message):
                    self._cancel_at(subjects.router_cancel(router), message)
                case Finish(message):
                    self._end(stream, message)
                case Fail(error):
                    self._end(stream, self._judged(error, stream.state.request))

    def _submit(self, stream: Stream, message: Generate, cause: str) -> None:
        if cause:
            self._metrics.resubmissions.labels(cause).inc()
            log.info("request_sent_again", stream=message.request_id, attempt=message.attempt, cause=cause,
                     delivered=len(stream.state.delivered), excluded=list(message.exclude_workers),
                     **ids_in(stream.headers.get("traceparent", "")))
        stream.submitted += 1

        def unheard() -> None:
            self._perform(stream, stream.state.unheard(message.attempt, self._clock.now()))

        def too_large(error: ValueError) -> None:
            self._perform(stream, stream.state.give_up(_too_large(error)))

        self.outbox.put_nowait(Outgoing(subjects.generate(message.model), encode(message), stream.headers, unheard,
                                        too_large))

    def _cancel_at(self, subject: str, message: Cancel) -> None:
        key, now_s = (subject, message.request_id, message.attempt), self._clock.now()
        if now_s - self._cancelled.get(key, -_CANCEL_AGAIN_S) < _CANCEL_AGAIN_S:
            return
        self._cancelled[key] = now_s
        self._cancelled.move_to_end(key)
        if len(self._cancelled) > _REMEMBERED_CANCELS:
            self._cancelled.popitem(last=False)
        self._metrics.cancels.inc()
        self.outbox.put_nowait(Outgoing(subject, encode(message), {}, None, None))

    def _end(self, stream: Stream, how: Finished | MillError) -> None:
        stream.ended = how
        stream.changed.set()
        self._forget(stream)

    def _judged(self, error: MillError, request: Generate) -> MillError:
        """A router that has just started knows of nobody; whoever was heard here a moment ago may be back soon."""
        demanded = {*demands(request)}
        if isinstance(error, NoEligibleWorker) and any(
                allows(request.residency, worker.zone) and demanded <= {*worker.abilities}
                for worker in self._fleet.workers(request.model)):
            return Overloaded(f"{error.message}, but one did lately: retry", retry_after_s=_BACK_SOON_S)
        return error

    def _forget(self, stream: Stream) -> None:
        known = self._streams.pop(stream.state.request.request_id, None)
        _take_out(self._by_worker, stream.filed_under, stream)
        for worker in stream.state.mourned:
            _take_out(self._mourners, worker, stream)
        if known is not None and self._record is not None:
            came_s = self._clock.wall() - (self._clock.now() - stream.opened_s)
            self._record.note(came_s, stream.state.request, len(stream.state.delivered))
        if not self._streams:
            self.some.clear()


def _take_out(files: dict[str, dict[Stream, None]], worker: str, stream: Stream) -> None:
    """Take a stream out of a worker's file, if it is there."""
    file = files.get(worker, {})
    file.pop(stream, None)
    if not file:
        files.pop(worker, None)


def _too_large(error: ValueError) -> MillError:
    return TooLarge(f"the request does not fit into one message of the mesh: {error}")
