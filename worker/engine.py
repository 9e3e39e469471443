"""The loop of a worker on a postcard: take what came, plan, run, publish meanwhile, commit.

    inbox --take--> scheduler --plan--> batch --execute--> device
                        ^                                     |
                        +------------commit <-----------------+--> events, published while the next step runs

Where the device queues steps the next one is planned and submitted while one runs, its tokens unknown (`_look_ahead`).

Rule: the scheduler changes only here and only between steps, so a cancel can never meet a request half registered.
A step that raises never ends the loop: its sequences run again one by one, and only those that raise alone end. Only
a lost rank ends it: no step can be computed any more.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import structlog

from kernels.ranks import RankLost
from kernels.step import Hidden, Logprobs, StepInputs
from shared.clock import Clock
from shared.errors import MillError, WorkerFailed
from shared.messages import Cancel, Drafts, Generate
from shared.telemetry import ids_in
from worker.alarm import Alarm
from worker.batch import Batch
from worker.draft_wait import DraftWait
from worker.events import Advanced, Event, Heard, Refused, Started
from worker.grammar import GrammarState
from worker.payback import Payback
from worker.runner import Runner
from worker.scheduler import Scheduler
from worker.sequence import Sequence
from worker.step import Step, Work

# what may wait between two steps; a Generate beyond is refused, advice beyond is dropped
INBOX_LIMIT = 4096
AUDIT_PERIOD_S = 10.0
RATE_WINDOW_S = 5.0
# what steps shorter than this say travels together for so long: messages to gateway and client, one for each of their
# tokens, would cost several times what the tokens do
SHORT_STEP_S = 0.0015  # between two ticks of the event loop's clock
GATHER_S = 0.004
# where nothing comes between steps a device that can may decode so many tokens of each stream by itself, if it takes no
# longer than this: who arrives meanwhile waits for it
STREAK_TOKENS, STREAK_S = 16, 0.0005
SHORTEST_STEP_S = STREAK_S / STREAK_TOKENS
# an alarm is set for this share of a wait before its end, so that with its being late the wait is no longer
ALARM_LATE = 0.2

_log = structlog.get_logger("worker.engine")


class Arrival(NamedTuple):
    """A request to register. `deadline` is monotonic."""

    request: Generate
    deadline: float
    traceparent: str = ""
    grammar: GrammarState | MillError | None = None


class DropGateways(NamedTuple):
    """These gateways are gone: nobody hears the replies."""

    gateways: frozenset[str]


class CloseDoors(NamedTuple):
    """Admit nothing more, for this reason."""

    reason: str


class HandBack(NamedTuple):
    """End everything so that gateways take it elsewhere."""


class Lose(NamedTuple):
    """A rank has died between two steps."""

    why: str


Command = Arrival | Cancel | Drafts | DropGateways | CloseDoors | HandBack | Lose


class Computed(NamedTuple):
    """What came of a step."""

    chosen: list[int]
    logprobs: Logprobs | None
    hidden: Hidden | None


class _Begun(NamedTuple):
    """A step that the device has, and what it will be collected by."""

    step: Step
    inputs: StepInputs
    ticket: Any


class TokenRate:
    """Tokens a second over the last seconds."""

    def __init__(self) -> None:
        self.total = 0
        self._marks: deque[tuple[float, int]] = deque()

    def count(self, tokens: int, now: float) -> None:
        self.total += tokens
        self._marks.append((now, tokens))
        self._forget(now)

    def per_second(self, now: float) -> float:
        self._forget(now)
        return sum(tokens for _, tokens in self._marks) / RATE_WINDOW_S

    def _forget(self, now: float) -> None:
        while self._marks and self._marks[0][0] <= now - RATE_WINDOW_S:
            self._marks.popleft()


class Engine:
    """One decoder at work.

    `publish` is given the events of each step, in order; maybe none. It says whether the drafter was told all of them.
    """

    def __init__(self, scheduler: Scheduler, batch: Batch, runner: Runner, clock: Clock,
                 publish: Callable[[list[Event]], Awaitable[bool]]) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.failed_steps = 0
        self.repairs = 0
        self.rate = TokenRate()
        self.draft_wait = DraftWait()
        self.payback = Payback()
        self.holds = 0  # steps held back for drafts
        self.held_s = 0.0
        # whether a drafter may hear of a stream; the owner knows
        self.heard_of: Callable[[Sequence], bool] = lambda sequence: False
        self.usd_per_hour = 0.0  # of this worker
        self.idle = asyncio.Event()  # nothing lives and all is published
        self._batch = batch
        self._runner = runner
        self._clock = clock
        self._publish = publish
        self._inbox: deque[Command] = deque()
        self._wake = asyncio.Event()
        self._audited_at = clock.now()
        self._kept: list[Event] = []  # events not yet published
        self._kept_since = clock.now()
        self._begun: set[Sequence] = set()  # streams whose first token is among them
        self._step_s = float("inf")  # what the last step took
        self._collected_at = clock.now()  # when it was over: what is queued behind it begins
        self._told_at = clock.now()  # when the drafter last heard of a step
        self._fresh = asyncio.Event()  # drafts made from the newest tokens are in the inbox, or the wait is over
        self._answered = False  # the former
        self._under_way: _Begun | None = None  # submitted, and not yet asked for its tokens
        self._ahead: _Begun | None = None  # submitted while the step before it ran

    def submit(self, command: Command) -> bool:
        """Hand over for the next gap between steps. False when the inbox is full and this was only a wish."""
        if len(self._inbox) >= INBOX_LIMIT and isinstance(command, Arrival | Drafts):
            return False
        self._inbox.append(command)
        if isinstance(command, Drafts) and self._is_fresh(command):
            self.draft_wait.answered(self._clock.now() - self._told_at)
            self._answered = True
            self._fresh.set()
        self.idle.clear()
        self._wake.set()
        return True

    async def run(self) -> None:
        """Until cancelled. Raises RankLost; then `give_up` is what is left to do."""
        with Alarm(self._fresh.set) as alarm:
            while True:
                started, tokens = self._clock.now(), self.rate.total
                waits = self.scheduler.speculation.wanted and self._ahead is None
                held_s = await self._wait_for_drafts(alarm) if waits else 0.0
                if self._inbox:
                    self._take_inbox()
                begun, self._ahead = self._ahead, None
                step = begun.step if begun is not None else self.scheduler.plan(self._clock.now())
                self._keep(self.scheduler.take_events())
                if step is None:
                    await self._rest()
                    continue
                if self._runner.goes_on and (tokens_each := int(STREAK_S / max(self._step_s, SHORTEST_STEP_S))) > 1:
                    step = self.scheduler.go_on(step, tokens_each)
                if step.copies and not await self._copy(step):
                    continue
                computed = await self._execute(step, begun)
                if computed is None:
                    await self._run_one_by_one(step)
                    continue
                self._keep(self.scheduler.commit(step, computed.chosen, self._clock.now(), held_s, computed.logprobs,
                                                 computed.hidden, self._step_s))
                self._learn(step, self.rate.total - tokens, self._clock.now() - started)

    async def give_up(self, why: str) -> None:
        """Hand everything back, what is still in the inbox too, and say it."""
        self.scheduler.close(why)
        self._inbox = deque(command for command in self._inbox if not isinstance(command, Lose))
        self._take_inbox()
        self.scheduler.hand_back()
        self._keep(self.scheduler.take_events())
        await self._publish_kept()
        self.idle.set()

    def _learn(self, step: Step, tokens: int, seconds: float) -> None:
        """What waiting and drafts bring: from steps that are not in the way of a prompt."""
        scheduler, speculation, streams = self.scheduler, self.scheduler.speculation, step.streams
        if not scheduler.limits.max_draft_tokens:
            return
        if not streams or not any(self.heard_of(work.sequence) for work in step.works):
            return
        if speculation.wanted:
            self.draft_wait.observe(streams, tokens, seconds)
        if step.rows == step.sampled and (speculation.wanted or not speculation.paying):
            before = self.payback.state
            self.payback.observe(streams, tokens, seconds, scheduler.cost.rows_s(streams), self.usd_per_hour)
            after = self.payback.state
            if (before, after) in (("following", "left"), ("trial without", "left"), ("trial with", "following")):
                _log.info("drafter_left_alone" if after == "left" else "drafter_followed_again",
                          drafter=speculation.drafter, gain=round(self.payback.gain, 3), why=self.payback.why)
            speculation.paying = self.payback.following

    async def _wait_for_drafts(self, alarm: Alarm) -> float:
        """Hold the next step back where that has paid so far; for how many seconds it was."""
        scheduler = self.scheduler
        streams = len(scheduler.running)
        if not self.draft_wait.waiting:
            return 0.0
        seconds = self.draft_wait.seconds(streams, scheduler.cost.rows_s(streams))
        if not seconds or not any(self.heard_of(sequence) for sequence in scheduler.running):
            return 0.0
        self._fresh.clear()
        self._answered = False
        if not await self._publish_kept():
            return 0.0
        began = self._clock.now()
        alarm.set((1.0 - ALARM_LATE) * seconds)
        await self._fresh.wait()
        alarm.stop()
        if not self._answered:
            self.draft_wait.missed()
        held_s = self._clock.now() - began
        self.holds += 1
        self.held_s += held_s
        return held_s

    def _is_fresh(self, drafts: Drafts) -> bool:
        """Whether the drafter knew all that is committed. Its proposals of one message are of one age."""
        if not drafts.proposals:
            return False
        first = drafts.proposals[0]
        return self.scheduler.length_of(first.request_id) == first.base_length

    def _take_inbox(self) -> None:
        scheduler, now = self.scheduler, self._clock.now()
        while self._inbox:
            match self._inbox.popleft():
                case Arrival(request, deadline, traceparent, grammar):
                    if (sequence := scheduler.add(request, now, deadline, grammar)) is not None:
                        sequence.traceparent = traceparent
                case Cancel() as cancel:
                    scheduler.cancel(cancel, now)
                case Drafts(proposals=proposals, seconds=seconds):
                    for proposal in proposals:
                        scheduler.offer(proposal, seconds / len(proposals))
                case DropGateways(gateways):
                    scheduler.drop_gateways(gateways, now)
                case CloseDoors(reason):
                    scheduler.close(reason)
                case HandBack():
                    scheduler.hand_back()
                case Lose(why):
                    raise RankLost(why)

    async def _copy(self, step: Step) -> bool:
        """Move blocks between pool and tier. When that raised, what blocks hold is unknown: everything ends."""
        try:
            await self._runner.copy(step.copies)
        except Exception as error:
            _log.error("copy_failed", error=repr(error), copies=len(step.copies))
            self.scheduler.lose_cache("blocks could not be copied between the device and host memory")
            return False
        return True

    async def _execute(self, step: Step, begun: _Begun | None) -> Computed | None:
        """Run a step, and publish what came before it meanwhile. None when the step raised."""
        rows, sampled = step.rows, step.sampled
        # a step of decoding takes as long as the one before
        due = self._take_due(self._step_s if rows == sampled
                             else self.scheduler.cost.expected_s(sampled, rows - sampled))
        if due is None:
            return await self._timed(step, rows, sampled, begun)
        running = asyncio.ensure_future(self._timed(step, rows, sampled, begun))
        try:
            # the device starts before this thread turns to anything else
            await asyncio.sleep(0)
            await self._tell(due)
            return await running
        finally:
            running.cancel()

    def _take_due(self, step_s: float) -> list[Event] | None:
        """What is to leave before a step that takes so long: all, or where steps are short what somebody waits for.

        That is first tokens, with all about their streams, and everything where a drafter listens. None: nothing is.
        """
        gathers = not self.scheduler.speculation.wanted and step_s < SHORT_STEP_S
        if not gathers or self._clock.now() - self._kept_since >= GATHER_S:
            return self._take_kept()
        if not self._begun:
            return None
        begun, kept = self._begun, self._take_kept()
        due: list[Event] = []
        for event in kept:
            (self._kept if isinstance(event, Refused | Heard) or event.sequence not in begun else due).append(event)
        return due

    async def _timed(self, step: Step, rows: int, sampled: int, begun: _Begun | None = None,
                     alone: bool = False) -> Computed | None:
        started = self._clock.now() if begun is None else self._collected_at
        try:
            if self._runner.queues:
                begun = self._under_way = begun or await self._begin(step)
                self._ahead = None if alone else await self._look_ahead(step)
                self._under_way = None
                inputs, chosen = begun.inputs, await self._runner.collect(begun.ticket)
            else:
                inputs = self._batch.build(step)
                chosen = await (self._runner.execute(inputs) if step.longest == 1
                                else self._runner.streak(inputs, step.lengths))
        except RankLost:
            raise
        except Exception as error:
            await self._forget_submitted()
            self.failed_steps += 1
            _log.error("step_failed", error=repr(error), sequences=len(step.works), rows=rows)
            return None
        self.steps += step.longest
        self._collected_at = self._clock.now()
        self._step_s = (self._collected_at - started) / step.longest
        if step.longest > 1:
            self.scheduler.cost.observe(round(len(chosen) / step.longest), 0, self._step_s)
        elif not step.scores:
            self.scheduler.cost.observe(sampled, rows - sampled, self._step_s)
        return Computed(chosen, inputs.logprobs, inputs.hidden)

    async def _begin(self, step: Step) -> _Begun:
        inputs = self._batch.build(step)
        return _Begun(step, inputs, await self._runner.submit(inputs, None))

    async def _look_ahead(self, step: Step) -> _Begun | None:
        """The step after the one under way, planned and submitted; None where its tokens have to be waited for."""
        if self._inbox or (ahead := self.scheduler.foresee(step, self._clock.now())) is None:
            return None
        try:
            inputs = self._batch.build(ahead)
            return _Begun(ahead, inputs, await self._runner.submit(inputs, self._batch.carried(ahead)))
        except RankLost:
            raise
        except Exception as error:  # nothing of it is under way, and it will be planned when its turn comes
            _log.error("step_ahead_failed", error=repr(error), sequences=len(ahead.works))
            return None

    async def _forget_submitted(self) -> None:
        """After a step that raised: collect it where that has not been tried, and what has nothing to stand on now."""
        submitted, self._under_way, self._ahead = (self._under_way, self._ahead), None, None
        for begun in submitted:
            if begun is not None:
                with contextlib.suppress(Exception):
                    await self._runner.collect(begun.ticket)

    async def _run_one_by_one(self, step: Step) -> None:
        """After a step that raised: find who is to blame. When everyone seems to be, it is the device."""
        broken: list[Work] = []
        for work in step.works:
            work.more = 0
            alone = Step([work])
            computed = await self._timed(alone, alone.rows, alone.sampled, alone=True)
            if computed is None:
                broken.append(work)
            else:
                self._keep(self.scheduler.commit(alone, computed.chosen, self._clock.now(), 0.0, computed.logprobs,
                                                 computed.hidden, self._step_s))
        device = len(broken) == len(step.works) > 1
        for work in broken:
            request = work.sequence.request
            reason = "the device fails on every request" if device else "the device fails on this request"
            _log.error("request_broke", request=request.request_id, attempt=request.attempt, reason=reason,
                       **ids_in(work.sequence.traceparent))
            self.scheduler.fail(work.sequence, WorkerFailed(f"{reason}; it was tried twice"), retryable=device)

    async def _rest(self) -> None:
        """Publish what is left and wait for something to do. Nothing lives now, unless blocks were lost."""
        await self._publish_kept()
        if self._inbox:
            return
        now = self._clock.now()
        stuck = len(self.scheduler.waiting) > 0
        if stuck or now - self._audited_at >= AUDIT_PERIOD_S:
            self._audited_at = now
            if self._audit() and stuck:
                return
        self.idle.set()
        self._wake.clear()
        await self._wake.wait()

    def _audit(self) -> bool:
        """Check the cache's books; whether anything had to be mended."""
        found = self.scheduler.audit()
        if found.repairs:
            self.repairs += found.repairs
            _log.warning("kv_blocks_repaired", **found._asdict())
        return found.repairs > 0

    def _keep(self, events: list[Event]) -> None:
        if not events:
            return
        now, tokens = self._clock.now(), 0
        if not self._kept:
            self._kept_since = now
        self._kept += events
        begun = False
        for event in events:
            if type(event) is Advanced:
                tokens += len(event.tokens)
                if not event.first:
                    self._begun.add(event.sequence)
            elif type(event) is Started:
                begun = begun or self.heard_of(event.sequence)
        if tokens:
            self.rate.count(tokens, now)
        if begun:
            self.payback.new_stream()

    def _take_kept(self) -> list[Event]:
        kept, self._kept, self._begun = self._kept, [], set()
        return kept

    async def _publish_kept(self) -> bool:
        """Whether the drafter knows all of it now."""
        return await self._tell(self._take_kept())

    async def _tell(self, events: list[Event]) -> bool:
        """Publish these; whether the drafter heard of them."""
        told_at = self._clock.now()
        told = await self._publish(events)
        if told:
            self._told_at = told_at
        return told
