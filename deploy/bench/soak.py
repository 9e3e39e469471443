"""Half an hour of everything clients do, and what must not have grown, leaked or stuck by its end.

    python -m deploy.bench.soak [--minutes 30] [--streams 12] [--threads N] [--seed 1] [--json FILE]

The whole mesh of real processes with the real model and the drafter, and a small KV cache so that it fills and requests
wait for blocks. `--streams` clients send requests of all kinds (`deploy.bench.soak_requests`) after random pauses.
Every REST_EVERY_S all of them rest until the mesh is idle, which is when its books are compared. Before they begin,
FILLERS requests that ask for no token, short ones over HTTP, and some whose long answers are all but finished fill the
tables in which requests, and what was said, are remembered.

Rules, each a complaint and exit code 1 when broken:
memory    of each process: the 95 % interval of its slope over the samples behind the first third (caches fill before)
          must not lie wholly above RESOLUTION_MIB_PER_HOUR
threads   and open files: at the last rest no more than at the fullest of the rests in the first third
blocks    none held, nothing running or waiting, no stream open at each rest; no repair by the worker's audit
requests  each ends once, as its kind must, within BOUND_S; the witnesses' texts never change
logs      no line of level error, no line that is not ours; no process starts a second time, or is missing in a sample
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy import broker, pull
from deploy.bench import machine, soak_requests
from deploy.bench.mesh import show
from deploy.bench.slope import Slope, fit
from deploy.bench.soak_requests import Hurry, Mesh, Wrong
from deploy.local_mesh import LocalMesh, Options
from drafter import recent
from gateway import receipts
from gateway.model_files import load_card

KV_MIB = 96  # about 4,400 tokens: filled within the first minute
FILLERS = 8500  # worker and router remember 8,192 and 4,096 requests: a table that fills is no leak
TOGETHER = 16  # of those over HTTP
PAUSE_S = 0.4  # mean of a client's pause between requests
BOUND_S = 120.0
SAMPLE_S = 5.0
REST_EVERY_S = 75.0
IDLE_WITHIN_S = 30.0
AUDIT_S = 10.5  # the worker audits when it falls idle, if it did not within 10 s before
KEPT_EVERY_S = 30.0  # samples in the report; the slopes are of all
RESOLUTION_MIB_PER_HOUR = 1.0
MOST_SHOWN = 20
AT_REST = {
    "worker": ("mill_worker_running", "mill_worker_waiting", "mill_worker_blocks_held"),
    "gateway": ("mill_gateway_active_streams",),
}
NEVER = {
    "worker": ("mill_worker_kv_repairs_total", "mill_worker_failed_steps_total", "mill_worker_lost_messages_total"),
    "gateway": ("mill_gateway_lost_messages_total", "mill_gateway_bad_messages_total"),
}
SHOWN = ("mill_worker_running", "mill_worker_waiting", "mill_worker_blocks_held", "mill_worker_blocks_named")

Figures = dict[str, dict[str, float]]  # service -> name -> value


class Usage(NamedTuple):
    """What one process holds now."""

    rss_mib: float
    threads: int
    files: int


class Sample(NamedTuple):
    """`at_s` since the soak began. `rest`: everybody was resting and the mesh idle."""

    at_s: float
    processes: dict[str, Usage]
    figures: Figures
    rest: bool


@dataclass
class Record:
    """All that happened."""

    samples: list[Sample] = field(default_factory=list)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)  # kind -> outcome -> requests
    longest_s: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # lines of logs

    def ended(self, kind: str, outcome: str, seconds: float) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        self.longest_s[kind] = max(seconds, self.longest_s.get(kind, 0.0))

    @property
    def requests(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="of the worker; 1 where others use the machine too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(60 * options.minutes, options.streams, options.seed, options.threads))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    show({"rows": [{"kind": kind, **row} for kind, row in report["requests"].items()]})
    if report["complaints"]:
        raise SystemExit("\n".join(report["complaints"]))


async def measure(seconds: float, streams: int, seed: int, threads: int = 0) -> dict[str, Any]:
    """Soak a mesh of its own; the report, `complaints` empty when all rules held."""
    model = pull.pull("default")
    record = Record()
    with tempfile.TemporaryDirectory() as data:
        ports = {module: broker.free_port() for module in ("router", "drafter", "worker")}
        settings: dict[str, dict[str, Any]] = {module: {"metrics_port": port} for module, port in ports.items()}
        settings["worker"] |= {"kv_mib": KV_MIB} | ({"threads": threads} if threads else {})
        for module in (*ports, "gateway"):
            settings.setdefault(module, {})["log"] = "json"
        options = Options(model=model, data=Path(data), port=broker.free_port(), settings=settings)
        with machine.Disturbance() as lost:
            async with LocalMesh(options) as mesh:
                await mesh.until_ready()
                await Soak(mesh, record, ports["worker"], streams, seed).run(seconds, load_card(model).name)
                restarts = {child.name: child.restarts for child in mesh.children if child.restarts}
        record.errors += log_errors(Path(data) / "logs")
    record.errors += [f"{name} was started {count} times more" for name, count in restarts.items()]
    return {
        "machine": machine.describe(),
        "command": machine.command("deploy.bench.soak", sys.argv[1:]),
        "seconds": seconds,
        "streams": streams,
        "seed": seed,
        "steal_cores": lost.steal_cores,
        "busy_cores": lost.busy_cores,
        **summary(record, seconds),
    }


class Soak:
    """The clients, and who watches them."""

    def __init__(self, mesh: LocalMesh, record: Record, worker_port: int, streams: int, seed: int) -> None:
        self._mesh = mesh
        self._record = record
        self._streams = streams
        self._seed = seed
        self._places = {"worker": f"http://127.0.0.1:{worker_port}/metrics", "gateway": f"{mesh.url}/metrics"}
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self._may_send = asyncio.Event()
        self._open = 0
        self._began = 0.0

    async def run(self, seconds: float, model: str) -> None:
        host, port = self._mesh.url.removeprefix("http://").split(":")
        shared = Mesh(host, int(port))
        bus = await self._mesh.connect()
        hurry = Hurry(bus, model)
        await hurry.listen()
        await self._fill_receipts(model)
        await hurry.fill_drafter(recent.TOKENS_PER_AUDIENCE + soak_requests.SAID_AT_ONCE)
        await hurry.fill(FILLERS, "worker-1")  # last: until the worker speaks again, its router takes them all for open
        self._began = time.monotonic()
        await self._rest()
        self._may_send.set()
        clients = [asyncio.create_task(self._client(number, shared, hurry)) for number in range(self._streams)]
        try:
            await self._watch(seconds)
            self._may_send.clear()
            await self._rest(last=True)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            await self._http.aclose()
            await bus.close()
        self._record.wrong += hurry.wrong

    async def _fill_receipts(self, model: str) -> None:
        """As many short requests as the gateway keeps receipts of."""
        body = {"model": model, "prompt": "The", "max_tokens": 1}

        async def send() -> None:
            answer = await self._http.post(f"{self._mesh.url}/v1/completions", json=body, timeout=BOUND_S)
            if answer.is_error:
                raise SystemExit(f"a request that fills the receipts ended with {answer.status_code}: {answer.text}")

        for _ in range(0, receipts.MOST + TOGETHER, TOGETHER):
            await asyncio.gather(*(send() for _ in range(TOGETHER)))

    async def _client(self, number: int, shared: Mesh, hurry: Hurry) -> None:
        """Requests of random kinds after random pauses, for as long as it may."""
        chooser = random.Random(f"{self._seed} {number}")
        kinds = soak_requests.kinds(hurry)
        weights = [weight for weight, _ in kinds.values()]
        while True:
            await asyncio.sleep(chooser.expovariate(1 / PAUSE_S))
            await self._may_send.wait()
            (kind,) = chooser.choices(list(kinds), weights)
            await self._request(kind, lambda: kinds[kind][1](shared, chooser))  # noqa: B023 (awaited in this turn)

    async def _request(self, kind: str, send: Any) -> None:
        started = time.monotonic()
        self._open += 1
        try:
            async with asyncio.timeout(BOUND_S):
                outcome = await send()
        except TimeoutError:
            outcome = "stuck"
            self._complain(f"{kind}: no end within {BOUND_S:.0f} s")
        except (Wrong, OSError, ValueError, LookupError, asyncio.IncompleteReadError) as error:
            outcome = "wrong"
            self._complain(f"{kind}: {error!r}")
        finally:
            self._open -= 1
        self._record.ended(kind, outcome, time.monotonic() - started)

    async def _watch(self, seconds: float) -> None:
        rested = 0.0
        while (at := time.monotonic() - self._began) < seconds:
            if at - rested >= min(REST_EVERY_S, seconds / 6):
                self._may_send.clear()
                await self._rest()
                self._may_send.set()
                rested = time.monotonic() - self._began
            self._say(await self._sample(rest=False))
            await asyncio.sleep(SAMPLE_S)

    async def _rest(self, last: bool = False) -> None:
        """Until everything is idle, which it must be in time; the last time the worker audits itself as well."""
        deadline = time.monotonic() + BOUND_S
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if last:
            await asyncio.sleep(AUDIT_S)
            try:
                await self._http.post(f"{self._mesh.url}/v1/completions", json={"prompt": "The end", "max_tokens": 2})
            except httpx.HTTPError as error:
                self._complain(f"the last request of all: {error!r}")
        deadline = time.monotonic() + IDLE_WITHIN_S
        while held := busy(await self._figures()):
            if time.monotonic() > deadline:
                self._complain(f"not idle {IDLE_WITHIN_S:.0f} s after the last request: {held}")
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)  # for sockets and threads that have just ended
        self._say(await self._sample(rest=True))

    async def _sample(self, rest: bool) -> Sample:
        processes = {child.name: held for child in self._mesh.children
                     if child.pid and (held := usage(child.pid)) is not None}
        sample = Sample(time.monotonic() - self._began, processes, await self._figures(), rest)
        self._record.samples.append(sample)
        return sample

    async def _figures(self) -> Figures:
        """Of the services that answer: one that has died is started again, and the report says so."""
        found = {}
        for name, place in self._places.items():
            with contextlib.suppress(httpx.HTTPError):
                found[name] = parse((await self._http.get(place)).text)
        return found

    def _complain(self, what: str) -> None:
        """At once: half an hour is long to wait for what went wrong in its first minute."""
        self._record.wrong.append(what)
        print(f"{time.monotonic() - self._began:6.0f} s  {what}", file=sys.stderr, flush=True)

    def _say(self, sample: Sample) -> None:
        worker = sample.figures.get("worker", {})
        gauges = " ".join(f"{name.rpartition('_')[2]} {worker.get(name, math.nan):.0f}" for name in SHOWN)
        memory = " ".join(f"{name} {held.rss_mib:.0f}" for name, held in sample.processes.items())
        print(f"{sample.at_s:6.0f} s  {self._record.requests} requests, {len(self._record.wrong)} wrong | {gauges} | "
              f"MiB: {memory}{'  (at rest)' if sample.rest else ''}", file=sys.stderr, flush=True)


# --- what is read ----------------------------------------------------------------------------------------------------


def usage(pid: int) -> Usage | None:
    """Resident memory, threads and open files of a process, from /proc; None of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last where nobody has waited for it yet
        return None
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmRSS" not in status:
        return None
    return Usage(int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), files)


def parse(text: str) -> dict[str, float]:
    """A Prometheus page as name -> value, labels added up."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def busy(figures: Figures) -> dict[str, float]:
    """What is not zero though nothing runs, and is not known of a service that does not answer."""
    return {name: figures.get(service, {}).get(name, math.nan) for service, names in AT_REST.items() for name in names
            if figures.get(service, {}).get(name, math.nan)}


def log_errors(folder: Path) -> list[str]:
    """Lines of level error in our logs, lines in them that are not ours, and errors of the broker."""
    found = []
    for path in sorted(folder.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            if path.name.startswith("nats-server"):
                wrong = "[ERR]" in line or "[FTL]" in line
            else:
                try:
                    wrong = json.loads(line)["level"] in ("error", "critical")
                except (ValueError, LookupError, TypeError):
                    wrong = bool(line.strip())
            if wrong:
                found.append(f"{path.name}: {line[:300]}")
    return found


# --- what it means ---------------------------------------------------------------------------------------------------


def summary(record: Record, seconds: float) -> dict[str, Any]:
    """The figures of the report, and `complaints`: each rule that was broken."""
    rows = [row(name, record.samples, seconds)
            for name in dict.fromkeys(name for sample in record.samples for name in sample.processes)]
    last = record.samples[-1].figures
    complaints = [*(f"{row['process']}: {why}" for row in rows for why in row.pop("wrong")),
                  *(f"the {service} did not answer at the end" for service in NEVER if service not in last),
                  *(f"{name} is {last[service][name]:.0f}" for service, names in NEVER.items() if service in last
                    for name in names if last[service].get(name, 0.0)),
                  *record.wrong[:MOST_SHOWN], *record.errors[:MOST_SHOWN]]
    return {
        "rule": f"behind the first third, the 95 % interval of the slope must not lie above {RESOLUTION_MIB_PER_HOUR} "
                "MiB/hour; threads and open files at the last rest at most those of the first third's rests",
        "rows": rows,
        "requests": {kind: {**record.outcomes[kind], "longest_s": round(record.longest_s[kind], 2)}
                     for kind in sorted(record.outcomes)},
        "figures": {service: {name: value for name, value in sorted(figures.items())
                              if name.startswith("mill_") and not name.endswith(("_bucket", "_created"))}
                    for service, figures in last.items()},
        "wrong": len(record.wrong),
        "log_errors": len(record.errors),
        "complaints": complaints,
        "samples": list(thinned(record.samples)),
    }


def row(process: str, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """One process's figures, of the samples in which it lived; `wrong` says which rules it broke."""
    lived = [sample for sample in samples if process in sample.processes]
    later = [sample for sample in lived if sample.at_s >= seconds / 3]
    slope = fit([sample.at_s / 3600 for sample in later], [sample.processes[process].rss_mib for sample in later])
    rests = [sample for sample in lived if sample.rest] or lived[:1]
    early = [sample.processes[process] for sample in rests if sample.at_s < seconds / 3 or sample is rests[0]]
    last = rests[-1].processes[process]
    missed = len(samples) - len(lived)
    shown = (lived[0], (later or lived)[0], lived[-1])
    return {
        "process": process,
        "rss_mib": [round(sample.processes[process].rss_mib, 1) for sample in shown],
        "mib_per_hour": round(slope.slope, 2),
        "low": _rounded(slope.low),
        "high": _rounded(slope.high),
        "threads": [max(held.threads for held in early), last.threads],
        "files": [max(held.files for held in early), last.files],
        "wrong": broken(slope, early, last)
        + ([f"not there in {missed} of {len(samples)} samples"] if missed else []),
    }


def broken(slope: Slope, early: Sequence[Usage], last: Usage) -> list[str]:
    """Which of the rules on processes do not hold."""
    wrong = []
    if slope.grows(RESOLUTION_MIB_PER_HOUR):
        wrong.append(f"memory grows by {slope.slope:.1f} MiB/hour ({slope.low:.1f} to {slope.high:.1f})")
    for name in ("threads", "files"):
        most, now = max(getattr(held, name) for held in early), getattr(last, name)
        if now > most:
            wrong.append(f"{now} {name} at the last rest, {most} at first")
    return wrong


def thinned(samples: Sequence[Sample]) -> Sequence[Mapping[str, Any]]:
    """A sample every KEPT_EVERY_S and each rest."""
    kept: list[Mapping[str, Any]] = []
    due = 0.0
    for sample in samples:
        if sample.rest or sample.at_s >= due:
            due = sample.at_s + (0.0 if sample.rest else KEPT_EVERY_S)
            kept.append({
                "at_s": round(sample.at_s, 1),
                "rest": sample.rest,
                "rss_mib": {name: round(held.rss_mib, 1) for name, held in sample.processes.items()},
                **{name.removeprefix("mill_worker_"): sample.figures.get("worker", {}).get(name) for name in SHOWN},
                "open_streams": sample.figures.get("gateway", {}).get("mill_gateway_active_streams"),
            })
    return kept


def _rounded(value: float) -> float | None:
    return round(value, 2) if abs(value) < float("inf") else None


if __name__ == "__main__":
    main()
