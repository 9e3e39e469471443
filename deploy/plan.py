"""`tokenmill plan`: how many workers and drafters a trace needs so that promises are kept, and what they cost.

    device_of(rows, side)   the formula of `deploy.replay_fleet.Device`, fitted to a price sheet's rows of that side
    plan(...)               the fewest workers whose replay meets every objective

Rules: a step of a fitted device stands for one token of each stream, its drafts included: so a side with drafters has
shorter ones. How far the fit is beside the rows is kept with it. More workers are taken to meet what fewer do: the
search doubles, then halves the gap, and has played the answer and the next smaller fleet. Costs are of whole machines
by the hour, whether they are busy or not.
Pure, but for the processor time it takes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from msgspec import Struct

from deploy.objectives import Objective, counted_percentile, missed, percentile
from deploy.price_sheet import Row, Side
from deploy.replay_fleet import Device, Fleet, Outcome, Replay, infinite_reuse
from deploy.replay_trace import Trace
from shared import pricing
from shared.pricing import Price

LEAST_S = 1e-6


class Fitted(NamedTuple):
    """`off`: by how much of the row's own TPOT the formula is beside it, the worst row's."""

    device: Device
    off: float


class Machines(Struct, frozen=True):
    """What a worker of a plan takes, in nano-dollars an hour, with its share of the drafters."""

    name: str
    worker_sku: str
    worker_hour: int
    drafters: Fraction  # for each worker
    drafter_sku: str = ""  # empty: they share the workers' machines
    drafter_hour: int = 0


class Tried(Struct, frozen=True):
    """One fleet that was played. Times in milliseconds."""

    workers: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    busy: float  # of the workers' time, until the last token
    cached_share: float  # of prompt tokens
    refused: int
    missed: tuple[str, ...]


class Plan(Struct, frozen=True):
    """What to run. Money in dollars. `workers` is None when not even the most that were allowed are enough."""

    name: str
    device: dict[str, float]
    device_off: float | None  # None: the formula was told, not fitted
    worker_sku: str
    workers: int | None
    drafter_sku: str
    drafters: int
    usd_per_hour: Decimal | None
    usd_per_month: Decimal | None  # of 730 hours
    usd_per_million_output: Decimal | None
    usd_per_million_total: Decimal | None
    margin: float | None  # at the price that tokens are sold at
    requests: int
    output_tok_s: float  # over the trace
    input_tok_s: float
    tried: tuple[Tried, ...]


def device_of(rows: Iterable[Row], side: Side) -> Fitted:
    """The formula of one worker's device. Raises ValueError where the rows do not tell it.

    TPOT against streams at once, by least squares over all rows; prompt tokens from the row with the fewest streams.
    """
    mine = [one for one in rows if one.side == side.name and one.tpot_ms.p50 and one.ttft_ms.p50]
    workers = max(1, side.workers or 1)
    at = [max(1.0, one.concurrency / workers) for one in mine]
    if len(set(at)) < 2:
        raise ValueError(f"side {side.name!r} has rows of less than two numbers of streams at once: what a stream adds "
                         "to a step cannot be told from them")
    each_s = [(one.tpot_ms.p50 or 0.0) / 1e3 for one in mine]
    middle, mean_s = sum(at) / len(at), sum(each_s) / len(each_s)
    together = sum((x - middle) * (y - mean_s) for x, y in zip(at, each_s, strict=True))
    row_s = max(0.0, together / sum((x - middle) ** 2 for x in at))
    step_s = mean_s - row_s * middle
    if step_s < LEAST_S:  # all of it comes with the streams
        step_s = LEAST_S
        row_s = max(0.0, sum(x * y for x, y in zip(at, each_s, strict=True)) / sum(x * x for x in at))
    first = min(mine, key=lambda one: (one.concurrency, -one.prompt_tokens))
    computed = max(1.0, first.prompt_tokens * (1.0 - first.cached_share))
    token_s = max(0.0, ((first.ttft_ms.p50 or 0.0) / 1e3 - step_s - row_s) / computed)
    off = max(abs(step_s + row_s * x - y) / y for x, y in zip(at, each_s, strict=True))
    return Fitted(Device(round(step_s, 9), round(row_s, 9), round(token_s, 9)), round(off, 3))


def plan(trace: Trace, machines: Machines, device: Device, objectives: Sequence[Objective], price: Price | None = None,
         blocks: int = 16_384, most_workers: int = 256, off: float | None = None,
         report: Callable[[int], None] = lambda workers: None) -> Plan:
    """The fewest workers, up to `most_workers`; `report` hears how many are played next."""
    tried: dict[int, Tried] = {}

    def enough(workers: int) -> bool:
        if workers not in tried:
            report(workers)
            tried[workers] = _judged(workers, Replay(trace, Fleet(workers, blocks, device), "cost").run(), objectives)
        return not tried[workers].missed

    needed = fewest(min(at_least(trace, device), most_workers), most_workers, enough)
    arrivals = trace.arrivals
    span_s = max(arrivals[-1].at_s, 1.0)
    prompt, output = (sum(getattr(one, f"{kind}_tokens") for one in arrivals) for kind in ("prompt", "output"))
    money: dict[str, Decimal | None] = dict.fromkeys(
        ("usd_per_hour", "usd_per_month", "usd_per_million_output", "usd_per_million_total"))
    drafters, left = 0, None
    if needed is not None:
        drafters = math.ceil(machines.drafters * needed)
        hour = needed * machines.worker_hour + (drafters * machines.drafter_hour if machines.drafter_sku else 0)
        rates = [Fraction(tokens * 10**6, round(span_s * 1e6)) for tokens in (prompt, output)]
        money = {
            "usd_per_hour": pricing.dollars(hour), "usd_per_month": pricing.dollars(730 * hour),
            "usd_per_million_output": pricing.dollars(round(pricing.unit_cost(hour, rates[1]))),
            "usd_per_million_total": pricing.dollars(round(pricing.unit_cost(hour, sum(rates, Fraction(0))))),
        }
        if price is not None:
            reuse = Fraction(str(tried[needed].cached_share))
            sold = pricing.revenue_per_hour(price, pricing.Rates(rates[0] * (1 - reuse), rates[0] * reuse, rates[1]))
            left = pricing.margin(sold, hour)
    return Plan(
        name=machines.name, device=device._asdict(), device_off=off, worker_sku=machines.worker_sku, workers=needed,
        drafter_sku=machines.drafter_sku, drafters=drafters, margin=None if left is None else float(round(left, 4)),
        requests=len(arrivals), output_tok_s=round(output / span_s, 2), input_tok_s=round(prompt / span_s, 2),
        tried=tuple(tried[workers] for workers in sorted(tried)), **money)


def fewest(low: int, most: int, enough: Callable[[int], bool]) -> int | None:
    """The least number from 1 to `most` that is enough, if more are never worse; `low` is where to begin to look."""
    failed, passed = 0, max(1, low)
    while not enough(passed):
        if passed >= most:
            return None
        failed, passed = passed, min(most, 2 * passed)
    while passed - failed > 1:
        middle = (failed + passed) // 2
        failed, passed = (failed, middle) if enough(middle) else (middle, passed)
    return passed


def at_least(trace: Trace, device: Device) -> int:
    """Half of the workers that the trace's rows and prompts keep busy, whatever is cached: where to begin to look."""
    arrivals = trace.arrivals
    computed = sum(one.prompt_tokens for one in arrivals) * (1.0 - infinite_reuse(trace))
    busy_s = sum(one.output_tokens for one in arrivals) * device.row_s + computed * device.token_s
    return max(1, int(busy_s / max(arrivals[-1].at_s, 1.0) / 2))


def lines(found: Sequence[Plan], objectives: Sequence[Objective]) -> list[str]:
    """What was found, for people; the cheapest first."""
    said = ["promised: " + (", ".join(map(str, objectives)) or "nothing: one worker will do")]
    for one in cheapest_first(found):
        said.append("")
        if one.workers is None:
            said.append(f"{one.name}: not with {one.tried[-1].workers} {one.worker_sku}: "
                        f"{'; '.join(one.tried[-1].missed)}")
        else:
            drafters = "no drafter" if not one.drafters else (
                f"{_several(one.drafters, 'drafter')} of {one.drafter_sku}" if one.drafter_sku
                else f"{_several(one.drafters, 'drafter')} on the workers' machines")
            said.append(f"{one.name}: {_several(one.workers, 'worker')} of {one.worker_sku}, {drafters}: "
                        f"${one.usd_per_hour} an hour, ${one.usd_per_month} a month")
            said.append(f"  ${one.usd_per_million_output:.4g} a million output tokens, "
                        f"${one.usd_per_million_total:.4g} a million tokens in all"
                        + ("" if one.margin is None else f"; margin {100 * one.margin:.1f} %"))
        fit = "as told" if one.device_off is None else f"fitted, {100 * one.device_off:.0f} % off a row's TPOT at most"
        step, row, token = (1e3 * one.device[name] for name in ("step_s", "row_s", "token_s"))
        said.append(f"  a step takes {step:.3g} ms + {row:.3g} ms a stream + {token:.3g} ms a prompt token ({fit})")
        said.append(f"  {one.requests:,} requests, {one.input_tok_s:,.0f} input and {one.output_tok_s:,.0f} output "
                    "tokens a second")
        said += map(_line, one.tried)
    return said


def _line(tried: Tried) -> str:
    ttft, itl = (f"p50 {_ms(p50)}, p99 {_ms(p99)}" for p50, p99 in (
        (tried.ttft_p50_ms, tried.ttft_p99_ms), (tried.itl_p50_ms, tried.itl_p99_ms)))
    return (f"  {_several(tried.workers, 'worker'):>11}: TTFT {ttft}; ITL {itl}; busy {100 * tried.busy:.0f} %; "
            f"cached {100 * tried.cached_share:.0f} %; {'; '.join(tried.missed) or 'enough'}")


def cheapest_first(found: Iterable[Plan]) -> list[Plan]:
    """Those that nothing meets at the end."""
    return sorted(found, key=lambda one: (one.usd_per_hour is None, one.usd_per_hour or Decimal(0)))


def _judged(workers: int, outcome: Outcome, objectives: Sequence[Objective]) -> Tried:
    times = {"ttft": [1e3 * one.ttft_s for one in outcome.served], "e2e": [1e3 * one.e2e_s for one in outcome.served],
             "tpot": [1e3 * (one.e2e_s - one.ttft_s) / (one.output_tokens - 1) for one in outcome.served
                      if one.output_tokens > 1]}

    def value_ms(what: str, percent: float) -> float | None:
        if what != "itl":
            return percentile(times[what], percent)
        gap = counted_percentile(outcome.gaps_us, percent)
        return None if gap is None else gap / 1e3

    misses = missed(objectives, value_ms)
    if outcome.refused:
        misses.append(f"{outcome.refused} requests were refused")
    served = outcome.served
    prompt = sum(one.prompt_tokens for one in served)
    busy = sum(outcome.busy_s) / len(outcome.busy_s) / outcome.ends_s if outcome.ends_s else 0.0
    cached = sum(one.cached_tokens for one in served) / prompt if prompt else 0.0
    return Tried(
        workers, value_ms("ttft", 50), value_ms("ttft", 99), value_ms("itl", 50), value_ms("itl", 99), round(busy, 4),
        round(cached, 4), outcome.refused, tuple(misses))


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
