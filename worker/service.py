"""A worker on the bus.

    worker.<id>.generate, .cancel, .drafts    -> the engine's inbox; what may not be everywhere names our zone too
    worker.<id>.kv_request                    -> a snapshot of the cache
    status.drafter.*, status.gateway.*        -> whom to follow, who is gone
    status.router.*                           -> a status at once for a router that has just started
    each step                                 -> replies, KV events, what the drafter should know

Rule: a handler decodes, decides and hands over. `serve` runs until cancelled and then drains: it says so first, hands
back what waits, gives running streams `drain_s` to end, and hands back the rest for another worker to continue. A
worker that has lost one of its ranks says so, hands everything back and raises.
"""

import asyncio
import contextlib
from functools import partial
from typing import Literal

import msgspec
import structlog
from msgspec.structs import replace

from kernels.ranks import RankLost
from kernels.step import Decoder, Embedding
from shared import subjects
from shared.bus import Bus, BusUnavailable, Delivery, Handler
from shared.clock import Clock
from shared.errors import NoEligibleWorker, Overloaded, WorkerFailed
from shared.ids import new_epoch, new_id
from shared.messages import (
    Cancel,
    DrafterStatus,
    Drafts,
    GatewayStatus,
    Generate,
    RouterStatus,
    SnapshotRequest,
    Status,
    WorkerStatus,
    decode,
    encode,
)
from shared.residency import allows, check_zone
from shared.settings import WorkerSettings, check_price
from shared.telemetry import configure_tracing
from shared.timeline import Timeline
from worker.batch import Batch
from worker.calibrate import calibrate
from worker.engine import Arrival, CloseDoors, DropGateways, Engine, HandBack, Lose
from worker.events import Advanced, Ended, Event, Heard, Refused, Started, failed
from worker.following import Following
from worker.grammar import Grammars
from worker.grammar_queue import GrammarQueue
from worker.kv_blocks import BlockPool
from worker.kv_tier import HostTier, TierMemory
from worker.mask_times import MaskTimes
from worker.metrics import Figures, Metrics
from worker.outbox import Outbox, Outgoing
from worker.pace import Pace
from worker.probe import probe_answer
from worker.ranks import RankedDecoder
from worker.runner import Runner, engine_of, load_decoder, runner_for, vocabulary_file, vocabulary_of
from worker.scheduler import Limits, Scheduler
from worker.trace import record_stream

# a gateway unheard for so many times the usual silence has lost its clients long ago
GATEWAY_SILENCES = 10
# after the streams were handed back, for the step under way and the last replies
LAST_WORDS_S = 5.0
# snapshots that several routers ask for at once are one; the next may follow after this
SNAPSHOT_PAUSE_S = 0.1
# changes of the cache that follow each other this fast are one message; routers expect what they sent anyway
KV_PAUSE_S = 0.05
REMEMBERED_ROUTERS = 256

_log = structlog.get_logger("worker")


async def serve(bus: Bus, settings: WorkerSettings, clock: Clock, ready: asyncio.Event | None = None,
                decoder: Decoder | None = None, timeline: Timeline | None = None) -> None:
    """Serve one decoder (loaded as the settings say unless given) until cancelled; then drain.

    `timeline` is the start so far; when the worker is ready it is logged with the phases that came here: weights
    (the checkpoint read and repacked), calibration, grammars (the vocabulary made ready for them), doors (subscribed,
    first messages sent). Raises ValueError for an id, a zone or a price that is none, and WorkerFailed for a lost rank.
    """
    timeline = timeline or Timeline()
    settings = replace(settings, zone=check_zone(settings.zone))
    check_price(settings.price_usd_per_hour)
    name = subjects.check_id(settings.id or new_id("worker"))
    epoch = new_epoch(clock)
    sender = Sender(bus)
    await sender.send([_status_of(WorkerStatus(name, epoch, settings.model_name, "starting", zone=settings.zone))])
    engine = settings.engine
    if decoder is None:
        engine = engine_of(settings)
        decoder = (load_decoder(settings, timeline) if engine == "mock"
                   else await asyncio.to_thread(load_decoder, settings, timeline))
        timeline.mark("weights")
    runner = runner_for(decoder, settings, clock)
    worker = Worker(sender, settings, clock, runner, engine, name, epoch)
    tracing = configure_tracing("worker", name, settings.otlp)
    rank_lost: BaseException | None = None
    try:
        with worker.metrics.served(settings.metrics_port, settings.metrics_host, lambda: worker.state == "ready"):
            await worker.run(bus, ready, timeline)
    except* RankLost as lost:
        rank_lost = lost.exceptions[0]
    finally:
        runner.close()
        if tracing.tracer is not None:
            await asyncio.to_thread(tracing.shutdown)
    if rank_lost is not None:
        raise WorkerFailed(str(rank_lost))


class Sender:
    """Publishing that outlives the broker: what cannot leave is counted and gone."""

    def __init__(self, bus: Bus) -> None:
        self.lost = 0
        self._bus = bus
        self._out = False

    async def send(self, outgoing: list[Outgoing]) -> None:
        for subject, message in outgoing:
            try:
                await self._bus.publish(subject, encode(message))
            except BusUnavailable as error:
                self.lost += 1
                if not self._out:
                    self._out = True
                    _log.warning("bus_unavailable", error=str(error))
            except ValueError as error:
                self.lost += 1
                _log.error("message_too_large", subject=subject, error=str(error))
            else:
                self._out = False


class Worker:
    """The shell around one engine."""

    def __init__(self, sender: Sender, settings: WorkerSettings, clock: Clock, runner: Runner, engine: str, name: str,
                 epoch: int) -> None:
        decoder = runner.decoder
        max_draft_tokens = settings.max_draft_tokens if settings.speculation else 0
        self.name = name
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self._sender = sender
        self._settings = settings
        self._clock = clock
        self._decoder = decoder
        self._runner = runner
        self._engine_name = engine
        self._vocabulary = vocabulary_of(settings)
        self._pool = BlockPool(decoder.blocks, HostTier(runner.tier.slots) if runner.tier else None)
        hidden_size = decoder.hidden_size if isinstance(decoder, Embedding) else 0
        self._scheduler = Scheduler(Limits(
            decoder.block_size_tokens, decoder.context_length, decoder.vocabulary_size, settings.step_tokens,
            settings.max_running, settings.max_waiting, max_draft_tokens, embeds=hidden_size > 0), self._pool)
        blocks_per_sequence = -(-self._scheduler.length_limit // decoder.block_size_tokens)
        self.metrics = Metrics(self.figures)
        masks = MaskTimes(self.metrics.mask_s.observe, self.metrics.step_masks_s.observe)
        self._engine = Engine(self._scheduler, Batch(settings.max_running, blocks_per_sequence,
                                                     decoder.vocabulary_size, masks.fill, hidden_size), runner, clock,
                              self._publish)
        self._outbox = Outbox(name, epoch, decoder.recipe, decoder.block_size_tokens, decoder.blocks)
        self._parity = probe_answer(name, epoch, decoder.block_size_tokens)
        self._following = Following(name, epoch, settings.zone, self._vocabulary, max_draft_tokens,
                                    settings.silence_s)
        self._engine.heard_of = self._following.may_hear
        self._engine.usd_per_hour = settings.price_usd_per_hour
        self._pace = Pace()
        self._speculates = max_draft_tokens > 0
        self._drafter_s = 0.0  # that drafters worked for this worker
        self._gateways: dict[str, float] = {}  # last heard
        self._routers: dict[str, int] = {}  # the last start of each that was answered
        self._grammars = Grammars(partial(vocabulary_file, settings), decoder.vocabulary_size)
        self._ungrammared = GrammarQueue(self._grammars, clock, self._submit,
                                         lambda request: self._say(Heard(request)))
        self._said: list[Event] = []  # at the door, not yet told
        self._status_wanted = asyncio.Event()
        self._snapshot_wanted = asyncio.Event()
        self._saying = asyncio.Event()
        self._kv_order = asyncio.Lock()
        self._kv_told_at = -KV_PAUSE_S

    async def run(self, bus: Bus, ready: asyncio.Event | None, timeline: Timeline) -> None:
        """Until cancelled, then drained."""
        await self._calibrate()
        timeline.mark("calibration")
        self._prepare_grammars()
        timeline.mark("grammars")
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            own = [tasks.create_task(work) for work in
                   (self._work(), self._beat(), self._send_snapshots(), self._send_said(),
                    self._ungrammared.run())]
            try:
                for subject, handler in self._handlers():
                    stack.push_async_callback((await bus.subscribe(subject, self._guarded(handler))).unsubscribe)
                self._snapshot_wanted.set()
                self._enter("ready")
                _log.info("worker_ready", worker=self.name, blocks=self._pool.blocks, recipe=self._decoder.recipe,
                          tier_blocks=self._runner.tier.slots if self._runner.tier else 0)
                timeline.mark("doors")
                _log.info("worker_started", **timeline.milliseconds())
                if ready is not None:
                    ready.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not any(task.done() for task in own):
                    await self._drain()
                raise
            finally:
                for task in own:
                    task.cancel()

    async def _work(self) -> None:
        """Run the engine until cancelled, or until a rank is lost: then nobody may place anything here any more."""
        if isinstance(self._decoder, RankedDecoder):
            loop = asyncio.get_running_loop()

            def lose(why: str) -> None:
                loop.call_soon_threadsafe(self._engine.submit, Lose(why))

            self._decoder.others.watch(lose)
        try:
            await self._engine.run()
        except RankLost as error:
            _log.error("rank_lost", worker=self.name, why=str(error))
            self.state = "draining"
            await self._sender.send([_status_of(self.status())])
            self._ungrammared.clear()
            await self._engine.give_up(f"worker {self.name} has lost a rank")
            raise

    async def _calibrate(self) -> None:
        try:
            await calibrate(self._runner, self._scheduler.cost, self._clock, self._settings.max_running,
                            self._settings.step_tokens)
        except RankLost:
            raise
        except Exception as error:
            # requests will show whether it was the device or only this
            _log.error("calibration_failed", error=repr(error))

    def _prepare_grammars(self) -> None:
        """Before the doors open: it holds everything up for as long as it takes."""
        try:
            self._grammars.prepare()
        except NoEligibleWorker as error:
            _log.info("no_grammars", worker=self.name, why=error.message)
        except ValueError as error:
            _log.error("no_grammars", worker=self.name, why=str(error))

    # --- what arrives ------------------------------------------------------------------------------------------------

    def _handlers(self) -> list[tuple[str, Handler]]:
        zone = self._settings.zone
        return [
            (subjects.worker_generate(self.name), self._on_generate),
            (subjects.worker_generate(self.name, zone), self._on_generate),
            (subjects.worker_cancel(self.name), self._on_cancel),
            (subjects.worker_drafts(self.name), self._on_drafts),
            (subjects.worker_drafts(self.name, zone), self._on_drafts),
            (subjects.worker_kv_request(self.name), self._on_snapshot_request),
            (subjects.status("drafter", "*"), self._on_status),
            (subjects.status("gateway", "*"), self._on_status),
            (subjects.status("router", "*"), self._on_status),
        ]

    def _guarded(self, handler: Handler) -> Handler:
        """Bytes that are no message are logged and dropped."""
        def guarded(delivery: Delivery) -> None:
            try:
                handler(delivery)
            except msgspec.MsgspecError as error:
                _log.warning("message_not_understood", subject=delivery.subject, error=str(error))
        return guarded

    def _on_generate(self, delivery: Delivery) -> None:
        request = decode(delivery.data, Generate)
        # a sign of life; one that dies before its first heartbeat arrives must fall silent too
        self._gateways[request.gateway] = self._clock.now()
        if not allows(request.residency, self._settings.zone):
            # whoever placed it thought this worker elsewhere: another may be where it is allowed
            error = NoEligibleWorker(f"the residency policy does not allow zone {self._settings.zone}")
            self._say(Refused(request, failed(request, error, True)))
            return
        if request.model != self._settings.model_name:
            # the same: under this name there was another one
            error = NoEligibleWorker(f"this worker serves {self._settings.model_name}, not {request.model}")
            self._say(Refused(request, failed(request, error, True)))
            return
        if request.recipe and request.recipe != self._decoder.recipe:
            other = WorkerFailed(f"the stream began under recipe {request.recipe}, this worker has "
                                 f"{self._decoder.recipe or 'none'}: its tokens would not fit")
            self._say(Refused(request, failed(request, other, True)))
            return
        deadline = self._clock.now() + request.deadline - self._clock.wall()
        arrival = Arrival(request, deadline, delivery.headers.get("traceparent", ""))
        if request.grammar is None:
            self._submit(arrival)
        elif not self._ungrammared.add(arrival):
            self._say(Refused(request, failed(request, Overloaded("too many grammars", retry_after_s=1.0))))

    def _submit(self, arrival: Arrival) -> None:
        if not self._engine.submit(arrival):
            request = arrival.request
            self._say(Refused(request, failed(request, Overloaded("too much at once", retry_after_s=1.0))))

    def _on_cancel(self, delivery: Delivery) -> None:
        cancel = decode(delivery.data, Cancel)
        self._engine.submit(cancel)
        self._ungrammared.cancel(cancel)

    def _on_drafts(self, delivery: Delivery) -> None:
        drafts = decode(delivery.data, Drafts)
        ours = self._following.admit(drafts, self._scheduler.length_of, self._clock.now())
        if ours is not None:
            self._drafter_s += ours.seconds
            self._engine.payback.spend(ours.seconds * self._following.usd_per_hour / 3600)
            self._engine.submit(ours)

    def _on_snapshot_request(self, delivery: Delivery) -> None:
        decode(delivery.data, SnapshotRequest)
        self._snapshot_wanted.set()

    def _on_status(self, delivery: Delivery) -> None:
        status: Status = decode(delivery.data, Status)  # type: ignore[arg-type]
        match status:
            case DrafterStatus() if self._speculates:
                before = self._following.name
                self._following.hear(status, self._clock.now())
                if self._following.name != before:
                    self._meet_drafter()
            case GatewayStatus(id=gateway):
                self._gateways[gateway] = self._clock.now()
            case RouterStatus(id=router, epoch=epoch, state="starting") if self._routers.get(router) != epoch:
                # it knows nobody yet: half a heartbeat sooner it finds every cache again
                self._routers[router] = epoch
                self._status_wanted.set()
                if len(self._routers) > REMEMBERED_ROUTERS:
                    del self._routers[next(iter(self._routers))]

    def _meet_drafter(self) -> None:
        """Another one is followed, or none."""
        self._scheduler.meet_drafter(self._following.name, self._following.usd_per_hour)
        self._engine.payback.new_drafter()
        self._status_wanted.set()

    def _say(self, event: Refused | Heard) -> None:
        self._said.append(event)
        self._saying.set()

    # --- what leaves -------------------------------------------------------------------------------------------------

    async def _publish(self, events: list[Event]) -> bool:
        """Everything one step has to say. Whether the drafter was told all of it."""
        replies = self._outbox.replies(events)
        told: list[Outgoing] = []
        tells = False
        if self._speculates:
            tokens = sum(len(event.tokens) for event in events if isinstance(event, Advanced))
            speculation = self._scheduler.speculation
            tells = speculation.wanted and bool(events) and self._pace.tell(
                tokens, speculation.accepted_draft_tokens, any(isinstance(event, Started) for event in events))
            told = self._following.follow(events, self._scheduler.live, tells)
        await self._sender.send(replies + told)
        now = self._clock.now()
        if now - self._kv_told_at >= KV_PAUSE_S or not self._scheduler.live:
            self._kv_told_at = now
            async with self._kv_order:
                await self._sender.send(self._outbox.kv_events(self._pool, self._clock.now()))
        self._record(events)
        return tells and bool(told)

    def _record(self, events: list[Event]) -> None:
        """What telemetry keeps of streams that have ended."""
        for event in events:
            if isinstance(event, Ended):
                now = self._clock.now()
                self.metrics.observe(event.sequence, now)
                record_stream(event.sequence, event.reply, self.name, self._following.name, self._settings.zone, now,
                              self._clock.wall())

    async def _send_said(self) -> None:
        while True:
            await self._saying.wait()
            self._saying.clear()
            said, self._said = self._said, []
            await self._sender.send(self._outbox.replies(said))

    async def _send_snapshots(self) -> None:
        while True:
            await self._snapshot_wanted.wait()
            self._snapshot_wanted.clear()
            async with self._kv_order:
                wrong = self._outbox.wrong_digests
                await self._sender.send(self._outbox.snapshot(self._pool, self._clock.now()))
                if self._outbox.wrong_digests > wrong:
                    _log.error("kv_events_wrong", worker=self.name, blocks=self._pool.named)
            await self._clock.sleep(SNAPSHOT_PAUSE_S)

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.heartbeat_s):
                    await self._status_wanted.wait()
            self._status_wanted.clear()
            now = self._clock.now()
            before = self._following.name
            self._following.choose(now)
            if self._following.name != before:
                self._meet_drafter()
                self._status_wanted.clear()
            self._drop_silent_gateways(now)
            await self._sender.send([_status_of(self.status())])

    def status(self) -> WorkerStatus:
        """This worker as others see it now."""
        scheduler, decoder, settings = self._scheduler, self._decoder, self._settings
        cost, speculation = scheduler.cost, scheduler.speculation
        abilities = ("adjust", "logprobs", *(("grammar",) if self._grammars.ready else ()),
                     *(("embeddings",) if scheduler.limits.embeds else ()))
        return WorkerStatus(
            self.name, self._outbox.epoch, settings.model_name, self.state, engine=self._engine_name,
            recipe=decoder.recipe, vocabulary=self._vocabulary, zone=settings.zone, sku=settings.sku,
            price_usd_per_hour=settings.price_usd_per_hour, block_size_tokens=decoder.block_size_tokens,
            blocks_total=self._pool.blocks, blocks_used=self._pool.blocks - self._pool.available,
            context_length=scheduler.length_limit, running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._ungrammared), queued_tokens=scheduler.queued_tokens,
            max_running=settings.max_running,
            prefill_tok_s=cost.prefill_tok_s(settings.step_tokens), step_base_s=cost.base_s, step_row_s=cost.row_s,
            decode_tok_s=self._engine.rate.per_second(self._clock.now()), kv_seq=self._outbox.kv_seq,
            replies_sent=dict(self._outbox.replies_sent), tokens_total=self._engine.rate.total,
            draft_tokens_total=speculation.draft_tokens, accepted_draft_tokens_total=speculation.accepted_draft_tokens,
            drafter=self._following.name, steps_total=self._engine.steps, kv_digest=self._outbox.kv_digest,
            parity=self._parity, drafting=self._drafting, draft_steps_total=speculation.verified_steps,
            abilities=abilities, stream_tokens=scheduler.stream_length.tokens)

    @property
    def _drafting(self) -> str:
        """What becomes of drafts, in a word."""
        if not self._following.name:
            return ""
        if self._engine.payback.state in ("left", "trial with"):
            return self._engine.payback.why
        # a short trial without drafts is part of following one
        speculation = self._scheduler.speculation
        return "on" if speculation.wanted or not speculation.paying else "full"

    def figures(self) -> Figures:
        """What Prometheus reads."""
        scheduler, engine, pool = self._scheduler, self._engine, self._pool
        speculation, drafts = scheduler.speculation, scheduler.speculation.drafts
        return {
            "tokens": engine.rate.total, "steps": engine.steps, "failed_steps": engine.failed_steps,
            "draft_tokens": speculation.draft_tokens, "accepted_draft_tokens": speculation.accepted_draft_tokens,
            "drafts_wanted": drafts.wanted, "drafts_ready": drafts.used,
            "drafts_foreseen": drafts.foreseen, "outcomes_prepared": drafts.prepared,
            "outcomes_hit": drafts.hits, "late_draft_tokens": speculation.late_draft_tokens,
            "forced_tokens": speculation.forced_tokens,
            "verified_drafts": speculation.verified_steps, "draft_saved_seconds": speculation.saved_s,
            "draft_holds": engine.holds, "draft_hold_seconds": engine.held_s,
            "draft_latency_seconds": engine.draft_wait.latency_s, "drafter_seconds": self._drafter_s,
            "drafter_left": engine.payback.times_left, "drafter_left_alone": float(engine.payback.state == "left"),
            "drafter_gain": engine.payback.gain, "alien_proposals": self._following.alien,
            "strange_proposals": self._following.strange, "repeated_proposals": self._following.repeated,
            "draft_lead_tokens": self._following.lead_tokens,
            "preemptions": scheduler.preemptions, "kv_repairs": engine.repairs, "lost_messages": self._sender.lost,
            "running": len(scheduler.running), "waiting": len(scheduler.waiting),
            "grammars_waiting": len(self._ungrammared), "grammars_compiled": self._grammars.compilations,
            "grammar_seconds": self._ungrammared.compile_s, "grammars_refused": self._ungrammared.refused,
            "grammars_slow": self._ungrammared.slow, "grammars_broken": scheduler.broken_grammars,
            "queued_tokens": scheduler.queued_tokens, "blocks": pool.blocks,
            "blocks_held": pool.blocks - pool.available, "blocks_named": pool.named,
            "prefill_tokens_per_second": scheduler.cost.prefill_tok_s(self._settings.step_tokens),
            "step_base_seconds": scheduler.cost.base_s, "step_row_seconds": scheduler.cost.row_s,
            "draft_wait": float(engine.draft_wait.waiting), **tier_figures(pool.tier, self._runner.tier),
        }

    def _enter(self, state: Literal["ready", "draining"]) -> None:
        self.state = state
        self._status_wanted.set()

    def _drop_silent_gateways(self, now: float) -> None:
        limit = now - GATEWAY_SILENCES * self._settings.silence_s
        gone = frozenset(gateway for gateway, heard in self._gateways.items() if heard < limit)
        if gone:
            _log.warning("gateways_silent", gateways=sorted(gone))
            self._engine.submit(DropGateways(gone))
            self._ungrammared.drop_gateways(gone)
            for gateway in gone:
                del self._gateways[gateway]

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Say it, hand back what waits, let streams end, hand back the rest."""
        self.state = "draining"
        await self._sender.send([_status_of(self.status())])
        self._engine.submit(CloseDoors(f"worker {self.name} is draining"))
        self._ungrammared.clear()
        if not await _within(self._settings.drain_s, self._engine.idle):
            self._engine.submit(HandBack())
            await _within(LAST_WORDS_S, self._engine.idle)
        _log.info("worker_drained", worker=self.name, lost_messages=self._sender.lost)


def tier_figures(tier: HostTier | None, memory: TierMemory | None) -> Figures:
    """What Prometheus reads of the tier; zeros when there is none."""
    if tier is None or memory is None:
        return dict.fromkeys(("tier_saves", "tier_restores", "tier_drops", "tier_blocks", "tier_bytes"), 0)
    return {"tier_saves": tier.saved, "tier_restores": tier.loaded, "tier_drops": tier.dropped,
            "tier_blocks": len(tier), "tier_bytes": len(tier) * memory.bytes // memory.slots}


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _status_of(status: WorkerStatus) -> Outgoing:
    return Outgoing(subjects.status("worker", status.id), status)


