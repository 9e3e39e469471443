"""The live table of `tokenmill up`: each process, its state, tokens/s, KV blocks, draft acceptance.

Fed by the status messages everyone publishes. `rows` is pure; only `table` knows how it looks.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
from rich.table import Table
from rich.text import Text

from shared.bus import Delivery
from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, Status, WorkerStatus, decode

SILENT_S = 3.0  # six heartbeats
COLOURS = {"ready": "green", "running": "green", "starting": "yellow", "draining": "yellow", "stopping": "yellow"}


class Process(Protocol):
    """What the table must know of one process; `deploy.supervisor.Child` and `deploy.all_in_one.Service` are such."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def restarts(self) -> int: ...
    @property
    def since(self) -> float:
        """When it was started last, in seconds of `time.monotonic`."""


class Row(NamedTuple):
    """One line of the table, as text."""

    process: str
    state: str
    pid: str
    tokens_s: str = ""
    kv_blocks: str = ""
    drafts: str = ""
    load: str = ""


class Board:
    """The last status of everyone, and when it came."""

    def __init__(self) -> None:
        self.heard: dict[str, tuple[float, Status]] = {}
        self._news = asyncio.Event()

    def take(self, delivery: Delivery) -> None:
        """Fold one status message in (a bus handler). What is no status this version knows is left out."""
        with contextlib.suppress(msgspec.DecodeError):
            status: Status = decode(delivery.data, Status)  # type: ignore[arg-type]
            self.heard[status.id] = (time.monotonic(), status)
            self._news.set()

    async def drafter_of(self, worker: str, within_s: float = 2.0) -> str:
        """The drafter that `worker` follows, as soon as a status says so; empty when none did in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not (drafter := self._drafter(worker)):
                    self._news.clear()
                    await self._news.wait()
                return drafter
        return ""

    def epoch_of(self, name: str) -> int:
        """Of its last status; 0 when it was never heard."""
        return self.heard[name][1].epoch if name in self.heard else 0

    async def ready(self, name: str, after_epoch: int, within_s: float) -> None:
        """Until `name` says that it is ready, in a start later than `after_epoch`. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while not (self.epoch_of(name) > after_epoch and self.heard[name][1].state == "ready"):
                self._news.clear()
                await self._news.wait()

    def _drafter(self, worker: str) -> str:
        _, status = self.heard.get(worker, (0.0, None))
        return status.drafter if isinstance(status, WorkerStatus) else ""

    def rows(self, processes: Sequence[Process], now: float) -> list[Row]:
        """The table as it stands; `now` in seconds of `time.monotonic`."""
        return [self._row(process, now) for process in processes]

    def _row(self, process: Process, now: float) -> Row:
        heard_at, status = self.heard.get(process.name, (0.0, None))
        if heard_at < process.since:  # the last words of its predecessor
            status = None
        state = process.state
        if state == "running" and not process.name.startswith("nats"):
            state = "starting" if status is None else "silent" if now - heard_at > SILENT_S else status.state
        if state not in ("ready", "draining"):
            status = None
        if process.restarts:
            state += f", {process.restarts} restart{'s' if process.restarts > 1 else ''}"
        return Row(process.name, state, str(process.pid or ""), *_figures(status))


def _figures(status: Status | None) -> tuple[str, str, str, str]:
    """tokens/s, KV blocks, drafts accepted, load."""
    match status:
        case WorkerStatus():
            drafted, accepted = status.draft_tokens_total, status.accepted_draft_tokens_total
            waiting = f", {status.waiting} waiting" if status.waiting else ""
            return (
                f"{status.decode_tok_s:.0f}",
                f"{status.blocks_used}/{status.blocks_total}",
                (f"{accepted / drafted:.0%}" if drafted else "-") + _aside(status.drafting),
                f"{status.running} running{waiting}",
            )
        case RouterStatus():
            refused = f", {status.refused_total} refused" if status.refused_total else ""
            return ("", "", "", f"{status.placed_total} placed{refused}")
        case DrafterStatus():
            return ("", "", "", f"{status.following} followed")
        case GatewayStatus():
            return ("", "", "", f"{status.active} active")
    return ("", "", "", "")


def _aside(drafting: str) -> str:
    """Why there are no drafts now, if there could be."""
    return f", {drafting}" if drafting not in ("", "on") else ""


def table(rows: Sequence[Row]) -> Table:
    """How it looks on a terminal. A line that would be too long ends in an ellipsis; none is wrapped."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("process", "left"),
        ("state", "left"),
        ("pid", "right"),
        ("tokens/s", "right"),
        ("KV blocks", "right"),
        ("drafts", "right"),
    ):
        drawn.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    drawn.add_column("load")
    for row in rows:
        colour = COLOURS.get(row.state.split(",")[0], "red")
        drawn.add_row(
            row.process, Text(row.state, colour), *row[2:6], Text(row.load, no_wrap=True, overflow="ellipsis")
        )
    return drawn
