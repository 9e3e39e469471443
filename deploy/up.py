"""`tokenmill up`: the whole mesh on this machine, one process per service, until Ctrl-C.

    1 find the model (pull it if need be), compile the CPU step if need be
    2 start nats-server, then router, drafter, worker, gateway
    3 wait until /ready answers 200
    4 stream one answer through all of it
    5 keep everything running; on SIGINT or SIGTERM drain: gateways, then routers, workers and drafters, then the broker
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.live import Live

from deploy import broker, first_answer
from deploy.live import Board
from deploy.supervisor import Child, Supervisor, last_lines, service_command
from gateway.model_files import load_card
from shared import subjects
from shared.bus import BusUnavailable
from shared.nats_bus import NatsBus
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, Settings, WorkerSettings, to_flags

READY_WITHIN_S = 180.0  # a first start may compile and load for long; children that die end the wait at once
KEEP_TRYING = 3


class UpFailed(Exception):
    """One clear sentence on why the mesh did not come up."""


@dataclass(frozen=True)
class Options:
    """What `tokenmill up` was asked for."""

    model: Path  # a pulled model
    data: Path
    host: str = "127.0.0.1"
    port: int = 8000
    gateways: int = 1
    routers: int = 1
    workers: int = 1
    drafters: int = 1
    engine: str = "auto"
    nats: str = ""  # empty: embedded
    quiet: bool = False
    otlp: str = ""
    log_level: str = "info"
    drain_s: float = 30.0
    extra: dict[str, str] = field(default_factory=dict)  # settings passed on to the workers


def plan(options: Options, nats: str) -> dict[str, list[Settings]]:
    """The settings of every service: module name -> one entry per process."""
    name = load_card(options.model).name
    common = {"nats": nats, "otlp": options.otlp, "log_level": options.log_level, "drain_s": options.drain_s}
    threads = max(1, (os.cpu_count() or 1) // max(1, options.workers))
    return {
        "router": [RouterSettings(id=f"router-{i}", **common) for i in _count(options.routers)],
        "drafter": [DrafterSettings(id=f"drafter-{i}", **common) for i in _count(options.drafters)],
        "worker": [WorkerSettings(id=f"worker-{i}", model=str(options.model), model_name=name, engine=options.engine,
                                  threads=threads, speculation=options.drafters > 0, **(common | options.extra))
                   for i in _count(options.workers)],
        "gateway": [GatewaySettings(id=f"gateway-{i}", host=options.host, port=options.port + i - 1,
                                    model=str(options.model), model_name=name, **common)
                    for i in _count(options.gateways)],
    }


def _count(number: int) -> range:
    return range(1, number + 1)


async def run(options: Options, console: Console) -> None:
    """Bring the mesh up, keep it up, take it down. Raises UpFailed."""
    for i in range(options.gateways):
        if not broker.port_is_free(options.host, options.port + i):
            raise UpFailed(f"port {options.port + i} on {options.host} is in use: stop what listens there, "
                           "or choose another with --port")
    logs = options.data / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpFailed(f"cannot write to {options.data}: {error.strerror}; choose another folder with --data") from None

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    supervisor = Supervisor(say=lambda line: console.print(f"[yellow]{line}[/]", highlight=False))
    start = time.perf_counter()
    try:
        nats = options.nats or _start_broker(supervisor, options, logs)
        services = plan(options, nats)
        children = {module: [_start(supervisor, module, each, logs) for each in settings]
                    for module, settings in services.items()}
        gateway = f"http://{options.host}:{options.port}"
        await until_ready(supervisor.children, gateway, stop)
        if stop.is_set():
            return
        console.print(f"[green]ready[/] in {time.perf_counter() - start:.1f} s, logs in {logs}", highlight=False)
        if not options.quiet:
            await show_answer(gateway, load_card(options.model).name, console)
        print_curl(gateway, load_card(options.model).name, console)
        await _watch(supervisor, nats, console, stop)
    finally:
        console.print("draining ... (Ctrl-C again to stop at once)" if supervisor.children else "", highlight=False)
        hurry = asyncio.create_task(_again(stop))
        down = asyncio.create_task(_down(supervisor, options.drain_s))
        await asyncio.wait({hurry, down}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done():
            for child in supervisor.children:
                with contextlib.suppress(ProcessLookupError):
                    if child.process and child.process.returncode is None:
                        child.process.kill()
        await down
        hurry.cancel()
        console.print("stopped")


def _start_broker(supervisor: Supervisor, options: Options, logs: Path) -> str:
    try:
        port = broker.free_port()
        command = broker.command(port, options.data)
    except broker.BrokerMissing as error:
        raise UpFailed(str(error)) from None
    supervisor.start(Child("nats-server", command, logs / "nats-server.log", drain_s=5.0))
    return f"nats://127.0.0.1:{port}"


def _start(supervisor: Supervisor, module: str, settings: Settings, logs: Path) -> Child:
    child = Child(settings.id, service_command(module, to_flags(settings)), logs / f"{settings.id}.log",
                  drain_s=settings.drain_s)
    child.log.write_bytes(b"")
    supervisor.start(child)
    return child


async def until_ready(children: Sequence[Child], url: str, stop: asyncio.Event) -> None:
    """Until /ready says 200. Raises UpFailed when a child keeps dying or time is up."""
    deadline = time.monotonic() + READY_WITHIN_S
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        while not stop.is_set():
            for child in children:
                if child.restarts >= KEEP_TRYING:
                    raise UpFailed(f"{child.name} does not start; the end of {child.log}:\n{last_lines(child.log)}")
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/ready")).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise UpFailed(f"the mesh was not ready within {READY_WITHIN_S:.0f} s: GET {url}/ready says what is missing, "
                               "the logs of each service say why")
            await asyncio.sleep(0.05)


async def show_answer(url: str, model: str, console: Console) -> None:
    console.print(f"\n[bold]{first_answer.QUESTION}[/]", highlight=False)
    try:
        answer = await first_answer.ask(url, model, lambda text: console.print(text, end="", markup=False, highlight=False))
    except httpx.HTTPError as error:
        console.print(f"[red]the first answer failed: {error}[/]", highlight=False)
        return
    told = ", ".join(f"{key} {answer.mesh[key]}" for key in ("worker", "drafter") if answer.mesh.get(key))
    console.print(f"\n[dim]TTFT {answer.ttft_s * 1000:.0f} ms, {answer.tokens_per_s:.0f} tokens/s, "
                  f"{answer.completion_tokens} tokens{', ' + told if told else ''}[/]", highlight=False)


def print_curl(url: str, model: str, console: Console) -> None:
    console.print("\nSend it something:\n", highlight=False)
    console.print(f"  curl -sN {url}/v1/chat/completions -H 'content-type: application/json' "
                  f"-d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n",
                  markup=False, highlight=False, soft_wrap=True)


async def _watch(supervisor: Supervisor, nats: str, console: Console, stop: asyncio.Event) -> None:
    """The live table on a terminal, silence elsewhere, until `stop`."""
    if not console.is_terminal:
        await stop.wait()
        return
    try:
        bus = await NatsBus.connect(nats, name="tokenmill-up")
    except (BusUnavailable, OSError):
        await stop.wait()
        return
    board = Board()
    await bus.subscribe(subjects.ALL_STATUS, board.take)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            live.update(board.table(supervisor.children), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
    await bus.close()


async def _down(supervisor: Supervisor, drain_s: float) -> None:
    """Gateways first, so that nothing new comes in; the broker last, so that everyone can say goodbye."""
    def of(*prefixes: str) -> list[Child]:
        return [child for child in supervisor.children if child.name.startswith(prefixes)]

    await supervisor.stop(of("gateway"), drain_s)
    await supervisor.stop(of("worker", "router", "drafter"), min(drain_s, 5.0))
    await supervisor.stop(of("nats"), 5.0)


async def _again(stop: asyncio.Event) -> None:
    """Return at the second Ctrl-C."""
    stop.clear()
    await stop.wait()


def exit_with(message: str) -> None:
    """Print one clear sentence and leave with exit code 1."""
    Console(stderr=True).print(f"[red]{message}[/]", highlight=False)
    sys.exit(1)
