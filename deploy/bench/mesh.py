"""What the mesh itself costs: gateway, router, bus and worker shell around the mock engine.

    python -m deploy.bench.mesh [--streams 1,32,256] [--requests N] [--max-tokens 64] [--json FILE]

Real processes over a real nats-server on loopback. The steps of the mock engine are short, so that what is measured is
the path of a token and not the pretended network. `chunks_per_cpu_s` counts the CPU seconds of all our processes and
the broker; it is the figure to compare on a noisy machine.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy import broker, pull
from deploy.bench import load, machine
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--requests", type=int, default=0, help="per row; default: 4 per stream, at least 16")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    streams = [int(count) for count in options.streams.split(",")]
    report = asyncio.run(measure(streams, options.requests, options.max_tokens))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


async def measure(streams: list[int], requests: int, max_tokens: int) -> dict[str, object]:
    """One row per number of concurrent streams, all on one mesh."""
    model = pull.pull("default")
    name = load_card(model).name
    rows = []
    with tempfile.TemporaryDirectory() as data:
        options = Options(
            model=model,
            data=Path(data),
            port=broker.free_port(),
            engine="mock",
            drafters=0,
            log_level="warning",
            settings={
                "worker": {
                    "mock_step_s": 0.002,
                    "mock_row_s": 0.0,
                    "mock_token_s": 0.0,
                    "max_running": 256,
                    "max_waiting": 1024,
                    "kv_blocks": 16384,
                    "step_tokens": 4096,
                }
            },
        )
        async with LocalMesh(options) as mesh:
            await mesh.until_ready()
            await load.run(mesh.url, bodies(name, 8, max_tokens), streams=4)  # warm
            pids = [child.pid for child in mesh.children if child.pid]
            for count in streams:
                sent = bodies(name, requests or max(16, 4 * count), max_tokens)
                before = machine.cpu_seconds(pids)
                with machine.Disturbance() as lost:
                    seen = await load.run(mesh.url, sent, streams=count)
                rows.append(row(count, len(sent), seen, machine.cpu_seconds(pids) - before, lost))
    return {"machine": machine.describe(), "command": "python -m deploy.bench.mesh", "rows": rows}


def bodies(model: str, count: int, max_tokens: int) -> list[dict[str, object]]:
    """Greedy chat requests with prompts of about 100 tokens that share no prefix."""
    return [
        {
            "model": model,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "messages": [{"role": "user", "content": f"{i}: " + " ".join(f"word{i * 31 + k}" for k in range(24))}],
        }
        for i in range(count)
    ]


def row(streams: int, requests: int, seen: load.Load, cpu_s: float, lost: machine.Disturbance) -> dict[str, object]:
    """The figures of one run."""
    return {
        "streams": streams,
        "requests": requests,
        "failures": len(seen.failures),
        "req_per_s": round(len(seen.e2e_s) / seen.wall_s, 1),
        "chunks_per_s": round(seen.chunks / seen.wall_s, 1),
        "tokens_per_s": round(seen.completion_tokens / seen.wall_s, 1),
        "chunks_per_cpu_s": round(seen.chunks / cpu_s, 1) if cpu_s else None,
        "ttft_p50_ms": load.percentile_ms(seen.ttft_s, 0.5),
        "ttft_p99_ms": load.percentile_ms(seen.ttft_s, 0.99),
        "itl_p50_ms": load.percentile_ms(seen.itl_s, 0.5),
        "itl_p99_ms": load.percentile_ms(seen.itl_s, 0.99),
        "server_cpu_s": round(cpu_s, 2),
        "wall_s": round(seen.wall_s, 2),
        "steal_cores": lost.steal_cores,
    }


def show(report: dict[str, object]) -> None:
    """The rows as a table for people."""
    rows = report["rows"]
    assert isinstance(rows, list)
    table = Table(box=None)
    titles = list(dict.fromkeys(title for figures in rows for title in figures))
    for title in titles:
        table.add_column(title, justify="right")
    for figures in rows:
        table.add_row(*("-" if figures.get(title) is None else str(figures[title]) for title in titles))
    Console().print(table)


if __name__ == "__main__":
    main()
