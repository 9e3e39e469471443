"""`python -m kernels.tune [--json FILE]`: measure the launch choices of the products on this GPU, into `tuned.json`.

Rule: a candidate differs from the reasoned choice in what changes no bit, and one whose result differs from it by a bit
is thrown out and named. The fastest replaces the reasoned choice only where it gains 3 %, more than two runs differ.
Takes about a minute: 4 shapes, 3 buckets of rows, 2 operators, 12 candidates. Exit status 2 without a GPU.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import tuned
from kernels.launch import Launch
from kernels.verify import median_time_us, versions

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))  # Llama-3.1-8B
GAIN = 0.97


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description="Measure launch choices on this GPU.")
    parser.add_argument("--json", type=Path, default=tuned.TABLE, metavar="FILE", help="the table, %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: launch choices are measured on the device that is to use them", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    found = dict(entry for shape in SHAPES for entry in measured(*shape))
    table = json.loads(options.json.read_text()) if options.json.exists() else {}
    table[device] = {"versions": versions(), "choices": found}
    options.json.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} choices of {device} in {options.json.name}")
    return 0


def measured(outputs: int, inputs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of one shape that are faster than the reasoned choice."""
    for operator, rows in itertools.product(("linear4", "linear8"), tuned.BUCKETS):
        run, fallback = workload(operator, outputs, inputs, rows)
        name = tuned.key(operator, outputs, inputs, rows)
        entry = best(name, run, fallback, candidates(fallback), median_time_us)
        if entry is not None:
            yield name, entry


def candidates(fallback: Launch) -> list[Launch]:
    """What is tried: one warpgroup for each 64 outputs, 2 to 6 stages."""
    tried = [Launch(block, block // 16, stages) for block in (64, 128) for stages in (2, 3, 4, 5, 6)]
    return [one for one in tried if one != fallback]


def best(
    name: str,
    run: Callable[[Launch], Tensor],
    fallback: Launch,
    others: list[Launch],
    time_us: Callable[[Callable[[], Any]], float],
) -> dict[str, Any] | None:
    """The entry of the fastest that gives the bits of `fallback`; None where that is `fallback`, or nearly."""
    expected, fallback_us = run(fallback), time_us(lambda: run(fallback))
    winner, winner_us = fallback, fallback_us * GAIN
    for other in others:
        try:
            result = run(other)
        except Exception as refusal:  # too much shared memory, say
            print(f"{name}: {other} cannot be launched: {type(refusal).__name__}")
            continue
        if not torch.equal(result, expected):
            print(f"{name}: {other} rounds differently and is left out")
            continue
        if (other_us := time_us(lambda other=other: run(other))) < winner_us:
            winner, winner_us = other, other_us
    print(f"{name}: {fallback_us:.1f} us reasoned, {min(winner_us, fallback_us):.1f} us with {winner}", flush=True)
    if winner == fallback:
        return None
    return {**winner._asdict(), "time_us": round(winner_us, 2), "fallback_us": round(fallback_us, 2)}


def workload(operator: str, outputs: int, inputs: int, rows: int) -> tuple[Callable[[Launch], Tensor], Launch]:
    """The product under a launch choice, and the reasoned choice."""
    from kernels import triton_linear4, triton_linear8, tuning
    from kernels.product_cases import random_rows8, random_weight4, random_weight8

    if operator == "linear4":
        x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        four = random_weight4(outputs, inputs, 128, "symmetric", torch.bfloat16, "cuda")
        fallback = tuning.linear4_split(outputs, inputs)[0]
        return lambda choice: triton_linear4.linear4(x, four, choice=choice), fallback
    code = torch.float8_e4m3fn
    rows8, eight = random_rows8(rows, inputs, code, False, "cuda"), random_weight8(outputs, inputs, code, False, "cuda")
    fallback = tuning.linear8(outputs, inputs)[0]
    return lambda choice: triton_linear8.linear8(rows8, eight, torch.bfloat16, choice), fallback


if __name__ == "__main__":
    sys.exit(main())
