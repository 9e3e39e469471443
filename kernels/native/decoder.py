"""The native CPU step as a `Decoder`: what a laptop and CI run.

Rule: the result for a row depends on that row's sequence alone, bit for bit: not on how many rows a step has, what stands
beside them, how a prompt was cut, the number of threads or the CPU's vector width. `specification.py` says which bits.
"""

import ctypes
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.checkpoint import open_checkpoint
from kernels.config import DecoderConfig
from kernels.native.build import build
from kernels.step import StepInputs

RECIPE = "int8-g32/1"
BLOCK_SIZE_TOKENS = 16
MOST_THREADS = 8  # more cores than memory channels can feed only spin

_GROUP = 32
_LANES = 16
_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16"}
_MESSAGE_BYTES = 512


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as the checkpoint stores it: `type` as numbered in GGUF, `data` its bytes, row by row."""

    data: NDArray[np.uint8]
    type: int
    shape: tuple[int, ...]  # (outputs, inputs), or (width,)


class _Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in (
        "layers", "hidden", "heads", "kv_heads", "head_dim", "rope_dims", "feed_forward", "vocabulary", "context",
        "blocks", "threads", "rope_interleaved")] + [
        ("norm_epsilon", ctypes.c_float), ("frequencies", ctypes.c_void_p)]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("outputs", ctypes.c_int32), ("inputs", ctypes.c_int32)]


class _Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "sequences", "table_width", "samples")] + [
        (name, ctypes.c_void_p) for name in (
            "tokens", "positions", "sequence_starts", "block_tables", "sample_rows",
            "temperature", "top_k", "top_p", "min_p", "seeds")]


class NativeDecoder:
    """A Llama-family model in packed weights with a paged fp16 KV cache, on the threads of one process."""

    block_size_tokens = BLOCK_SIZE_TOKENS
    recipe = RECIPE

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Packed], *, blocks: int, threads: int = 0,
                 instructions: str | None = None) -> None:
        """`tensors` by GGUF name; they are repacked, not kept. `threads` 0: as many as this process may use, at most 8.

        Raises ValueError when the model is of a kind the step does not know, RuntimeError when nothing can be compiled.
        """
        if blocks < 1:
            raise ValueError(f"the KV cache needs at least one block, got {blocks}: raise kv_bytes")
        _check_shape(config)
        self.vocabulary_size = config.vocabulary
        self.context_length = config.context_length
        self.blocks = blocks
        self.threads = threads or min(_usable_cpus(), MOST_THREADS)
        self._library = load_library(instructions)
        self.instructions = str(self._library.mill_instructions().decode())
        self._process = os.getpid()
        self._busy = threading.Lock()
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        described, kept = _describe(config, tensors)
        frequencies = np.array(config.rope_frequencies(), np.float64)
        native = _Config(
            config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim, config.rotary_dim, config.ffn,
            config.vocabulary, config.context_length, blocks, self.threads, int(config.rope_interleaved),
            config.norm_eps, frequencies.ctypes.data)
        self._model = self._library.mill_open(ctypes.byref(native), described, self._message, _MESSAGE_BYTES)
        del kept
        if not self._model:
            raise RuntimeError(f"the native step could not load the model: {self._message.value.decode()}")

    @classmethod
    def load(cls, model_path: Path, *, blocks: int | None = None, kv_bytes: int = 256 << 20, threads: int = 0) -> Self:
        """The model in a GGUF file, or in a folder that holds `model.gguf`.

        `blocks`: size of the KV cache in blocks of 16 tokens; None: as many as fit into `kv_bytes` (memory is taken
        only as blocks are first used).
        """
        path = Path(model_path)
        path = path / "model.gguf" if path.is_dir() else path
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        if blocks is None:
            blocks = kv_bytes // (config.kv_bytes_per_token(2) * BLOCK_SIZE_TOKENS)
        return cls(config, _packed(checkpoint), blocks=blocks, threads=threads)

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """The chosen token of each sample row. Raises ValueError on inputs that do not fit, and then nothing has changed."""
        tokens = np.empty(len(inputs.sample_rows), np.int32)
        self._run(inputs, tokens, None)
        return tokens

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The raw logits [L, V] of the sample rows."""
        logits = np.empty((len(inputs.sample_rows), self.vocabulary_size), np.float32)
        self._run(inputs, None, logits)
        return logits

    def close(self) -> None:
        """Give the memory back and end the helper threads. The decoder cannot be used afterwards."""
        with self._busy:
            model, self._model = self._model, None
            if model and os.getpid() == self._process:  # a forked child has no helpers to end
                self._library.mill_close(model)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()

    def _run(self, inputs: StepInputs, tokens: NDArray[np.int32] | None, logits: NDArray[np.float32] | None) -> None:
        native, kept = _native_inputs(inputs)
        with self._busy:
            if not self._model:
                raise ValueError("this decoder was closed")
            if os.getpid() != self._process:
                raise RuntimeError("a forked process has none of the step's threads: load the model after the fork")
            code = self._library.mill_step(self._model, ctypes.byref(native), _address(tokens), _address(logits),
                                           self._message, _MESSAGE_BYTES)
            message = self._message.value.decode() if code else ""
        del kept
        if code == 1:
            raise ValueError(message)
        if code:
            raise RuntimeError(message)


def load_library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled step with its C signatures. `instructions` as in `build`."""
    library = ctypes.CDLL(str(build(instructions)))
    library.mill_instructions.restype = ctypes.c_char_p
    library.mill_open.restype = ctypes.c_void_p
    library.mill_open.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32]
    library.mill_close.restype = None
    library.mill_close.argtypes = [ctypes.c_void_p]
    library.mill_step.restype = ctypes.c_int32
    library.mill_step.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_char_p, ctypes.c_int32]
    library.mill_choose.restype = ctypes.c_int32
    library.mill_choose.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_int32, ctypes.c_float,
                                    ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64]
    return library


def _address(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _native_inputs(inputs: StepInputs) -> tuple[_Inputs, list[NDArray[np.generic]]]:
    """The C view of `inputs`, and the arrays it points into. Lengths are checked here, contents in C++."""
    def array(name: str, kind: DTypeLike, *shape: int | None) -> NDArray[np.generic]:
        given = np.asarray(getattr(inputs, name))
        if given.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, given.shape, strict=True)):
            raise ValueError(f"{name} must have the shape {shape}, it has {given.shape}")
        if not np.can_cast(given.dtype, kind, "same_kind"):
            raise ValueError(f"{name} must be {np.dtype(kind)}, it is {given.dtype}")
        return np.ascontiguousarray(given, kind)

    rows, samples = len(inputs.tokens), len(inputs.sample_rows)
    starts = array("sequence_starts", np.int32, None)
    sequences = len(starts) - 1
    if sequences < 0:
        raise ValueError("sequence_starts needs one entry more than there are sequences")
    tables = array("block_tables", np.int32, sequences, None)
    kept = [
        array("tokens", np.int32, rows), array("positions", np.int32, rows), starts, tables,
        array("sample_rows", np.int32, samples), array("temperature", np.float32, samples),
        array("top_k", np.int32, samples), array("top_p", np.float32, samples), array("min_p", np.float32, samples),
        array("seeds", np.uint64, samples)]
    return _Inputs(rows, sequences, tables.shape[1], samples, *(each.ctypes.data for each in kept)), kept


def _check_shape(config: DecoderConfig) -> None:
    """Raises ValueError when the step's layouts do not fit the model."""
    for name, value, multiple in (
            ("hidden", config.hidden, _GROUP), ("ffn", config.ffn, _GROUP),
            ("heads * head_dim", config.heads * config.head_dim, _GROUP), ("head_dim", config.head_dim, _LANES)):
        if value % multiple:
            raise ValueError(f"{name} is {value}; the native step needs a multiple of {multiple}: use the torch decoder")
    if not math.isfinite(config.norm_eps):
        raise ValueError(f"norm_eps is {config.norm_eps}")


def _describe(config: DecoderConfig, tensors: Mapping[str, Packed]) -> tuple[ctypes.Array[_Tensor], list[NDArray[np.generic]]]:
    """The tensors in the order mill_open wants them, and the arrays they point into."""
    attention, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(config.layers):
        shapes += [(f"blk.{layer}.{name}.weight", shape) for name, shape in (
            ("attn_norm", (config.hidden,)), ("attn_q", (attention, config.hidden)), ("attn_k", (kv, config.hidden)),
            ("attn_v", (kv, config.hidden)), ("attn_output", (config.hidden, attention)), ("ffn_norm", (config.hidden,)),
            ("ffn_gate", (config.ffn, config.hidden)), ("ffn_up", (config.ffn, config.hidden)),
            ("ffn_down", (config.hidden, config.ffn)))]
    shapes += [("token_embd.weight", (config.vocabulary, config.hidden)), ("output_norm.weight", (config.hidden,))]
    if not config.tied_head:
        shapes.append(("output.weight", (config.vocabulary, config.hidden)))

    described = (_Tensor * (9 * config.layers + 3))()
    kept = []
    for at, (name, shape) in enumerate(shapes):
        if name not in tensors:
            raise ValueError(f"the checkpoint has no tensor {name}")
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, the checkpoint's has {tensor.shape}")
        if tensor.type not in _TYPES or (len(shape) == 1 and tensor.type != 0):
            served = "F32" if len(shape) == 1 else ", ".join(_TYPES.values())
            raise ValueError(f"{name} is of GGUF type {tensor.type}; the native step serves {served}")
        data = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)
        expected = math.prod(shape) * _BYTES_PER_GROUP[tensor.type] // _GROUP
        if data.nbytes != expected:
            raise ValueError(f"{name} should take {expected} bytes, the checkpoint has {data.nbytes}: is the file whole?")
        kept.append(data)
        outputs, inputs = shape if len(shape) == 2 else (1, shape[0])
        described[at] = _Tensor(data.ctypes.data, tensor.type, outputs, inputs)
    return described, kept


_BYTES_PER_GROUP = {0: 128, 1: 64, 2: 18, 3: 20, 8: 34, 30: 64}


def _usable_cpus() -> int:
    """CPUs this process may run on, or fewer where a control group grants less time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
