"""A drafter: hears what its workers' streams say, and says what may come next.

    drafter.<id>.follow.<zone>   -> contexts       -> worker.<id>.drafts.<zone>, one message per worker
    status.worker.*       -> who lives, and where
    status.drafter.<id>   twice a second, and when streams were lost

Rules: nobody waits for a drafter, so a late proposal is only useless (law 2). Everything that has arrived is taken in
before anything is proposed: when there is too much to do, proposals become fewer, not later. Where nothing matches,
nothing is said.
"""

import asyncio
from typing import Any, Literal

import msgspec
import structlog
from msgspec.structs import replace

from drafter.contexts import Context, Contexts, Ended, Key
from drafter.metrics import Metrics
from drafter.recent import Audience, Recent
from drafter.suffix import longer
from shared import subjects, telemetry
from shared import trace_names as names
from shared.bus import Bus, BusUnavailable, Delivery
from shared.clock import Clock
from shared.fleet import Fleet
from shared.ids import new_epoch, new_id
from shared.messages import DrafterStatus, Drafts, Follow, Proposal, Status, Wire, WorkerStatus, decode, encode
from shared.residency import check_zone
from shared.settings import DrafterSettings
from shared.tokens import pack

# 16 bytes each
MAX_CONTEXT_TOKENS = 8_000_000
# past it messages are dropped: their workers' streams are lost and opened again
MAX_INBOX = 2000
# streams are asked for again (by a new epoch) no more often than this
REOPEN_S = 5.0
LEAVE_S = 1.0

_log = structlog.get_logger("drafter")


async def serve(bus: Bus, settings: DrafterSettings, clock: Clock, ready: asyncio.Event | None = None) -> None:
    """Draft until cancelled; then say goodbye, so that workers look for another.

    `ready` is set once this drafter is subscribed. Raises ValueError for an unknown kind, a zone that is none or an
    id that cannot stand in a subject, BusUnavailable when the broker is gone at the start.
    """
    settings = checked(settings)
    tracing = telemetry.configure_tracing("drafter", settings.id, settings.otlp)
    drafter = Drafter(bus, settings, clock)
    try:
        with drafter.metrics.served(settings.metrics_port):
            await drafter.listen()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(drafter.draft(), name=f"{drafter.id}-draft")
                tasks.create_task(drafter.beat(), name=f"{drafter.id}-beat")
                if ready is not None:
                    ready.set()
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    await drafter.leave()
    finally:
        if tracing.tracer is not None:
            await asyncio.to_thread(tracing.shutdown)


def checked(settings: DrafterSettings) -> DrafterSettings:
    """The settings with an id made up if there is none. Raises ValueError for what no drafter can be told."""
    if settings.kind != "suffix":
        raise ValueError(f"unknown kind of drafter {settings.kind!r}: use suffix")
    return replace(settings, id=subjects.check_id(settings.id or new_id("drafter")), zone=check_zone(settings.zone))


class Drafter:
    """One drafter: its streams, what its tenants said lately, and the messages that wait to be taken in."""

    def __init__(self, bus: Bus, settings: DrafterSettings, clock: Clock) -> None:
        self.id = settings.id
        self.epoch = new_epoch(clock)
        self.state: Literal["ready", "draining"] = "ready"
        self.contexts = Contexts(settings.max_contexts, MAX_CONTEXT_TOKENS)
        self.recent = Recent()
        self.metrics = Metrics()
        self.proposed_total = 0
        self._bus = bus
        self._settings = settings
        self._clock = clock
        self._fleet = Fleet()
        self._followed_at: dict[str, float] = {}
        self._started_again: dict[str, int] = {}  # worker -> epoch, since the last beat
        self._inbox: asyncio.Queue[Follow] = asyncio.Queue(MAX_INBOX)
        self._reopened_at = float("-inf")

    async def listen(self) -> None:
        """Subscribe."""
        await self._bus.subscribe(subjects.status("worker", "*"), self.on_status)
        for subject in (subjects.drafter_follow(self.id), subjects.drafter_follow(self.id, self._settings.zone)):
            await self._bus.subscribe(subject, self.on_follow)

    def on_follow(self, delivery: Delivery) -> None:
        message = self._decoded(delivery, Follow)
        if message is not None:
            try:
                self._inbox.put_nowait(message)
            except asyncio.QueueFull:
                self.metrics.lost.labels("inbox_full").inc()

    def on_status(self, delivery: Delivery) -> None:
        status = self._decoded(delivery, Status)
        if isinstance(status, WorkerStatus) and self._fleet.fold(status, self._clock.now()):
            self._started_again[status.id] = status.epoch

    async def draft(self) -> None:
        """Take in all that has arrived, then propose, until cancelled."""
        while True:
            messages = [await self._inbox.get()]
            while not self._inbox.empty():
                messages.append(self._inbox.get_nowait())
            touched: dict[str, dict[Key, None]] = {}
            for message in messages:
                touched.setdefault(message.worker, {}).update(dict.fromkeys(self._take_in(message)))
            for worker, keys in touched.items():
                await self._propose(worker, [context for key in keys if (context := self.contexts.get(key))])
            # a bus that takes everything at once must not keep the loop from hearing
            await asyncio.sleep(0)

    async def beat(self) -> None:
        """Twice a second: forget the silent, say how it goes."""
        while True:
            self._forget_silent()
            now = self._clock.now()
            if self.contexts.lost and now - self._reopened_at >= REOPEN_S:
                # workers open their streams again for a drafter that is new
                self._reopened_at = now
                self.contexts.lost = False
                self.epoch += 1
                _log.info("streams_asked_again", epoch=self.epoch)
            await self._say_status()
            await self._clock.sleep(self._settings.heartbeat_s)

    async def leave(self) -> None:
        """Say goodbye: a worker that hears it looks for another drafter at once."""
        self.state = "draining"
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._say_status()
        except TimeoutError:
            _log.warning("left_in_haste")

    def _take_in(self, message: Follow) -> list[Key]:
        """Returns the streams that stand elsewhere now."""
        self.metrics.followed.inc()
        self._followed_at[message.worker] = self._clock.now()
        followed = self.contexts.follow(message, self._clock.wall())
        for ended in followed.ended:
            self._end(ended)
        return followed.touched

    async def _propose(self, worker: str, contexts: list[Context]) -> None:
        """A proposal for each of these streams that has something to expect: one message, to the zone they are in."""
        proposals: dict[str, list[Proposal]] = {}
        for context in contexts:
            tokens = self._guess(context)
            if tokens:
                key = context.key
                proposals.setdefault(context.zone, []).append(
                    Proposal(key.request_id, key.attempt, len(context), pack(tokens)))
                self.metrics.proposed_tokens.inc(len(tokens))
        for zone, those in proposals.items():
            self.proposed_total += len(those)
            self.metrics.proposals.inc(len(those))
            await self._publish(subjects.worker_drafts(worker, zone), Drafts(self.id, self.epoch, tuple(those)))

    def _guess(self, context: Context) -> list[int]:
        draft_tokens = min(context.max_draft_tokens, self._settings.max_draft_tokens)
        if draft_tokens <= 0:
            return []
        # the answer may come a step late: when a step has verified one draft and sampled a token more, there must still
        # be as much behind it
        most = 2 * (draft_tokens + 1)
        end = context.history.tokens
        match = context.history.longest_match(end, most)
        audience = self._audience(context)
        if audience is not None:
            match = longer(match, self.recent.longest_match(audience, end, most))
        if match is None or not match.tokens:
            context.expect_nothing()
            return []
        return context.expect(match)

    def _audience(self, context: Context) -> Audience | None:
        """Who may see this stream's text; None while its worker's zone is not known, or its worker is another now."""
        worker = self._fleet.worker(context.key.worker)
        if worker is None or worker.epoch != context.epoch:
            return None
        return Audience(context.tenant, worker.model, worker.zone)

    def _end(self, ended: Ended) -> None:
        """A stream is followed no longer: remember what it said, and tell how drafting it went."""
        context, why = ended
        audience = self._audience(context)
        if why == "closed" and audience is not None:
            self.recent.add(audience, context.history.tokens, context.prompt_tokens)
        self.metrics.streams_ended.labels(why).inc()
        self.metrics.judged_tokens.inc(context.judged_tokens)
        self.metrics.right_tokens.inc(context.right_tokens)
        telemetry.span_at(
            "draft", context.opened_at, self._clock.wall(), telemetry.extract({"traceparent": context.traceparent}),
            {
                names.REQUEST_ID: context.key.request_id,
                names.ATTEMPT: context.key.attempt,
                names.WORKER: context.key.worker,
                names.DRAFTER: self.id,
                names.DRAFT_TOKENS: context.proposed_tokens,
                names.DRAFT_ACCEPTED_TOKENS: context.right_tokens,
            },
            error="" if why == "closed" else why)

    def _forget_silent(self) -> None:
        """Streams of workers that started again, or that tell of none and neither speak nor have any.

        A worker whose last `Close` was lost says nothing more, so that no gap shows: its status does.
        """
        now = self._clock.now()
        for worker, epoch in self._started_again.items():
            for ended in self.contexts.drop_worker(worker, before_epoch=epoch):
                self._end(ended)
        self._started_again.clear()
        self._fleet.forget_silent(now, self._settings.silence_s)
        for worker, at in list(self._followed_at.items()):
            status = self._fleet.worker(worker)
            at_work = status is not None and bool(status.running or status.waiting)
            if now - at > self._settings.silence_s and not at_work:
                del self._followed_at[worker]
                for ended in self.contexts.drop_worker(worker):
                    self._end(ended)

    async def _say_status(self) -> None:
        self.metrics.following.set(len(self.contexts))
        self.metrics.context_tokens.set(self.contexts.tokens)
        self.metrics.recent_tokens.set(self.recent.tokens)
        self.metrics.gaps.set(self.contexts.gaps_total)
        await self._publish(subjects.status("drafter", self.id), DrafterStatus(
            self.id, self.epoch, self._settings.kind, state=self.state, zone=self._settings.zone,
            following=len(self.contexts), proposed_total=self.proposed_total))

    async def _publish(self, subject: str, message: Wire) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except (BusUnavailable, ValueError) as error:
            self.metrics.lost.labels("bus" if isinstance(error, BusUnavailable) else "too_large").inc()
            _log.debug("publish_failed", subject=subject, reason=str(error))

    def _decoded(self, delivery: Delivery, kind: Any) -> Any:
        """The message, or None when these bytes are none."""
        try:
            return decode(delivery.data, kind)
        except msgspec.DecodeError as error:
            self.metrics.bad_messages.inc()
            _log.warning("bad_message", subject=delivery.subject, reason=str(error))
            return None
