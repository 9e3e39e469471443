"""A checkpoint written again in compressed-tensors: fewer bits a weight, one layer after the other.

Rule: the bytes depend on the source and the recipe alone. A layer is a shard of its own, written under another name and
renamed, so that whoever was killed goes on behind the last whole shard and ends with the same bytes. config.json comes
after them: before, the folder is no model. What is not rounded (embedding, head, norms, biases) has 16 bits.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kernels import compressed_tensors
from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.config import CheckpointError
from worker.compress.hugging_face import MATRICES, NORMS, halves, settings
from worker.compress.rounding import Parts, check_inputs, quantisation, rounded, scheme_for

Report = Callable[[str, int, int, str], None]  # phase, done, in all, figures

REPORT = "compression.json"
_BEGUN = "compression.begun"
RECIPES = ("rtn",)

_ENDS_BYTES = 1 << 20  # of a file, that tell one source from another
_ERRORS = ".errors"  # beside a shard until all are there: how far each of its matrices lies from the source


class Recipe(Struct, frozen=True, kw_only=True):
    """How weights are rounded. `group`: inputs that share a scale, of four bits; eight have one for each output."""

    name: str = "rtn"
    bits: int = 4
    group: int = 64
    symmetric: bool = True


class Compression(Struct, frozen=True, kw_only=True):
    """What compression.json holds."""

    recipe: Recipe
    source: str  # hash of the source's sizes and of the ends of its files
    source_kinds: dict[str, int]  # weights by the kind in which the source stores them
    weights: int
    source_bytes: int
    bytes: int
    bits_a_weight: float
    errors: dict[str, float]  # of each rounded matrix: norm of what rounding changed over its own norm


class OtherRun(ValueError):
    """The folder holds something else; nothing in it was changed."""


def compress(model: Path, out: Path, recipe: Recipe, report: Report, more: dict[str, object] | None = None
             ) -> Compression:
    """Write the checkpoint at `model` into the folder `out`; what was begun there goes on. `more`: for config.json.

    Raises CheckpointError, OtherRun, and ValueError for a recipe that does not fit the model.
    """
    if recipe.name not in RECIPES:
        raise ValueError(f"recipe {recipe.name!r} is unknown: choose {', '.join(RECIPES)}")
    scheme = scheme_for(recipe.bits, recipe.group, recipe.symmetric)
    source = open_checkpoint(model)
    config = source.config
    said = _settings(source) | (more or {}) | {"quantization_config": quantisation(scheme)}
    dtype = torch.float16 if source.kind("embedding.weight") == "F16" else torch.bfloat16
    said["torch_dtype"] = str(dtype).removeprefix("torch.")
    for name in source.names():
        if name.startswith("layers.") and len(source.shape(name)) == 2:
            check_inputs(source.shape(name)[1], scheme)
    identity = _identity(source.path)
    if (done := _begin(out, recipe, identity)) is not None:
        return done

    def matrix(stored: str, weight: Tensor) -> tuple[Parts, float]:
        parts = rounded(weight, scheme, dtype)
        return {f"{stored}.{part}": tensor for part, tensor in parts.items()}, _error(weight, parts, recipe)

    shards = [out / f"model-{at + 1:05}-of-{config.layers + 1:05}.safetensors" for at in range(config.layers + 1)]
    for at, shard in enumerate(shards):
        report("layers", at, len(shards), "")
        if shard.exists():
            continue
        tensors: Parts = {}
        errors: dict[str, float] = {}
        for name, stored in _names(source, at - 1):
            weight = _stored(source, name)
            if stored.removesuffix(".weight").rpartition(".")[2].endswith("_proj") and stored.endswith(".weight"):
                module = stored.removesuffix(".weight")
                parts, errors[module] = matrix(module, weight)
                tensors |= parts
            else:
                tensors[stored] = weight.to(dtype)
        _write(shard.with_suffix(_ERRORS), json.dumps(errors).encode())
        _write(shard, save(tensors, {"format": "pt"}))
    report("layers", len(shards), len(shards), "")
    done = _sum_up(source, identity, shards, recipe)
    names = {name: shard.name for shard in shards for name in _keys(shard)}
    index = {"metadata": {"total_size": done.bytes}, "weight_map": names}
    _write(out / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    _write(out / "config.json", json.dumps(said, indent=1).encode())
    _write(out / REPORT, msgspec.json.format(msgspec.json.encode(done), indent=1))
    _tidy(out)
    return done


def _begin(out: Path, recipe: Recipe, source: str) -> Compression | None:
    """What was finished there. Raises OtherRun where the folder holds anything but this run's own files."""
    other = OtherRun(f"{out} was begun from another model or with another recipe: choose another folder")
    if (out / REPORT).exists():
        done = msgspec.json.decode((out / REPORT).read_bytes(), type=Compression)
        if (done.recipe, done.source) != (recipe, source):
            raise other
        _tidy(out)  # once more, for whoever was killed over it
        return done
    plan = msgspec.json.encode({"recipe": recipe, "source": source})
    out.mkdir(parents=True, exist_ok=True)
    if (out / _BEGUN).exists():
        if (out / _BEGUN).read_bytes() != plan:
            raise other
    elif any(out.iterdir()):
        raise OtherRun(f"{out} holds other files: choose an empty folder")
    else:
        _write(out / _BEGUN, plan)
    return None


def _tidy(out: Path) -> None:
    """Remove what only the way there needed; the report is written."""
    for beside in (*out.glob(f"*{_ERRORS}"), out / _BEGUN):
        beside.unlink(missing_ok=True)


def _sum_up(source: Checkpoint, identity: str, shards: list[Path], recipe: Recipe) -> Compression:
    errors: dict[str, float] = {}
    for shard in shards:
        errors |= json.loads(shard.with_suffix(_ERRORS).read_text())
    kinds: dict[str, int] = {}
    for name in source.names():
        kinds[source.kind(name)] = kinds.get(source.kind(name), 0) + math.prod(source.shape(name))
    weights, size = sum(kinds.values()), sum(shard.stat().st_size for shard in shards)
    return Compression(recipe=recipe, source=identity, source_kinds=kinds, weights=weights,
                       source_bytes=sum(file.stat().st_size for file in _files(source.path)), bytes=size,
                       bits_a_weight=round(size * 8 / weights, 4), errors=errors)


def _keys(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        return sorted(file.keys())


def _settings(source: Checkpoint) -> dict[str, object]:
    """The source's own config.json, or one made of what a GGUF says. Raises CheckpointError where it cannot be."""
    config = source.config
    if config.experts is not None or config.layer_norm or not config.gated or config.sinks or config.head_ids:
        raise CheckpointError(f"{source.path} is no plain dense decoder (it has experts, layer norms, sinks or a "
                              "trimmed head), which cannot be compressed yet")
    if source.path.is_dir():
        said: dict[str, object] = json.loads((source.path / "config.json").read_text())
        return said
    if config.rope_factors is not None or config.rope_magnitude != 1.0:
        raise CheckpointError(f"{source.path} scales its rope, which cannot be put into config.json yet: compress the "
                              "model's Hugging Face folder")
    made = settings(config)
    return made | {"architectures": [f"{str(made['model_type']).capitalize()}ForCausalLM"]}


def _names(source: Checkpoint, layer: int) -> Iterator[tuple[str, str]]:
    """Names of the tensors of a layer, ours and Hugging Face's; of -1: those outside of the layers."""
    prefix = f"layers.{layer}."
    outside = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for name in source.names():
        if layer < 0 and not name.startswith("layers."):
            module, _, kind = name.rpartition(".")
            yield name, f"{outside[module]}.{kind}"
        elif name.startswith(prefix):
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            yield name, f"model.layers.{layer}.{(MATRICES | NORMS)[module]}.{kind}"


def _stored(source: Checkpoint, name: str) -> Tensor:
    """The weights of a tensor in float32, in the order that Hugging Face has."""
    module = name.split(".", 2)[-1].rpartition(".")[0]
    shape = source.shape(name)
    return halves(source.tensor(name).view(shape), module, source.config).contiguous()


def _error(weight: Tensor, parts: Parts, recipe: Recipe) -> float:
    """What rounding changed, as a share of the matrix (Frobenius norms)."""
    scales = parts["weight_scale"].float().numpy()
    if recipe.bits == 8:
        rows = compressed_tensors.channel_rows(parts["weight"].view(torch.uint8).numpy(), scales)
    else:
        zeros = parts.get("weight_zero_point")
        rows = compressed_tensors.grouped_rows(parts["weight_packed"].numpy(), scales,
                                               None if zeros is None else zeros.numpy())
    kind = scheme_for(recipe.bits, recipe.group, recipe.symmetric).kind
    kept = torch.from_numpy(compressed_tensors.dequantised(kind, rows))
    return round(float((kept - weight).double().norm() / weight.double().norm().clamp(min=1e-30)), 6)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _identity(path: Path) -> str:
    """A hash that another model's files do not have: their sizes, their first and last MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for file in _files(path):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS_BYTES))
            stream.seek(max(0, size - _ENDS_BYTES))
            digest.update(stream.read(_ENDS_BYTES))
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
