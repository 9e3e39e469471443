"""`tokenmill up`: the whole mesh on this machine until Ctrl-C.

1 start nats-server, then router, drafter, worker, gateway (or all of them in this process)
2 wait until /ready answers 200
3 stream one answer through all of it, print where to send the next one
4 keep everything running and show it
5 on SIGINT or SIGTERM drain; a second one stops at once
"""

import asyncio
import contextlib
import json
import signal
import time

import httpx
from rich.console import Console
from rich.live import Live

from deploy import first_answer
from deploy.all_in_one import OneProcess
from deploy.live import Board
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card
from shared import subjects
from shared.bus import BusUnavailable
from shared.nats_bus import NatsBus


async def run(options: Options, console: Console, *, one_process: bool, quiet: bool) -> None:
    """Bring the mesh up, keep it up, take it down. Raises UpFailed."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    start = time.perf_counter()

    def say(line: str) -> None:
        console.print(f"[yellow]{line}[/]", highlight=False)

    mesh = OneProcess(options) if one_process else LocalMesh(options, say)
    try:
        mesh.start()
        await mesh.until_ready(stop)
        if not stop.is_set():
            where = "all in this process" if one_process else f"logs in {options.data / 'logs'}"
            console.print(f"[green]ready[/] in {time.perf_counter() - start:.1f} s, {where}", highlight=False)
            name = load_card(options.model).name
            if not quiet:
                await _show_answer(options.url, name, console)
            _print_curl(options.url, name, console)
            await _watch(mesh, console, stop)
    finally:
        await _down(mesh, console, stop)


async def _show_answer(url: str, model: str, console: Console) -> None:
    def show(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False)

    console.print(f"\n[bold]{first_answer.QUESTION}[/]", highlight=False)
    try:
        answer = await first_answer.ask(url, model, show)
    except httpx.HTTPError as error:
        console.print(f"[red]the first answer failed: {error}[/]", highlight=False)
        return
    told = ", ".join(str(answer.mesh[key]) for key in ("worker", "drafter") if answer.mesh.get(key))
    console.print(
        f"\n[dim]TTFT {answer.ttft_s * 1000:.0f} ms, {answer.tokens_per_s:.0f} tokens/s, "
        f"{answer.completion_tokens} tokens{', by ' + told if told else ''}[/]",
        highlight=False,
    )


def _print_curl(url: str, model: str, console: Console) -> None:
    console.print("\nSend it something:\n", highlight=False)
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello"}]})
    console.print(
        f"  curl -sN {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


async def _watch(mesh: LocalMesh | OneProcess, console: Console, stop: asyncio.Event) -> None:
    """The live table on a terminal, silence elsewhere, until `stop`."""
    if isinstance(mesh, OneProcess):
        await mesh.until_stopped(stop)
        return
    if not console.is_terminal:
        await stop.wait()
        return
    try:
        bus = await NatsBus.connect(mesh.nats, name="tokenmill-up")
    except BusUnavailable:
        await stop.wait()
        return
    board = Board()
    await bus.subscribe(subjects.ALL_STATUS, board.take)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            live.update(board.table(mesh.children), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
    await bus.close()


async def _down(mesh: LocalMesh | OneProcess, console: Console, stop: asyncio.Event) -> None:
    console.print("draining ... (Ctrl-C again stops at once)", highlight=False)
    stop.clear()
    down = asyncio.create_task(mesh.stop())
    again = asyncio.create_task(stop.wait())
    await asyncio.wait({down, again}, return_when=asyncio.FIRST_COMPLETED)
    if not down.done():
        mesh.kill()
    again.cancel()
    await down
    console.print("stopped")
