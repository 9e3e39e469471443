"""`python -m kernels.tune [--json FILE]`: measure the launch choices of the products on this GPU, into `tuned.json`.

Rule: a candidate differs from the reasoned choice in what changes no bit, and one whose result differs from it by a bit
is thrown out and named. The fastest replaces the reasoned choice only where it gains 3 %, more than two runs differ.
Takes about a minute: 5 shapes, 2 or 3 buckets of rows for 3 operators, 7 candidates, each in a chain of launches on
weights that no cache holds. Exit status 2 without a GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import tuned
from kernels.case import copies_of
from kernels.compile_ahead import compile_ahead
from kernels.launch import Launch
from kernels.verify import chain_time_us, versions

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192))  # Llama-3.1-8B, and a large one
GAIN = 0.97


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description="Measure launch choices on this GPU.")
    parser.add_argument("--json", type=Path, default=tuned.TABLE, metavar="FILE", help="the table, %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: launch choices are measured on the device that is to use them", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    compile_ahead("kernels.tune:calls_on_paper")
    found: dict[str, dict[str, Any]] = {}
    try:
        for operator, shape, rows in workloads():
            found.update(measured(operator, *shape, rows))
    finally:  # also of a run that was interrupted
        table = json.loads(options.json.read_text()) if options.json.exists() else {}
        table[device] = {"versions": versions(), "choices": found}
        options.json.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} choices of {device} in {options.json.name}")
    return 0


def workloads() -> Iterator[tuple[str, tuple[int, int], int]]:
    """Operator, outputs and inputs, and the rows at the upper end of each of its buckets."""
    for shape in SHAPES:
        for operator, buckets in tuned.BUCKETS.items():
            for rows in buckets:
                yield operator, shape, rows


def calls_on_paper() -> Iterator[Callable[[], Any]]:
    """Every candidate of every workload, on the meta device: for the compiler."""
    for operator, shape, rows in workloads():
        runs, fallback = workload(operator, *shape, rows, "meta")
        for choice in (fallback, *candidates(fallback)):
            yield partial(runs[0], choice)


def measured(operator: str, outputs: int, inputs: int, rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entry of one workload, if anything is faster than the reasoned choice."""
    runs, fallback = workload(operator, outputs, inputs, rows, "cuda")
    name = tuned.key(operator, outputs, inputs, rows)

    def time_us(choice: Launch) -> float:
        return chain_time_us([partial(run, choice) for run in runs])

    entry = best(name, runs[0], fallback, candidates(fallback), time_us)
    if entry is not None:
        yield name, entry


def candidates(fallback: Launch) -> list[Launch]:
    """What is tried: one or two times 64 outputs for each warpgroup, 2 to 4 stages."""
    tried = [Launch(64, 4, stages) for stages in (2, 3, 4)]
    tried += [Launch(128, 4, stages) for stages in (3, 4)]
    tried.append(Launch(128, 8, 3))
    return [one for one in tried if one != fallback]


def best(
    name: str,
    run: Callable[[Launch], Tensor],
    fallback: Launch,
    others: list[Launch],
    time_us: Callable[[Launch], float],
) -> dict[str, Any] | None:
    """The entry of the fastest that gives the bits of `fallback`; None where that is `fallback`, or nearly."""
    expected, fallback_us = run(fallback), time_us(fallback)
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
        if (other_us := time_us(other)) < winner_us:
            winner, winner_us = other, other_us
    print(f"{name}: {fallback_us:.1f} us reasoned, {min(winner_us, fallback_us):.1f} us with {winner}", flush=True)
    if winner == fallback:
        return None
    return {**winner._asdict(), "time_us": round(winner_us, 2), "fallback_us": round(fallback_us, 2)}


def workload(
    operator: str, outputs: int, inputs: int, rows: int, device: str
) -> tuple[list[Callable[[Launch], Tensor]], Launch]:
    """The product under a launch choice, on several weights, and the reasoned choice."""
    from kernels import triton_linear4, triton_linear8, tuning
    from kernels.product_cases import random_rows8, random_weight4, random_weight8
    from kernels.triton_product import Workspace

    kind, code = torch.bfloat16, torch.float8_e4m3fn
    count = 1 if device == "meta" else None
    if operator == "linear4":
        x = torch.randn(rows, inputs, dtype=kind, device=device)
        make4 = partial(random_weight4, outputs, inputs, 128, "symmetric", kind, device)
        fallback, splits = tuning.linear4_split(outputs, inputs)
        work = Workspace(device, rows, splits * outputs)
        fours = copies_of(make4, outputs * inputs // 2)[:count]
        return [partial(_with_choice, triton_linear4.linear4, x, four, work=work) for four in fours], fallback
    many = rows > tuning.FEW_ROWS
    rows8 = random_rows8(rows, inputs, code, False, device)
    eights = copies_of(partial(random_weight8, outputs, inputs, code, False, device), outputs * inputs)[:count]
    fallback = tuning.linear8_many(outputs, inputs)[1] if many else tuning.linear8(outputs, inputs)
    return [partial(_with_choice, triton_linear8.linear8, rows8, eight, kind) for eight in eights], fallback


def _with_choice(operator: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
    """The operator under a launch choice, which comes last."""
    *before, choice = arguments
    return operator(*before, choice=choice, **named)


if __name__ == "__main__":
    sys.exit(main())
