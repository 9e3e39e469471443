"""Which worker gets a request.

Rules:
- Walls come first and nothing climbs them: model, residency, vocabulary, numeric recipe of a stream already begun,
  context length, state, abilities. `exclude_workers` is a strong wish, not a wall: an excluded worker is taken when
  nobody else is left.
- Everything else is compared in seconds: what this request waits for, and what the streams beside it lose.
- Refusing is a value with its reason.
Pure: no clock, no bus; the caller passes the wall time, a snapshot and the random generator.

    estimate = queue + slot + prefill + one step             until the first token; what admission looks at
    cost     = estimate + decode + others + later + evict    what workers are compared by
    queue    = prompt tokens ahead / prefill rate            ahead: by the last status, and sent since
    slot     = streams ahead that must end first x seconds between two ends, which is as long as they last over slots
    prefill  = (prompt - cached) / prefill rate
    decode   = expected output x step(1 + OVERLAP x rows)
    others   = rows x (prefill + OVERLAP x expected output x seconds per row)
    later    = arrivals a second and worker x (wait + prefill) x prefill
    evict    = turnover x EVICT_WEIGHT x prefill

`others` and `later` are why a cache hit weighs more where there is more to do: prefill holds up every stream that
decodes there, and everyone who arrives before it is over. Arrivals are not measured either: r rows that live for s
seconds are replaced r / s times a second. `evict`: what is computed also pushes out what was computed before, which
others come back for; nothing while the cache has room, and more where it is written over more often than its fleet's
(`router.turnover`). That makes the caches of a fleet one: a new conversation goes where it pushes out least, not to
whoever holds the system prompt, and an old one stays where it is for as long as moving costs more than waiting.
Routers that count a request's own prefill only need a factor for all this, tuned per fleet.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from shared.blocks import BLOCK_SIZE_TOKENS
from shared.errors import ContextTooLong, DeadlineExceeded, NoEligibleWorker, Overloaded
from shared.messages import Generate, WorkerStatus, demands
from shared.residency import allows
from shared.tokens import count

# taken for a worker that has not measured yet, and only while nobody in its place has: else the best of its peers, so
# that a new worker is tried rather than starved
UNMEASURED_PREFILL_TOK_S = 4000.0
UNMEASURED_STEP_S = 0.01
UNMEASURED_ROW_S = 0.0001
# how much a stream is expected to say when it may say more (mean of the Mooncake conversation trace: 343); slots of a
# worker whose streams have said less of late are expected to be free sooner
EXPECTED_OUTPUT_TOKENS = 256
# of a stream's life, the share that another which runs now lives on: it may be anywhere in its own. With 1, as if all
# lived on to its end, made up chat (8 workers) waits 22.1 ms for first tokens and is done after 1,982 ms in the mean,
# with 0.5 21.0 and 1,984, with 0 20.2 and 1,996; the Mooncake trace does not tell 0.25 from 1
OVERLAP = 0.5
# prefills that a full turnover adds to the price of one: a token pushed out is waited for again, takes a device again
# and pushes out another. No router can see how often; the optimum is flat. On the Mooncake conversation trace, 8 and 16
# workers of 16,384 blocks of 64 tokens, mean TTFT is the same within 2 % from 0 to 4, while reuse grows by 5 %
EVICT_WEIGHT = 4.0
# costs this close are equal: the rates behind them are not known better
TIE_SHARE, TIE_S = 0.01, 0.0005
# within this share of the best cost, the cheaper worker
PRICE_SHARE = 0.10
RETRY_AFTER_LEAST_S, RETRY_AFTER_MOST_S = 1.0, 60.0
# when to come back for a model that no worker serves: as long as a worker takes to start
NOBODY_RETRY_S = 10.0


class Candidate(NamedTuple):
    """A worker as this router sees it now."""

    status: WorkerStatus
    cached_blocks: int = 0  # leading blocks of this request it holds
    sent_requests: int = 0  # placed there by any router, not yet in its status
    sent_tokens: int = 0  # prompt tokens those have to compute
    sent_output_tokens: int = 0  # that they are expected to say (`expected_output`)
    turnover: float = 0.0  # how often its cache was written over while its fleet's were once (`router.turnover`)
    certain_blocks: int = 0  # of `cached_blocks`, what it has told of itself


class Terms(NamedTuple):
    """Where one worker's cost comes from. Seconds."""

    worker: str
    cached_tokens: int
    queue_s: float
    slot_s: float
    prefill_s: float
    step_s: float
    decode_s: float
    others_s: float
    later_s: float
    evict_s: float
    load: float  # streams and queued work, for least_loaded
    price_usd_per_hour: float
    cost_s: float  # all seconds above; a field, because a decision among 16 asks for it a hundred times

    @property
    def wait_s(self) -> float:
        """Until this request's own prefill begins."""
        return self.queue_s + self.slot_s

    @property
    def estimate_s(self) -> float:
        return self.queue_s + self.slot_s + self.prefill_s + self.step_s

    def __str__(self) -> str:
        return (f"{self.worker}: {self.cost_s:.4f} s = queue {self.queue_s:.4f} + slot {self.slot_s:.4f} + prefill "
                f"{self.prefill_s:.4f} + step {self.step_s:.4f} + decode {self.decode_s:.4f} + others "
                f"{self.others_s:.4f} + later {self.later_s:.4f} + evict {self.evict_s:.4f}, {self.cached_tokens} "
                "tokens cached")


class Decision(NamedTuple):
    """Where the request goes, and everything that was weighed."""

    chosen: Terms
    candidates: tuple[Terms, ...]
    turned_away: Mapping[str, str]  # worker -> the wall it stood behind
    policy: str


class Refused(NamedTuple):
    """Nobody gets the request. `code` is one of `shared.errors`."""

    code: str
    message: str
    retryable: bool
    retry_after_s: float
    turned_away: Mapping[str, str]


Policy = Callable[[Sequence[Terms], str, int, random.Random], Terms]


def decide(request: Generate, workers: Sequence[Candidate], *, wall_s: float, rng: random.Random, policy: str = "cost",
           turn: int = 0, max_queue_s: float = float("inf"), recipe: str = "", served_lately: bool = False,
           block_size_tokens: int = BLOCK_SIZE_TOKENS) -> Decision | Refused:
    """Place `request` on one of `workers` or say why not.

    `turn` counts placements, for round_robin. `recipe`: the stream began under this numeric recipe and can only go on
    under it (empty: unknown or not begun). `served_lately`: somebody served this model a moment ago.
    `block_size_tokens`: what a hash of the request stands for; the mesh's own everywhere but in a replay.
    Raises KeyError for an unknown policy.
    """
    choose = POLICIES[policy]
    if wall_s >= request.deadline:
        return Refused(DeadlineExceeded.code, "the deadline passed before the request was placed", False, 0.0, {})
    prompt_tokens = count(request.tokens) + count(request.generated)
    demanded = demands(request)
    turned_away = {}
    eligible = []
    for worker in workers:
        wall = _wall(request, prompt_tokens, demanded, recipe, worker.status)
        if wall:
            turned_away[worker.status.id] = wall
        else:
            eligible.append(worker)
    if not eligible:
        return _nobody(request, turned_away, served_lately)
    wished = eligible
    if request.exclude_workers:
        wished = [worker for worker in eligible if worker.status.id not in request.exclude_workers] or eligible
        turned_away |= {worker.status.id: "it failed this request before"
                        for worker in eligible if worker not in wished}
    candidates = tuple(weigh(request, prompt_tokens, wished, block_size_tokens))
    time_left_s = request.deadline - wall_s
    in_reach = [terms for terms in candidates if terms.wait_s <= max_queue_s and terms.estimate_s <= time_left_s]
    if not in_reach:
        return _too_late(candidates, time_left_s, max_queue_s, turned_away)
    return Decision(choose(in_reach, request.cache_hint, turn, rng), candidates, turned_away, policy)


def weigh(request: Generate, prompt_tokens: int, workers: Sequence[Candidate],
          block_size_tokens: int = BLOCK_SIZE_TOKENS) -> list[Terms]:
    """The terms of each worker, in their order. `prompt_tokens` counts what was generated before, too."""
    prefill_tok_s = max((worker.status.prefill_tok_s for worker in workers), default=0.0) or UNMEASURED_PREFILL_TOK_S
    measured = [worker.status for worker in workers if worker.status.step_base_s > 0]
    step_base_s = min((status.step_base_s for status in measured), default=UNMEASURED_STEP_S)
    step_row_s = min((status.step_row_s for status in measured), default=UNMEASURED_ROW_S)
    # at least one prompt token is computed: its logits choose the first token
    cacheable_blocks = max(0, prompt_tokens - 1) // block_size_tokens
    output_tokens = expected_output(request)
    weighed = []
    arrivals_per_s = 0.0
    for status, cached_blocks, sent_requests, sent_tokens, sent_output_tokens, turnover, _ in workers:
        rate = status.prefill_tok_s or prefill_tok_s
        base_s, row_s = (status.step_base_s, status.step_row_s) if status.step_base_s > 0 else (step_base_s, step_row_s)
        streams = status.running + status.waiting + sent_requests
        slots = status.max_running or streams + 1
        rows = min(streams, slots - 1)
        step_s = base_s + (rows + 1) * row_s
        arrivals_per_s += rows / (EXPECTED_OUTPUT_TOKENS * step_s) / len(workers)
        cached_tokens = min(cached_blocks, cacheable_blocks) * block_size_tokens
        queued_tokens = status.queued_tokens + sent_tokens
        prefill_s = (prompt_tokens - cached_tokens) / rate
        weighed.append((
            status.id,
            cached_tokens,
            queued_tokens / rate,
            max(0, streams - slots + 1) * _said(status, sent_requests, sent_output_tokens) * step_s / slots,
            prefill_s,
            step_s,
            output_tokens * (base_s + (1 + OVERLAP * rows) * row_s),
            rows * (prefill_s + OVERLAP * output_tokens * row_s),
            turnover * EVICT_WEIGHT * prefill_s,
            streams + queued_tokens / max(1, prompt_tokens),
            status.price_usd_per_hour,
        ))
    terms = []
    for worker, cached_tokens, queue_s, slot_s, prefill_s, step_s, decode_s, others_s, evict_s, load, price in weighed:
        # new requests come to the fleet, not to the worker that is busy now
        later_s = arrivals_per_s * (queue_s + slot_s + prefill_s) * prefill_s
        terms.append(Terms(worker, cached_tokens, queue_s, slot_s, prefill_s, step_s, decode_s, others_s, later_s,
                           evict_s, load, price, queue_s + slot_s + prefill_s + step_s + decode_s + others_s + later_s
                           + evict_s))
    return terms


def expected_output(request: Generate) -> int:
    """Tokens that it is expected to say: what it may, and no more than streams do."""
    return max(1, min(request.max_tokens - count(request.generated), EXPECTED_OUTPUT_TOKENS))


def _said(status: WorkerStatus, sent_requests: int, sent_output_tokens: int) -> float:
    """What each of the worker's streams is expected to say, in the mean of those it told of and those sent since."""
    there = status.running + status.waiting
    each = min(status.stream_tokens or EXPECTED_OUTPUT_TOKENS, EXPECTED_OUTPUT_TOKENS)
    sent = min(sent_output_tokens, sent_requests * each)
    return (there * each + sent) / max(1, there + sent_requests)


def cheapest(candidates: Sequence[Terms], hint: str, turn: int, rng: random.Random) -> Terms:
    """Least seconds; near the least, the lower price; among equals more cache, then the hint, then chance."""
    near = _near(candidates, PRICE_SHARE)
    price = min(terms.price_usd_per_hour for terms in near)
    equals = _near([terms for terms in near if terms.price_usd_per_hour == price], TIE_SHARE)
    most_cached = max(terms.cached_tokens for terms in equals)
    return _among_equals([terms for terms in equals if terms.cached_tokens == most_cached], hint, rng)


def longest_prefix(candidates: Sequence[Terms], hint: str, turn: int, rng: random.Random) -> Terms:
    """Most cache, whatever the queue; then least load."""
    most = max(terms.cached_tokens for terms in candidates)
    return least_loaded([terms for terms in candidates if terms.cached_tokens == most], hint, turn, rng)


def least_loaded(candidates: Sequence[Terms], hint: str, turn: int, rng: random.Random) -> Terms:
    """Fewest streams and queued prompts."""
    least = min(terms.load for terms in candidates)
    return _among_equals([terms for terms in candidates if terms.load == least], hint, rng)


def round_robin(candidates: Sequence[Terms], hint: str, turn: int, rng: random.Random) -> Terms:
    """One after the other, by name."""
    return sorted(candidates, key=lambda terms: terms.worker)[turn % len(candidates)]


def at_random(candidates: Sequence[Terms], hint: str, turn: int, rng: random.Random) -> Terms:
    """Anyone."""
    return rng.choice(candidates)


POLICIES: Mapping[str, Policy] = {
    "cost": cheapest,
    "prefix": longest_prefix,
    "least_loaded": least_loaded,
    "round_robin": round_robin,
    "random": at_random,
}


def _wall(request: Generate, prompt_tokens: int, demanded: Sequence[str], recipe: str, status: WorkerStatus) -> str:
    """The first wall between the request and this worker; empty when there is none."""
    if status.model != request.model:
        return "serves another model"
    if not allows(request.residency, status.zone):
        return f"zone {status.zone} is not allowed"
    if request.vocabulary and status.vocabulary and status.vocabulary != request.vocabulary:
        return f"vocabulary {status.vocabulary}, not {request.vocabulary}"
    if recipe and status.recipe != recipe:
        return f"recipe {status.recipe or 'unknown'}, not {recipe}"
    if 0 < status.context_length < prompt_tokens + (request.pooling == ""):  # and a token of the answer
        return f"context of {status.context_length} tokens"
    if status.state != "ready":
        return status.state
    # last: who starts has not said it yet
    if lacking := [name for name in demanded if name not in status.abilities]:
        return f"keeps to no {' and no '.join(lacking)} (an older version, or no vocabulary beside the model)"
    return ""


def _nobody(request: Generate, turned_away: Mapping[str, str], served_lately: bool) -> Refused:
    """Why nobody may serve the request: the wall that the last workers stood behind."""
    walls = set(turned_away.values()) - {"serves another model"}
    passing = walls & {"starting", "draining"}
    if passing:
        states = " or ".join(sorted(passing))
        return Refused(Overloaded.code, f"every worker that may serve {request.model} is {states}", True,
                       RETRY_AFTER_LEAST_S, turned_away)
    too_short = sorted(wall for wall in walls if wall.startswith("context of "))
    if too_short:
        return Refused(ContextTooLong.code, f"the prompt is longer than what workers of {request.model} take: "
                       f"{', '.join(too_short)}", False, 0.0, turned_away)
    if walls:
        zones = ", ".join(request.residency.zones) or "any"
        remedy = "; start one in an allowed zone, or allow another zone" if request.residency.zones else ""
        return Refused(NoEligibleWorker.code, f"no worker may serve this request for {request.model} (allowed zones: "
                       f"{zones}): {'; '.join(sorted(walls))}{remedy}", False, 0.0, turned_away)
    if served_lately:
        return Refused(Overloaded.code, f"the workers of {request.model} are gone for the moment", True,
                       RETRY_AFTER_LEAST_S, turned_away)
    return Refused(NoEligibleWorker.code, f"no worker serves {request.model}: start one, or retry when there is one",
                   False, NOBODY_RETRY_S, turned_away)


def _too_late(candidates: Sequence[Terms], time_left_s: float, max_queue_s: float,
              turned_away: Mapping[str, str]) -> Refused:
    """Nobody is in reach: come back when the shortest queue is short enough."""
    first = min(candidates, key=lambda terms: terms.estimate_s)
    shortest_s = min(terms.wait_s for terms in candidates)
    if shortest_s > max_queue_s:
        too_long_s = shortest_s - max_queue_s
        message = f"the shortest queue takes {shortest_s:.1f} s, more than the {max_queue_s:.1f} s allowed"
    else:
        too_long_s = first.wait_s
        message = f"a first token takes {first.estimate_s:.1f} s and the deadline is {time_left_s:.1f} s away"
    retry_after_s = min(max(too_long_s, RETRY_AFTER_LEAST_S), RETRY_AFTER_MOST_S)
    return Refused(Overloaded.code, message, True, retry_after_s, turned_away)


def _near(candidates: Sequence[Terms], share: float) -> list[Terms]:
    costs_s = [terms.cost_s for terms in candidates]
    best_s = min(costs_s)
    enough_s = max(best_s * (1 + share), best_s + TIE_S)
    return [terms for terms, cost_s in zip(candidates, costs_s, strict=True) if cost_s <= enough_s]


def _among_equals(equals: Sequence[Terms], hint: str, rng: random.Random) -> Terms:
    """By the hint the same one for as long as it is among them (rendezvous hashing), else by chance."""
    if len(equals) == 1:
        return equals[0]
    if hint:
        return max(equals, key=lambda terms: blake2b(f"{hint}\0{terms.worker}".encode(), digest_size=8).digest())
    return rng.choice(equals)
