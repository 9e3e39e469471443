"""`python -m deploy.bench.gpu [--json FILE]`: decode and prefill of whole models on a GPU, beside the naive way.

Shapes of Llama-3.1-8B and SmolLM2-135M with random weights, in bf16, FP8 and four bits, batches of 1 to 256 sequences
of 512 tokens. Decode steps are captured as CUDA graphs, replayed and timed with events; prefill is one prompt of 2,048
tokens. Naive is torch called operator by operator, without graphs, in bf16.

    share_of_bandwidth  bytes of weights and KV cache that a decode step has to read, over its time, over the bandwidth
                        of a large copy in the same run
    share_of_matmul     operations of a prefill's products, over its time, over the rate of a large bf16 product in the
                        same run; FP8 may be above one

Exit status 2 where there is no GPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deploy.bench import machine
from deploy.bench.gpu_model import (
    PRECISIONS,
    SHAPES,
    Batch,
    Model,
    fused_step,
    naive_step,
    random_batch,
    random_model,
    unfused_step,
)
from kernels.compile_ahead import compile_ahead
from kernels.verify import Machine, measure_machine, versions

CONTEXT_TOKENS = 512
PROMPT_TOKENS = 2048
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Above it the fused products read weights again for every 16 rows; see docs/kernels.md.
MOST_FUSED_ROWS = 64
REPETITIONS = 20
NAIVE = "naive bf16"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(SHAPES), help="of %(default)s")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="%(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "no GPU here: this benchmark measures one. Run it on a machine where torch.cuda.is_available() is true; "
            "`python -m kernels.verify` checks the kernels' numbers anywhere.",
            file=sys.stderr,
        )
        return 2
    compile_ahead("deploy.bench.gpu:calls_on_paper")
    device, batches = measure_machine(), [int(batch) for batch in options.batches.split(",")]
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {device.copy_bytes_per_s / 1e9:.0f} GB/s, {device.matmul_flops_per_s / 1e12:.0f} Tflop/s")
    rows: list[dict[str, Any]] = []
    try:
        for row in (row for model in options.models.split(",") for row in measured(model, batches, device)):
            rows.append(row)
            print(line(row), flush=True)
    finally:  # also of a run that was interrupted
        if options.json:
            report = {
                "machine": machine.describe(),
                "device": name,
                "copy_bytes_per_s": device.copy_bytes_per_s,
                "matmul_flops_per_s": device.matmul_flops_per_s,
                "versions": versions(),
                "rows": rows,
            }
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def calls_on_paper() -> Iterator[Callable[[], Any]]:
    """A decode step and a prompt of every model in every precision, on the meta device: for the compiler."""
    for shape in SHAPES.values():
        for precision in PRECISIONS:
            model = random_model(shape._replace(layers=2), precision, "meta")
            batch = partial(random_batch, model.shape, device="meta")
            yield partial(fused_step, model, batch(1, CONTEXT_TOKENS, 1))
            yield partial(unfused_step, model, batch(1, PROMPT_TOKENS, PROMPT_TOKENS))
            yield partial(unfused_step, model, batch(2 * MOST_FUSED_ROWS, CONTEXT_TOKENS, 1))


def measured(name: str, batches: list[int], device: Machine) -> Iterator[dict[str, Any]]:
    for precision in (*PRECISIONS, NAIVE):
        # A model is gone before the next one is made.
        yield from of_precision(name, precision, batches, device)
        torch.cuda.empty_cache()


def of_precision(name: str, precision: str, batches: list[int], device: Machine) -> Iterator[dict[str, Any]]:
    shape, naive = SHAPES[name], precision == NAIVE
    model = random_model(shape, "bf16" if naive else precision, "cuda")
    prefill_s = None
    if not naive:
        prompt = random_batch(shape, 1, PROMPT_TOKENS, PROMPT_TOKENS, "cuda")
        prefill_s = seconds(partial(unfused_step, model, prompt), graph=False)
    for sequences in batches:
        batch = random_batch(shape, sequences, CONTEXT_TOKENS, 1, "cuda")
        step_s = seconds(partial(decode_step(precision, sequences), model, batch), graph=not naive)
        yield row(name, precision, model, batch, step_s, prefill_s, device)


def decode_step(precision: str, sequences: int) -> Callable[[Model, Batch], torch.Tensor]:
    if precision == NAIVE:
        return naive_step
    return unfused_step if sequences > MOST_FUSED_ROWS else fused_step


def row(
    name: str,
    precision: str,
    model: Model,
    batch: Batch,
    step_s: float,
    prefill_s: float | None,
    device: Machine,
) -> dict[str, Any]:
    """A row of the report, from times."""
    sequences, shape = len(batch.tokens), model.shape
    cached = 2 * shape.layers * shape.kv_heads * shape.head_dim * batch.context * sequences
    moved = model.bytes_per_step + cached * batch.caches[0].keys.element_size()
    operations = model.flops_per_row * PROMPT_TOKENS
    return {
        "model": name,
        "precision": precision,
        "batch": sequences,
        "decode_tok_s": round(sequences / step_s, 1),
        "share_of_bandwidth": round(moved / step_s / device.copy_bytes_per_s, 3),
        "prefill_tok_s": None if prefill_s is None else round(PROMPT_TOKENS / prefill_s),
        "share_of_matmul": None if prefill_s is None else round(operations / prefill_s / device.matmul_flops_per_s, 3),
    }


def seconds(step: Callable[[], Any], graph: bool) -> float:
    """Median seconds of a step, replayed from a CUDA graph or launched again each time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    run = step
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        run = captured.replay
    times: list[float] = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def line(row: dict[str, Any]) -> str:
    prefill = ""
    if row["prefill_tok_s"] is not None:
        prefill = f"{row['prefill_tok_s']:>9} prompt tok/s {row['share_of_matmul']:>6.0%} of matmul rate"
    return (
        f"{row['model']:<14}{row['precision']:<12}{row['batch']:>4}"
        f"{row['decode_tok_s']:>10.0f} tok/s {row['share_of_bandwidth']:>6.0%} of bandwidth{prefill}"
    )


if __name__ == "__main__":
    sys.exit(main())
