"""What the mesh costs when nobody asks it anything.

    python -m deploy.bench.idle [--seconds 20] [--json FILE]

Real processes, the real model loaded. Figures are shares of one core.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from deploy import broker, pull
from deploy.bench import machine
from deploy.bench.mesh import show
from deploy.local_mesh import LocalMesh, Options

SETTLE_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.idle", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(options.seconds))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


async def measure(seconds: float) -> dict[str, Any]:
    """One row per process and one for all."""
    with tempfile.TemporaryDirectory() as data:
        async with LocalMesh(Options(model=pull.pull("default"), data=Path(data), port=broker.free_port())) as mesh:
            await mesh.until_ready()
            await asyncio.sleep(SETTLE_S)
            pids = {child.name: child.pid for child in mesh.children if child.pid}
            before = {name: machine.cpu_seconds([pid]) for name, pid in pids.items()}
            with machine.Disturbance() as lost:
                await asyncio.sleep(seconds)
            used = {name: machine.cpu_seconds([pid]) - before[name] for name, pid in pids.items()}
            memory = {name: machine.peak_rss_mib(pid) for name, pid in pids.items()}
    rows = [
        {"process": name, "share_of_core": round(used[name] / seconds, 4), "peak_rss_mib": round(memory[name], 1)}
        for name in pids
    ]
    rows.append(
        {
            "process": "all",
            "share_of_core": round(sum(used.values()) / seconds, 4),
            "peak_rss_mib": round(sum(memory.values()), 1),
        }
    )
    return {"machine": machine.describe(), "seconds": seconds, "steal_cores": lost.steal_cores, "rows": rows}


if __name__ == "__main__":
    main()
