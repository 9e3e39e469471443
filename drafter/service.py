"""A drafter: hears what its workers' streams say, and says what may come next.

    drafter.<id>.follow.<zone>   -> contexts -> draftsman   -> worker.<id>.drafts.<zone>, one message per worker
    status.worker.*       -> who lives, and where
    status.drafter.<id>   twice a second, and when streams were lost

Rules: nobody waits for a drafter, so a late proposal is only useless (law 2). Everything that has arrived is taken in
before anything is proposed: when there is too much to do, proposals become fewer, not later. Where nothing matches,
nothing is said. Beyond the likeliest continuation of a stream only so much is prepared as `drafter.budget` allows.
A draftsman that fails loses its streams, and they are opened again as after a gap: the drafter lives on.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from drafter import kinds
from drafter.budget import SHARE, THREAD_SHARE, Budget
from drafter.contexts import Advanced, Context, Contexts, Ended, News, Opened
from drafter.drafting import Ask, Audience, Continuation, Draftsman, Key
from drafter.metrics import Metrics
from shared import subjects, telemetry
from shared import trace_names as names
from shared.bus import Bus, BusUnavailable, Delivery
from shared.clock import Clock
from shared.fleet import Fleet
from shared.ids import new_epoch, new_id
from shared.messages import DrafterStatus, Drafts, Follow, Proposal, Status, Wire, WorkerStatus, decode, encode
from shared.residency import check_zone
from shared.settings import DrafterSettings, check_price
from shared.tokens import pack

T = TypeVar("T")

# about 100 bytes each
MAX_CONTEXT_TOKENS = 1_000_000
# past it messages are dropped: their workers' streams are lost and opened again
MAX_INBOX = 2000
# streams are asked for again (by a new epoch) no more often than this
REOPEN_S = 5.0
LEAVE_S = 1.0
# a worker takes no longer proposals, and of a longer lead nothing is right
LONGEST_CONTINUATION = 128

_log = structlog.get_logger("drafter")


async def serve(bus: Bus, settings: DrafterSettings, clock: Clock, ready: asyncio.Event | None = None) -> None:
    """Draft until cancelled; then say goodbye, so that workers look for another.

    `ready` is set once this drafter is subscribed. Raises ValueError for an unknown kind, a model that cannot be read,
    a zone that is none or an id that cannot stand in a subject, BusUnavailable when the broker is gone at the start.
    """
    settings = checked(settings)
    tracing = telemetry.configure_tracing("drafter", settings.id, settings.otlp)
    if settings.kind == "suffix":
        draftsman = kinds.draftsman_of(settings)
    else:
        # reading a model takes seconds, and others may live on this loop
        draftsman = await asyncio.to_thread(kinds.draftsman_of, settings)
    drafter = Drafter(bus, settings, clock, draftsman)
    try:
        with drafter.metrics.served(settings.metrics_port, settings.metrics_host, lambda: drafter.state == "ready"):
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
        drafter.close()
        if tracing.tracer is not None:
            await asyncio.to_thread(tracing.shutdown)


def checked(settings: DrafterSettings) -> DrafterSettings:
    """The settings with an id made up if there is none. Raises ValueError for what no drafter can be told."""
    kinds.check(settings)
    check_price(settings.price_usd_per_hour)
    return replace(settings, id=subjects.check_id(settings.id or new_id("drafter")), zone=check_zone(settings.zone))


class Drafter:
    """One drafter: its streams, who drafts, and the messages that wait to be taken in."""

    def __init__(self, bus: Bus, settings: DrafterSettings, clock: Clock, draftsman: Draftsman) -> None:
        self.id = settings.id
        self.epoch = new_epoch(clock)
        self.state: Literal["ready", "draining"] = "ready"
        self.contexts = Contexts(settings.max_contexts, MAX_CONTEXT_TOKENS)
        self.draftsman = draftsman
        self.budget = Budget(THREAD_SHARE if draftsman.threaded else SHARE)
        self.metrics = Metrics()
        self.proposed_total = 0
        self._bus = bus
        self._settings = settings
        self._clock = clock
        self._fleet = Fleet()
        self._followed_at: dict[str, float] = {}
        self._started_again: dict[str, int] = {}  # worker -> epoch, since the last beat
        self._inbox: asyncio.Queue[Follow] = asyncio.Queue(MAX_INBOX)
        self._untold: list[tuple[News, Audience | None]] = []  # what the draftsman has not heard yet, in order
        self._touched: dict[Key, None] = {}  # streams of which something is to be said
        self._reopened_at = float("-inf")
        self._thread = ThreadPoolExecutor(1, "draftsman") if draftsman.threaded else None

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
            own = self.draftsman.vocabulary
            if own and own != status.vocabulary:
                _log.warning("vocabulary_differs", worker=status.id, its=status.vocabulary, own=own,
                             instead="it takes no drafts from here: give this drafter a model of the same vocabulary, "
                             "such as one that `tokenmill distil` makes of the worker's own")

    async def draft(self) -> None:
        """Take in all that has arrived, then propose, until cancelled."""
        while True:
            heard = [self._take_in(await self._inbox.get())] if not self._touched else []
            heard += self._take_in_all()
            self.budget.begin(self._clock.now(), asked=bool(heard))
            touched, self._touched = self._touched, {}
            await self._propose([context for key in touched if (context := self.contexts.get(key))],
                                backlog=len(heard) > len(set(heard)))
            # a bus that takes everything at once must not keep the loop from hearing
            await asyncio.sleep(0)
            self._touched.update(dict.fromkeys(key for key in self.draftsman.behind if self.contexts.get(key)))

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

    def close(self) -> None:
        """End the draftsman's thread, once it is done with what it does."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    # --- what arrives ------------------------------------------------------------------------------------------------

    def _take_in_all(self) -> list[str]:
        """Everything that has arrived; whose messages they were."""
        heard = []
        while not self._inbox.empty():
            heard.append(self._take_in(self._inbox.get_nowait()))
        return heard

    def _take_in(self, message: Follow) -> str:
        """Streams that stand elsewhere now are `_touched`; returns whose they are."""
        self.metrics.followed.inc()
        self._followed_at[message.worker] = self._clock.now()
        followed = self.contexts.follow(message, self._clock.wall())
        self._hear(followed.news)
        self._touched.update(dict.fromkeys(followed.touched))
        return message.worker

    def _hear(self, news: list[News]) -> None:
        """Keep what happened for the draftsman, and tell how drafting went where a stream has ended."""
        for happened in news:
            audience = None
            if isinstance(happened, Ended):
                audience = self._audience(happened.context) if happened.why == "closed" else None
                self._account(happened)
            self._untold.append((happened, audience))

    def _audience(self, context: Context) -> Audience | None:
        """Who may see this stream's text; None while its worker's zone is not known, or its worker is another now."""
        worker = self._fleet.worker(context.key.worker)
        if worker is None or worker.epoch != context.epoch:
            return None
        return Audience(context.tenant, worker.model, worker.zone)

    def _forget_silent(self) -> None:
        """Streams of workers that started again, or that tell of none and neither speak nor have any.

        A worker whose last `Close` was lost says nothing more, so that no gap shows: its status does.
        """
        now = self._clock.now()
        for worker, epoch in self._started_again.items():
            self._hear(self.contexts.drop_worker(worker, before_epoch=epoch))
        self._started_again.clear()
        self._fleet.forget_silent(now, self._settings.silence_s)
        for worker, at in list(self._followed_at.items()):
            status = self._fleet.worker(worker)
            at_work = status is not None and bool(status.running or status.waiting)
            if now - at > self._settings.silence_s and not at_work:
                del self._followed_at[worker]
                self._hear(self.contexts.drop_worker(worker))

    # --- what leaves -------------------------------------------------------------------------------------------------

    async def _propose(self, contexts: list[Context], backlog: bool) -> None:
        """What is expected of these streams: a message to each worker whose streams something is known of."""
        branches = self.budget.branches(len(contexts), self._settings.max_branches, backlog)
        asks = [ask for context in contexts if (ask := self._ask(context, branches)) is not None]
        untold, self._untold = self._untold, []
        seconds = self.budget.seconds
        try:
            found = await self._call(lambda: _work(self.draftsman, untold, asks, seconds))
        except Exception as error:
            _log.exception("drafting_failed", error=repr(error), streams=len(self.contexts))
            await self._lose_streams(untold)
            found = []
        if self._thread is not None:
            # streams went on and ended meanwhile
            self._take_in_all()
        proposals: dict[tuple[str, int, str], list[Proposal]] = {}
        for continuation in found:
            context = self.contexts.get(continuation.key)
            proposal = _proposal(continuation, context) if context is not None else None
            if context is None or proposal is None:
                continue
            if not continuation.assumed:
                context.expect(continuation.tokens)
            proposals.setdefault((context.key.worker, context.epoch, context.zone), []).append(proposal)
            self.metrics.proposed_tokens.inc(len(continuation.tokens))
        took_s = self.budget.end(self._clock.now(), len(found))
        self.metrics.seconds.inc(took_s)
        for (worker, epoch, zone), those in proposals.items():
            self.proposed_total += len(those)
            self.metrics.proposals.inc(len(those))
            self.metrics.conditions.inc(sum(1 for proposal in those if proposal.assumed))
            share = took_s * len(those) / len(found)
            await self._publish(subjects.worker_drafts(worker, zone),
                                Drafts(self.id, self.epoch, tuple(those), epoch, share))

    async def _lose_streams(self, untold: Sequence[tuple[News, Audience | None]]) -> None:
        """Nobody knows what the draftsman has of them, or heard of `untold`; a new epoch asks for them again."""
        ended = self.contexts.drop_all("failed")
        for one in ended:
            self._account(one)
        keys = {one.context.key for one in ended}
        keys.update(happened.context.key if isinstance(happened, Ended) else happened.key for happened, _ in untold)
        await self._call(lambda: _forget(self.draftsman, keys))

    def _ask(self, context: Context, branches: int) -> Ask | None:
        draft_tokens = min(context.max_draft_tokens, self._settings.max_draft_tokens)
        if draft_tokens <= 0:
            return None
        # the answer comes `lead` tokens late and may be wanted a step later still: when that step has verified all it
        # could and sampled a token more, there must be as much behind it
        lead = min(max(0, context.lead_tokens), LONGEST_CONTINUATION)
        length = min(lead + 2 * (draft_tokens + 1), LONGEST_CONTINUATION)
        context.ask()
        return Ask(context.key, length, lead, branches, self._audience(context))

    async def _call(self, work: Callable[[], T]) -> T:
        """In the draftsman's thread if it has one."""
        if self._thread is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _account(self, ended: Ended) -> None:
        """A stream is followed no longer: tell how drafting it went."""
        context, why = ended
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

    async def _say_status(self) -> None:
        busy = self.budget.busy(self._clock.now())
        self.metrics.following.set(len(self.contexts))
        self.metrics.context_tokens.set(self.contexts.tokens)
        self.metrics.gaps.set(self.contexts.gaps_total)
        self.metrics.diverged.set(self.contexts.diverged_total)
        self.metrics.busy.set(busy)
        await self._publish(subjects.status("drafter", self.id), DrafterStatus(
            self.id, self.epoch, self._settings.kind, self.draftsman.vocabulary, self.state, self._settings.zone,
            len(self.contexts), self.proposed_total, busy, self._settings.price_usd_per_hour))

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


def _work(draftsman: Draftsman, untold: Sequence[tuple[News, Audience | None]], asks: Sequence[Ask],
          budget_s: float) -> list[Continuation]:
    """Tell the draftsman what happened, then ask."""
    for happened, audience in untold:
        match happened:
            case Opened(key, stream):
                draftsman.open(key, stream)
            case Advanced(key, base, tokens):
                draftsman.advance(key, base, tokens)
            case Ended(context, _):
                draftsman.close(context.key, audience)
    return draftsman.propose(asks, budget_s) if asks else []


def _forget(draftsman: Draftsman, keys: Collection[Key]) -> None:
    """Close these streams, whether it has them or not."""
    for key in keys:
        with contextlib.suppress(Exception):
            draftsman.close(key, None)


def _proposal(continuation: Continuation, context: Context) -> Proposal | None:
    """The message of a continuation; None when its stream is another now or has gone on otherwise."""
    digest = context.digest_at(continuation.base)
    if digest is None or not context.still_open([*continuation.assumed, *continuation.tokens]):
        return None
    key = continuation.key
    confidence = list(continuation.confidence)
    if continuation.assumed:
        # what all but the last of them are worth is said with the likeliest continuation
        confidence = [1.0] * (len(continuation.assumed) - 1) + [continuation.likely, *confidence]
    return Proposal(key.request_id, key.attempt, continuation.base, pack(continuation.tokens),
                    pack(continuation.assumed), digest, bytes(min(255, max(0, round(255 * one))) for one in confidence))
