"""The head of a GGUF file: metadata and where each tensor lies. Nothing of the weights is read.

Rule: strings of arrays (a vocabulary, its merges) are stepped over, not decoded: the default model opens in 30 ms where
decoding them takes 2 s. Nothing is trusted: a damaged file is a CheckpointError, whatever its bytes.
Source: the GGUF specification, versions 2 and 3 (ggml/docs/gguf.md), little endian.

    magic "GGUF" | uint32 version | uint64 tensors | uint64 metadata entries | entries | tensor infos | padding | data
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.config import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
# characters; GGML itself takes 64. A stack of experts writes its name out for each of them
_LONGEST_NAME = 256


class BlockType(NamedTuple):
    """A storage type of GGML: `elements` weights in `size_bytes` bytes."""

    name: str
    elements: int
    size_bytes: int


# By GGML's number; all others are refused.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
    39: BlockType("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class SkippedStrings:
    """An array of strings that was stepped over."""

    count: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is rows first, as torch counts; `start` and `size_bytes` are bytes of the file."""

    block: BlockType
    shape: tuple[int, ...]
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, Any]  # scalars, strings, numpy arrays, SkippedStrings
    tensors: dict[str, TensorInfo]
    file: NDArray[np.uint8]  # the whole file, mapped


def read_gguf_header(path: Path) -> GgufHeader:
    """Map the file and read its head. Raises CheckpointError where it is damaged, cut short or of another version."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path} is no GGUF file: it has {size} bytes; download it again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, mapped)
    if mapped[:4] != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file: it starts with {mapped[:4]!r}, not b'GGUF'")
    cursor.at = 4
    version, tensor_count, entry_count = cursor.unpack("IQQ")
    if version not in (2, 3):
        raise CheckpointError(f"{path} has GGUF version {version}; versions 2 and 3, little endian, can be read")

    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    places = [_tensor_place(cursor) for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path} is damaged: its alignment is {alignment!r}; download it again")
    data = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, block, shape, offset in places:
        length = math.prod(shape) // block.elements * block.size_bytes
        if data + offset + length > size:
            raise CheckpointError(
                f"{path} is cut short: {name} ends at byte {data + offset + length} of {size}; download it again"
            )
        tensors[name] = TensorInfo(block, shape, data + offset, length)
    if len(tensors) != tensor_count:
        raise CheckpointError(f"{path} is damaged: it names a tensor twice; download it again")
    return GgufHeader(metadata, tensors, np.frombuffer(mapped, np.uint8))


def _tensor_place(cursor: "_Cursor") -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.string()
    if len(name) > _LONGEST_NAME:
        raise cursor.damaged(f"the name of a tensor has {len(name)} characters")
    (dimensions,) = cursor.unpack("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise cursor.damaged(f"{name} has {dimensions} dimensions")
    shape = tuple(reversed(cursor.unpack(f"{dimensions}Q")))
    number, offset = cursor.unpack("IQ")
    block = BLOCK_TYPES.get(number)
    if block is None:
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise CheckpointError(f"{cursor.path}: {name} is stored in GGML type {number}; types that can be read: {known}")
    if shape[-1] % block.elements or 0 in shape:
        raise cursor.damaged(f"{name} has shape {shape}, which {block.name} cannot store")
    return name, block, shape, offset


class _Cursor:
    """Reads forward through the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged near byte {self.at}: {what}; download it again")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        start = self.at
        self._advance(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.data, start)

    def string(self) -> str:
        (length,) = self.unpack("Q")
        start = self.at
        self._advance(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string is not UTF-8 ({error.reason})") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"metadata of unknown type {kind}")
        of, count = self.unpack("IQ")
        if of == _STRING:
            self._skip_strings(count)
            return SkippedStrings(count)
        if of not in _SCALARS:
            raise self.damaged(f"an array of elements of type {of}")
        start = self.at
        dtype = np.dtype("<" + _SCALARS[of]) if of != 7 else np.dtype(np.bool_)
        self._advance(count * dtype.itemsize)
        return np.frombuffer(self.data[start : self.at], dtype)

    def _skip_strings(self, count: int) -> None:
        # The hot loop: a hundred thousand strings in the default model.
        data, at, end = self.data, self.at, len(self.data) - 8
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > end:
                raise self.damaged("an array of strings runs beyond the end")
            at += 8 + length_at(data, at)[0]
        self.at = at
        self._advance(0)

    def _advance(self, length: int) -> None:
        if self.at + length > len(self.data):
            raise self.damaged(f"{length} bytes are announced, {max(0, len(self.data) - self.at)} remain")
        self.at += length
