"""A worker as a process of its own, on a real nats-server."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from shared import subjects
from shared.messages import Finished, StepReplies, WorkerStatus, decode, encode
from shared.nats_bus import NatsBus
from tests.nats_server import NatsServer
from tests.worker.builders import FAR, request

ROOT = Path(__file__).resolve().parents[2]


async def worker_process(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "--engine=mock", "--model-name=m", *flags, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=asyncio.subprocess.PIPE)


async def test_a_worker_process_serves_and_drains_on_sigterm(tmp_path: Path) -> None:
    server = NatsServer(tmp_path).start()
    bus = await NatsBus.connect(server.url, "test")
    states: asyncio.Queue[str] = asyncio.Queue()
    replies: asyncio.Queue[object] = asyncio.Queue()

    async def until_state(state: str) -> None:
        while await states.get() != state:
            pass

    try:
        await bus.subscribe(subjects.status("worker", "w1"),
                            lambda delivery: states.put_nowait(decode(delivery.data, WorkerStatus).state))
        await bus.subscribe(subjects.replies("g1"), lambda delivery: [
            replies.put_nowait(reply) for reply in decode(delivery.data, StepReplies).replies] and None)
        process = await worker_process("--id=w1", f"--nats={server.url}")
        await asyncio.wait_for(until_state("ready"), 60)
        await bus.publish(subjects.worker_generate("w1"), encode(request(max_tokens=60, deadline=FAR * 10)))
        await asyncio.wait_for(replies.get(), 30)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(until_state("draining"), 30)
        while not isinstance(last := await asyncio.wait_for(replies.get(), 30), Finished):
            pass
        assert (last.reason, last.completion_tokens) == ("length", 60)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        await bus.close()
        server.stop()


async def test_a_start_leaves_one_line_with_the_milliseconds_of_each_phase(tmp_path: Path) -> None:
    server = NatsServer(tmp_path).start()
    try:
        process = await worker_process("--id=w1", f"--nats={server.url}", "--log=json")
        assert process.stderr is not None
        async with asyncio.timeout(60):
            while (line := json.loads(await process.stderr.readline()))["event"] != "worker_started":
                pass
        process.send_signal(signal.SIGTERM)
        rest, _ = await process.communicate()
    finally:
        server.stop()
    phases = [name for name in line if name.endswith("_ms")]
    assert phases == ["imports_ms", "settings_ms", "bus_ms", "weights_ms", "calibration_ms", "grammars_ms", "doors_ms",
                      "total_ms"]
    assert all(isinstance(line[name], int) for name in phases)
    assert b"worker_started" not in (rest or b"")


async def test_a_wrong_flag_ends_with_one_sentence() -> None:
    process = await worker_process("--colour=red")
    _, error = await process.communicate()
    assert process.returncode == 1
    assert error.decode().strip() == "worker: unknown settings for worker: --colour"
