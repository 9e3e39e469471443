"""`python -m kernels.verify [--json FILE]`: every Triton kernel against its reference, on whatever device is here.

On a GPU: serving shapes, with the time of each kernel and its share of what the machine was measured to do in the same
run: the time that moving the bytes at copy bandwidth and doing the arithmetic at matmul rate would take, over the time
it took; and the time of the fastest that the library has for the same work. Products run one after the other in a CUDA
graph, as in a decode step, each on weights of its own that no cache holds; everything else runs alone, after the caches
were flushed. Medians. Elsewhere: small shapes in Triton's interpreter, whose times mean nothing and are left out. Exit
status 1 when any result is wrong.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kernels.case import Case

REPETITIONS = 20
CHAIN_REPETITIONS = 9
# Far larger than any L2 cache, so that a timed kernel finds nothing of its own there, and long enough to write that the
# host has launched the kernel by then.
FLUSH_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Verified:
    """One row of the table. `error` is None when the kernel raised; times are None where they would mean nothing."""

    name: str
    shape: str
    ok: bool
    error: float | None
    time_us: float | None
    bytes: int
    flops: int
    share: float | None
    library_us: float | None = None  # the fastest of the library's ways


@dataclass(frozen=True, slots=True)
class Machine:
    """What this GPU was measured to do; bytes of a copy count read and written."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.verify", description="Check every Triton kernel against its reference."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args(arguments)
    # Triton reads this when a kernel is defined, so it stands before the import of the cases.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from kernels.cases import serving_cases, small_cases
    from kernels.compile_ahead import compile_ahead
    from kernels.launch import INTERPRETED
    from kernels.layer_cases import launches_of_a_layer

    torch.manual_seed(0)
    if not INTERPRETED:
        compile_ahead("kernels.cases:serving_calls")
    if INTERPRETED:
        device, machine, cases = f"Triton interpreter on {platform.machine()}", None, small_cases("cpu")
    else:
        device, machine, cases = torch.cuda.get_device_name(), measure_machine(), serving_cases("cuda")
    print(f"{device}; {', '.join(f'{name} {version}' for name, version in versions().items())}")
    if machine:
        print(f"copy {machine.copy_bytes_per_s / 1e9:.0f} GB/s, matmul {machine.matmul_flops_per_s / 1e12:.0f} Tflop/s")

    results: list[Verified] = []
    print(_line("kernel", "shape", "ok", "error", "time us", "MB", "share", "library"))
    try:
        for case in cases:
            results.append(verify(case, machine))
            print(_line(*_cells(results[-1])), flush=True)
    finally:  # also of a run that was interrupted
        if options.json:
            report = {
                "device": device,
                "copy_bytes_per_s": machine.copy_bytes_per_s if machine else None,
                "matmul_flops_per_s": machine.matmul_flops_per_s if machine else None,
                "versions": versions(),
                "kernels": [asdict(result) for result in results],
            }
            options.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"{launches_of_a_layer()} launches for each layer of a decode step")
    wrong = sum(not result.ok for result in results)
    print(f"{len(results)} checks, {wrong} wrong")
    return 1 if wrong else 0


def verify(case: "Case", machine: Machine | None) -> Verified:
    """Check one case; with a `machine`, time it too. A kernel that raises is a wrong result, its trace on stderr."""
    error: float | None = None
    time_us = share = library_us = None
    try:
        with nan_filled_memory():
            results = case.run()
        error = case.error(results)
        if machine and case.timed:
            time_us = median_time_us(case.run) if case.copies is None else chain_time_us(case.copies())
            ideal_s = max(case.bytes / machine.copy_bytes_per_s, case.flops / machine.matmul_flops_per_s)
            share = ideal_s * 1e6 / time_us
            library_us = _library_us(case)
    except Exception:
        print(f"{case.name} ({case.shape}) raised:", file=sys.stderr)
        traceback.print_exc()
        error = None
    ok = error is not None and error <= case.tolerance
    # JSON knows no NaN or infinity.
    finite = error if error is not None and math.isfinite(error) else None
    return Verified(case.name, case.shape, ok, finite, time_us, case.bytes, case.flops, share, library_us)


def _library_us(case: "Case") -> float | None:
    """The time of the library's fastest way; None where it has none."""
    times_us = []
    for way in case.library() if case.library else []:
        try:
            times_us.append(median_time_us(way[0]) if case.copies is None else chain_time_us(way))
        except (RuntimeError, ValueError) as refusal:
            print(f"{case.name} ({case.shape}): the library refuses: {refusal}", file=sys.stderr)
    return min(times_us, default=None)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """New tensors start as NaN (integers at their maximum), so that an element no kernel wrote is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])


def measure_machine() -> Machine:
    """Copy bandwidth over 1 GiB and bf16 matmul rate at 8192^3, timed like the kernels."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_us = median_time_us(lambda: target.copy_(source))
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matmul_us = median_time_us(lambda: torch.mm(a, b))
    return Machine(2 * source.nbytes / copy_us * 1e6, 2 * size**3 / matmul_us * 1e6)


def median_time_us(call: Callable[[], Any]) -> float:
    """Median device time of `call`, each run with a flushed L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    times_us = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times_us)


def chain_time_us(calls: list[Callable[[], Any]]) -> float:
    """Median device time of one of `calls`, which run one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # so that no result's memory is used twice
    times_us = []
    for _ in range(CHAIN_REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / len(kept))
    return statistics.median(times_us)


def versions() -> dict[str, str]:
    """What a result depends on, and when it was taken."""
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | {"commit": _commit(), "date": datetime.now(UTC).date().isoformat()}


def _commit() -> str:
    """The commit of this tree, with `+` when files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _cells(result: Verified) -> tuple[str, ...]:
    error = "-" if result.error is None else f"{result.error:.1e}"
    time_us = "-" if result.time_us is None else f"{result.time_us:.1f}"
    share = "-" if result.share is None else f"{result.share:.0%}"
    megabytes = f"{result.bytes / 1e6:.3g}"
    library = "-"
    if result.library_us is not None and result.time_us is not None:
        library = f"{result.library_us:.1f} ({result.library_us / result.time_us:.2f}x)"
    return result.name, result.shape, "yes" if result.ok else "NO", error, time_us, megabytes, share, library


def _line(name: str, shape: str, ok: str, error: str, time_us: str, megabytes: str, share: str, library: str) -> str:
    return f"{name:<28}{shape:<62}{ok:<4}{error:>8}{time_us:>10}{megabytes:>9}{share:>7}{library:>17}"


if __name__ == "__main__":
    sys.exit(main())
