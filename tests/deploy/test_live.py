"""The live table says what the statuses say, and of whom."""

import asyncio
import time
from dataclasses import dataclass
from io import StringIO

import msgspec
from rich.console import Console

from deploy.live import SILENT_S, Board, Row, table
from shared.bus import Delivery
from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, Wire, WorkerStatus, encode


@dataclass
class Process:
    name: str
    state: str = "running"
    pid: int | None = 7
    restarts: int = 0
    since: float = 0.0


def _board(*statuses: Wire) -> Board:
    board = Board()
    for status in statuses:
        board.take(Delivery("mill.v1.status", encode(status), {}))
    return board


def _row(board: Board, process: Process, later_s: float = 0.0) -> Row:
    return board.rows([process], time.monotonic() + later_s)[0]


async def test_a_worker_shows_its_speed_blocks_acceptance_and_load() -> None:
    status = WorkerStatus(
        "worker-1", 1, "m", decode_tok_s=129.6, blocks_used=14, blocks_total=728, running=3, waiting=2,
        draft_tokens_total=200, accepted_draft_tokens_total=142)
    row = _row(_board(status), Process("worker-1"))
    assert row == Row("worker-1", "ready", "7", "130", "14/728", "71%", "3 running, 2 waiting")


async def test_a_worker_that_drafted_nothing_shows_no_acceptance() -> None:
    assert _row(_board(WorkerStatus("worker-1", 1, "m")), Process("worker-1")).drafts == "-"


async def test_a_worker_that_leaves_its_drafter_alone_says_why() -> None:
    status = WorkerStatus("worker-1", 1, "m", draft_tokens_total=200, accepted_draft_tokens_total=20, drafting="slower")
    assert _row(_board(status), Process("worker-1")).drafts == "10%, slower"
    assert _row(_board(msgspec.structs.replace(status, drafting="on")), Process("worker-1")).drafts == "10%"


async def test_everyone_shows_what_he_does() -> None:
    board = _board(
        RouterStatus("router-1", 1, placed_total=9, refused_total=2), DrafterStatus("drafter-1", 1, following=4),
        GatewayStatus("gateway-1", 1, active=5))
    loads = [_row(board, Process(name)).load for name in ("router-1", "drafter-1", "gateway-1", "nats-server")]
    assert loads == ["9 placed, 2 refused", "4 followed", "5 active", ""]


async def test_the_last_status_counts() -> None:
    board = _board(GatewayStatus("gateway-1", 1, active=5), GatewayStatus("gateway-1", 1, "draining", active=1))
    assert _row(board, Process("gateway-1"))[1::5] == ("draining", "1 active")


async def test_a_process_is_starting_until_it_speaks_and_silent_when_it_stops_speaking() -> None:
    board = _board(GatewayStatus("gateway-1", 1, active=5))
    assert _row(board, Process("router-1")).state == "starting"
    assert _row(board, Process("gateway-1")).state == "ready"
    assert _row(board, Process("gateway-1"), later_s=SILENT_S + 1).state == "silent"


async def test_a_broker_says_nothing_and_is_running() -> None:
    assert _row(_board(), Process("nats-server")).state == "running"


async def test_the_last_words_of_a_predecessor_are_not_taken_for_its_successor() -> None:
    board = _board(WorkerStatus("worker-1", 1, "m", running=3))
    row = _row(board, Process("worker-1", restarts=1, since=time.monotonic() + 1))
    assert (row.state, row.load) == ("starting, 1 restart", "")


async def test_a_dead_process_has_a_state_and_no_figures() -> None:
    board = _board(WorkerStatus("worker-1", 1, "m", running=3))
    row = _row(board, Process("worker-1", "restarting", None, restarts=2))
    assert row == Row("worker-1", "restarting, 2 restarts", "")


async def test_bytes_that_are_no_status_change_nothing() -> None:
    board = _board(GatewayStatus("gateway-1", 1))
    before = dict(board.heard)
    board.take(Delivery("mill.v1.status", b"\xc1 nonsense", {}))
    assert board.heard == before


async def test_the_drafter_of_a_worker_is_known_from_its_status() -> None:
    board = _board(WorkerStatus("worker-1", 1, "m", drafter="drafter-2"), WorkerStatus("worker-2", 1, "m"))
    assert await board.drafter_of("worker-1") == "drafter-2"
    assert await board.drafter_of("worker-2", within_s=0.01) == ""
    asking = asyncio.create_task(board.drafter_of("worker-2", within_s=60))
    await asyncio.sleep(0)
    later = WorkerStatus("worker-2", 1, "m", drafter="drafter-1")
    board.take(Delivery("mill.v1.status", encode(later), {}))
    assert await asking == "drafter-1"


def test_no_line_is_wrapped_or_wider_than_the_terminal() -> None:
    rows = [Row("nats-server", "running", "4194304"),
            Row("worker-1", "starting, 12 restarts", "4194304", "1234", "4096/4096", "100%", "64 running, 256 waiting")]
    for width in (80, 120):
        console = Console(file=StringIO(), width=width)
        console.print(table(rows))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) == 3
        assert max(map(len, lines)) <= width
    assert "64 running, 256 waiting" in lines[2]
