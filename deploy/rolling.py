"""Every service of a local mesh started anew, one after the other, while it serves.

    1 drafters, then routers, workers, gateways: a new version of who only helps first, of who faces clients last
    2 one that nobody else could stand in for gets somebody for as long as it is away; a gateway cannot, it has its port
    3 it drains: what it works on ends there or goes on elsewhere, token for token the same (laws 1 and 5)
    4 the next one only once this one is ready again

Rule: whoever does not come back stops it all, so that one is missing and not all of them.
"""

import time

from msgspec.structs import replace

from deploy.live import Board
from deploy.local_mesh import READY_WITHIN_S, LocalMesh
from deploy.supervisor import Say
from shared.ids import new_id
from shared.settings import Settings, WorkerSettings

ORDER = ("drafter", "router", "worker", "gateway")
STANDS_IN = ("router", "worker")


class RollStopped(Exception):
    """One clear sentence on who did not come back; the services after it run on as they did."""


async def roll(mesh: LocalMesh, board: Board, say: Say, within_s: float = READY_WITHIN_S) -> None:
    """Start all of `mesh` anew. `board` hears its statuses; each service may take `within_s`. Raises RollStopped."""
    for module in ORDER:
        for settings in mesh.services[module]:
            stand_in = ""
            if module in STANDS_IN and not _has_peers(settings, mesh.services[module]):
                stand_in = await _stand_in(mesh, board, module, settings, within_s)
            before, began = board.epoch_of(settings.id), time.monotonic()
            await mesh.again(settings.id)
            drained_s = time.monotonic() - began
            await _back(mesh, board, settings.id, before, within_s)
            away_s = time.monotonic() - began
            if stand_in:
                await mesh.drop(stand_in)
            say(f"{settings.id} is new: away for {away_s:.1f} s, {drained_s:.1f} s of it to drain"
                + (f"; {stand_in} stood in" if stand_in else ""))


async def _stand_in(mesh: LocalMesh, board: Board, module: str, settings: Settings, within_s: float) -> str:
    """Start another of the same kind; its name, once it is ready."""
    other = replace(settings, id=new_id(settings.id), metrics_port=0)
    mesh.add(module, other)
    try:
        await _back(mesh, board, other.id, 0, within_s)
    except RollStopped:
        await mesh.drop(other.id)
        raise
    return other.id


async def _back(mesh: LocalMesh, board: Board, name: str, before: int, within_s: float) -> None:
    try:
        await board.ready(name, before, within_s)
    except TimeoutError:
        raise RollStopped(f"{name} was not ready within {within_s:.0f} s, so those after it were left as they are: "
                          f"{mesh.child(name).log} says why") from None


def _has_peers(settings: Settings, all_of_them: list[Settings]) -> bool:
    """Whether another of them does the same work."""
    if isinstance(settings, WorkerSettings):
        return sum(isinstance(one, WorkerSettings) and one.model_name == settings.model_name for one in all_of_them) > 1
    return len(all_of_them) > 1
