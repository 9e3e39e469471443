"""What the router's index costs: memory, decisions, placements a second, and a killed router's way back.

    python -m deploy.bench.index [--blocks 1000000] [--parts memory,decision,placement,restart] [--json FILE]

Decisions and placements are judged by CPU time, because wall time on a shared machine is the neighbours'; wall time
stands beside it. A decision: hashes split, prefixes looked up, terms weighed, receipt packed. A placement: the same
through the real `Router` on a memory bus, from the bytes of a request to the worker's handler. The restart is of real
processes over a real NATS (`deploy.bench.index_restart`).
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import structlog

from deploy.bench import index_restart, machine
from router.placement import Decision, decide
from router.prefix_index import PrefixIndex
from router.receipts import receipt_of
from router.service import Router
from router.view import View
from shared import receipts, subjects
from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES, split_hashes
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Generate, KvSnapshot, WorkerStatus, encode
from shared.settings import RouterSettings

PARTS = ("memory", "decision", "placement", "restart")
PROMPT_TOKENS = 12_000
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE_TOKENS
# blocks of one event: a step of a busy worker
EVENT_BLOCKS = 128


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.index", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1_000_000, help="indexed in all")
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--placements", type=int, default=10_000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    report: dict[str, Any] = {"machine": machine.describe(), "blocks": options.blocks}
    blocks = options.blocks
    measured: dict[str, Callable[[], Any]] = {
        "memory": lambda: [_apart(memory, blocks, holders) for holders in (1, 2, 4)],
        "decision": lambda: [_apart(decisions, blocks, workers, options.decisions) for workers in (16, 64)],
        "placement": lambda: [
            _apart(placements, blocks, 16, tokens, options.placements) for tokens in (1000, PROMPT_TOKENS)
        ],
        "restart": lambda: asyncio.run(index_restart.measure(blocks, 16, options.restarts)),
    }
    with machine.Disturbance() as lost:
        for part in (part for part in PARTS if part in parts):
            print(f"{part} ...", file=sys.stderr, flush=True)
            report[part] = measured[part]()
            if options.json:  # a long run that is cut off leaves what it has
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    report["lost"] = {"steal_cores": lost.steal_cores, "busy_cores": lost.busy_cores}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def memory(blocks: int, holders: int) -> dict[str, Any]:
    """Resident memory of an index in which each block lies at so many of 16 workers, learned from events."""
    hashes = os.urandom(HASH_BYTES * blocks)
    share = blocks // 16
    index = PrefixIndex()
    before = machine.rss_bytes()
    began_s = time.process_time()
    for turn, worker in itertools.product(range(holders), range(16)):
        first = (worker + turn) % 16 * share
        for start in range(first, first + share, EVENT_BLOCKS):
            end = min(start + EVENT_BLOCKS, first + share)
            index.store(f"worker-{worker}", hashes[HASH_BYTES * start:HASH_BYTES * end])
    spent_s = time.process_time() - began_s
    resident = machine.rss_bytes() - before
    return {"holders": holders, "blocks": len(index), "mb_per_million_blocks": round(resident / len(index), 1),
            "accounted_mb_per_million_blocks": round(index.nbytes / len(index), 1),
            "us_per_stored_copy": round(1e6 * spent_s / (holders * len(index)), 3)}


def decisions(blocks: int, workers: int, count: int) -> dict[str, Any]:
    """Time to decide on prompts of 12,000 tokens, most of whose blocks some workers hold."""
    view, names = _view(blocks, workers)
    rng = random.Random(1)
    asked = [_request(number, names, rng, PROMPT_TOKENS) for number in range(count)]
    cpu_s, wall_s = [], []
    for number, request in enumerate(asked):
        wall, cpu = time.perf_counter(), time.thread_time()
        candidates = view.candidates(request.block_hashes, float(number) * 1e-4)
        verdict = decide(request, candidates, wall_s=0.0, rng=rng)
        assert isinstance(verdict, Decision)
        receipts.pack(receipt_of("router-1", PROMPT_TOKENS, verdict, candidates, 0.0))
        cpu_s.append(time.thread_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    return {"workers": workers, "prompt_tokens": PROMPT_TOKENS, "decisions": count, **_spread("cpu", cpu_s),
            **_spread("wall", wall_s)}


def placements(blocks: int, workers: int, prompt_tokens: int, count: int) -> dict[str, Any]:
    """Requests a second through one router, from their bytes to the worker's handler."""
    return asyncio.run(_placements(blocks, workers, prompt_tokens, count))


async def _placements(blocks: int, workers: int, prompt_tokens: int, count: int) -> dict[str, Any]:
    view, names = _view(blocks, workers)
    broker, clock = MemoryBroker(), LoopClock()
    router = Router(MemoryBus(broker), RouterSettings(id="router-1", max_queue_s=1e9), clock, view)
    await router.listen()
    await router.take_requests()
    got = 0
    done = asyncio.Event()

    def arrived(_: object) -> None:
        nonlocal got
        got += 1
        if got == count:
            done.set()

    sink, gateway = MemoryBus(broker), MemoryBus(broker)
    for number in range(workers):
        await sink.subscribe(subjects.worker_generate(_name(number)), arrived)
    rng = random.Random(1)
    sent = [encode(_request(number, names, rng, prompt_tokens, clock.wall() + 1e6)) for number in range(count)]
    statuses = [encode(_status(number, 1)) for number in range(workers)]
    sending = asyncio.create_task(router.outbox.send())
    wall, cpu = time.perf_counter(), time.process_time()
    for number, data in enumerate(sent):
        await gateway.publish(subjects.generate("m"), data)
        if number % 64 == 63:  # a router that is busy hears its workers too
            for worker, status in enumerate(statuses):
                await gateway.publish(subjects.status("worker", _name(worker)), status)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    async with asyncio.timeout(300):
        await done.wait()
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    sending.cancel()
    return {"workers": workers, "prompt_tokens": prompt_tokens, "placements": count,
            "per_cpu_s": round(count / cpu_s), "per_wall_s": round(count / wall_s)}


def _apart(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of `part` from a process of its own: memory is only then what it took."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        return pool.submit(part, *arguments).result()


def _quiet() -> None:
    """Only what goes wrong is said, as a service in production does."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))


def _view(blocks: int, workers: int) -> tuple[View, list[bytes]]:
    """A router's picture: `blocks` different ones, each at two workers; and their names, in chains of one prompt."""
    view = View(silence_s=1e9)
    names = split_hashes(os.urandom(HASH_BYTES * blocks))
    share = blocks // workers
    for number in range(workers):
        view.on_status(_status(number, 1), 0.0)
        for part, first in enumerate((number * share, (number + 1) % workers * share)):
            held = b"".join(names[first:first + share])
            view.on_kv(KvSnapshot(_name(number), 1, 1, held, part, 2), 0.0)
    return view, names


def _request(number: int, names: list[bytes], rng: random.Random, prompt_tokens: int, deadline: float = 1e12
             ) -> Generate:
    """A prompt that begins with known blocks, between none and all of them, and goes on with its own."""
    prompt_blocks = prompt_tokens // BLOCK_SIZE_TOKENS
    known = rng.randrange(prompt_blocks + 1)
    first = rng.randrange(max(1, len(names) // prompt_blocks)) * prompt_blocks
    chain = b"".join(names[first:first + known])
    own = rng.randbytes(HASH_BYTES * (prompt_blocks - len(chain) // HASH_BYTES))
    return Generate(f"request-{number}", 1, "gateway-1", "m", bytes(4 * prompt_tokens), 256, deadline,
                    block_hashes=chain + own)


def _status(number: int, kv_seq: int) -> WorkerStatus:
    return WorkerStatus(_name(number), 1, "m", max_running=256, prefill_tok_s=2_000_000.0, step_base_s=0.01,
                        step_row_s=0.0001, kv_seq=kv_seq, running=number % 8)


def _name(number: int) -> str:
    return f"worker-{number}"


def _spread(what: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"{what}_{name}_ms": round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


if __name__ == "__main__":
    main()
