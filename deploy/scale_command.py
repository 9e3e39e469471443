"""`tokenmill scale --advise`: how many gateways, routers, workers and drafters the load needs, and why.

An observer of the mesh: it hears what services say of themselves, says nothing and starts nothing. With `--watch` it
goes on, lets time tell (`deploy.scaling`), and serves what it thinks to Prometheus, for KEDA or whatever else starts
and ends services.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Annotated, NoReturn

import msgspec
import typer
from prometheus_client import CollectorRegistry, Gauge
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.scaling import UP_S, Advice, Advisor, Goals, Need, needs
from shared import subjects
from shared.bus import Bus, BusRefused, BusUnavailable, Delivery
from shared.credentials import credentials
from shared.fleet import Fleet
from shared.messages import Status, decode
from shared.nats_bus import NatsBus
from shared.permissions import ROLES
from shared.telemetry import metrics_served

EVERY_S = 1.0
SILENT_S = 5.0


def scale(
    advise: Annotated[bool, typer.Option("--advise", help="say it, and change nothing: the only way there is")] = False,
    nats: Annotated[str, typer.Option(metavar="URL", envvar="TOKENMILL_NATS", show_envvar=False,
                                      help="NATS of the mesh")] = "nats://127.0.0.1:4222",
    nats_creds: Annotated[str, typer.Option(metavar="FILE|DIR", envvar="TOKENMILL_NATS_CREDS", show_envvar=False,
                                            help="an observer's credential for it")] = "",
    nats_ca: Annotated[str, typer.Option(metavar="FILE", envvar="TOKENMILL_NATS_CA", show_envvar=False,
                                         help="PEM file to check a tls:// NATS against")] = "",
    seconds: Annotated[float, typer.Option(metavar="S", min=2.0, help="how long to listen")] = 5.0,
    watch: Annotated[bool, typer.Option("--watch", help="go on; a line for each change")] = False,
    first_token_s: Annotated[float, typer.Option(metavar="S", min=0.01, help="promised: time to the first "
                                                  "token")] = 1.0,
    per_token_ms: Annotated[float, typer.Option(metavar="MS", min=0.1, help="promised: each token behind it")] = 50.0,
    least: Annotated[list[str] | None, typer.Option(metavar="ROLE=N", help="so many whatever the load; may be given "
                                                    "several times")] = None,
    most: Annotated[list[str] | None, typer.Option(metavar="ROLE=N", help="never more; may be given several "
                                                   "times")] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="with --watch: where Prometheus "
                                              "reads mill_advice_replicas; 0: nowhere")] = 0,
    metrics_host: Annotated[str, typer.Option(metavar="ADDRESS", help="on which address")] = "127.0.0.1",
    json: Annotated[bool, typer.Option("--json", help="the advice as JSON")] = False,
) -> None:
    """Say how many of each service the load needs, and why. Exit code 1 when more are needed than there are."""
    if not advise:
        _leave("`tokenmill scale` only advises: say --advise. `tokenmill up --workers 1..4` does what it says")
    goals = Goals(first_token_s, per_token_ms / 1e3)
    try:
        goals = msgspec.structs.replace(goals, least={**goals.least, **bounds(least or [])}, most=bounds(most or []))
        shown = credentials("observer", "", "", nats_creds, nats_ca)

        async def listen() -> list[Advice]:
            bus = await NatsBus.connect(nats, name="tokenmill-scale", timeout_s=5.0, credentials=shown)
            try:
                return await _Watch(goals, json).run(bus, None if watch else seconds, metrics_port, metrics_host)
            finally:
                await bus.close()

        told = asyncio.run(listen())
    except (ValueError, OSError, BusUnavailable, BusRefused) as error:
        _leave(str(error))
    if watch:
        return
    if not told:
        _leave(f"nobody said anything on {nats} in {seconds:g} s: is that the mesh's NATS?")
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode([_plain(advice) for advice in told])).decode())
    else:
        Console().print(table(told))
    raise SystemExit(1 if any(advice.wanted > advice.need.have for advice in told) else 0)


def bounds(said: Sequence[str]) -> dict[str, int]:
    """`ROLE=N` of each. Raises ValueError."""
    found = {}
    for text in said:
        role, _, number = text.partition("=")
        if role not in ROLES[:4] or not number.isdigit():
            raise ValueError(f"{text!r} is no bound: write {', '.join(ROLES[:4])}, = and a number, as in worker=4")
        found[role] = int(number)
    return found


def table(told: Sequence[Advice]) -> Table:
    """How it looks on a terminal."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("service", "of", "have", "need", "load", "why"):
        drawn.add_column(title, justify="right" if title in ("have", "need", "load") else "left")
    for need, wanted in told:
        colour = "red" if wanted > need.have else "yellow" if wanted < need.have else "green"
        drawn.add_row(need.role, need.name, str(need.have), Text(str(wanted), colour), f"{need.load:.2f}",
                      need.why + _spare(need, wanted))
    return drawn


def _spare(need: Need, wanted: int) -> str:
    """What fewer would save; not yet advice, for that takes time."""
    if wanted != need.have or need.down >= need.have:
        return ""
    saved = f", {need.usd_per_hour * (need.have - need.down):.2f} $/h less" if need.usd_per_hour else ""
    return f"; {need.down} would do now{saved}"


class _Watch:
    """Listens, thinks once a second, and tells."""

    def __init__(self, goals: Goals, json: bool) -> None:
        self._goals, self._json = goals, json
        self._fleet = Fleet()
        self._told: dict[tuple[str, str], int] = {}
        self.registry = CollectorRegistry()
        labels = ["role", "name"]
        self._wanted = Gauge("mill_advice_replicas", "How many there should be.", labels, registry=self.registry)
        self._have = Gauge("mill_advice_have", "How many there are.", labels, registry=self.registry)
        self._load = Gauge("mill_advice_load", "How many the load would fill.", labels, registry=self.registry)

    async def run(self, bus: Bus, seconds: float | None, port: int, host: str) -> list[Advice]:
        """For so long, or until a signal. Returns the last advice."""
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await bus.subscribe(subjects.ALL_STATUS, self._take)
        # who looks for a moment cannot wait for more
        advisor = Advisor(self._goals, up_s=UP_S if seconds is None else max(0.0, seconds - 2 * EVERY_S - 0.5))
        began, told = time.monotonic(), list[Advice]()
        with metrics_served(self.registry, port, host):
            while not stop.is_set() and (seconds is None or time.monotonic() - began < seconds):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), EVERY_S)
                now = time.monotonic()
                self._fleet.forget_silent(now, SILENT_S)
                told = advisor.advise(needs(self._heard(), self._goals), now)
                self._tell(told, seconds is None)
        return told

    def _take(self, delivery: Delivery) -> None:
        with contextlib.suppress(msgspec.DecodeError):
            self._fleet.fold(decode(delivery.data, Status), time.monotonic())  # type: ignore[arg-type]

    def _heard(self) -> list[Status]:
        fleet = self._fleet
        return [*fleet.gateways(), *fleet.routers(), *fleet.workers(), *fleet.drafters()]

    def _tell(self, told: Sequence[Advice], aloud: bool) -> None:
        for gauge in (self._wanted, self._have, self._load):
            gauge.clear()
        for need, wanted in told:
            key = need.role, need.name
            self._wanted.labels(*key).set(wanted)
            self._have.labels(*key).set(need.have)
            self._load.labels(*key).set(need.load)
            if aloud and self._told.get(key) != wanted:
                self._told[key] = wanted
                typer.echo(msgspec.json.encode(_plain(Advice(need, wanted))).decode() if self._json else
                           f"{need.role} {need.name}: {wanted} wanted, {need.have} there; {need.why}")


def _plain(advice: Advice) -> dict[str, object]:
    return {**advice.need._asdict(), "wanted": advice.wanted}


def _leave(reason: str) -> NoReturn:
    Console(stderr=True).print(Text(reason, "red"), soft_wrap=True)
    raise SystemExit(2)
