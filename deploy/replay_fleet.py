"""A fleet on a virtual clock: the router's and the workers' own code between events in a heap.

Real: prefix index, expected blocks, resync, outstanding placements, placement (`router`); scheduler, block pool,
eviction, learned step costs, outbox (`worker`). Messages take `HOP_S`, cache events leave after each step, statuses
twice a second: the router knows as little as in a mesh.
Modelled: the device, by the mock engine's formula: a step takes base + rows * row + prompt tokens * token. There is no
tokenizer, no HTTP, no draft.

Rule: steps in which nobody does anything but decode are committed up to `STRETCH` at a time, through the scheduler's
own way for accepted drafts, at the price of the single steps; whatever arrives ends the stretch after the step that is
running then. So times are those of single steps; only the cache events of generated blocks leave a little later.
Deterministic: same trace, same options, same figures.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from typing import NamedTuple

from deploy.replay_trace import FIRST_OWN_TOKEN, Trace
from router.placement import Refused, decide
from router.view import View
from shared.blocks import split_hashes
from shared.messages import Finished, Generate, KvEvents, Placement, WorkerStatus
from worker.calibrate import DECODE_ROWS, PREFILL_TOKENS, REPEATS
from worker.events import Ended, Event
from worker.events import Refused as TurnedAway
from worker.kv_blocks import BlockPool
from worker.outbox import Outbox
from worker.scheduler import Limits, Scheduler
from worker.step import Step

HOP_S = 0.001
HEARTBEAT_S = 0.5
SILENCE_S = 2.0
# tokens of each stream that one commit may take together
STRETCH = 128
STEP_TOKENS = 8192
MAX_RUNNING = 256
VOCABULARY = 1 << 32
MODEL, GATEWAY, ROUTER = "replay", "replay", "router"
NEVER_S = 1e12


class Device(NamedTuple):
    """The mock engine's formula, seconds. As shipped: a line through the timing that NVIDIA Dynamo's simulator uses
    (16.5 ms + 15.2 us a prompt token + 0.42 ns its square; 5.7 ms a decode step), at this trace's lengths."""

    step_s: float = 0.006
    row_s: float = 0.0001
    token_s: float = 0.000019

    def seconds(self, rows: int, prefill_tokens: int) -> float:
        return self.step_s + rows * self.row_s + prefill_tokens * self.token_s


class Served(NamedTuple):
    """One request that ended."""

    worker: int
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int  # what the router thought was cached
    ttft_s: float
    e2e_s: float
    output_tokens: int


class Outcome(NamedTuple):
    """What a policy did with a trace."""

    served: list[Served]
    refused: int
    busy_s: list[float]  # device time, per worker
    ends_s: float
    gaps_us: Mapping[int, int]  # so long a stream waited for its next token -> how many tokens


class Fleet(NamedTuple):
    """What is replayed on."""

    workers: int
    blocks: int = 16_384
    device: Device = Device()


class VirtualWorker:
    """A worker without a bus and with a device that only takes time."""

    def __init__(self, name: str, trace: Trace, fleet: Fleet) -> None:
        size = trace.block_size_tokens
        self.pool = BlockPool(fleet.blocks)
        limits = Limits(size, fleet.blocks * size, VOCABULARY, STEP_TOKENS, MAX_RUNNING, max_waiting=1 << 30,
                        max_draft_tokens=0)
        self.scheduler = Scheduler(limits, self.pool)
        # a stretch is committed as drafts that were right, though nobody drafts here
        self.scheduler.speculation.accepted_by_place = [0] * STRETCH
        self.outbox = Outbox(name, 1)
        self.inbox: list[Generate] = []
        self.busy_s = 0.0
        self.gaps_us: Counter[int] = Counter()
        self.ends_s = -1.0  # of the step under way; below 0 when there is none
        self._device = fleet.device
        self._step: Step | None = None
        self._began_s = self._each_s = 0.0
        self._stretch = 1
        for _ in range(REPEATS):
            for rows in DECODE_ROWS:
                self.scheduler.cost.observe(rows, 0, self._device.seconds(rows, 0))
            self.scheduler.cost.observe(1, PREFILL_TOKENS - 1, self._device.seconds(1, PREFILL_TOKENS - 1))

    def receive(self, request: Generate, now: float) -> None:
        """Take a request after the single step that is running now."""
        self.inbox.append(request)
        if self._step is not None and self._stretch > 1:
            steps = min(self._stretch, max(1, -int(-(now - self._began_s) // self._each_s)))
            for work in self._step.works:
                del work.drafts[steps - 1:]
                work.rows = 1 + len(work.drafts)
            self._stretch, self.ends_s = steps, self._began_s + steps * self._each_s

    def begin(self, now: float) -> list[Event]:
        """Plan the next step and start it, if there is anything to do."""
        for request in self.inbox:
            self.scheduler.add(request, now, NEVER_S)
        self.inbox.clear()
        step = self.scheduler.plan(now)
        if step is not None:
            sampled = step.sampled
            self._each_s = self._device.seconds(sampled, step.rows - sampled)
            self.scheduler.cost.observe(sampled, step.rows - sampled, self._each_s)
            self._stretch = self._prolong(step)
            self._began_s, self.ends_s = now, now + self._stretch * self._each_s
        self._step = step
        return self.scheduler.take_events()

    def end(self, now: float) -> list[Event]:
        """Commit the step that ends now."""
        assert self._step is not None
        self.busy_s += self._stretch * self._each_s
        chosen: list[int] = []
        for work in self._step.works:
            if work.samples:
                chosen += [_own_token(work.sequence.request)] * (1 + len(work.drafts))
                # a stream's first token has none before it
                self.gaps_us[round(1e6 * self._each_s)] += (work.sequence.first_token_at is not None) + len(work.drafts)
        events = self.scheduler.commit(self._step, chosen, now)
        self._step, self.ends_s = None, -1.0
        return events

    def status(self) -> WorkerStatus:
        scheduler, cost = self.scheduler, self.scheduler.cost
        return WorkerStatus(
            self.outbox.worker, self.outbox.epoch, MODEL, engine="mock",
            block_size_tokens=scheduler.limits.block_size, blocks_total=self.pool.blocks,
            blocks_used=self.pool.blocks - self.pool.available, context_length=scheduler.length_limit,
            running=len(scheduler.running), waiting=len(scheduler.waiting) + len(self.inbox),
            queued_tokens=scheduler.queued_tokens, max_running=MAX_RUNNING,
            prefill_tok_s=cost.prefill_tok_s(STEP_TOKENS), step_base_s=cost.base_s, step_row_s=cost.row_s,
            kv_seq=self.outbox.kv_seq, stream_tokens=scheduler.stream_length.tokens)

    def _prolong(self, step: Step) -> int:
        """Make a step that only decodes stand for many; for how many."""
        scheduler, size = self.scheduler, self.scheduler.limits.block_size
        if len(scheduler.waiting) or any(work.rows > 1 or not work.samples for work in step.works) \
                or len(step.works) < len(scheduler.running):
            return 1
        more = min(STRETCH - 1, *(work.sequence.end_length - len(work.sequence.tokens) - 1 for work in step.works))
        if more < 1:
            return 1
        wanted = [-(-(len(work.sequence.tokens) + more) // size) - len(work.sequence.blocks) for work in step.works]
        blocks = self.pool.allocate(sum(map(max, wanted, [0] * len(wanted))))
        if blocks is None:
            return 1
        for work, count in zip(step.works, wanted, strict=True):
            for _ in range(count):
                work.sequence.blocks.append(blocks.pop())
            work.drafts = [_own_token(work.sequence.request)] * more
            work.rows = 1 + more
        return 1 + more


class Replay:
    """One policy, one fleet, one trace."""

    def __init__(self, trace: Trace, fleet: Fleet, policy: str, seed: int = 0) -> None:
        self.workers = [VirtualWorker(_name(number), trace, fleet) for number in range(fleet.workers)]
        self._trace = trace
        self._policy = policy
        self._view = View(SILENCE_S, trace.block_size_tokens)
        self._rng = random.Random(seed)
        self._placed = 0
        self._refused = 0
        self._served: list[Served] = []
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._pending = len(trace.arrivals)

    def run(self, report: Callable[[int], None] = lambda done: None) -> Outcome:
        """To the last token. `report` is told how many requests have ended."""
        for number in range(len(self.workers)):
            self._at(0.0, lambda now, number=number: self._beat(number, now))  # type: ignore[misc]
        self._at(HOP_S, lambda now: self._arrive(0, now))
        told = now = 0.0
        while self._pending:
            now, _, happen = heappop(self._events)
            happen(now)
            if now >= told + 60.0:
                told = now
                report(len(self._served))
        gaps_us = sum((worker.gaps_us for worker in self.workers), Counter[int]())
        return Outcome(self._served, self._refused, [worker.busy_s for worker in self.workers], now, gaps_us)

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        self._order += 1
        heappush(self._events, (when, self._order, happen))

    # --- the router

    def _arrive(self, number: int, now: float) -> None:
        """A request reaches the router; `HOP_S` after its client sent it."""
        arrivals = self._trace.arrivals
        if number + 1 < len(arrivals):
            self._at(arrivals[number + 1].at_s + HOP_S, lambda later: self._arrive(number + 1, later))
        arrival, hashes = arrivals[number], self._trace.hashes(number)
        request = Generate(
            str(number), 1, GATEWAY, MODEL, self._trace.prompt(number), arrival.output_tokens, NEVER_S,
            block_hashes=hashes)
        verdict = decide(request, self._view.candidates(hashes, now), wall_s=now, rng=self._rng,
                         policy=self._policy, turn=self._placed, block_size_tokens=self._trace.block_size_tokens)
        if isinstance(verdict, Refused):
            self._refused += 1
            self._pending -= 1
            return
        chosen = verdict.chosen
        placement = Placement(ROUTER, chosen.worker, chosen.cached_tokens, chosen.estimate_s, verdict.policy)
        request = Generate(
            request.request_id, 1, GATEWAY, MODEL, request.tokens, request.max_tokens, NEVER_S, block_hashes=hashes,
            placement=placement)
        self._view.on_placed(request, arrival.prompt_tokens, now)
        self._placed += 1
        worker = int(chosen.worker)
        self._at(now + HOP_S, lambda later: self._deliver(worker, request, later))

    def _hear(self, message: WorkerStatus | KvEvents, now: float) -> None:
        if isinstance(message, WorkerStatus):
            asked = self._view.on_status(message, now)
        else:
            asked = self._view.on_kv(message, now)
        assert not asked, "nothing is lost here"

    # --- the workers

    def _deliver(self, number: int, request: Generate, now: float) -> None:
        worker = self.workers[number]
        before = worker.ends_s
        worker.receive(request, now)
        if before < 0.0:
            self._begin(number, now)
        elif worker.ends_s != before:
            self._at(worker.ends_s, lambda later: self._end(number, later))

    def _begin(self, number: int, now: float) -> None:
        worker = self.workers[number]
        self._tell(number, worker.begin(now), now)
        if worker.ends_s >= 0.0:
            self._at(worker.ends_s, lambda later: self._end(number, later))

    def _end(self, number: int, now: float) -> None:
        worker = self.workers[number]
        if worker.ends_s == now:  # else the stretch was cut short after this was noted down
            self._tell(number, worker.end(now), now)
            self._begin(number, now)

    def _tell(self, number: int, events: list[Event], now: float) -> None:
        worker = self.workers[number]
        for event in events:
            if isinstance(event, Ended) and isinstance(event.reply, Finished):
                self._serve(number, event, now)
            elif isinstance(event, Ended | TurnedAway):
                self._refused += 1
                self._pending -= 1
        for _, message in worker.outbox.kv_events(worker.pool):
            assert isinstance(message, KvEvents)
            self._at(now + HOP_S, lambda later, message=message: self._hear(message, later))  # type: ignore[misc]

    def _serve(self, number: int, event: Ended, now: float) -> None:
        sequence = event.sequence
        came_s = self._trace.arrivals[int(sequence.request.request_id)].at_s
        assert sequence.first_token_at is not None and sequence.request.placement is not None
        self._served.append(Served(
            number, sequence.prompt_length, sequence.cached_tokens, sequence.request.placement.cached_tokens,
            sequence.first_token_at + HOP_S - came_s, now + HOP_S - came_s,
            self._trace.arrivals[int(sequence.request.request_id)].output_tokens))
        self._pending -= 1

    def _beat(self, number: int, now: float) -> None:
        status = self.workers[number].status()
        self._at(now + HOP_S / 2, lambda later: self._hear(status, later))
        self._at(now + HEARTBEAT_S, lambda later: self._beat(number, later))


def infinite_reuse(trace: Trace) -> float:
    """Share of prompt tokens that one cache without bounds would have, each request computing one token at least."""
    known: set[bytes] = set()
    cached = total = 0
    for number, arrival in enumerate(trace.arrivals):
        chain = split_hashes(trace.hashes(number))
        held = next((index for index, name in enumerate(chain) if name not in known), len(chain))
        cached += min(held, (arrival.prompt_tokens - 1) // trace.block_size_tokens) * trace.block_size_tokens
        total += arrival.prompt_tokens
        known.update(chain)
    return cached / total


def _own_token(request: Generate) -> int:
    """What a stream says, over and over: nobody else says it."""
    return FIRST_OWN_TOKEN + int(request.request_id)


def _name(number: int) -> str:
    return f"{number:03}"
