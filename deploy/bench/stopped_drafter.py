"""What a stream loses when its drafter is stopped (SIGSTOP) in the middle of it.

    python -m deploy.bench.stopped_drafter [--trials 8] [--json FILE]

The default model repeats a text, so that drafts pay and are waited for. After a third of the stream the drafter's
process is stopped; it is woken for the next trial. The same request without drafts gives the tokens to compare with.

    held_ms      how long steps were held back for drafts behind the stop, all together: the added latency
    wait_ms      what one wait could last then: twice the drafter's usual answer, at most a step
    gap_ms       the longest pause between two tokens behind the stop, beside the longest of the stream without drafts
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from deploy import pull
from deploy.bench import machine
from deploy.bench.mesh import show
from deploy.bench.rig import MODEL, WITH_DRAFTS, WITHOUT, Rig, Stream
from deploy.bench.speculation_prompts import quote
from gateway.prompt import ServedModel
from shared.messages import Sampling
from shared.settings import DrafterSettings, WorkerSettings

TOKENS = 120
DRAFTER = "drafter-1"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.stopped_drafter", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = uvloop.run(measure(options.trials))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


async def measure(trials: int) -> dict[str, Any]:
    """One row a trial."""
    folder = pull.pull("default")
    model = ServedModel.load(folder, MODEL)
    with tempfile.TemporaryDirectory() as data, machine.Disturbance() as lost:
        async with Rig(Path(data), WorkerSettings(model=str(folder), kv_mib=256)) as rig:
            await rig.start_drafter(DrafterSettings(id=DRAFTER))
            rows = []
            for number in range(trials):
                prompt = model.chat([{"role": "user", "content": quote(number)}], now_s=0.0)
                for _ in range(2):  # the worker learns whether waiting pays
                    await rig.ask(prompt, Sampling(0.0), TOKENS, WITH_DRAFTS)
                rows.append({"trial": number} | await trial(rig, prompt))
    return {"machine": machine.describe(), "command": machine.command("deploy.bench.stopped_drafter", sys.argv[1:]),
            "steal_cores": lost.steal_cores, "most_held_of_a_wait": max(row["held_waits"] for row in rows),
            "rows": rows}


async def trial(rig: Rig, prompt: list[int]) -> dict[str, Any]:
    """One stream with the stop in it, and the same without drafts."""
    plain = await rig.ask(prompt, Sampling(0.0), TOKENS, WITHOUT)
    stopped_at: list[int] = []
    before: list[dict[str, float]] = []
    stopping: list[asyncio.Task[None]] = []

    async def stop(stream: Stream) -> None:
        before.append(await rig.figures())
        rig.signal(DRAFTER, signal.SIGSTOP)
        stopped_at.append(len(stream.arrived_s))

    def look(stream: Stream) -> None:
        if not stopping and len(stream.tokens) >= TOKENS // 3:
            stopping.append(asyncio.ensure_future(stop(stream)))

    try:
        stream = await rig.ask(prompt, Sampling(0.0), TOKENS, WITH_DRAFTS, on_tokens=look)
        await stopping[0]
        after = await rig.figures()
    finally:
        rig.signal(DRAFTER, signal.SIGCONT)
    await rig.until(lambda: rig.worker is not None and rig.worker.drafter == DRAFTER, "the drafter does not come back")
    held_s = after["draft_hold_seconds"] - before[0]["draft_hold_seconds"]
    holds = after["draft_holds"] - before[0]["draft_holds"]
    wait_s = min(2 * before[0]["draft_latency_seconds"],
                 before[0]["step_base_seconds"] + before[0]["step_row_seconds"])
    gaps = [late - early for early, late in pairwise(stream.arrived_s[stopped_at[0] - 1:])]
    return {
        "same_tokens": stream.tokens == plain.tokens,
        "waited_before": bool(before[0]["draft_wait"]),
        "holds": int(holds),
        "held_ms": round(1000 * held_s, 3),
        "wait_ms": round(1000 * wait_s, 3),
        "held_waits": round(held_s / wait_s, 2) if wait_s else 0.0,
        "gap_ms": round(1000 * max(gaps), 2),
        "plain_gap_ms": round(1000 * max(late - early for early, late in pairwise(plain.arrived_s)), 2),
        "drafts_before": stream.end.accepted_draft_tokens,
    }


if __name__ == "__main__":
    main()
