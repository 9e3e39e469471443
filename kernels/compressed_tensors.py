"""compressed-tensors in safetensors: matrices of four or eight bits, as vLLM, SGLang and transformers read them.

Rule: nothing is rounded and nothing guessed. What config.json says and what the tensors are must agree; a checkpoint
where they do not, or which asks for more than is done here, is refused. Format: compressed-tensors 0.20.

    pack-quantized              in place of NAME.weight [N, C]
    NAME.weight_packed          int32 [N, C / 8]: input c is in bits 4 (c % 8) of word c // 8, its value plus 8
    NAME.weight_scale           [N, C / group], plain floats
    NAME.weight_zero_point      int32 [ceil(N / 8), C / group]: as the values, but along outputs; not where symmetric
    NAME.weight_shape           int64 [2]: N, C
    int-quantized, float-quantized
    NAME.weight                 int8 or float8_e4m3fn [N, C]
    NAME.weight_scale           [N, 1], or one for all: [1] or []

Activations that other engines round to eight bits on the way, each row by a scale of its own, are not rounded here.

`Raw` has such a matrix in rows that stand alone, little endian, in one of these kinds:

    INT4_G32, INT4_G64, INT4_G128       each group: scale (float32), codes, two in a byte, the first in its low bits
    UINT4_G32, UINT4_G64, UINT4_G128    each group: scale (float32), zero point (a byte), codes
    INT8, FP8                           scale (float32), codes

    weight = scale * (code - 8)         scale * (code - zero point)         scale * code
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.config import CheckpointError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

METHOD = "compressed-tensors"
GROUPS = (32, 64, 128)
FOUR_BIT_KINDS = tuple(f"{sign}4_G{group}" for sign in ("INT", "UINT") for group in GROUPS)
KINDS = (*FOUR_BIT_KINDS, "INT8", "FP8")

_PACKED = "pack-quantized"
# Format: what it says of its weights' type, and safetensors' name of that.
_EIGHT_BITS = {"int-quantized": ("int", "I8"), "float-quantized": ("float", "F8_E4M3")}
EIGHT_BIT_TYPES = tuple(stored for _, stored in _EIGHT_BITS.values())
_FLOATS = ("F32", "F16", "BF16")
_MIDDLE = 8
_SCALE_BYTES = 4
_WORD = 8  # values of a word


class Scheme(NamedTuple):
    """How every quantised matrix of a checkpoint is stored."""

    format: str
    group: int  # inputs of a scale; 0: all
    symmetric: bool

    @property
    def kind(self) -> str:
        if self.format == _PACKED:
            return f"{'INT' if self.symmetric else 'UINT'}4_G{self.group}"
        return "INT8" if self.format == "int-quantized" else "FP8"


class Part(NamedTuple):
    """A stored tensor: its name, safetensors' name of its type, its shape."""

    stored: str
    kind: str
    shape: tuple[int, ...]


class Grouped(NamedTuple):
    """A matrix [N, C] of one of FOUR_BIT_KINDS."""

    codes: Bytes  # [N, C]
    scales: Floats  # [N, C / group]
    zeros: Bytes | None  # as scales; None: 8 everywhere
    group: int


def scheme_of(file: Path, quantisation: Mapping[str, Any]) -> Scheme:
    """What `quantization_config` of config.json says. Raises CheckpointError for what is not done here."""
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        said = quantisation.get(key)
        if said and not (isinstance(said, dict) and said.get("format") == "dense"):
            raise CheckpointError(f"{file}: quantization_config has a {key}, which is not supported")
    groups = quantisation.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{file}: quantization_config should have config_groups, it has {groups!r}")
    schemes = {_scheme(file, group, quantisation.get("format")) for group in groups.values()}
    if len(schemes) > 1:
        kinds = ", ".join(sorted(scheme.kind for scheme in schemes))
        raise CheckpointError(f"{file}: quantization_config mixes {kinds}; one for all matrices is supported")
    return schemes.pop()


def shape_of(path: Path, name: str, scheme: Scheme, parts: Mapping[str, Part], said: list[int]) -> tuple[int, int]:
    """The shape of the matrix that is stored in `parts`, by the last of their names.

    `said` is what its weight_shape holds, empty where there is none. Raises CheckpointError where anything contradicts
    anything else.
    """
    packed = scheme.format == _PACKED
    wanted = {"weight_packed", "weight_scale", "weight_shape"} if packed else {"weight", "weight_scale"}
    wanted |= set() if scheme.symmetric else {"weight_zero_point"}
    if parts.keys() != wanted:
        found, usual = (", ".join(sorted(names)) for names in (parts, wanted))
        raise CheckpointError(
            f"{path}: {name} consists of {found}; {scheme.format} has {usual}: use another checkpoint"
        )
    codes = parts["weight_packed" if packed else "weight"]
    if len(codes.shape) != 2:
        raise CheckpointError(f"{path}: {codes.stored} is no matrix, its shape is {codes.shape}")
    outputs, columns = codes.shape
    inputs = columns * (_WORD if packed else 1)
    if packed and said != [outputs, inputs]:
        raise CheckpointError(f"{path}: {name} says that it is {said}, what is packed is {[outputs, inputs]}")
    if packed and inputs % scheme.group:
        raise CheckpointError(f"{path}: {name} has {inputs} inputs, which are no groups of {scheme.group}")
    scales = [(outputs, inputs // scheme.group)] if packed else [(outputs, 1), (1,), ()]
    _check(path, codes, [(outputs, columns)], ("I32",) if packed else (_EIGHT_BITS[scheme.format][1],))
    _check(path, parts["weight_scale"], scales, _FLOATS)
    if not scheme.symmetric:
        _check(path, parts["weight_zero_point"], [(-(-outputs // _WORD), inputs // scheme.group)], ("I32",))
    return outputs, inputs


def grouped_rows(words: NDArray[np.int32], scales: Floats, zero_words: NDArray[np.int32] | None) -> Bytes:
    """Rows of a matrix of four bits. Words [N, C / 8], scales [N, C / group], zero_words [ceil(N / 8), C / group]."""
    outputs, groups = scales.shape
    parts = [np.ascontiguousarray(scales, "<f4").view(np.uint8).reshape(outputs, groups, _SCALE_BYTES)]
    if zero_words is not None:
        bits = 4 * np.arange(_WORD, dtype=np.uint32)[:, None]
        zeros = zero_words.astype("<u4")[:, None] >> bits & 15  # [ceil(N / 8), 8, groups]
        parts.append(zeros.astype(np.uint8).reshape(-1, groups)[:outputs, :, None])
    parts.append(np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(outputs, groups, -1))
    return np.concatenate(parts, -1).reshape(outputs, -1)


def channel_rows(codes: Bytes, scales: Floats) -> Bytes:
    """Rows of a matrix of eight bits. Codes [N, C], and one scale for each output or one for all."""
    each = np.broadcast_to(scales.reshape(-1, 1), (len(codes), 1))
    return np.concatenate((np.ascontiguousarray(each, "<f4").view(np.uint8), codes), 1)


def grouped(kind: str, rows: Bytes) -> Grouped:
    """Rows [N, bytes] of one of FOUR_BIT_KINDS, taken apart."""
    sign, _, size = kind.partition("4_G")
    group = int(size)
    head = _SCALE_BYTES + (sign == "UINT")
    blocks = rows.reshape(len(rows), -1, head + group // 2)
    pairs = blocks[..., head:]
    codes = np.stack((pairs & 15, pairs >> 4), -1).reshape(len(rows), -1)
    zeros = np.ascontiguousarray(blocks[..., _SCALE_BYTES]) if sign == "UINT" else None
    return Grouped(codes, _scales(blocks[..., :_SCALE_BYTES]), zeros, group)


def channels(rows: Bytes) -> tuple[Bytes, Floats]:
    """Rows [N, bytes] of INT8 or FP8: codes as bytes [N, C], scales [N]."""
    return rows[:, _SCALE_BYTES:], _scales(rows[:, :_SCALE_BYTES])


def dequantised(kind: str, rows: Bytes) -> Floats:
    """The weights [N, C] of rows of one of KINDS, each product rounded once."""
    if kind in FOUR_BIT_KINDS:
        codes, scales, zeros, group = grouped(kind, rows)
        middles = np.float32(_MIDDLE) if zeros is None else zeros[..., None].astype(np.float32)
        values = codes.reshape(len(rows), -1, group).astype(np.float32) - middles
        return (values * scales[..., None]).reshape(len(rows), -1)
    bytes_, scales = channels(rows)
    if kind == "INT8":
        return bytes_.view(np.int8).astype(np.float32) * scales[:, None]
    return _fp8_values()[bytes_] * scales[:, None]


def _scheme(file: Path, group: Mapping[str, Any], whole_format: object) -> Scheme:
    """Of one of the config_groups."""
    format = group.get("format") or whole_format
    if whole_format != format or format not in (_PACKED, *_EIGHT_BITS):
        can = ", ".join((_PACKED, *_EIGHT_BITS))
        raise CheckpointError(f"{file}: quantization_config has format {format!r}; {can} can be read")
    for key in ("input_activations", "output_activations"):
        said = group.get(key)
        if said is not None and not (isinstance(said, dict) and said.get("dynamic") is True):
            raise CheckpointError(f"{file}: {key} have scales of their own, which is not supported: {said!r}")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file}: quantization_config should say what weights are, it says {weights!r}")
    bits, kind = (4, "int") if format == _PACKED else (8, _EIGHT_BITS[format][0])
    strategies = ("group",) if format == _PACKED else ("channel", "tensor")
    symmetric = weights.get("symmetric", True)
    for key, found, can in (
        ("num_bits", weights.get("num_bits"), (bits,)),
        ("type", weights.get("type", "int"), (kind,)),
        ("strategy", weights.get("strategy"), strategies),
        ("group_size", weights.get("group_size"), GROUPS if format == _PACKED else (None, -1)),
        ("symmetric", symmetric, (True, False) if format == _PACKED else (True,)),
        ("dynamic", weights.get("dynamic", False), (False,)),
        # The order in which inputs were rounded; "group" would store them in another.
        ("actorder", weights.get("actorder"), (None, False, "weight", "static")),
    ):
        if not any(type(found) is type(value) and found == value for value in can):
            supported = ", ".join(map(repr, can))
            raise CheckpointError(f"{file}: {key} of {format} weights is {found!r}; supported: {supported}")
    return Scheme(format, weights["group_size"] if format == _PACKED else 0, symmetric)


def _check(path: Path, part: Part, shapes: list[tuple[int, ...]], kinds: tuple[str, ...]) -> None:
    if part.shape not in shapes or part.kind not in kinds:
        wanted = f"{' or '.join(kinds)} {' or '.join(map(str, shapes))}"
        raise CheckpointError(f"{path}: {part.stored} is {part.kind} {part.shape}, not {wanted}: download it again")


def _scales(stored: Bytes) -> Floats:
    """[..., 4] bytes as [...]"""
    return np.ascontiguousarray(stored).view("<f4")[..., 0]


def _fp8_values() -> Floats:
    """The value of each byte as float8_e4m3fn: four bits of exponent, and one code of either sign that is no number."""
    byte = np.arange(256)
    exponents, fractions = byte >> 3 & 15, byte & 7
    sizes = np.where(exponents == 0, np.ldexp(fractions, -9), np.ldexp(8 + fractions, exponents - 10))
    sizes[byte & 127 == 127] = np.nan
    return np.where(byte < 128, sizes, -sizes).astype(np.float32)
