"""What tokens cost at one operating point: rows of a price sheet, out of what was measured and what an hour costs.

    rows(points, sides, terms, objectives) -> a Row for each point; other terms, other rows of the same points

Rules: a figure stands in a row with everything it depends on, or is None: nothing is filled in. Rates are of whole
runs, their slow beginning and end included, and each has the slowest and the fastest run beside it. A row that misses
an objective, or is worse than another one beyond what runs differ by, is marked and stays. Money goes through
`shared.pricing`: tokens are whole, times whole microseconds, so it is exact until it is shown, rounded to nano-dollars.
Cost per million is the whole hour, on one kind of token alone: of input, of output, and of both together.
Pure.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
from msgspec import Struct

from deploy.objectives import Objective, counted_percentile, missed, percentile
from shared import pricing
from shared.pricing import Price, Rates

FORMAT = 1
US = 10**6


class Hardware(Struct, frozen=True):
    """Machines of one kind, and what an hour of each costs, in nano-dollars."""

    sku: str
    machines: int
    hour: int
    source: str = ""


class Side(Struct, frozen=True):
    """What was driven. `hardware`: all that has to be paid for, drafters' own machines too."""

    name: str
    model: str
    hardware: tuple[Hardware, ...]
    revision: str = ""  # of the weights
    precision: str = ""
    engine: str = ""
    workers: int | None = None  # processes; None where it was not started here
    drafters: int | None = None

    @property
    def hour(self) -> int:
        """Nano-dollars of an hour of everything."""
        return sum(each.machines * each.hour for each in self.hardware)


class Run(Struct, frozen=True):
    """Streams sent once, so many at a time, until all had ended. Figures that nobody could take are None."""

    wall_us: int
    requests: int
    failures: int
    wrong_lengths: int  # answers without usage, or of another length than was demanded
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    draft_tokens: int
    accepted_draft_tokens: int
    chunks: int
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    e2e_ms: tuple[float, ...]
    itl_tenths: dict[int, int]  # tenths of milliseconds between chunks -> how often
    mesh_cores: float | None = None  # that its processes used
    busy_cores: float | None = None  # that everything on its machine used
    steal_cores: float | None = None
    joules: float | None = None  # of its whole machine


class Point(Struct, frozen=True):
    """One operating point and all its runs. `fixed`: every answer was forced to its full length."""

    side: str
    workload: str
    fixed: bool
    concurrency: int
    runs: tuple[Run, ...]


class Terms(Struct, frozen=True):
    """What tokens are sold at, and how: shares from 0 to 1."""

    price: Price
    margin: Decimal = Decimal("0.35")  # that is wanted
    utilisation: Decimal = Decimal(1)  # of an hour, so long it is loaded like this


class Times(Struct, frozen=True):
    """Milliseconds that 50, 90 and 99 of a hundred do not exceed."""

    p50: float | None
    p90: float | None
    p99: float | None


class Row(Struct, frozen=True):
    """One operating point as it is printed. Money in dollars."""

    side: str
    workload: str
    hardware: str
    concurrency: int
    runs: int
    requests: int
    failures: int
    wrong_lengths: int
    prompt_tokens: float  # means of a request
    output_tokens: float
    cached_share: float  # of prompt tokens
    accepted_share: float | None  # of drafts; None where there were none
    accepted_of_output: float  # tokens that were drafts
    tokens_per_chunk: float | None
    output_tok_s: float
    output_tok_s_low: float
    output_tok_s_high: float
    input_tok_s: float
    total_tok_s: float
    user_tok_s: float | None  # of the median stream behind its first token
    user_tok_s_slow: float | None  # nine of ten streams are faster
    ttft_ms: Times
    tpot_ms: Times
    itl_ms: Times
    e2e_ms: Times
    mesh_cores: float | None
    busy_cores: float | None
    steal_cores: float | None
    output_joules: float | None  # of a token, everything on the machine included
    usd_per_hour: Decimal
    utilisation: Decimal
    usd_per_million_input: Decimal | None
    usd_per_million_output: Decimal | None
    usd_per_million_total: Decimal | None
    output_tok_s_per_usd: float | None  # tokens a second for a dollar an hour
    revenue_usd_per_hour: Decimal
    margin: float | None
    hour_usd_for_margin: Decimal  # what an hour might cost at the wanted margin
    break_even_share: float | None  # of an hour loaded like this, from which on it is earned
    missed: tuple[str, ...] = ()  # objectives
    outdone: bool = False  # another row of its workload gives users as much and costs less, its slowest run even


class Document(Struct, frozen=True):
    """A sheet as a file: everything it was made of, so that it can be priced again."""

    date: str
    commit: str
    machine: dict[str, Any]
    command: str
    notes: list[str]
    sides: list[Side]
    terms: Terms
    objectives: list[Objective]
    rows: list[Row]
    points: list[Point]
    format: int = FORMAT


def rows(points: Iterable[Point], sides: Iterable[Side], terms: Terms,
         objectives: Sequence[Objective] = ()) -> list[Row]:
    """One row for each point that has a run with an answer. Raises ValueError for a point of no side."""
    named = {side.name: side for side in sides}
    found = []
    for point in points:
        if point.side not in named:
            raise ValueError(f"there is no side {point.side!r}: its points cannot be priced")
        if any(run.output_tokens and run.wall_us for run in point.runs):
            found.append(row(point, named[point.side], terms, objectives))
    return [msgspec.structs.replace(one, outdone=_outdone(one, found)) for one in found]


def row(point: Point, side: Side, terms: Terms, objectives: Sequence[Objective] = ()) -> Row:
    """The row of one point by itself."""
    runs = point.runs
    prompt, cached, output, drafted, accepted, chunks, answers, requests, failures, wrong = (
        sum(counts) for counts in zip(*((
            run.prompt_tokens, run.cached_tokens, run.output_tokens, run.draft_tokens, run.accepted_draft_tokens,
            run.chunks, len(run.e2e_ms), run.requests, run.failures, run.wrong_lengths) for run in runs), strict=True))
    rates, joules = rates_of(runs), [run.joules for run in runs if run.joules is not None]
    by_run = sorted(Fraction(run.output_tokens * US, run.wall_us) for run in runs if run.wall_us)
    money = economics(rates, side.hour, terms)
    times = {what: [value for run in runs for value in getattr(run, f"{what}_ms")] for what in ("ttft", "tpot", "e2e")}
    gaps = sum((Counter(run.itl_tenths) for run in runs), Counter[int]())

    def value_ms(what: str, percent: float) -> float | None:
        if what != "itl":
            return percentile(times[what], percent)
        tenths = counted_percentile(gaps, percent)
        return None if tenths is None else tenths / 10

    def spread(what: str) -> Times:
        return Times(*(None if (value := value_ms(what, percent)) is None else round(value, 2)
                       for percent in (50, 90, 99)))

    return Row(
        side=side.name, workload=point.workload,
        hardware=" + ".join(f"{each.machines} {each.sku}" for each in side.hardware),
        concurrency=point.concurrency, runs=len(runs), requests=requests, failures=failures,
        wrong_lengths=wrong, prompt_tokens=_ratio(prompt, answers) or 0.0,
        output_tokens=_ratio(output, answers) or 0.0, cached_share=_ratio(cached, prompt) or 0.0,
        accepted_share=_ratio(accepted, drafted), accepted_of_output=_ratio(accepted, output) or 0.0,
        tokens_per_chunk=_ratio(output, chunks), output_tok_s=_shown(rates.output),
        output_tok_s_low=_shown(by_run[0]), output_tok_s_high=_shown(by_run[-1]),
        input_tok_s=_shown(rates.input + rates.cached_input),
        total_tok_s=_shown(rates.input + rates.cached_input + rates.output),
        user_tok_s=_per_second(value_ms("tpot", 50)), user_tok_s_slow=_per_second(value_ms("tpot", 90)),
        ttft_ms=spread("ttft"), tpot_ms=spread("tpot"), itl_ms=spread("itl"), e2e_ms=spread("e2e"),
        mesh_cores=_mean(runs, "mesh_cores"), busy_cores=_mean(runs, "busy_cores"),
        steal_cores=_mean(runs, "steal_cores"),
        output_joules=round(sum(joules) / output, 4) if output and len(joules) == len(runs) else None,
        missed=tuple(missed(objectives, value_ms)), **money)


def rates_of(runs: Iterable[Run]) -> Rates:
    """Tokens a second of some runs together, one after the other."""
    wall_us = prompt = cached = output = 0
    for run in runs:
        wall_us += run.wall_us
        prompt += run.prompt_tokens
        cached += min(run.cached_tokens, run.prompt_tokens)
        output += run.output_tokens
    return Rates(*(Fraction(tokens * US, wall_us) for tokens in (prompt - cached, cached, output)))


def economics(rates: Rates, hour: int, terms: Terms) -> dict[str, Any]:
    """The part of a row that is money: what these rates cost and earn at `hour` nano-dollars an hour."""
    loaded = Fraction(terms.utilisation)
    revenue = pricing.revenue_per_hour(terms.price, rates, loaded)
    left = pricing.margin(revenue, hour)
    kinds = {"input": rates.input + rates.cached_input, "output": rates.output}
    kinds["total"] = kinds["input"] + kinds["output"]
    cost = {f"usd_per_million_{kind}": _usd(pricing.unit_cost(hour, rate * loaded)) if rate and loaded else None
            for kind, rate in kinds.items()}
    full = pricing.revenue_per_hour(terms.price, rates)
    return {
        "usd_per_hour": _usd(hour), "utilisation": terms.utilisation, **cost,
        "output_tok_s_per_usd": _shown(rates.output * loaded * pricing.NANOS / hour) if hour else None,
        "revenue_usd_per_hour": _usd(revenue), "margin": None if left is None else float(round(left, 6)),
        "hour_usd_for_margin": _usd(pricing.cost_for_margin(revenue, Fraction(terms.margin))),
        "break_even_share": float(round(Fraction(hour) / full, 6)) if full else None,
    }


def encode(document: Document) -> bytes:
    """As a file: one line, for every stream of every run is in it."""
    return msgspec.json.Encoder(decimal_format="number").encode(document) + b"\n"


def decode(data: bytes) -> Document:
    """A file that `encode` wrote. Raises ValueError."""
    try:
        found = msgspec.json.decode(data, type=Document)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"it is no price sheet as `tokenmill price-sheet --out` writes it: {error}") from None
    if found.format != FORMAT:
        raise ValueError(f"it is a price sheet of format {found.format}, this version reads {FORMAT}")
    return found


def _outdone(one: Row, found: Iterable[Row]) -> bool:
    """Whether some row's slowest run made more for a dollar than the fastest one of this, and its users got as much."""
    best, each = _for_a_dollar(one, one.output_tok_s_high), one.user_tok_s or 0.0
    return any(_for_a_dollar(other, other.output_tok_s_low) > best and (other.user_tok_s or 0.0) >= each
               for other in found if other.workload == one.workload)


def _for_a_dollar(one: Row, rate: float) -> float:
    return rate * float(one.utilisation) / (float(one.usd_per_hour) or 1.0)


def _mean(runs: Sequence[Run], name: str) -> float | None:
    """By time; None unless every run has it."""
    values: list[float | None] = [getattr(run, name) for run in runs]
    known = [value * run.wall_us for value, run in zip(values, runs, strict=True) if value is not None]
    return round(sum(known) / sum(run.wall_us for run in runs), 3) if len(known) == len(runs) else None


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _per_second(ms: float | None) -> float | None:
    return round(1000 / ms, 2) if ms else None


def _shown(rate: Fraction) -> float:
    return float(round(rate, 3))


def _usd(nanos: int | Fraction) -> Decimal:
    return pricing.dollars(round(nanos))
