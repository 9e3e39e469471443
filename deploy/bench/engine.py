"""How fast the engine is, alone and behind the gateway; and how fast others are on the same requests.

    python -m deploy.bench.engine [--workloads W1,W2,W3,W4,W5] [--repeats N] [--engine cpu] [--json FILE]
                                  [--peer llama.cpp=PYTHON] [--peer transformers=PYTHON] [--peer vllm=PYTHON] ...

    W1  one stream, 128 in, 256 out            W2  32 requests at once, 128 in, 128 out
    W3  64 requests, 512 tokens shared, 64 own, 64 out      W4  one prompt of 2,048 tokens
    W5  16 concurrent streams through the HTTP gateway, 128 in, 128 out
    naive  32 streams through the gateway; transformers serves the same requests one at a time (it is given 4 of them)

Greedy, fixed lengths. Every run is a process of its own, so that memory and cold start are its own. W1 to W4 put
requests straight to the worker service over the memory bus; W5 is the mesh of real processes, and its side "engine
alone" is the same load straight on the worker service. The side "with drafts" is ours with speculation.

Sides alternate: before every run of another side there is one of ours. Figures are medians over the runs of a side;
a ratio is the median over the pairs, with the lowest and the highest. A peer is a driver in `peers/`, run by the
PYTHON given; one that fails has its error for a row. vLLM, which takes minutes to start, is one process for all runs of
W1 to W4: its memory is that of all of them.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from deploy import broker, pull
from deploy.bench import load, machine, peer, prompts
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

OURS, DRAFTS, ALONE = "tokenmill", "with drafts", "engine alone"
RUN_WITHIN_S = 900.0
SERVED = {"vllm"}  # the peers whose server is driven here
STAYING = {"vllm"}  # those that are started once
NAIVE_REQUESTS = 4  # a rate does not need all 32 of them
SERVER_WITHIN_S = 900.0

Figures = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Requests of one length."""

    requests: int
    shared_tokens: int
    own_tokens: int
    out_tokens: int
    judged: tuple[str, ...]  # the figures that ratios are taken of
    streams: int = 0  # at a time; 0: all
    http: bool = False  # through the gateway


RATES = ("output_tok_s", "ttft_ms", "rss_mib")
WORKLOADS = {
    "W1": Workload(1, 0, 128, 256, ("decode_tok_s", "ttft_ms", "rss_mib", "cold_start_s")),
    "W2": Workload(32, 0, 128, 128, RATES),
    "W3": Workload(64, 512, 64, 64, RATES),
    "W4": Workload(1, 0, 2048, 8, ("prefill_tok_s", "rss_mib")),
    "W5": Workload(32, 0, 128, 128, ("output_tok_s", "ttft_ms", "itl_p50_ms", "itl_p99_ms"), streams=16, http=True),
    "naive": Workload(32, 0, 128, 128, ("output_tok_s",), streams=32, http=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W5", help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", default="cpu")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(peer.DRIVERS))
    parser.add_argument("--peer-dtype", help="of transformers and vllm; default: bfloat16 where the processor has it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # inside: run one workload once, print its figures
    parser.add_argument("--side", default=OURS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        workload = WORKLOADS[options.one]
        run_one = _through_http if workload.http and options.side != ALONE else _in_process
        print(json.dumps(asyncio.run(run_one(workload, options.engine, options.side == DRAFTS))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # or peers would stay behind
    names = options.workloads.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise SystemExit(f"--workloads: {', '.join(unknown)} is not one of {', '.join(WORKLOADS)}")
    dtype = options.peer_dtype or ("bfloat16" if machine.multiplies_bfloat16() else "float32")
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "command": machine.command("deploy.bench.engine", sys.argv[1:]),
        "peers": {},
        "rows": [],
        "ratios": [],
    }
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as kept:
        ready = _prepare(peer.parse(options.peer), dtype, scratch, report["peers"], kept)
        for name in names:
            _measure(name, _sides(name, options.engine, ready), options.repeats, report)
            if options.json:  # a long run that is cut off leaves what it has
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    if report["ratios"]:
        show({"rows": report["ratios"]})


# --- sides and their turns -------------------------------------------------------------------------------------------


Side = Callable[[], Figures]  # one run. Raises PeerFailed


@dataclass(frozen=True)
class Ready:
    """A peer with what every job of its has, and how it is asked for a workload."""

    who: peer.Peer
    job: dict[str, Any]
    ask: peer.Ask


def _prepare(
    peers: list[peer.Peer], dtype: str, scratch: str, said: dict[str, str], kept: ExitStack
) -> list[Ready]:
    """Peers that can be asked; `said` learns each one's version or error, `kept` the processes that stay."""
    folder = pull.pull("default")
    ready = []
    for each in peers:
        job = {
            "model": str(folder / "model.gguf"),
            "tokenizer": str(folder / "tokenizer.json"),
            "folder": str(Path(scratch) / each.name),
            "name": load_card(folder).name,
            "threads": machine.usable_cores(),
            "dtype": dtype,
            "warm": _prompt(_tokenizer(), WORKLOADS["W1"], -1),
        }
        try:
            said[each.name] = each.ask(job | {"task": "prepare"})["version"]
        except peer.PeerFailed as error:
            said[each.name] = f"error: {error}"
        ready.append(Ready(each, job, _staying(each, job, kept) if each.name in STAYING else each.ask))
    return ready


def _staying(each: peer.Peer, job: dict[str, Any], kept: ExitStack) -> peer.Ask:
    """Asks a process that is started when first asked and ends with `kept`."""

    @cache
    def started() -> peer.Ask:
        return kept.enter_context(each.stay(job))

    return lambda run: started()(run)


def _sides(name: str, engine: str, peers: list[Ready]) -> dict[str, Side]:
    """Ours first, then whom it is compared with."""
    workload = WORKLOADS[name]
    own = [OURS] if name == "naive" else [OURS, DRAFTS, ALONE] if workload.http else [OURS, DRAFTS]
    sides: dict[str, Side] = {side: partial(_run_own, name, side, engine) for side in own}
    for each in peers:
        name_there = each.who.name
        if name == "naive":
            if name_there == "transformers":
                few = replace(workload, requests=NAIVE_REQUESTS)
                alone = replace(each, job=each.job | {"one_at_a_time": True})
                sides["transformers, one at a time"] = partial(_run_peer, alone, few)
        elif not workload.http:
            sides[name_there] = partial(_run_peer, each, workload)
        elif name_there in SERVED:
            sides[name_there] = partial(_run_server, each, workload)
    return sides


def _measure(name: str, sides: dict[str, Side], repeats: int, report: dict[str, Any]) -> None:
    """Add the rows and ratios of one workload to the report."""
    ours, *others = sides
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    pairs: dict[str, list[tuple[Figures, Figures]]] = {side: [] for side in others}
    errors: dict[str, str] = {}
    for _ in range(repeats):
        for other in others or [ours]:
            if other in errors:
                continue
            runs[ours].append(_watched(sides[ours]))
            if other == ours:
                continue
            try:
                theirs = _watched(sides[other])
            except peer.PeerFailed as error:
                errors[other] = str(error)
                continue
            runs[other].append(theirs)
            pairs[other].append((runs[ours][-1], theirs))
    for side, seen in runs.items():
        failed = {"error": errors[side]} if side in errors else {}
        report["rows"].append({"workload": name, "side": side} | (_middle(seen) if seen else {}) | failed)
    for side, seen_pairs in pairs.items():
        for figure in WORKLOADS[name].judged:
            if found := ratio(seen_pairs, figure):
                report["ratios"].append({"workload": name, "side": side, "figure": figure} | found)


def ratio(pairs: Sequence[tuple[Figures, Figures]], figure: str) -> dict[str, float] | None:
    """Ours over theirs, pair by pair: median, lowest, highest. None where a side does not have the figure."""
    both = [(ours.get(figure), theirs.get(figure)) for ours, theirs in pairs]
    ratios = [a / b for a, b in both if a is not None and b]
    if not ratios:
        return None
    return {
        "ours": round(statistics.median(a for a, b in both if a is not None and b), 2),
        "theirs": round(statistics.median(b for a, b in both if a is not None and b), 2),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "pairs": len(ratios),
    }


def _middle(runs: list[Figures]) -> Figures:
    """The median of each figure; of steal the worst."""
    middle: Figures = {"runs": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs if run[key] is not None]
        pick = max if key == "steal_cores" else statistics.median
        middle[key] = round(pick(values), 2 if key != "steal_cores" else 3) if values else None
    return middle


def _watched(side: Side) -> Figures:
    with machine.Disturbance() as lost:
        seen = side()
    return seen | {"steal_cores": lost.steal_cores}


def _run_own(name: str, side: str, engine: str) -> Figures:
    command = [sys.executable, "-m", "deploy.bench.engine", "--one", name, "--side", side, "--engine", engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_WITHIN_S)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    seen: Figures = json.loads(done.stdout.splitlines()[-1])
    return seen


def _run_peer(each: Ready, workload: Workload) -> Figures:
    """The workload once in a process of the peer's."""
    asked = [_prompt(_tokenizer(), workload, i) for i in range(workload.requests)]
    answer = each.ask(
        each.job
        | {
            "task": "generate",
            "prompts": asked,
            "out_tokens": workload.out_tokens,
            "shared_tokens": workload.shared_tokens,
        }
    )
    if answer["tokens"] != [workload.out_tokens] * len(asked):
        raise peer.PeerFailed(f"it made {answer['tokens']} tokens, {workload.out_tokens} each were asked for")
    seen = figures(answer["first_s"], answer["end_s"], answer["tokens"], sum(map(len, asked)))
    return seen | {"rss_mib": answer["rss_mib"], "cold_start_s": answer["cold_start_s"]}


def _run_server(each: Ready, workload: Workload) -> Figures:
    """The workload once through a server of the peer's."""
    port = broker.free_port()
    with each.who.start(each.job | {"task": "serve", "port": port}) as running:
        url = f"http://127.0.0.1:{port}"
        _until_healthy(url, running)
        return asyncio.run(_load(url, each.job["name"], pull.pull("default"), workload)) | {
            "rss_mib": machine.peak_rss_tree_mib(running.process.pid)
        }


def _until_healthy(url: str, running: peer.Running) -> None:
    give_up = time.perf_counter() + SERVER_WITHIN_S
    while running.process.poll() is None and time.perf_counter() < give_up:
        try:
            if httpx.get(f"{url}/health", timeout=5.0).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise peer.PeerFailed(f"its server ended or was not ready within {SERVER_WITHIN_S:.0f} s: {running.last_words()}")


def figures(first_s: Sequence[float], end_s: float, tokens: Sequence[int], prompt_tokens: int) -> Figures:
    """What runs are compared by. `first_s`: from when each request was sent to its first token; `end_s`: of all."""
    made = sum(tokens)
    decode_s = end_s - min(first_s)
    return {
        "decode_tok_s": (made - len(tokens)) / decode_s if made > len(tokens) else None,
        "output_tok_s": made / end_s,
        "prefill_tok_s": prompt_tokens / max(first_s),
        "ttft_ms": 1000 * statistics.median(first_s),
    }


# --- one run of ours -------------------------------------------------------------------------------------------------


async def _in_process(workload: Workload, engine: str, speculation: bool) -> Figures:
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
    asked = [_prompt(tokenizer, workload, i) for i in range(workload.requests)]
    seen = await client.run(asked, workload.out_tokens, workload.streams)
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


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.load(pull.pull("default"))


class _Client:
    """Publishes requests to the worker and watches their tokens arrive."""

    def __init__(self, bus: MemoryBus, clock: LoopClock) -> None:
        self._bus, self._clock = bus, clock
        self._arrivals: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}
        self._ended: dict[str, asyncio.Future[None]] = {}
        self._runs = 0

    async def listen(self) -> None:
        await self._bus.subscribe(subjects.replies("bench"), self._take)

    async def beat(self) -> None:
        """Stay alive in the worker's eyes: streams of a silent gateway are dropped."""
        while True:
            await self._bus.publish(subjects.status("gateway", "bench"), encode(GatewayStatus("bench", 1)))
            await self._clock.sleep(0.5)

    async def run(self, prompts: list[list[int]], out_tokens: int, streams: int = 0) -> Figures:
        """All at once, or `streams` at a time, each next one when another has ended."""
        self._runs += 1
        names = [f"r{self._runs}-{i}" for i in range(len(prompts))]
        sent: dict[str, float] = {}
        todo = iter(zip(names, prompts, strict=True))

        async def lane() -> None:
            for name, prompt in todo:
                sent[name] = time.perf_counter()
                await self._ask(name, prompt, out_tokens)
                await self._ended[name]

        start = time.perf_counter()
        async with asyncio.timeout(600), asyncio.TaskGroup() as lanes:
            for _ in range(streams or len(prompts)):
                lanes.create_task(lane())
        first = [self._arrivals[name][0] - sent[name] for name in names]
        end = max(self._arrivals[name][-1] for name in names)
        gaps = [late - early for name in names for early, late in pairwise(self._arrivals[name])]
        seen = figures(first, end - start, [self._counts[name] for name in names], sum(map(len, prompts)))
        return seen | {
            "ttft_p99_ms": load.percentile_ms(first, 0.99),
            "itl_p50_ms": load.percentile_ms(gaps, 0.5),
            "itl_p99_ms": load.percentile_ms(gaps, 0.99),
        }

    async def _ask(self, name: str, prompt: list[int], out_tokens: int) -> None:
        self._ended[name] = asyncio.get_running_loop().create_future()
        request = Generate(
            request_id=name,
            attempt=1,
            gateway="bench",
            model="m",
            tokens=pack(prompt),
            max_tokens=out_tokens,
            deadline=self._clock.wall() + 600,
            sampling=Sampling(temperature=0.0),
            block_hashes=blocks.join_hashes(blocks.hash_chain(prompt, b"")),
        )
        await self._bus.publish(subjects.worker_generate("worker-1"), encode(request))

    def _take(self, delivery: Delivery) -> None:
        now = time.perf_counter()
        for reply in decode(delivery.data, StepReplies).replies:
            match reply:
                case Tokens():
                    self._arrivals.setdefault(reply.request_id, []).append(now)
                    self._counts[reply.request_id] = self._counts.get(reply.request_id, 0) + count(reply.tokens)
                case Finished(reason="cancelled"):
                    self._fail(reply.request_id, "the worker dropped it")
                case Finished():
                    self._ended[reply.request_id].set_result(None)
                case Failed():
                    self._fail(reply.request_id, reply.message)

    def _fail(self, request_id: str, why: str) -> None:
        self._ended[request_id].set_exception(RuntimeError(f"{request_id}: {why}"))


async def _through_http(workload: Workload, engine: str, speculation: bool) -> Figures:
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
            seen = await _load(mesh.url, name, folder, workload)
            worker_pid = mesh.child("worker-1").pid
            return seen | {"rss_mib": machine.peak_rss_mib(worker_pid)}


async def _load(url: str, name: str, folder: Path, workload: Workload) -> Figures:
    """The workload as any client sends it to an OpenAI server, after two requests that warm it. Raises PeerFailed."""
    asked = _bodies(name, folder, workload, 0, workload.requests)
    await load.run(url, _bodies(name, folder, workload, 900, 2), streams=2)
    seen = await load.run(url, asked, workload.streams, timeout_s=RUN_WITHIN_S)
    if seen.failures:
        raise peer.PeerFailed(f"{len(seen.failures)} requests failed, first: {seen.failures[0]}")
    if seen.completion_tokens != len(asked) * workload.out_tokens:
        raise peer.PeerFailed(f"{seen.completion_tokens} tokens came, not {len(asked)} times {workload.out_tokens}")
    return {
        "decode_tok_s": None,
        "output_tok_s": seen.completion_tokens / seen.wall_s,
        "prefill_tok_s": None,
        "ttft_ms": load.percentile_ms(seen.ttft_s, 0.5),
        "ttft_p99_ms": load.percentile_ms(seen.ttft_s, 0.99),
        "itl_p50_ms": load.percentile_ms(seen.itl_s, 0.5),
        "itl_p99_ms": load.percentile_ms(seen.itl_s, 0.99),
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
