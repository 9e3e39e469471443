"""What a shared prefix saves: TTFT of a long prompt, and of the next one that begins with the same 2,000 tokens.

    python -m deploy.bench.prefix [--repeats 5] [--workers 2] [--json FILE]

Real processes and two workers: a request that went to the other one would find nothing.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from deploy import broker, pull
from deploy.bench import load, machine, prompts
from deploy.bench.mesh import show
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer

PREFIX_TOKENS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.prefix", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(options.repeats, options.workers))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


async def measure(repeats: int, workers: int) -> dict[str, Any]:
    """One row per repeat, each with a prefix of its own, and the medians."""
    model = pull.pull("default")
    name, tokenizer = load_card(model).name, Tokenizer.load(model)

    def body(seed: int, own_seed: int) -> dict[str, object]:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special=False)

        prompt = prompts.tokens(encode, seed, PREFIX_TOKENS) + prompts.tokens(encode, own_seed, 24)
        return {"model": name, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as data:
        options = Options(model=model, data=Path(data), port=broker.free_port(), workers=workers, log_level="warning")
        async with LocalMesh(options) as mesh:
            await mesh.until_ready()
            await load.run(mesh.url, [body(1, 1)], streams=1)
            for repeat in range(repeats):
                with machine.Disturbance() as lost:
                    first = await load.run(mesh.url, [body(100 + repeat, 200 + repeat)], streams=1)
                    second = await load.run(mesh.url, [body(100 + repeat, 300 + repeat)], streams=1)
                failures = first.failures + second.failures
                if failures:
                    raise SystemExit(f"a request failed: {failures[0]}")
                cold_ms, warm_ms = 1000 * first.ttft_s[0], 1000 * second.ttft_s[0]
                rows.append(
                    {
                        "repeat": repeat,
                        "first_ttft_ms": round(cold_ms, 1),
                        "second_ttft_ms": round(warm_ms, 1),
                        "ratio": round(cold_ms / warm_ms, 1),
                        "cached_tokens": second.cached_tokens,
                        "steal_cores": lost.steal_cores,
                    }
                )
    middle = {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
    return {"machine": machine.describe(), "rows": [*rows, middle | {"repeat": "median"}]}


if __name__ == "__main__":
    main()
