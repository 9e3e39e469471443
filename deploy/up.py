"""`tokenmill up`: the whole mesh on this machine until Ctrl-C.

1 start nats-server, then router, drafter, worker, gateway (or all of them in this process)
2 wait until /ready answers 200
3 stream one answer through all of it, print where to send the next one
4 keep everything running and show it
5 on SIGUSR1 restart every service, one after the other, while all goes on
6 on SIGINT or SIGTERM drain; a second one stops at once
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shlex
import signal
import time
from collections.abc import Coroutine
from typing import Any

import structlog
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from deploy import first_answer
from deploy.all_in_one import OneProcess
from deploy.autoscale import follow
from deploy.live import Board, table
from deploy.local_mesh import LocalMesh, Options
from deploy.rolling import RollStopped, roll
from deploy.supervisor import Say
from gateway.model_files import load_card
from shared import subjects

DRAW_S = 0.5
API_KEY = "TOKENMILL_API_KEY"  # in the environment, where keys are needed: for the first answer
FAILED_DRAIN_S = 1.0

Mesh = LocalMesh | OneProcess


async def run(options: Options, console: Console, *, one_process: bool, quiet: bool) -> None:
    """Bring the mesh up, keep it up, take it down. Raises UpFailed."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    again = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, again.set)

    def say(line: str) -> None:
        _print(console, Text(line, "yellow"))

    _keep_off_the_terminal()
    mesh: Mesh = OneProcess(options) if one_process else LocalMesh(options, say)
    board = Board()
    start = time.perf_counter()
    try:
        async with contextlib.AsyncExitStack() as stack:
            if options.nats:  # named by a person: say at once when nobody answers there
                await _listen(mesh, board, stack)
            mesh.start()
            with console.status("starting ...") as status:
                await mesh.until_ready(stop, lambda reason: status.update(Text(f"starting: {reason}")))
            if not stop.is_set() and not options.nats:
                await _listen(mesh, board, stack)
            if not stop.is_set():
                where = "all in this process, " if one_process else ""
                said = f" in {time.perf_counter() - start:.1f} s, {where}logs in {options.data / 'logs'}"
                _print(console, Text.assemble(("ready", "green"), said))
                if figures := figures_at(options):
                    _print(console, Text(figures))
            name = load_card(options.model).name
            key = os.environ.get(API_KEY, "") if options.keyed else ""
            if not stop.is_set() and not quiet and (key or not options.keyed):
                await _unless(stop, _show_answer(options, name, board, console, key))
            if not stop.is_set():
                _print_curl(options, name, console)
                rolling = asyncio.create_task(_roll_when_asked(mesh, board, again, say))
                stack.callback(rolling.cancel)
                if isinstance(mesh, LocalMesh) and options.most_workers > options.workers:
                    scaling = asyncio.create_task(follow(mesh, board, options.most_workers, say))
                    stack.callback(scaling.cancel)
                await _keep(mesh, board, console, stop)
        await _drain(mesh, console, stop)
    except BaseException:
        await _give_up(mesh)
        raise


def _keep_off_the_terminal() -> None:
    """A log line would tear the table. What our own bus connection would say, every service logs for itself."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger().addHandler(logging.NullHandler())


async def _listen(mesh: Mesh, board: Board, stack: contextlib.AsyncExitStack) -> None:
    """Let the board hear everyone until `stack` is left."""
    bus = await mesh.connect()
    stack.push_async_callback(bus.close)
    await bus.subscribe(subjects.ALL_STATUS, board.take)


def figures_at(options: Options) -> str:
    """Where Prometheus finds everyone's figures; empty when only gateways have any."""
    if not options.metrics_port:
        return ""
    counts = {"router": options.routers, "drafter": options.drafters, "worker": options.workers * len(options.models)}
    names = [f"{kind}-{i + 1}" for kind, count in counts.items() for i in range(count)]
    ports = itertools.count(options.metrics_port)
    shown = ", ".join(f"{name} :{port}" for name, port in zip(names, ports, strict=False))
    return f"figures for Prometheus at /metrics: gateway-1 :{options.port}, {shown}"


async def _show_answer(options: Options, model: str, board: Board, console: Console, key: str) -> None:
    def show(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    _print(console, Text(f"\n{first_answer.QUESTION}", "bold"))
    try:
        answer = await first_answer.ask(options.url, model, show, key=key, verify=options.verify)
    except first_answer.AnswerFailed as error:
        _print(console, Text(f"the first answer failed: {error}", "red"))
        return
    worker = str(answer.mesh.get("worker", ""))
    # it may have ended before the drafter had anything to say
    drafter = str(answer.mesh.get("drafter", ""))
    if not drafter and options.drafters:
        drafter = await board.drafter_of(worker)
    _print(console, Text(f"\n{_told(answer, worker, drafter)}", "dim"))


def _told(answer: first_answer.Answer, worker: str, drafter: str) -> str:
    """What the first answer took, and by whom."""
    drafted, accepted = answer.mesh.get("draft_tokens", 0), answer.mesh.get("accepted_draft_tokens", 0)
    drafts = f" ({accepted} of {drafted} drafts accepted)" if drafted else ""
    return (
        f"TTFT {answer.ttft_s * 1000:.0f} ms, {answer.tokens_per_s:.0f} tokens/s, {answer.completion_tokens} tokens, "
        f"by {worker or 'no worker'} with {drafter or 'no drafter'}{drafts}"
    )


def _print_curl(options: Options, model: str, console: Console) -> None:
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello"}]})
    address, key, said = shlex.quote(f"{options.url}/v1/chat/completions"), "", "Send it something:"
    if options.keyed:
        key = f' -H "authorization: Bearer ${API_KEY}"'
        said = f"Send it something, with a key of {options.keyed} in {API_KEY}:"
    _print(console, Text(f"\n{said}\n"))
    if options.tls_cert is not None:
        address = f"--cacert {shlex.quote(str(options.tls_cert.absolute()))} {address}"
    _print(console, Text(f"curl -sN {address} -H 'content-type: application/json'{key} -d {shlex.quote(body)}\n"))


async def _keep(mesh: Mesh, board: Board, console: Console, stop: asyncio.Event) -> None:
    """The live table on a terminal, one line elsewhere, until `stop`. Raises UpFailed when the mesh cannot go on."""
    showing: Coroutine[Any, Any, object]
    if console.is_terminal and not console.is_dumb_terminal:
        showing = _show_table(mesh, board, console, stop)
    else:
        _print(console, Text("running; SIGINT or SIGTERM drains and stops"))
        showing = stop.wait()
    if isinstance(mesh, OneProcess):
        await mesh.unless_it_ends(showing)
    else:
        await showing


async def _roll_when_asked(mesh: Mesh, board: Board, again: asyncio.Event, say: Say) -> None:
    while True:
        await again.wait()
        if isinstance(mesh, OneProcess):
            say("all is one process here: stop it and start it again")
        else:
            try:
                await roll(mesh, board, say)
            except RollStopped as error:
                say(str(error))
        again.clear()


async def _show_table(mesh: Mesh, board: Board, console: Console, stop: asyncio.Event) -> None:
    shown: object = None
    # behind the last line stands what the terminal echoes for Ctrl-C
    hint = Text("\nCtrl-C drains and stops ", "dim")
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            rows = board.rows(mesh.children, time.monotonic())
            if shown != (shown := (rows, console.size)):
                live.update(Group(table(rows), hint), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), DRAW_S)


async def _drain(mesh: Mesh, console: Console, stop: asyncio.Event) -> None:
    """Let what runs end; a second signal ends it now."""
    _print(console, Text("draining ... (Ctrl-C again stops at once)"))
    stop.clear()
    down = asyncio.create_task(mesh.stop())
    again = asyncio.create_task(stop.wait())
    await asyncio.wait({down, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not down.done():
        mesh.kill()
    await down
    _print(console, Text("stopped"))


async def _give_up(mesh: Mesh) -> None:
    """End what had been started, quietly."""
    down = asyncio.create_task(mesh.stop())
    await asyncio.wait({down}, timeout=FAILED_DRAIN_S)
    if not down.done():
        mesh.kill()
    await down


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; drop it when `stop` comes first."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
    else:
        await working


def _print(console: Console, text: Text) -> None:
    """One line, however long: a path or a command that a terminal broke up could not be copied."""
    console.print(text, soft_wrap=True)
