"""How fast the engine is, alone and behind the gateway.

    python -m deploy.bench.engine [--workloads W1,W2,W3,W4,W5] [--repeats N] [--engine cpu] [--json FILE]

    W1  one stream, 128 in, 256 out            W2  32 requests at once, 128 in, 128 out
    W3  64 requests, 512 tokens shared, 64 own, 64 out      W4  one prompt of 2,048 tokens
    W5  16 concurrent streams through the HTTP gateway, 128 in, 128 out

Greedy, fixed lengths, each once without and once with speculation. Every repeat is a process of its own, so that memory
and cold start are its own; figures are medians over the repeats. W1 to W4 put requests straight to the worker service
over the memory bus; W5 is the mesh of real processes.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import broker, pull
from deploy.bench import load, machine, prompts
from deploy.bench.mesh import show
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer
from shared import blocks, subjects
from shared.bus import Delivery
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Failed, Finished, GatewayStatus, Generate, Sampling, StepReplies, Tokens, decode, encode
from shared.settings import DrafterSettings, WorkerSettings
from shared.tokens import count, pack

BORN = time.perf_counter()


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together."""

    requests: int
    shared_tokens: int
    own_tokens: int
    out_tokens: int
    http_streams: int = 0  # through the gateway


WORKLOADS = {
    "W1": Workload(1, 0, 128, 256),
    "W2": Workload(32, 0, 128, 128),
    "W3": Workload(64, 512, 64, 64),
    "W4": Workload(1, 0, 2048, 8),
    "W5": Workload(32, 0, 128, 128, http_streams=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W5")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # inside: run one workload once, print its figures
    parser.add_argument("--speculation", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one = _through_http if WORKLOADS[options.one].http_streams else _in_process
        print(json.dumps(asyncio.run(run_one(WORKLOADS[options.one], options.engine, options.speculation))))
        return
    rows = [
        _row(name, speculation, options.repeats, options.engine)
        for name in options.workloads.split(",")
        for speculation in (False, True)
    ]
    report: dict[str, object] = {
        "machine": machine.describe(),
        "command": f"python -m deploy.bench.engine --workloads {options.workloads} --repeats {options.repeats} "
        f"--engine {options.engine}",
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def _row(name: str, speculation: bool, repeats: int, engine: str) -> dict[str, Any]:
    """Medians over `repeats` processes."""
    command = [sys.executable, "-m", "deploy.bench.engine", "--one", name, "--engine", engine]
    runs = []
    with machine.Disturbance() as lost:
        for _ in range(repeats):
            done = subprocess.run(
                command + ["--speculation"] * speculation, capture_output=True, text=True, timeout=900
            )
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {
        key: round(statistics.median(run[key] for run in runs), 2) if runs[0][key] is not None else None
        for key in runs[0]
    }
    return (
        {"workload": name, "speculation": speculation} | middle | {"repeats": repeats, "steal_cores": lost.steal_cores}
    )


async def _in_process(workload: Workload, engine: str, speculation: bool) -> dict[str, float | None]:
    """The worker service (and a drafter) on the memory bus, requests published straight to it."""
    import drafter.service
    import worker.service

    folder = pull.pull("default")
    tokenizer = Tokenizer.load(folder)
    clock, memory = LoopClock(), MemoryBroker()
    ready = asyncio.Event()
    services = [
        asyncio.create_task(
            worker.service.serve(
                MemoryBus(memory),
                WorkerSettings(
                    id="worker-1",
                    model=str(folder),
                    model_name="m",
                    engine=engine,
                    kv_mib=768,
                    log_level="warning",
                    speculation=speculation,
                ),
                clock,
                ready,
            )
        )
    ]
    if speculation:
        services.append(
            asyncio.create_task(
                drafter.service.serve(MemoryBus(memory), DrafterSettings(id="drafter-1", log_level="warning"), clock)
            )
        )
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({waiting, *services}, return_when=asyncio.FIRST_COMPLETED)
    for service in services:
        if service.done():
            service.result()
    client = _Client(MemoryBus(memory), clock)
    await client.listen()
    services.append(asyncio.create_task(client.beat()))
    await client.run([_prompt(tokenizer, WORKLOADS["W1"], -1)], 1)  # the first token of a cold process
    cold_start_s = time.perf_counter() - BORN
    seen = await client.run([_prompt(tokenizer, workload, i) for i in range(workload.requests)], workload.out_tokens)
    for service in services:
        service.cancel()
    await asyncio.gather(*services, return_exceptions=True)
    return seen | {"rss_mib": machine.peak_rss_mib(), "cold_start_s": cold_start_s}


def _prompt(tokenizer: Tokenizer, workload: Workload, number: int) -> list[int]:
    def encode_text(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False)

    shared = (
        prompts.tokens(encode_text, 7 if number >= 0 else 8, workload.shared_tokens) if workload.shared_tokens else []
    )
    return shared + prompts.tokens(encode_text, 1000 + number, workload.own_tokens)


class _Client:
    """Publishes requests to the worker and watches their tokens arrive."""

    def __init__(self, bus: MemoryBus, clock: LoopClock) -> None:
        self._bus, self._clock = bus, clock
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._open: set[str] = set()
        self._done = asyncio.Event()
        self._runs = 0

    async def listen(self) -> None:
        await self._bus.subscribe(subjects.replies("bench"), self._take)

    async def beat(self) -> None:
        """Stay alive in the worker's eyes: streams of a silent gateway are dropped."""
        while True:
            await self._bus.publish(subjects.status("gateway", "bench"), encode(GatewayStatus("bench", 1)))
            await self._clock.sleep(0.5)

    async def run(self, prompts: list[list[int]], out_tokens: int) -> dict[str, float | None]:
        self._runs += 1
        names = [f"r{self._runs}-{i}" for i in range(len(prompts))]
        self._open, self._done = set(names), asyncio.Event()
        start = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            hashes = blocks.join_hashes(blocks.hash_chain(prompt, b""))
            request = Generate(
                request_id=name,
                attempt=1,
                gateway="bench",
                model="m",
                tokens=pack(prompt),
                max_tokens=out_tokens,
                deadline=self._clock.wall() + 600,
                sampling=Sampling(temperature=0.0),
                block_hashes=hashes,
            )
            await self._bus.publish(subjects.worker_generate("worker-1"), encode(request))
        async with asyncio.timeout(600):
            await self._done.wait()
        first = [self._first[name] - start for name in names]
        end = max(self._last[name] for name in names)
        made = sum(self._counts[name] for name in names)
        decode_s = end - start - min(first)
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        return {
            "decode_tok_s": (made - len(names)) / decode_s if made > len(names) else None,
            "output_tok_s": made / (end - start),
            "prefill_tok_s": prompt_tokens / max(first),
            "ttft_ms": 1000 * statistics.median(first),
        }

    def _take(self, delivery: Delivery) -> None:
        now = time.perf_counter()
        for reply in decode(delivery.data, StepReplies).replies:
            match reply:
                case Tokens():
                    self._first.setdefault(reply.request_id, now)
                    self._last[reply.request_id] = now
                    self._counts[reply.request_id] = self._counts.get(reply.request_id, 0) + count(reply.tokens)
                case Finished(reason="cancelled"):
                    raise RuntimeError(f"the worker dropped {reply.request_id}")
                case Finished():
                    self._open.discard(reply.request_id)
                case Failed():
                    raise RuntimeError(reply.message)
        if not self._open:
            self._done.set()


async def _through_http(workload: Workload, engine: str, speculation: bool) -> dict[str, float | None]:
    """The mesh of real processes; requests as any client sends them."""
    folder = pull.pull("default")
    name = load_card(folder).name
    with tempfile.TemporaryDirectory() as data:
        options = Options(
            model=folder,
            data=Path(data),
            port=broker.free_port(),
            engine=engine,
            drafters=int(speculation),
            log_level="warning",
            settings={"worker": {"kv_mib": 512}},
        )
        async with LocalMesh(options) as mesh:
            await mesh.until_ready()
            await load.run(mesh.url, _bodies(name, folder, workload, 900, 2), streams=2)
            seen = await load.run(
                mesh.url, _bodies(name, folder, workload, 0, workload.requests), workload.http_streams
            )
            if seen.failures:
                raise SystemExit(f"{len(seen.failures)} requests failed, first: {seen.failures[0]}")
            worker_pid = mesh.child("worker-1").pid
            return {
                "decode_tok_s": seen.completion_tokens / seen.wall_s,
                "output_tok_s": seen.completion_tokens / seen.wall_s,
                "prefill_tok_s": None,
                "ttft_ms": load.percentile_ms(seen.ttft_s, 0.5),
                "ttft_p99_ms": load.percentile_ms(seen.ttft_s, 0.99),
                "itl_p50_ms": load.percentile_ms(seen.itl_s, 0.5),
                "itl_p99_ms": load.percentile_ms(seen.itl_s, 0.99),
                "rss_mib": machine.peak_rss_mib(worker_pid),
                "cold_start_s": None,
            }


def _bodies(name: str, folder: Path, workload: Workload, seed: int, number: int) -> list[dict[str, object]]:
    tokenizer = Tokenizer.load(folder)
    return [
        {
            "model": name,
            "prompt": _prompt(tokenizer, workload, seed + i),
            "max_tokens": workload.out_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        for i in range(number)
    ]


if __name__ == "__main__":
    main()
