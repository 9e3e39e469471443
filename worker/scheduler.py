"""What the next step computes, and what a computed step means.

One number per sequence: how many of its missing tokens go into this step. Running sequences first, oldest first; then
waiting ones; then drafts in what is left of the token budget.

    add, cancel     a request comes or goes                        between steps
    plan(now)       -> Step: sequences and their rows              blocks are taken, nothing is committed
    commit(step)    tokens chosen by the device become the stream  blocks are named, sequences end

Rules
1. A token, once committed, never changes; a row whose draft was rejected only leaves KV that the next step overwrites.
2. A block is named when all its tokens are committed and computed. At least one token of a prompt is always computed.
3. When blocks run out the youngest of the lowest priority gives its own back and waits at the head of the queue; its
   blocks keep their names, so that it usually finds them again. The oldest sequence therefore always advances.
4. Every request that was not a duplicate ends exactly once, with Finished or Failed.

Pure: no clock, no bus, no tensor. Not re-entrant: nothing may change between `plan` and its `commit`.

    foresee(step)   -> Step: the one after it, while its tokens are not known yet      for devices that queue steps
    go_on(step, n)  each of its rows decodes up to n tokens, one after the other       for devices that can go on alone
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Container, Iterable
from typing import Literal, NamedTuple

from kernels.step import Hidden, Logprobs
from shared.blocks import LONGEST_SALT
from shared.errors import (
    BadRequest,
    ContextTooLong,
    DeadlineExceeded,
    MillError,
    NoEligibleWorker,
    Overloaded,
    WorkerFailed,
)
from shared.logprobs import pack_likely, record_bytes
from shared.messages import Cancel, Failed, Finished, Generate, Proposal
from shared.tokens import unpack
from worker import adjust
from worker.block_tables import BlockTables
from worker.events import Advanced, Ended, Event, PromptScored, Refused, Registered, Started, failed, finished
from worker.grammar import GrammarState
from worker.kv_blocks import Audit, BlockPool
from worker.sequence import Sequence, from_request
from worker.speculation import Speculation
from worker.step import Step, Work
from worker.step_cost import StepCost
from worker.stream_length import StreamLength
from worker.waiting import WaitingQueue

# while streams run, prompts get at most this share of a step, and no more than makes it this long (or takes as long as
# the streams themselves): a long prompt does not hold the streams up
PREFILL_SHARE = 0.5
PROMPT_STEP_S = 0.06
REMEMBERED_REQUESTS = 8192


class Limits(NamedTuple):
    """What the scheduler may use. Sizes in tokens unless named otherwise."""

    block_size: int
    context_length: int
    vocabulary_size: int
    step_tokens: int = 256
    max_running: int = 64
    max_waiting: int = 256
    max_draft_tokens: int = 8  # 0: no speculation
    max_forced_tokens: int = 8  # of one step, that a grammar leaves no choice about; nobody has to guess them
    embeds: bool = False  # whether the decoder fills `StepInputs.hidden`


class Scheduler:
    """All sequences of one decoder."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        if limits.step_tokens < limits.max_running:
            raise ValueError(f"step_tokens={limits.step_tokens} is less than max_running={limits.max_running}: "
                             "each running stream needs a row of every step; raise one or lower the other")
        self.limits = limits
        self.pool = pool
        self.cost = StepCost()
        self.speculation = Speculation(limits.max_draft_tokens, limits.max_forced_tokens, limits.vocabulary_size,
                                       self.cost)
        self.stream_length = StreamLength()
        self.length_limit = min(limits.context_length, pool.blocks * limits.block_size)
        self.running: list[Sequence] = []  # by rank
        self.waiting = WaitingQueue()
        self.preemptions = 0
        self.broken_grammars = 0  # streams that theirs ended with an error
        self.closed_because: str | None = None  # set while draining
        self._tables = BlockTables(pool, limits.block_size)
        self._live: dict[str, Sequence] = {}
        self._seen: OrderedDict[str, int] = OrderedDict()  # request -> highest attempt registered
        self._cancelled: OrderedDict[str, int] = OrderedDict()  # request -> attempts up to this are not wanted
        self._slots = list(range(limits.max_running))[::-1]
        self._arrivals = 0
        self._leases = 0
        self._next_deadline = float("inf")
        self._blocked: tuple[Sequence, int] | None = None  # who did not fit, and the blocks that were not enough
        self._works: list[Work] = []
        self._events: list[Event] = []

    # --- requests come and go ----------------------------------------------------------------------------------------

    def add(self, request: Generate, now: float, deadline: float,
            grammar: GrammarState | MillError | None = None) -> Sequence | None:
        """Register a request, `deadline` on the clock of `now`; or say why not. A duplicate changes nothing.

        `grammar`: the state of the one it asks for, or why that cannot be used.
        """
        if request.attempt <= self._seen.get(request.request_id, -1):
            return None
        self._remember(self._seen, request.request_id, request.attempt)
        if request.attempt <= self._cancelled.get(request.request_id, -1):
            self._events.append(Refused(request, Finished(request.request_id, request.attempt, "cancelled")))
            return None
        if (older := self._live.get(request.request_id)) is not None:
            self._end(older, self._finished(older, "cancelled", now))
        if request.grammar is not None and grammar is None:
            grammar = BadRequest("this worker keeps to no grammar: leave response_format and structured_outputs out")
        refusal = self._refusal(request, now, deadline) or (grammar if isinstance(grammar, MillError) else None)
        if refusal is not None:
            # another worker may have what this one lacks
            elsewhere = True if isinstance(refusal, NoEligibleWorker) else None
            self._events.append(Refused(request, failed(request, refusal, elsewhere)))
            return None
        self._arrivals += 1
        sequence = from_request(request, self._arrivals, now, deadline, self.length_limit,
                                self.limits.vocabulary_size, grammar if isinstance(grammar, GrammarState) else None)
        self._live[request.request_id] = sequence
        self._events.append(Registered(sequence, self._tables.reusable(sequence)))
        if sequence.pooling is None and (reason := _end_reason(sequence)) is not None:
            self._end(sequence, self._finished(sequence, reason, now))
            return None
        self.waiting.push(sequence)
        self._next_deadline = min(self._next_deadline, deadline)
        return sequence

    def cancel(self, cancel: Cancel, now: float) -> None:
        """End all attempts up to `cancel.attempt`, also one that is still on its way here."""
        known = self._cancelled.get(cancel.request_id, -1)
        self._remember(self._cancelled, cancel.request_id, max(known, cancel.attempt))
        sequence = self._live.get(cancel.request_id)
        if sequence is not None and sequence.key.attempt <= cancel.attempt:
            self._end(sequence, self._finished(sequence, "cancelled", now))

    def drop_gateways(self, gateways: Container[str], now: float) -> None:
        """End as cancelled what nobody hears any more."""
        for sequence in list(self._live.values()):
            if sequence.request.gateway in gateways:
                self._end(sequence, self._finished(sequence, "cancelled", now))

    def fail(self, sequence: Sequence, error: MillError, retryable: bool) -> None:
        """End one sequence with an error."""
        if not sequence.ended:
            self._end(sequence, failed(sequence.request, error, retryable))

    def meet_drafter(self, name: str, usd_per_hour: float = 0.0) -> None:
        """Another one is followed, or none: nothing is known of it."""
        self.speculation.meet(name, usd_per_hour, self._streams)

    def close(self, reason: str) -> None:
        """Admit no more: refuse what comes and hand back what waits. Running sequences go on."""
        self.closed_because = reason
        for sequence in list(self.waiting):
            self._end(sequence, failed(sequence.request, WorkerFailed(reason), True))

    def hand_back(self) -> None:
        """End everything so that the gateway takes it elsewhere."""
        for sequence in list(self._live.values()):
            self._end(sequence, failed(sequence.request, WorkerFailed(self.closed_because or "handed back"), True))

    def lose_cache(self, reason: str) -> None:
        """Nobody knows any more what the blocks hold: hand everything back and forget all names."""
        for sequence in list(self._live.values()):
            self._end(sequence, failed(sequence.request, WorkerFailed(reason), True))
        self.pool.clear()

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    @property
    def live(self) -> Iterable[Sequence]:
        return self._live.values()

    def length_of(self, request_id: str) -> int | None:
        """Committed tokens of a live request, prompt included."""
        sequence = self._live.get(request_id)
        return None if sequence is None else len(sequence.tokens)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to compute, running and waiting."""
        running = sum(sequence.missing - 1 for sequence in self.running)
        return running + sum(sequence.missing for sequence in self.waiting)

    @property
    def next_deadline(self) -> float:
        """No sequence passes its deadline before."""
        return self._next_deadline

    # --- a step ------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Step | None:
        """The next step, or None when there is nothing to compute."""
        if now >= self._next_deadline:
            self._expire(now)
        self._works = works = []
        preempted = self.preemptions
        size = self.limits.block_size
        for sequence in list(self.running):
            computed, length = sequence.computed, len(sequence.tokens)
            # a slot of -1: an older one has just taken its blocks
            if length - computed == 1 and sequence.slot >= 0 and sequence.pooling is None \
                    and (length <= len(sequence.blocks) * size or self._make_room(sequence, length)):
                works.append(Work(sequence, computed, 1, True))
        if len(works) < len(self.running) or self.waiting:
            budget = self.limits.step_tokens - len(works)
            if works:
                budget = min(budget, self._bearable_prompt(len(works)))
            computing: set[bytes] = set()
            for sequence in list(self.running):
                if budget and (sequence.missing > 1 or sequence.pooling is not None) and sequence.slot >= 0:
                    budget -= self._prefill(sequence, budget, computing)
            if self.preemptions == preempted:
                self._admit(budget, computing, now)
        if self.limits.max_forced_tokens:
            self.speculation.add_forced(works, self._rows_left, self._tables.room_for_drafts)
        if self.speculation.decide(self._streams):
            self.speculation.add_drafts(works, self._rows_left, self._streams, self._tables.room_for_drafts, now)
        return Step(works, self.pool.take_copies()) if works else None

    def foresee(self, step: Step, now: float) -> Step | None:
        """What comes after `step`, whose tokens nobody knows yet; None where they have to be waited for.

        Every stream that its length does not end decodes one more row. Blocks are only taken from those that nobody
        holds. `commit(step)` follows, then the commit of what is returned, with no plan between them; rows of sequences
        that have ended by then were computed in vain.
        """
        if self.waiting or self.speculation.decide(self._streams) or self.pool.tier is not None \
                or now >= self._next_deadline or len(step.works) < len(self.running):
            return None
        works: list[Work] = []
        for sample, work in enumerate(step.works):
            sequence = work.sequence
            if work.rows != 1 or not work.samples or work.scored or sequence.adjuster is not None \
                    or sequence.request.logprobs >= 0:
                return None
            length = len(sequence.tokens) + 1  # when the tokens of `step` are committed
            if work.is_over or length >= sequence.end_length:
                continue
            if length > len(sequence.blocks) * self.limits.block_size:
                if not self.pool.available or (blocks := self.pool.allocate(1)) is None:
                    return None
                sequence.blocks += blocks
            ahead = Work(sequence, work.start + 1, 1, True)
            ahead.carries = sample
            works.append(ahead)
        return Step(works) if works else None

    def go_on(self, step: Step, most_tokens: int) -> Step:
        """`step`, just planned, with rows that decode up to `most_tokens` each.

        None does where prompts are computed too or somebody waits to be, where drafts may come, or where what is
        chosen depends on more than the tokens before it. Blocks are only taken from those that nobody holds, and not
        where a tier keeps what was in them: that is copied before the step. Tokens behind a stop token are computed in
        vain.
        """
        if self.waiting or self.speculation.drafter or self.pool.tier is not None \
                or len(step.works) < len(self.running):
            return step
        for work in step.works:
            sequence = work.sequence
            if work.rows != 1 or not work.samples or work.scored or sequence.adjuster is not None \
                    or sequence.request.logprobs >= 0:
                return step
        longest = 1
        for work in step.works:
            sequence = work.sequence
            wanted = min(most_tokens, sequence.end_length - len(sequence.tokens)) - 1
            work.more = self._tables.room_for_drafts(sequence, wanted) if wanted > 0 else 0
            longest = max(longest, 1 + work.more)
        return step._replace(longest=longest)

    def offer(self, proposal: Proposal, seconds: float = 0.0) -> None:
        """Keep a drafter's proposal, on which it spent `seconds`."""
        sequence = self._live.get(proposal.request_id)
        if sequence is not None and sequence.key.attempt == proposal.attempt:
            self.speculation.offer(sequence, proposal, seconds)

    def commit(self, step: Step, chosen: list[int], now: float, held_s: float = 0.0,
               logprobs: Logprobs | None = None, hidden: Hidden | None = None, busy_s: float = 0.0) -> list[Event]:
        """Make the device's `chosen` tokens (one per sampled row, in order) part of the streams.

        `held_s`: so long was the step held back for drafts. `logprobs`, `hidden`: what was asked of the step, filled.
        `busy_s`: so long did the device take, of which each row has an equal part.
        """
        self.speculation.count_costs(step, held_s)
        offset = told = pooled = 0
        row_s = busy_s / sum([work.rows + work.more for work in step.works])
        for work in step.works:
            sequence = work.sequence
            if work.carries >= 0 and work.is_over:
                offset += 1
                continue
            sequence.steps += 1 + work.more
            sequence.worker_s += (work.rows + work.more) * row_s
            if work.scored and logprobs is not None:
                first, count = sequence.scored + 1, len(work.scored)
                most = sequence.request.prompt_logprobs
                sequence.scored += count
                self._events.append(PromptScored(sequence, first, _records(logprobs, told, count, most)))
                told += count
                offset += count
            if work.pooled and sequence.pooling is not None and hidden is not None:
                sequence.pooling.take(hidden.values[pooled:pooled + len(work.pooled)])
                pooled += len(work.pooled)
            if not work.samples:
                sequence.computed += work.rows
                self._tables.store(sequence)
                if sequence.pooling is not None and not sequence.missing:
                    self._end(sequence, self._finished(sequence, "stop", now))
                continue
            count = 1 + len(work.drafts) + work.more
            tokens = chosen[offset:offset + count]
            offset += count
            records = b""
            if sequence.request.logprobs >= 0 and logprobs is not None:
                records = _records(logprobs, told, count, sequence.request.logprobs)
                told += count
            if work.drafts:
                tokens = tokens[:self.speculation.judge(work, tokens) + 1]
                if not work.forced:
                    sequence.verified_until = now
            if sequence.adjuster is not None and not sequence.adjuster.dead.isdisjoint(range(len(tokens))):
                self.broken_grammars += sequence.adjuster.grammar is not None
                self._end(sequence, failed(sequence.request, BadRequest(
                    (sequence.adjuster.grammar and sequence.adjuster.grammar.broken)
                    or "no token is left: allowed_token_ids and the grammar exclude each other")))
                continue
            self._append(sequence, work.start + work.rows - len(work.drafts), tokens, now, records)
        return self.take_events()

    def audit(self) -> Audit:
        """Check who holds which block, and mend. Between steps only."""
        return self.pool.audit(sequence.blocks for sequence in self._live.values())

    @property
    def _rows_left(self) -> int:
        """Of the step under way."""
        return self.limits.step_tokens - sum(work.rows for work in self._works)

    @property
    def _streams(self) -> int:
        """What drafts save now they save from steps that the waiting ones join, so it is valued at the price of all."""
        return min(self.limits.max_running, len(self.running) + len(self.waiting))

    # --- parts of plan -----------------------------------------------------------------------------------------------

    def _bearable_prompt(self, streams: int) -> int:
        """Prompt tokens that a step may have without holding up so many streams for long; a block at least."""
        most = max(1, int(PREFILL_SHARE * self.limits.step_tokens))
        if not self.cost.token_s:
            return most
        alone_s = self.cost.expected_s(streams)
        return min(most, max(self.limits.block_size, int(max(PROMPT_STEP_S - alone_s, alone_s) / self.cost.token_s)))

    def _prefill(self, sequence: Sequence, budget: int, computing: set[bytes]) -> int:
        """Plan a chunk of missing tokens; how many. Skips a block that another sequence computes in this very step."""
        size = self.limits.block_size
        before = sequence.computed
        self._tables.reuse(sequence)
        start, length = sequence.computed, len(sequence.tokens)
        if not sequence.preemptions:
            sequence.cached_tokens = min(sequence.cached_tokens + start - before, sequence.prompt_length)
        first = start // size
        full = start % size == 0 and start + size <= length
        if full and not sequence.wants_rows and sequence.name(first, size) in computing:
            return 0
        end = min(length, start + budget)
        if end < length and end // size * size > start:
            end = end // size * size
        if not self._make_room(sequence, end):
            return 0
        if full:
            computing.update(sequence.name(index, size) for index in range(first, end // size))
        work = Work(sequence, start, end - start, end == length and sequence.pooling is None)
        work.scored = sequence.scored_rows(start, work.rows)
        if sequence.pooling is not None:
            work.pooled = sequence.pooling.wanted(start, work.rows)
        self._works.append(work)
        return end - start

    def _admit(self, budget: int, computing: set[bytes], now: float) -> None:
        while budget and self._slots and (sequence := self.waiting.peek()) is not None:
            if not self._fits(sequence):
                return
            self.waiting.admit(sequence, sequence.missing)
            sequence.slot = self._slots.pop()
            self._leases += 1
            sequence.lease = self._leases
            insort(self.running, sequence, key=_rank)
            if sequence.admitted_at is None:
                sequence.admitted_at = now
                sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
                self.speculation.drafts.open(sequence.key)
                self._events.append(Started(sequence))
            budget -= self._prefill(sequence, budget, computing)
            if sequence.slot < 0:
                # it had to give way to itself: blocks are missing that nobody here holds, until an audit finds them
                return

    def _fits(self, sequence: Sequence) -> bool:
        """Whether all its tokens have room beside what running ones need and one block more for each.

        Holds what it can reuse if so.
        """
        available = self.pool.available
        if self.running and self._blocked is not None and self._blocked[0] is sequence \
                and available <= self._blocked[1]:
            return False
        self._tables.reuse(sequence, restore=False)
        promised = sum(self._tables.wanted(other, len(other.tokens)) + 1 for other in self.running)
        wanted = self._tables.wanted(sequence, len(sequence.tokens)) + promised
        if self.running and wanted > self.pool.available:
            self._tables.give_up(sequence)
            self._blocked = (sequence, available)
            return False
        self._blocked = None
        return True

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Blocks for `length` tokens, if need be taken from the lowest in rank. False when that was `sequence`."""
        wanted = self._tables.wanted(sequence, length)
        if wanted <= 0:
            return True
        while (blocks := self.pool.allocate(wanted)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        victim.preemptions += 1
        self._works[:] = [work for work in self._works if work.sequence is not victim]
        self._leave(victim)
        self.waiting.push_back(victim)

    # --- parts of commit ---------------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, sure: int, tokens: list[int], now: float, records: bytes) -> None:
        """Commit `tokens`; positions below `sure`, and those of all tokens but the last, are computed.

        `records`: how likely each was, and perhaps others after them.
        """
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        stream = sequence.tokens
        index = sequence.delivered
        reason: Literal["stop", "length"] | None = None
        grammar = sequence.adjuster.grammar if sequence.adjuster is not None else None
        broken = False
        for count, token in enumerate(tokens, 1):
            stream.append(token)
            if grammar is not None and not grammar.advance(token):
                tokens, broken = tokens[:count], True
                break
            # asked of few tokens: most end nothing
            if (token in sequence.stop_ids or len(stream) >= sequence.end_length or grammar is not None) \
                    and (reason := _end_reason(sequence)) is not None:
                tokens = tokens[:count]
                break
        self.stream_length.say(len(tokens))
        sequence.computed = sure + len(tokens) - 1
        if sequence.computed >= (sequence.stored + 1) * self.limits.block_size:
            self._tables.store(sequence)
        told = len(tokens) * record_bytes(sequence.request.logprobs) if records else 0
        self._events.append(Advanced(sequence, index, tokens, records[:told]))
        if grammar is not None and broken:
            self.broken_grammars += 1
            self._end(sequence, failed(sequence.request, BadRequest(
                grammar.broken or "the grammar does not permit what was chosen")))
        elif reason is not None:
            self._end(sequence, self._finished(sequence, reason, now))

    # --- ends --------------------------------------------------------------------------------------------------------

    def _refusal(self, request: Generate, now: float, deadline: float) -> MillError | None:
        if len(request.tokens) % 4 or len(request.generated) % 4 or not request.tokens:
            return BadRequest("the prompt must be one token or more, packed 4 bytes each")
        if len(request.cache_salt) > LONGEST_SALT:
            return BadRequest(f"a cache salt has at most {LONGEST_SALT} bytes, this one has {len(request.cache_salt)}")
        length = (len(request.tokens) + len(request.generated)) // 4
        if request.pooling and not self.limits.embeds:
            return NoEligibleWorker("this worker's decoder gives no embeddings", param="pooling")
        if len(request.tokens) // 4 >= self.length_limit + (request.pooling != ""):
            return ContextTooLong(f"the prompt has {len(request.tokens) // 4} tokens and this worker holds "
                                  f"{self.length_limit} with the answer: send a shorter one")
        if max(max(unpack(request.tokens)), max(unpack(request.generated), default=0)) >= self.limits.vocabulary_size:
            return BadRequest(f"token ids must be below {self.limits.vocabulary_size}, the model's vocabulary")
        if request.adjust is not None \
                and (wrong := adjust.refusal(request.adjust, self.limits.vocabulary_size)) is not None:
            return wrong
        if now >= deadline:
            return DeadlineExceeded("the deadline had passed when the request reached the worker")
        if self.closed_because is not None:
            return Overloaded(self.closed_because, retry_after_s=1.0)
        if len(self.waiting) >= self.limits.max_waiting:
            seconds = self.queued_tokens * self.cost.token_s + length * self.cost.token_s
            return Overloaded(f"{len(self.waiting)} requests wait already", retry_after_s=min(max(seconds, 1.0), 60.0))
        return None

    def _expire(self, now: float) -> None:
        for sequence in list(self._live.values()):
            if now >= sequence.deadline:
                error = DeadlineExceeded(f"the deadline passed after {sequence.delivered} tokens")
                self._end(sequence, failed(sequence.request, error))
        self._next_deadline = min((sequence.deadline for sequence in self._live.values()), default=float("inf"))

    def _end(self, sequence: Sequence, reply: Finished | Failed) -> None:
        if sequence.slot >= 0:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.ended = True
        if sequence.first_token_at is not None:
            self.stream_length.end()
        self.speculation.drafts.close(sequence.key)
        del self._live[sequence.request.request_id]
        self._events.append(Ended(sequence, reply))

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running: slot and blocks are free again."""
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self._tables.give_up(sequence)

    def _finished(self, sequence: Sequence, reason: Literal["stop", "length", "cancelled"], now: float) -> Finished:
        return finished(sequence, reason, now, self.limits.max_draft_tokens)

    @staticmethod
    def _remember(table: OrderedDict[str, int], request_id: str, attempt: int) -> None:
        table[request_id] = attempt
        table.move_to_end(request_id)
        if len(table) > REMEMBERED_REQUESTS:
            table.popitem(last=False)


def _records(logprobs: Logprobs, first: int, count: int, most: int) -> bytes:
    """What was told of `count` rows from `first` on, with the `most` likeliest of each."""
    here = slice(first, first + count)
    return pack_likely(logprobs.of_target[here], logprobs.ranks[here], logprobs.top_ids[here, :most],
                       logprobs.top[here, :most])


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _end_reason(sequence: Sequence) -> Literal["stop", "length"] | None:
    """Why the stream ends with the tokens it has, if it does. A stop in the prompt is none."""
    if sequence.delivered and sequence.tokens[-1] in sequence.stop_ids:
        return "stop"
    if sequence.adjuster is not None and sequence.adjuster.grammar is not None and sequence.adjuster.grammar.finished:
        return "stop"
    return "length" if len(sequence.tokens) >= sequence.end_length else None
