"""What tracing costs: the same load on meshes without it, with all of it, and with a twentieth of it, in turn.

    python -m deploy.bench.tracing [--rounds 10] [--streams 32] [--requests 256] [--max-tokens 64]
        [--engine mock|cpu] [--json FILE]

Three meshes of real processes. A mock engine takes no time here, so that all there is is the path of a token, which is
the worst case; `--engine cpu` says what is left of it beside a model of 135M parameters. Spans go to a collector of a
process of its own, which reads and drops them; its time counts for nobody, but it shares the machine. Ratios are within
a round, the median of them with its 95 % interval: above 1, more than without tracing.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvloop

from deploy import broker, pull
from deploy.bench import load, machine, mesh, paired
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card

SAMPLED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.05"}
SIDES: dict[str, tuple[bool, dict[str, str]]] = {"off": (False, {}), "on": (True, {}), "sampled": (True, SAMPLED)}
FIGURES = ("tokens_per_s", "tokens_per_cpu_s", "req_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.tracing", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help=f"at least {paired.LEAST_PAIRS}")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="of a side and round")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--engine", choices=("mock", "cpu"), default="mock")
    parser.add_argument("--sink", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.sink:
        ThreadingHTTPServer(("127.0.0.1", options.sink), _Sink).serve_forever()
    report = uvloop.run(measure(options))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["ratios"]:
        print(f"{row['side']:<8} {row['figure']:<17} {row['value']:.3f} of off ({row['low']:.3f} to {row['high']:.3f})")


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, `options.rounds` times."""
    model = pull.pull("default")
    name, numbers = load_card(model).name, itertools.count(1)
    seen: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    async with contextlib.AsyncExitStack() as stack:
        collector = stack.enter_context(_collector())
        sides = [await stack.enter_async_context(_mesh(side, model, collector, options.engine)) for side in SIDES]
        for side in sides:
            await load.run(side.url, mesh.bodies(name, options.streams, 8, numbers), options.streams)
        for number in range(options.rounds):
            turn = number % len(sides)
            for side in sides[turn:] + sides[:turn]:
                sent = mesh.bodies(name, options.requests, options.max_tokens, numbers)
                seen[side.name].append(await mesh.once(side, sent, options.streams))
    ratios = [{"side": side, "figure": figure, **_ratio(seen[side], seen["off"], figure)}
              for side in SIDES if side != "off" for figure in FIGURES]
    return {"machine": machine.describe(), "command": machine.command("deploy.bench.tracing", sys.argv[1:]),
            "ratios": ratios, "rows": [mesh.median_row(side, options.streams, rounds) for side, rounds in seen.items()]}


def _ratio(side: list[dict[str, Any]], off: list[dict[str, Any]], figure: str) -> dict[str, float]:
    found = paired.median([one[figure] / other[figure] for one, other in zip(side, off, strict=True)])
    return {name: round(value, 4) for name, value in found._asdict().items()}


@contextlib.asynccontextmanager
async def _mesh(side: str, model: Path, collector: str, engine: str) -> AsyncIterator[mesh.Side]:
    traced, variables = SIDES[side]
    worker = {"mock_step_s": 0.0, "mock_row_s": 0.0, "mock_token_s": 0.0, "max_running": 256, "max_waiting": 1024,
              "kv_blocks": 65536, "step_tokens": 8192} if engine == "mock" else {}
    with tempfile.TemporaryDirectory() as data:
        options = Options(model=model, data=Path(data), port=broker.free_port(), engine=engine, drafters=0,
                          log_level="warning", otlp=collector if traced else "", settings={"worker": worker})
        os.environ.update(variables)
        async with LocalMesh(options) as running:
            await running.until_ready()
            for variable in variables:
                del os.environ[variable]
            yield mesh.Side(side, running.url, {child.name: child.pid for child in running.children if child.pid})


@contextlib.contextmanager
def _collector() -> Iterator[str]:
    """The URL of one that runs while the block does."""
    port = broker.free_port()
    process = subprocess.Popen([sys.executable, "-m", "deploy.bench.tracing", "--sink", str(port)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nobody reads it."""


if __name__ == "__main__":
    main()
