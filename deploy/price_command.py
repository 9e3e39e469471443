"""`tokenmill price-sheet` and `tokenmill plan`: what tokens cost where it was measured, and what a trace would take."""

import asyncio
import itertools
import sys
import tempfile
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.database import leave, print_json

if TYPE_CHECKING:
    from deploy.plan import Machines
    from deploy.price_load import Driven, Workload
    from deploy.price_sheet import Document, Hardware, Point, Side, Terms
    from deploy.replay_fleet import Device
    from shared.pricing import PriceSheet

PRICES = Path(__file__).with_name("prices.toml")
SPECULATION = {"both": (0, 1), "off": (0,), "on": (1,)}

Prices = Annotated[Path, typer.Option(metavar="FILE", envvar="TOKENMILL_PRICES", show_envvar=False, show_default=False,
                                      help="what tokens and machines cost; default: deploy/prices.toml, an example")]
Slo = Annotated[str, typer.Option(metavar="PROMISES", help="such as ttft_p99=500ms,itl_p99=100ms; of ttft, itl, tpot, "
                                  "e2e")]
SkuOption = Annotated[str, typer.Option(metavar="NAME", help="a machine of the prices file: what a worker runs on")]
DrafterSku = Annotated[str, typer.Option(metavar="NAME", help="what a drafter runs on; default: the workers' machines")]
Tier = Annotated[str, typer.Option(metavar="TIER", help="whose price counts: default, flex or priority")]


def price_sheet(
    url: Annotated[list[str] | None, typer.Option(metavar="[NAME=]URL", help="a mesh or an OpenAI endpoint that runs; "
                   "may be given several times; default: meshes of our own, started for this")] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="of our own meshes, may be given several "
                     "times; of endpoints the name they are asked for; default: the default model, or the first one "
                     "served")] = None,
    concurrency: Annotated[str, typer.Option(metavar="N[,N2...]", help="streams at once, 1 to 1024")] = "1,4,16,64",
    workload: Annotated[str, typer.Option("--workloads", metavar="W[,W2...]", help="questions, or tokens of prompt and "
                        "answer such as 512/64, which sides with drafters do not get")] = "questions",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="of a question's answer")] = 128,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="of each point")] = 3,
    waves: Annotated[int, typer.Option(metavar="N", min=1, help="requests of each stream in a run")] = 2,
    speculation: Annotated[str, typer.Option(metavar="WHICH", help="of our own meshes: both, on or off")] = "both",
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="of each mesh of our own")] = 1,
    engine: Annotated[str, typer.Option(metavar="ENGINE", help="of our own meshes, as of `tokenmill up`")] = "auto",
    sku: SkuOption = "cpu",
    machines: Annotated[int, typer.Option(metavar="N", min=1, help="of these, that everything but drafters runs "
                                          "on")] = 1,
    drafter_sku: DrafterSku = "",
    drafter_machines: Annotated[int, typer.Option(metavar="N", min=1, help="of these, where they are named")] = 1,
    revision: Annotated[str, typer.Option(metavar="TEXT", help="of an endpoint's weights, to be stated")] = "",
    precision: Annotated[str, typer.Option(metavar="TEXT", help="of an endpoint's weights, to be stated")] = "",
    prices: Prices = PRICES,
    tier: Tier = "default",
    margin: Annotated[str, typer.Option(metavar="SHARE", help="that is wanted: 0 to 1")] = "0.35",
    utilisation: Annotated[str, typer.Option(metavar="SHARE", help="of an hour, so long it is loaded like this")] = "1",
    slo: Slo = "",
    note: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="to stand at the head of the sheet; may be "
                                                   "given several times")] = None,
    key: Annotated[str, typer.Option(metavar="KEY", envvar="TOKENMILL_API_KEY", show_envvar=False,
                                     help="of a tenant, where an endpoint wants one")] = "",
    again: Annotated[Path | None, typer.Option("--from", metavar="FILE.json", exists=True, dir_okay=False,
                                               help="measure nothing: price this sheet's points again")] = None,
    out: Annotated[Path | None, typer.Option(metavar="STEM", help="write STEM.md, STEM.json and STEM.svg")] = None,
    json: Annotated[bool, typer.Option("--json", help="print the sheet as JSON")] = False,
) -> None:
    """Measure what tokens cost, point by point, with everything it depends on: a page, JSON and a curve."""
    import msgspec

    from deploy import objectives, price_load, price_page
    from deploy import price_sheet as sheets
    from deploy.bench import machine

    try:
        listed, promised = _listed(prices), objectives.parse(slo)
        shares = [_share("--margin", margin, below_one=True), _share("--utilisation", utilisation, above_zero=True)]
        if again is not None:
            before = sheets.decode(again.read_bytes())
            sides, points, described = before.sides, before.points, before.machine
            notes, command = [*before.notes, *(note or [])], before.command
            date, commit = before.date, before.commit
        else:
            asked = price_load.workloads(workload, max_tokens)
            at_once = _counts(concurrency)
            if speculation not in SPECULATION:
                leave(f"--speculation {speculation!r} is unknown: choose both, on or off")
            hardware = _hardware(listed, sku, machines)
            with_drafter = (*hardware, *_hardware(listed, drafter_sku, drafter_machines)) if drafter_sku else hardware
            what = _Asked(asked, at_once, runs, waves)
            if url:
                if drafter_sku:
                    hardware = with_drafter
                if len(model or []) > 1:
                    leave("endpoints are asked for one --model")
                named = (model or [""])[0]
                sides, points = asyncio.run(_endpoints(url, named, key, hardware, (revision, precision), what))
            else:
                sides, points = _own(model or ["default"], SPECULATION[speculation], workers, engine,
                                     {False: hardware, True: with_drafter}, what)
            described = machine.describe()
            date, commit = str(described.pop("date"))[:10], str(described.pop("commit"))
            notes = note or []
            said = [word for word in sys.argv[1:] if word not in ("--note", *notes)]
            command = machine.command("tokenmill", said).removeprefix("python -m ")
        terms = _terms(listed, sides, tier, shares)
        document = sheets.Document(date, commit, described, command, notes, sides, terms, promised,
                                   sheets.rows(points, sides, terms, promised), points)
    except (ValueError, OSError, price_load.LoadFailed) as error:
        leave(str(error))
    if out is not None:
        _write(out, document)
    typer.echo(msgspec.json.format(sheets.encode(document)).decode() if json else "\n".join(price_page.text(document)))


def plan(
    trace: Annotated[Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, readable=True,
                     help="requests as JSON lines: a Mooncake trace, or what a gateway wrote with --record")] = None,
    synthetic: Annotated[str, typer.Option(metavar="KIND", help="no trace but traffic made up: chat, agents or "
                                           "files")] = "",
    requests: Annotated[int, typer.Option(metavar="N", help="of made up traffic: how many requests", min=1)] = 1500,
    seed: Annotated[int, typer.Option(metavar="N", help="of made up traffic: another seed, other requests")] = 0,
    speed: Annotated[float, typer.Option(metavar="X", help="play the trace X times as fast")] = 1.0,
    slo: Slo = "ttft_p99=2s,itl_p99=100ms",
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.json", exists=True, dir_okay=False, readable=True,
                     help="rates and hardware, as `tokenmill price-sheet --out` measured them: each side is "
                     "planned")] = None,
    sku: SkuOption = "h100",
    step_ms: Annotated[float, typer.Option(metavar="MS", help="without a sheet: a step without rows", min=0.001)] = 6.0,
    row_ms: Annotated[float, typer.Option(metavar="MS", help="without a sheet: each stream in a step", min=0.0)] = 0.1,
    token_ms: Annotated[float, typer.Option(metavar="MS", help="without a sheet: each prompt token computed",
                                            min=0.0)] = 0.019,
    drafters: Annotated[str, typer.Option(metavar="N", help="without a sheet: drafters for each worker, such as "
                                          "0.5")] = "0",
    drafter_sku: DrafterSku = "",
    most_workers: Annotated[int, typer.Option(metavar="N", min=1, help="how far to look")] = 256,
    block_size: Annotated[int, typer.Option(metavar="TOKENS", help="tokens of a KV block", min=1)] = 64,
    blocks_per_worker: Annotated[int, typer.Option(metavar="N", help="KV blocks of a worker", min=1)] = 16_384,
    prices: Prices = PRICES,
    tier: Tier = "default",
    json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Say how many workers and drafters of which machine a trace needs to keep promises, and what they cost."""
    from deploy import objectives, replay_synthetic
    from deploy import plan as planning
    from deploy.replay_trace import Trace, read

    if (trace is None) == (not synthetic):
        leave("name a --trace, or a kind of traffic to make up with --synthetic")
    if not speed > 0:
        leave(f"--speed {speed:g} is no speed: give a number above 0")
    try:
        listed, promised = _listed(prices), objectives.parse(slo)
        arrivals = read(trace, speed) if trace is not None else replay_synthetic.synthetic(
            synthetic, requests, seed, speed)
        played = Trace(arrivals, block_size)
        if sheet is not None:
            choices = _of_sheet(sheet, listed)
        else:
            choices = [_told(listed, sku, drafters, drafter_sku, (step_ms, row_ms, token_ms))]
        found = [planning.plan(
            played, machines, device, promised, listed.price(model, tier), blocks_per_worker, most_workers, off,
            lambda workers, name=machines.name: typer.echo(f"{name}: with {workers} ...", err=True))  # type: ignore[misc]
            for machines, device, off, model in choices]
    except (ValueError, OSError) as error:
        leave(str(error))
    if json:
        print_json({"promised": promised, "plans": planning.cheapest_first(found)})
    else:
        typer.echo("\n".join(planning.lines(found, promised)))


# --- what is measured ------------------------------------------------------------------------------------------------


class _Asked:
    """What each side is asked."""

    def __init__(self, workloads: "list[Workload]", at_once: list[int], runs: int, waves: int) -> None:
        self.workloads, self.at_once, self.runs, self.waves = workloads, at_once, runs, waves

    async def measure(self, driven: "Sequence[Driven]") -> "list[Point]":
        from deploy import price_load

        def report(what: str, done: int, total: int) -> None:
            if what:
                typer.echo(f"{done + 1} of {total}: {what}", err=True)

        return await price_load.measure(driven, self.workloads, self.at_once, self.runs, self.waves, report)


def _own(refs: Sequence[str], drafters: Sequence[int], workers: int, engine: str,
         hardware: "dict[bool, tuple[Hardware, ...]]", asked: _Asked) -> "tuple[list[Side], list[Point]]":
    """Meshes of our own, measured. Raises LoadFailed, ValueError for an engine that is none."""
    import uvloop

    from deploy import models, price_load, pull
    from deploy.price_sheet import Side
    from kernels.checkpoint import open_checkpoint
    from shared.settings import WorkerSettings
    from worker.runner import engine_of

    meant = engine_of(WorkerSettings(engine=engine))
    try:
        folders = [pull.pull(ref) for ref in refs]
    except pull.PullFailed as error:
        leave(str(error))
    left = models.available_memory()
    for folder in folders:
        needed = models.memory_needed(open_checkpoint(folder))
        if problem := models.too_large(needed, left, workers * len(drafters)):
            leave(f"{folder.name} {problem}")
        left -= needed * workers * len(drafters)

    async def measured() -> "tuple[list[Driven], list[Point]]":
        with tempfile.TemporaryDirectory() as data:
            async with price_load.meshes(folders, Path(data), drafters, workers, engine) as driven:
                return driven, await asked.measure(driven)

    driven, points = uvloop.run(measured())
    made = itertools.product(folders, drafters)
    return [Side(side.name, side.model, hardware[side.drafts], price_load.revision(folder),
                 models.look_at(folder).precision, meant, workers, count)
            for side, (folder, count) in zip(driven, made, strict=True)], points


async def _endpoints(urls: Sequence[str], model: str, key: str, hardware: "tuple[Hardware, ...]",
                     said: tuple[str, str], asked: _Asked) -> "tuple[list[Side], list[Point]]":
    """Endpoints that run, measured. Raises LoadFailed."""
    import time

    from deploy import price_load
    from deploy.price_sheet import Side

    driven = []
    # who measures a mesh for the second time must not find its own prompts there
    start = int(time.time()) * 1000
    for each in urls:
        name, equals, url = each.partition("=")
        if not equals or "/" in name:
            name, url = each, each
        driven.append(price_load.Driven(name, url, model or await price_load.first_model(url, key), key=key,
                                        numbers=itertools.count(start)))
    points = await asked.measure(driven)
    return [Side(side.name, side.model, hardware, *said) for side in driven], points


def _write(stem: Path, document: "Document") -> None:
    from deploy import price_curve, price_page
    from deploy import price_sheet as sheets

    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        # not with_suffix: a stem may hold a dot, as a model's name does
        names = {kind: stem.parent / f"{stem.name}.{kind}" for kind in ("md", "json", "svg")}
        title = f"{document.sides[0].model} on {document.sides[0].hardware[0].sku}, {document.date}"
        names["svg"].write_text(price_curve.svg(document.rows, title))
        names["json"].write_bytes(sheets.encode(document))
        names["md"].write_text(price_page.markdown(document, names["svg"].name))
    except OSError as error:
        leave(f"cannot write {stem}.*: {error.strerror}")


# --- what it is sold at ----------------------------------------------------------------------------------------------


def _listed(path: Path) -> "PriceSheet":
    """The prices file. Raises ValueError, OSError."""
    from shared import pricing

    try:
        return pricing.read(path.read_text())
    except ValueError as error:
        raise ValueError(f"the price sheet {path}: {error}") from None


def _hardware(listed: "PriceSheet", sku: str, machines: int) -> "tuple[Hardware, ...]":
    from deploy.price_sheet import Hardware

    if sku not in listed.skus:
        raise ValueError(f"the prices file has no machine {sku!r}: write a table [skus.{sku}], or name one of "
                         f"{', '.join(listed.skus) or 'none that are there'}")
    found = listed.skus[sku]
    return (Hardware(sku, machines, found.hour, found.source),)


def _terms(listed: "PriceSheet", sides: "Sequence[Side]", tier: str, shares: Sequence[Decimal]) -> "Terms":
    from deploy.price_sheet import Terms

    # where endpoints call a model by a name that has no price the first one's counts
    prices = [listed.price(side.model, tier) for side in sides]
    if len({(each.input, each.cached_input, each.output) for each in prices if each is not None}) > 1:
        raise ValueError("these models have several prices, and a sheet has one: measure each by itself")
    price = prices[0]
    if price is None:
        raise ValueError(f"the prices file has no price for {sides[0].model} at tier {tier!r}: add one, or name "
                         "another --tier")
    return Terms(price, *shares)


def _of_sheet(path: Path, listed: "PriceSheet") -> "list[tuple[Machines, Device, float | None, str]]":
    """Each side of a sheet as machines, their device and the model. Machines cost what is listed, else as it says."""
    from deploy.plan import Machines, device_of
    from deploy.price_sheet import decode

    document = decode(path.read_bytes())
    found: list[tuple[Machines, Device, float | None, str]] = []
    for side in document.sides:
        fitted = device_of(document.rows, side)
        workers = max(1, side.workers or 1)
        first, *others = side.hardware
        hours = {each.sku: (listed.skus.get(each.sku) or each).hour for each in side.hardware}
        drafter = others[0] if others else None
        # drafters with machines of their own are counted by those
        count = drafter.machines if drafter else side.drafters or 0
        worker_hour = round(Fraction(first.machines * hours[first.sku], workers))
        machines = Machines(f"{side.name} ({document.date})", first.sku, worker_hour, Fraction(count, workers),
                            drafter.sku if drafter else "", hours[drafter.sku] if drafter else 0)
        found.append((machines, fitted.device, fitted.off, side.model))
    return found


def _told(listed: "PriceSheet", sku: str, drafters: str, drafter_sku: str,
          device_ms: tuple[float, float, float]) -> "tuple[Machines, Device, float | None, str]":
    from deploy.plan import Machines
    from deploy.replay_fleet import Device

    try:
        each = Fraction(Decimal(drafters))
    except (InvalidOperation, ValueError, OverflowError):
        each = Fraction(-1)
    if not 0 <= each <= 64:
        raise ValueError(f"--drafters {drafters!r} is no number of drafters for each worker: write such as 0.5")
    worker = _hardware(listed, sku, 1)[0]
    hour = _hardware(listed, drafter_sku, 1)[0].hour if drafter_sku else 0
    device = Device(*(each_ms / 1e3 for each_ms in device_ms))
    return Machines(sku, sku, worker.hour, each, drafter_sku, hour), device, None, "*"


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= 1024 for word in words):
        raise ValueError(f"--concurrency {text!r}: write numbers from 1 to 1024 with commas between, such as 1,4,16")
    return sorted({int(word) for word in words})


def _share(flag: str, text: str, above_zero: bool = False, below_one: bool = False) -> Decimal:
    try:
        found = Decimal(text)
        if not 0 <= found <= 1 or (above_zero and not found) or (below_one and found == 1):
            raise InvalidOperation
    except InvalidOperation:
        raise ValueError(f"{flag} {text!r} is no share: write a number from 0 to 1, such as 0.35") from None
    return found
