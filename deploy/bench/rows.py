"""What more rows of one sequence cost a step of the native engine: what verifying drafts costs.

    python -m deploy.bench.rows [--rows 1,2,4,8,16] [--contexts 64,256] [--repeats 60] [--threads 2] [--json FILE]

The default model; steps of each number of rows in turn, medians; `ratio` is to one row in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploy import pull
from deploy.bench import machine
from deploy.bench.mesh import show
from kernels.native.decoder import NativeDecoder
from kernels.step import StepInputs

WARM = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,16", help="the first is what the others are compared with")
    parser.add_argument("--contexts", default="64,256", help="tokens in the cache before the rows")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(word) for word in options.rows.split(",")]
    contexts = [int(word) for word in options.contexts.split(",")]
    blocks = -(-(max(contexts) + max(counts)) // NativeDecoder.block_size_tokens)
    decoder = NativeDecoder.load(pull.pull("default"), blocks=blocks, threads=options.threads)
    with machine.Disturbance() as lost:
        rows = [row for context in contexts for row in measure(decoder, context, counts, options.repeats)]
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "command": machine.command("deploy.bench.rows", sys.argv[1:]),
        "steal_cores": lost.steal_cores,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def measure(decoder: NativeDecoder, context: int, counts: list[int], repeats: int) -> list[dict[str, float]]:
    """One line per number of rows, taken in turn."""
    steps = {count: step_of(decoder, context, count) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(WARM + repeats):
        for count, inputs in steps.items():
            started = time.perf_counter()
            decoder.step(inputs)
            seconds[count].append(time.perf_counter() - started)
    middle = {count: statistics.median(times[WARM:]) for count, times in seconds.items()}
    return [
        {
            "context": context,
            "rows": count,
            "step_ms": round(1000 * middle[count], 3),
            "least_ms": round(1000 * min(seconds[count][WARM:]), 3),
            "ratio": round(middle[count] / middle[counts[0]], 3),
        }
        for count in counts
    ]


def step_of(decoder: NativeDecoder, context: int, count: int) -> StepInputs:
    """`count` greedy rows of one sequence behind `context` tokens."""
    return StepInputs(
        tokens=np.arange(100, 100 + count, dtype=np.int32),
        positions=np.arange(context, context + count, dtype=np.int32),
        sequence_starts=np.array([0, count], np.int32),
        block_tables=np.arange(decoder.blocks, dtype=np.int32)[None],
        sample_rows=np.arange(count, dtype=np.int32),
        temperature=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seeds=np.zeros(count, np.uint64),
    )


if __name__ == "__main__":
    main()
