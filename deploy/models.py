"""Models as they lie on this machine: what they are, what they take, and whether they can be served here.

Rule: nothing of the weights is read. What cannot be served is listed too, with the sentence that says why.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from rich.table import Table
from rich.text import Text

from deploy.paths import cache_folder
from gateway.model_files import UnusableModel, load_card
from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.checkpoint_config import GGUF_FAMILIES, HUGGING_FACE_FAMILIES
from kernels.config import CheckpointError
from kernels.native.as_blocks import BLOCKS
from kernels.native.grids import PANEL_BYTES
from kernels.shards import Shard
from shared.settings import WorkerSettings

GIB = 1 << 30
KV_MIB = WorkerSettings().kv_mib  # what a worker takes for its KV cache unless told otherwise
BASE_MIB = 160  # a worker without weights and cache: peak RSS of the default model's worker, less both
RANK_MIB = 310  # a rank of several, instead: each loads torch, for its process group; peaks of two and three ranks
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_REFERENCE_BYTES = 4  # what the native step does not know runs in float32


class Model(Struct, frozen=True, kw_only=True):
    """One folder of the cache; `problem` says why it cannot be served, and is empty where it can."""

    name: str
    folder: str
    family: str = ""
    precision: str = ""  # of most weights, and of the embedding where that differs
    parameters: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0  # of one worker on a CPU
    context_length: int = 0
    problem: str = ""


def shelf() -> list[Model]:
    """All pulled models, by name."""
    folders = cache_folder() / "models"
    found = [look_at(folder) for folder in folders.iterdir() if folder.is_dir()] if folders.is_dir() else []
    return sorted(found, key=lambda model: model.name)


def look_at(folder: Path, available_bytes: int | None = None) -> Model:
    """What lies in a folder of a pulled model, held against `available_bytes` (None: what this machine has)."""
    try:
        card = load_card(folder)
        name = card.name
    except UnusableModel as error:
        return Model(name=folder.name, folder=str(folder), problem=str(error), disk_bytes=_disk_bytes(folder))
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        return Model(name=name, folder=str(folder), family=card.architecture, problem=str(error),
                     disk_bytes=_disk_bytes(folder), context_length=card.context_length)
    needed = memory_needed(checkpoint)
    return Model(
        name=name,
        folder=str(folder),
        family=card.architecture,
        precision=_precision(checkpoint),
        parameters=sum(_count(checkpoint, tensor) for tensor in checkpoint.names()),
        disk_bytes=_disk_bytes(folder),
        memory_bytes=needed,
        context_length=card.context_length,
        problem=too_large(needed, available_memory() if available_bytes is None else available_bytes),
    )


def table(models: Sequence[Model]) -> Table:
    """For people."""
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("name", "family", "weights", "precision", "disk", "memory", "context"):
        words = name in ("name", "family", "precision")
        found.add_column(name, justify="left" if words else "right", no_wrap=name == "name")
    found.add_column("here", overflow="fold")
    for model in models:
        here = Text(model.problem, "yellow") if model.problem else Text("can be served", "green")
        found.add_row(model.name, model.family, _short(model.parameters), model.precision, _gib(model.disk_bytes),
                      _gib(model.memory_bytes), str(model.context_length or ""), here)
    return found


def memory_needed(checkpoint: Checkpoint, kv_mib: int = KV_MIB, ranks: int = 1) -> int:
    """Bytes that one worker on a CPU comes to hold: packed weights, the KV cache when it is full, and itself.

    Of several ranks, all together. Raises ValueError when they cannot share the model.
    """
    parts = [checkpoint] if ranks == 1 else [Shard(checkpoint, rank, ranks) for rank in range(ranks)]
    weights = 0
    for part in parts:
        for name in part.names():
            kind, count = part.kind(name), _count(part, name)
            weights += count * _FLOAT_BYTES[kind] if kind in _FLOAT_BYTES else _grid_bytes(kind, count)
    return weights + (kv_mib + (BASE_MIB if ranks == 1 else ranks * RANK_MIB) << 20)


def too_large(needed_bytes: int, available_bytes: int, workers: int = 1) -> str:
    """Why so many workers do not fit, and what would; empty when they do."""
    if workers * needed_bytes <= available_bytes:
        return ""
    each = "" if workers == 1 else f" for each of {workers} workers"
    fewer = "" if workers == 1 else "fewer workers, "
    return (
        f"needs about {needed_bytes / GIB:.1f} GiB{each} and {available_bytes / GIB:.1f} GiB are free here: "
        f"take {fewer}a smaller quantisation of it (Q4_K_M has about 0.6 bytes a parameter), or a smaller model"
    )


def available_memory() -> int:
    """Bytes that this machine, or its control group, can still give."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most == "max":
            return free
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])  # counted as used, and given up when asked for
        return min(free, int(most) - used + cached)
    except (OSError, KeyError, ValueError):
        return free


def supported() -> str:
    """The families that can be served, as a sentence has them."""
    return f"{', '.join(HUGGING_FACE_FAMILIES)} from safetensors; {', '.join(GGUF_FAMILIES)} from GGUF"


def _short(count: int) -> str:
    """135M, 7.2B."""
    if not count:
        return ""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes else ""


def _count(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(checkpoint.shape(name))


def _grid_bytes(kind: str, count: int) -> int:
    per_group = PANEL_BYTES.get(BLOCKS.get(kind, kind))
    return int(count / 32 * per_group) if per_group else count * _REFERENCE_BYTES


def _precision(checkpoint: Checkpoint) -> str:
    kinds: Counter[str] = Counter()
    for name in checkpoint.names():
        if name.startswith("layers.") and len(checkpoint.shape(name)) == 2:
            kinds[checkpoint.kind(name)] += _count(checkpoint, name)
    ((most, _),) = kinds.most_common(1)
    embedding = checkpoint.kind("embedding.weight")
    return most if embedding == most else f"{most}, embedding {embedding}"


def _disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
