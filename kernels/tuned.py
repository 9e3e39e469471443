"""Launch choices that were measured on a device, and the reasoned ones where nothing was.

Rule: the table holds only what changes no bit: how many outputs a program has, warps and stages of the tensor core
products. How inputs are divided and in which order sums are added stands in `kernels.tuning`, the same for every
device, so a stream may move between a worker with a table and one without.

`tuned.json` is made by `python -m kernels.tune` on the device and committed with what it measured:

    {"NVIDIA H200": {"versions": {...}, "choices": {"linear4 4096 x 4096, 16 rows": {"block": 64, "num_warps": 4,
                     "num_stages": 4, "time_us": ..., "fallback_us": ...}}}}
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.launch import INTERPRETED, Launch

TABLE = Path(__file__).with_name("tuned.json")
# Upper ends of the buckets of rows of each operator; more rows than the last belong to it.
BUCKETS = {"linear4": (8, 16, 64), "linear8": (16, 64), "linear8 many": (512, 2048)}


def choice(operator: str, outputs: int, inputs: int, rows: int, fallback: Launch) -> Launch:
    """What was measured to be fastest on this process's GPU for such a product, or `fallback`."""
    if INTERPRETED or not torch.cuda.is_available():
        return fallback
    return chosen(table(), torch.cuda.get_device_name(), key(operator, outputs, inputs, rows), fallback)


def key(operator: str, outputs: int, inputs: int, rows: int) -> str:
    buckets = BUCKETS[operator]
    bucket = next((bucket for bucket in buckets if rows <= bucket), buckets[-1])
    return f"{operator} {outputs} x {inputs}, {bucket} rows"


def chosen(table: dict[str, Any], device: str, key: str, fallback: Launch) -> Launch:
    """The entry of a table, if it has one."""
    entry = table.get(device, {}).get("choices", {}).get(key)
    return fallback if entry is None else Launch(entry["block"], entry["num_warps"], entry["num_stages"])


@cache
def table() -> dict[str, Any]:
    """The table in this tree, read once; empty while no device has been measured."""
    found: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return found
