"""What the mesh itself costs: gateway, router, bus and worker shells around mock engines; beside other meshes.

    python -m deploy.bench.mesh [--streams 1,32,256] [--step-ms 0] [--rounds 3] [--peer NAME=URL@PID,PID ...]

Real processes over a real nats-server on loopback. A mock step takes `--step-ms`, whatever its rows: what is measured
is the path of a token. A peer is any running OpenAI endpoint with the processes that serve it (their descendants
count too); the sides take turns, round by round, under the same client with the same requests. One row per side and
number of streams, each figure the median of its rounds. `tokens_per_cpu_s` counts the CPU seconds of everything but
the client, broker and mock engines included: it is the figure to compare on a noisy machine.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from deploy import broker, pull
from deploy.bench import load, machine
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card

OURS = "tokenmill"
LEAST_REQUESTS = 16
WAVES = 4  # requests per stream


@dataclass(frozen=True)
class Side:
    """One mesh under load. `parts` names the processes whose CPU time counts."""

    name: str
    url: str
    parts: Mapping[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--requests", type=int, default=0, help=f"per row and round; default: {WAVES} per stream, "
                        f"at least {LEAST_REQUESTS}")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=0.0, help="of our mock engines; a peer brings its own")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=URL@PID,PID",
                        help="an OpenAI endpoint that runs already and serves a model of the same name")
    parser.add_argument("--model-name", help="for peers that call the model otherwise")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = uvloop.run(measure(options))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def peer(text: str) -> Side:
    """A `--peer`: NAME=URL@PID,PID. Raises argparse's error for anything else."""
    name, equals, rest = text.partition("=")
    url, at, pids = rest.rpartition("@")
    parts = pids.split(",")
    if not (name and equals and at and url.startswith("http://") and all(pid.isdigit() for pid in parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=http://HOST:PORT@PID,PID")
    return Side(name, url.rstrip("/"), {pid: int(pid) for pid in parts})


async def measure(options: argparse.Namespace) -> dict[str, object]:
    """Every side at every number of streams, in turn."""
    model = pull.pull("default")
    name = load_card(model).name
    numbers = itertools.count(1)
    rows = []
    with tempfile.TemporaryDirectory() as data:
        async with LocalMesh(_mesh(model, Path(data), options)) as mesh:
            await mesh.until_ready()
            ours = Side(OURS, mesh.url, {child.name: child.pid for child in mesh.children if child.pid})
            sides = [ours, *options.peer]
            for streams in (int(count) for count in options.streams.split(",")):
                count = options.requests or max(LEAST_REQUESTS, WAVES * streams)
                for side in sides:  # warm, at the width that is measured
                    await load.run(side.url, bodies(_name(side, name, options), streams, 8, numbers), streams)
                seen: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
                for _ in range(options.rounds):
                    for side in sides:
                        sent = bodies(_name(side, name, options), count, options.max_tokens, numbers)
                        seen[side.name].append(await once(side, sent, streams))
                rows += [median_row(side, streams, found) for side, found in seen.items()]
    said = [argument for argument in sys.argv[1:] if argument not in ("--json", str(options.json))]
    command = shlex.join(["python", "-m", "deploy.bench.mesh", *said])
    return {"machine": machine.describe(), "command": command, "step_ms": options.step_ms, "rows": rows}


def _mesh(model: Path, data: Path, options: argparse.Namespace) -> Options:
    worker = {"mock_step_s": options.step_ms / 1000, "mock_row_s": 0.0, "mock_token_s": 0.0, "max_running": 256,
              "max_waiting": 1024, "kv_blocks": 65536, "step_tokens": 8192}
    return Options(model=model, data=data, port=broker.free_port(), engine="mock", workers=options.workers,
                   drafters=0, log_level="warning", settings={"worker": worker})


def _name(side: Side, ours: str, options: argparse.Namespace) -> str:
    return ours if side.name == OURS else options.model_name or ours


def bodies(model: str, count: int, max_tokens: int, numbers: "itertools.count[int]") -> list[dict[str, object]]:
    """Greedy chat requests with prompts of about 130 tokens; none begins like another one ever did."""
    return [
        {
            "model": model,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "messages": [{"role": "user", "content": f"{i}: " + " ".join(f"word{i * 31 + k}" for k in range(24))}],
        }
        for i in itertools.islice(numbers, count)
    ]


async def once(side: Side, sent: Sequence[dict[str, object]], streams: int) -> dict[str, Any]:
    """The figures of one run on one side."""
    before = {part: machine.cpu_seconds([pid]) for part, pid in side.parts.items()}
    with machine.Disturbance() as lost:
        seen = await load.run(side.url, sent, streams)
    cpu_s = {part: machine.cpu_seconds([pid]) - before[part] for part, pid in side.parts.items()}
    total_s = sum(cpu_s.values())
    tokens = seen.completion_tokens
    return {
        "requests": len(sent),
        "failures": len(seen.failures),
        "tokens": tokens,
        "tokens_per_cpu_s": round(tokens / total_s, 1) if total_s else None,
        "req_per_cpu_s": round(len(seen.e2e_s) / total_s, 2) if total_s else None,
        "cpu_us_per_token": round(1e6 * total_s / tokens, 1) if tokens else None,
        "tokens_per_chunk": round(tokens / seen.chunks, 2) if seen.chunks else None,
        "ttft_p50_ms": load.percentile_ms(seen.ttft_s, 0.5),
        "ttft_p99_ms": load.percentile_ms(seen.ttft_s, 0.99),
        "itl_p50_ms": load.percentile_ms(seen.itl_s, 0.5),
        "itl_p99_ms": load.percentile_ms(seen.itl_s, 0.99),
        "tokens_per_s": round(tokens / seen.wall_s, 1),
        "req_per_s": round(len(seen.e2e_s) / seen.wall_s, 1),
        "cpu_s": round(total_s, 2),
        "cpu_s_of": {part: round(seconds, 2) for part, seconds in cpu_s.items()},
        "client_cpu_s": round(seen.cpu_s, 2),
        "steal_cores": lost.steal_cores,
        "others_cores": round(max(0.0, lost.busy_cores - (total_s + seen.cpu_s) / seen.wall_s), 2),
    }


def median_row(side: str, streams: int, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row out of its rounds: failures summed, all else the median; the rounds themselves are kept."""
    row: dict[str, Any] = {"side": side, "streams": streams}
    for title, value in rounds[0].items():
        values = [figures[title] for figures in rounds if figures[title] is not None]
        if title == "failures":
            row[title] = sum(values)
        elif isinstance(value, Mapping):
            row[title] = {part: statistics.median(figures[part] for figures in values) for part in value}
        else:
            row[title] = statistics.median(values) if values else None
    return row | {"rounds": list(rounds)}


def show(report: dict[str, object]) -> None:
    """The rows as a table for people; what is nested stays in the file."""
    rows = report["rows"]
    assert isinstance(rows, list)
    table = Table(box=None)
    titles = [title for title in dict.fromkeys(title for figures in rows for title in figures)
              if not any(isinstance(figures.get(title), dict | list) for figures in rows)]
    for title in titles:
        table.add_column(title, justify="right")
    for figures in rows:
        table.add_row(*("-" if figures.get(title) is None else str(figures[title]) for title in titles))
    Console().print(table)


if __name__ == "__main__":
    main()
