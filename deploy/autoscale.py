"""Workers of a local mesh, started and drained as the load needs: what `tokenmill scale --advise` says, done.

Rule: who was started last goes first, so that those of the beginning, which have ports for their figures, stay.
"""

import asyncio
import time
from collections import defaultdict

from msgspec.structs import replace

from deploy.live import SILENT_S, Board
from deploy.local_mesh import LocalMesh
from deploy.scaling import Advisor, Goals, needs
from deploy.supervisor import Say
from shared.ids import new_id
from shared.settings import WorkerSettings

EVERY_S = 1.0


async def follow(mesh: LocalMesh, board: Board, most: int, say: Say, advisor: Advisor | None = None) -> None:
    """Keep as many workers of each model as the load needs, from as many as were asked for up to `most`.

    Until cancelled. `board` hears the mesh's statuses.
    """
    least = mesh.options.workers
    goals = Goals(least={"worker": least}, most={"worker": most})
    advisor = advisor or Advisor(goals)
    while True:
        await asyncio.sleep(EVERY_S)
        now = time.monotonic()
        alive = [status for heard_at, status in board.heard.values() if now - heard_at <= SILENT_S]
        own = _by_model(mesh)
        for need, wanted in advisor.advise(needs(alive, goals), now):
            workers = own.get(need.name, []) if need.role == "worker" else []
            if not workers:
                continue
            for _ in range(wanted - len(workers)):
                another = replace(workers[0], id=new_id("worker"), metrics_port=0)
                mesh.services["worker"].append(another)
                mesh.add("worker", another)
                say(f"{another.id} starts, {wanted} are wanted: {need.why}")
            if wanted < len(workers):
                leaving = workers[-1]
                mesh.services["worker"].remove(leaving)
                say(f"{leaving.id} leaves, {wanted} are enough: {need.why}")
                await mesh.drop(leaving.id)


def _by_model(mesh: LocalMesh) -> dict[str, list[WorkerSettings]]:
    found: dict[str, list[WorkerSettings]] = defaultdict(list)
    for settings in mesh.services["worker"]:
        assert isinstance(settings, WorkerSettings)
        found[settings.model_name].append(settings)
    return found
