"""What the host-memory tier is worth to conversations that come back after their blocks had to go.

    python -m deploy.bench.tier [--conversations 24] [--tokens 600] [--turns 3] [--blocks 256] [--threads 0]
                                [--repeats 3] [--json FILE]

Conversations take turns, one after the other, and together need more blocks than the pool has. Each turn sends all that
was said before and a new question. The first turn is new to everyone and not counted. One process per row, alternating:

    off     the pool alone: what it evicted is computed again
    tier    the pool, and a tier with room for everything
    pool    a pool with room for everything: what a CPU can have instead, and a GPU cannot

`cpu_ms` is processor time of the whole process from question to first token, `ttft_ms` the time that passed: on a
machine that others use too, compare the former. `computed` and `cached` count prompt tokens, `saved` and `restored`
blocks.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import pull
from deploy.bench import machine, prompts
from deploy.bench.mesh import show
from gateway.tokenizer import Tokenizer
from kernels.native.decoder import NativeDecoder
from shared import subjects
from shared.blocks import BLOCK_SIZE_TOKENS
from shared.bus import Delivery
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Failed, Finished, GatewayStatus, Generate, Sampling, StepReplies, Tokens, decode, encode
from shared.settings import WorkerSettings
from shared.tokens import pack, unpack
from worker import service

MODES = ("off", "tier", "pool")
QUESTION_TOKENS = 24
ANSWER_TOKENS = 8
WORKER = "worker-1"


@dataclass(frozen=True)
class Load:
    """Sizes of the workload."""

    conversations: int
    tokens: int
    turns: int
    blocks: int
    threads: int = 0  # 0: one per core

    @property
    def blocks_of_all(self) -> int:
        """What all conversations need at their ends, and one spare for each."""
        tokens = self.tokens + self.turns * (QUESTION_TOKENS + ANSWER_TOKENS)
        return self.conversations * (tokens // BLOCK_SIZE_TOKENS + 2)


@dataclass
class Answer:
    """One turn as its client saw it."""

    prompt_tokens: int
    ttft_s: float = 0.0
    ttft_cpu_s: float = 0.0
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)


class CountingDecoder(NativeDecoder):  # type: ignore[misc]  # kernels are outside of the type check
    """Counts the blocks copied."""

    saves = 0
    restores = 0

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        self.saves += 1
        super().read_block(block, to)

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        self.restores += 1
        super().write_block(block, data)


class Client:
    """Asks one question at a time."""

    def __init__(self, bus: MemoryBus, clock: LoopClock) -> None:
        self._bus, self._clock = bus, clock
        self._asked = 0
        self._answer = Answer(0)
        self._over = asyncio.Event()
        self._since = (0.0, 0.0)

    async def listen(self) -> None:
        await self._bus.subscribe(subjects.replies("bench"), self._take)

    async def beat(self) -> None:
        """Stay alive in the worker's eyes."""
        while True:
            await self._bus.publish(subjects.status("gateway", "bench"), encode(GatewayStatus("bench", 1)))
            await self._clock.sleep(0.5)

    async def ask(self, prompt: list[int]) -> Answer:
        self._asked += 1
        self._answer = answer = Answer(len(prompt))
        self._over.clear()
        self._since = time.perf_counter(), time.process_time()
        request = Generate(
            request_id=f"r{self._asked}",
            attempt=1,
            gateway="bench",
            model="m",
            tokens=pack(prompt),
            max_tokens=ANSWER_TOKENS,
            deadline=self._clock.wall() + 600,
            sampling=Sampling(temperature=0.0),
        )
        await self._bus.publish(subjects.worker_generate(WORKER), encode(request))
        async with asyncio.timeout(600):
            await self._over.wait()
        return answer

    def _take(self, delivery: Delivery) -> None:
        for reply in decode(delivery.data, StepReplies).replies:
            match reply:
                case Tokens(tokens=tokens):
                    if not self._answer.tokens:
                        wall, cpu = self._since
                        self._answer.ttft_s = time.perf_counter() - wall
                        self._answer.ttft_cpu_s = time.process_time() - cpu
                    self._answer.tokens += unpack(tokens)
                case Finished(cached_tokens=cached_tokens):
                    self._answer.cached_tokens = cached_tokens
                    self._over.set()
                case Failed(message=message):
                    raise RuntimeError(message)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.tier", description=__doc__.splitlines()[0])
    for name, default in (("conversations", 24), ("tokens", 600), ("turns", 3), ("blocks", 256), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)  # inside: one row, printed
    options = parser.parse_args()
    load = Load(options.conversations, options.tokens, options.turns, options.blocks, options.threads)
    if load.turns < 2:
        parser.error("--turns must be at least 2: the first is new to everyone and not counted")
    if options.one:
        print(json.dumps(asyncio.run(run(load, options.one))))
        return
    report = measure(load, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def measure(load: Load, repeats: int) -> dict[str, Any]:
    """One row per mode, medians over the repeats, and the repeats themselves."""
    sizes = [f"--{name}={value}" for name, value in vars(load).items()]
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode in MODES:
            command = [sys.executable, "-m", "deploy.bench.tier", "--one", mode, *sizes]
            with machine.Disturbance() as lost:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            runs[mode].append(json.loads(done.stdout.splitlines()[-1]) | {"steal": lost.steal_cores})
    said = {run.pop("said") for mode in MODES for run in runs[mode]}
    if len(said) != 1:
        raise SystemExit("answers differ between rows: a restored block was not the computed one")
    rows = [
        {"row": mode} | {key: round(statistics.median(run[key] for run in runs[mode]), 1) for key in runs[mode][0]}
        for mode in MODES
    ]
    return {
        "machine": machine.describe(),
        "command": machine.command("deploy.bench.tier", sys.argv[1:]),
        "load": vars(load) | {"blocks_of_all": load.blocks_of_all},
        "rows": rows,
        "runs": runs,
    }


async def run(load: Load, mode: str) -> dict[str, Any]:
    """All turns of all conversations on a worker of its own, over the memory bus."""
    folder = pull.pull("default")
    tokenizer = Tokenizer.load(folder)
    blocks = load.blocks_of_all if mode == "pool" else load.blocks
    decoder = CountingDecoder.load(folder, blocks=blocks, threads=load.threads)
    tier_mib = 1 + (load.blocks_of_all * decoder.block_bytes >> 20) if mode == "tier" else 0
    settings = WorkerSettings(id=WORKER, model=str(folder), model_name="m", engine="cpu", speculation=False,
                              kv_tier_mib=tier_mib)
    clock, broker, ready = LoopClock(), MemoryBroker(), asyncio.Event()
    client = Client(MemoryBus(broker), clock)
    await client.listen()
    serving = asyncio.create_task(service.serve(MemoryBus(broker), settings, clock, ready, decoder))
    beating = asyncio.create_task(client.beat())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False)

    said = [prompts.tokens(encoded, seed, load.tokens) for seed in range(load.conversations)]
    answers: list[Answer] = []
    for turn in range(load.turns):
        for number, conversation in enumerate(said):
            conversation += prompts.tokens(encoded, 1000 * (turn + 1) + number, QUESTION_TOKENS)
            answer = await client.ask(conversation)
            conversation += answer.tokens
            if turn:
                answers.append(answer)
    for task in (serving, beating):
        task.cancel()
    await asyncio.gather(serving, beating, return_exceptions=True)
    cached = sum(answer.cached_tokens for answer in answers)
    return {
        "ttft_ms": 1000 * statistics.median(answer.ttft_s for answer in answers),
        "cpu_ms": 1000 * statistics.median(answer.ttft_cpu_s for answer in answers),
        "computed": sum(answer.prompt_tokens for answer in answers) - cached,
        "cached": cached,
        "saved": decoder.saves,
        "restored": decoder.restores,
        "rss_mib": machine.peak_rss_mib(),
        "said": hash(tuple(map(tuple, said))),
    }


if __name__ == "__main__":
    main()
