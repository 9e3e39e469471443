"""The native CPU step as a `Decoder`: what a laptop and CI run.

Rule: the result for a row depends on that row's sequence alone, bit for bit: not on how many rows a step has, what
stands beside them, how a prompt was cut, the number of threads or the CPU's vector width. `specification.py` says
which bits.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.adjust import check_adjustments
from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.config import DecoderConfig
from kernels.logprobs import check_logprobs
from kernels.native.as_blocks import AsBlocks
from kernels.native.build import build
from kernels.ranks import RankLost, Ranks
from kernels.shards import Shard, shard_config
from kernels.step import Adjustments, Logprobs, Race, StepInputs, check_hidden, check_places

RECIPE = "int8-g32/1"
BLOCK_SIZE_TOKENS = 16
MOST_THREADS = 8  # more cores than memory channels can feed only spin

_GROUP = 32
_LANES = 16
_KV_FORMATS = {"fp16": (0, 2, 0), "int8": (1, 1, 4), "fp8": (2, 1, 0)}  # number in C, bytes a number, bytes a step
_TYPES = {  # as numbered in GGUF
    "F32": 0, "F16": 1, "BF16": 30,
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "MXFP4": 39,
}  # fmt: skip
_LAYER = (
    "attention_norm",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "mlp_norm",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
_LAYER_EXTRAS = (  # of some families only
    "attention.q.bias",
    "attention.k.bias",
    "attention.v.bias",
    "attention.o.bias",
    "attention.q_norm.weight",
    "attention.k_norm.weight",
    "attention_norm.bias",
    "mlp_norm.bias",
    "attention.sinks.weight",
)
_EXPERT = ("gate.weight", "up.weight", "down.weight", "gate.bias", "up.bias", "down.bias")
_MESSAGE_BYTES = 512
_MOST_THREADS_ASKED = 256


_Exchange = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Ranks(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("attention", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("feed_forward", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        ("exchange", _Exchange),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rope_dims", ctypes.c_int32),
        ("feed_forward", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("context", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("rope_interleaved", ctypes.c_int32),
        ("kv_format", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_float),
        ("rope_magnitude", ctypes.c_float),
        ("frequencies", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
        ("head_ids", ctypes.c_void_p),
        ("head_rows", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("experts_per_token", ctypes.c_int32),
        ("expert_feed_forward", ctypes.c_int32),
        ("experts_normalised", ctypes.c_int32),
        ("clamped", ctypes.c_int32),
        ("swiglu_alpha", ctypes.c_float),
        ("swiglu_limit", ctypes.c_float),
        ("ranks", ctypes.c_void_p),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
    ]


_Fetch = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int32)


class _Adjustments(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("mask_words", ctypes.c_int32)] + [
        (field.name, ctypes.c_void_p) for field in fields(Adjustments) if field.name != "fill"
    ]


class _Logprobs(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("most", ctypes.c_int32)] + [
        (field.name, ctypes.c_void_p) for field in fields(Logprobs)
    ]


class _Hidden(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("at", ctypes.c_void_p), ("values", ctypes.c_void_p)]


class _Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "sequences", "table_width", "samples")] + [
        (name, ctypes.c_void_p)
        for name in (
            "tokens",
            "positions",
            "sequence_starts",
            "block_tables",
            "sample_rows",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "seeds",
            "adjustments",
            "logprobs",
            "hidden",
        )
    ]


class _Wanted(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("places", ctypes.c_int32),
    ]


class NativeDecoder:
    """A model in packed weights with a paged KV cache, on the threads of one process.

    The cache is in fp16, or in half the memory as "int8" or "fp8". Each is a recipe of its own.
    """

    block_size_tokens = BLOCK_SIZE_TOKENS
    recipe = RECIPE

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        blocks: int,
        threads: int = 0,
        instructions: str | None = None,
        kv_format: str = "fp16",
        ranks: Ranks | None = None,
    ) -> None:
        """The weights are repacked and not kept. `threads` 0: as many as this process may use, at most 8.

        With `ranks` the decoder is one of several that run every step together, each with its part of the weights and
        of the cache; the numbers are those of one alone. A step then also raises RankLost.

        Raises ValueError when the model is of a kind the step does not know, RuntimeError when nothing can be compiled.
        """
        check_sizes(checkpoint.config, blocks, threads)
        if ranks is not None:
            checkpoint = Shard(checkpoint, ranks.rank, ranks.size)
        config = checkpoint.config
        self.recipe = recipe_of(kv_format)
        self.block_bytes = block_bytes(config, kv_format)
        self.vocabulary_size = config.vocabulary
        self.head_size = config.head_size
        self.hidden_size = config.hidden
        self.context_length = config.context_length
        self.blocks = blocks
        self.threads = threads or min(usable_cpus(), MOST_THREADS)
        self._library = load_library(instructions)
        self.instructions = str(self._library.mill_instructions().decode())
        self._process = os.getpid()
        self._busy = threading.Lock()
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        stored = AsBlocks(checkpoint)
        names, described, kept = _describe(stored)
        fetching = _Fetching(stored, names)
        frequencies = np.array(config.rope_frequencies(), np.float64)
        windows = np.array([config.window(layer) for layer in range(config.layers)], np.int32)
        self._trimmed = config.head_ids is not None
        head_ids = None if config.head_ids is None else np.array(config.head_ids, np.int32)
        native = _Config(
            config.layers,
            config.hidden,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.rotary_dim,
            config.ffn,
            config.vocabulary,
            config.context_length,
            blocks,
            self.threads,
            int(config.rope_interleaved),
            _KV_FORMATS[kv_format][0],
            config.norm_eps,
            config.rope_magnitude,
            frequencies.ctypes.data,
            windows.ctypes.data,
            _address(head_ids),
            config.head_size,
            *_described_experts(config),
        )
        self._lost: RankLost | None = None
        if isinstance(checkpoint, Shard) and ranks is not None:
            # the model keeps the function for as long as it lives
            shared, self._exchange = _native_ranks(checkpoint, ranks, self._lose)
            native.ranks = ctypes.addressof(shared)
        self._model = self._library.mill_open(
            ctypes.byref(native), described, fetching.function, self._message, _MESSAGE_BYTES
        )
        del kept
        if fetching.failure is not None:
            raise fetching.failure
        if not self._model:
            raise RuntimeError(f"the native step could not load the model: {self._message.value.decode()}")
        memory = ctypes.c_uint8 * (blocks * self.block_bytes)
        cache = memory.from_address(self._library.mill_cache(self._model))
        self._cache = np.frombuffer(cache, np.uint8).reshape(blocks, self.block_bytes)

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        blocks: int | None = None,
        kv_bytes: int = 256 << 20,
        threads: int = 0,
        kv_format: str = "fp16",
        ranks: Ranks | None = None,
    ) -> Self:
        """The model in a GGUF file or a folder, as `open_checkpoint` finds it.

        `blocks`: size of the KV cache in blocks of 16 tokens; None: as many as fit into `kv_bytes` (memory is taken
        only as blocks are first used), those of all ranks together.
        """
        checkpoint = open_checkpoint(Path(model_path))
        if blocks is None:
            size = 1 if ranks is None else ranks.size
            every = (shard_config(checkpoint.config, rank, size) for rank in range(size))
            blocks = kv_bytes // sum(block_bytes(config, kv_format) for config in every)
        return cls(checkpoint, blocks=blocks, threads=threads, kv_format=kv_format, ranks=ranks)

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """The chosen token of each sample row. Raises ValueError for inputs that do not fit; nothing has changed."""
        tokens = np.empty(len(inputs.sample_rows), np.int32)
        self._run(inputs, tokens=tokens)
        return tokens

    def race(self, inputs: StepInputs, places: int) -> Race:
        """As `kernels.step.Racing`."""
        check_places(places)
        shape = (len(inputs.sample_rows), places)
        race = Race(np.empty(shape, np.int32), np.empty(shape, np.float32))
        self._run(inputs, tokens=race.tokens, scores=race.scores, places=places)
        return race

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The raw logits [L, H] of the sample rows."""
        logits = np.empty((len(inputs.sample_rows), self.head_size), np.float32)
        self._run(inputs, logits=logits)
        return logits

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        with self._busy:
            self._check_open()
            np.copyto(to, self._cache[block])

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        with self._busy:
            self._check_open()
            np.copyto(self._cache[block], data)

    @property
    def crew(self) -> int:
        """Threads that took part in the last step: all, or one where other work has kept the rest from coming."""
        with self._busy:
            self._check_open()
            return int(self._library.mill_crew(self._model))

    def go_alone(self, seconds: int) -> None:
        """Leave the steps of the next seconds to the calling thread; 0: to all again. Changes no number."""
        with self._busy:
            self._check_open()
            self._library.mill_go_alone(self._model, seconds)

    def close(self) -> None:
        """Give the memory back and end the helper threads. The decoder cannot be used afterwards."""
        with self._busy:
            model, self._model = self._model, None
            if model and os.getpid() == self._process:  # a forked child has no helpers to end
                self._library.mill_close(model)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()

    def _lose(self, error: RankLost) -> None:
        self._lost = error

    def _check_open(self) -> None:
        if not self._model:
            raise ValueError("this decoder was closed")

    def _run(
        self,
        inputs: StepInputs,
        *,
        tokens: NDArray[np.int32] | None = None,
        scores: NDArray[np.float32] | None = None,
        logits: NDArray[np.float32] | None = None,
        places: int = 1,
    ) -> None:
        if self._trimmed and (inputs.adjustments is not None or inputs.logprobs is not None):
            raise ValueError("a trimmed head has no logits for some ids: its decoder neither adjusts nor tells them")
        native, kept = _native_inputs(inputs, self.vocabulary_size, self.hidden_size)
        wanted = _Wanted(_address(tokens), _address(scores), _address(logits), places)
        with self._busy:
            self._check_open()
            if os.getpid() != self._process:
                raise RuntimeError("a forked process has none of the step's threads: load the model after the fork")
            code = self._library.mill_step(
                self._model, ctypes.byref(native), ctypes.byref(wanted), self._message, _MESSAGE_BYTES
            )
            message = self._message.value.decode() if code else ""
        del kept
        if code == 1:
            raise ValueError(message)
        if code == 3:
            raise self._lost or RankLost(message)
        if code:
            raise RuntimeError(message)


def recipe_of(kv_format: str) -> str:
    """The recipe of a decoder whose KV cache is in this format. Raises ValueError when there is no such format."""
    if kv_format not in _KV_FORMATS:
        raise ValueError(f"there is no KV format {kv_format!r}: choose one of {', '.join(_KV_FORMATS)}")
    return RECIPE if kv_format == "fp16" else f"{RECIPE}+kv-{kv_format}"


def block_bytes(config: DecoderConfig, kv_format: str) -> int:
    """Memory of one block of 16 tokens. Raises ValueError when there is no such format."""
    recipe_of(kv_format)
    _, number_bytes, step_bytes = _KV_FORMATS[kv_format]
    steps = 2 * config.layers * config.kv_heads * step_bytes
    return BLOCK_SIZE_TOKENS * (config.kv_bytes_per_token(number_bytes) + steps)


def load_library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled step with its C signatures. `instructions` as in `build`."""
    library = ctypes.CDLL(str(build(instructions)))
    library.mill_instructions.restype = ctypes.c_char_p
    library.mill_open.restype = ctypes.c_void_p
    library.mill_open.argtypes = [ctypes.c_void_p, ctypes.c_void_p, _Fetch, ctypes.c_char_p, ctypes.c_int32]
    library.mill_close.restype = None
    library.mill_close.argtypes = [ctypes.c_void_p]
    library.mill_cache.restype = ctypes.c_void_p
    library.mill_cache.argtypes = [ctypes.c_void_p]
    library.mill_block_bytes.restype = ctypes.c_int64
    library.mill_block_bytes.argtypes = [ctypes.c_void_p]
    library.mill_crew.restype = ctypes.c_int32
    library.mill_crew.argtypes = [ctypes.c_void_p]
    library.mill_go_alone.restype = None
    library.mill_go_alone.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.mill_step.restype = ctypes.c_int32
    library.mill_step.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_char_p, ctypes.c_int32]
    library.mill_choose.restype = ctypes.c_int32
    library.mill_choose.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_float,
        ctypes.c_int32,
        ctypes.c_float,
        ctypes.c_float,
        ctypes.c_uint64,
        ctypes.c_uint64,
    ]
    return library


def _native_ranks(shard: Shard, ranks: Ranks, lose: Callable[[RankLost], None]) -> tuple[_Ranks, Any]:
    """The C view of `ranks`, and the function in it. `lose` hears why an exchange has failed."""
    import torch

    def floats(address: int, *shape: int) -> torch.Tensor:
        """Memory of C++ as it lies."""
        view = SimpleNamespace(
            __array_interface__={"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}
        )
        return torch.from_numpy(np.asarray(view))

    def exchange(own: int, everyone: int, count: int) -> int:
        try:
            ranks.exchange(floats(own, count), floats(everyone, ranks.size, count))
        except RankLost as error:
            lose(error)
        except Exception as error:  # C++ cannot hand it on
            lose(RankLost(f"an exchange between ranks failed: {error!r}"))
        else:
            return 0
        return 1

    cuts = shard.cuts
    starts = [np.array(cut.starts, np.int32) for cut in (cuts.attention, cuts.hidden, cuts.ffn, cuts.head)]
    function = _Exchange(exchange)
    native = _Ranks(ranks.size, ranks.rank, *(each.ctypes.data for each in starts), function)
    native.kept = starts  # until C++ has copied them
    return native, function


def _address(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _native_inputs(inputs: StepInputs, vocabulary_size: int, hidden_size: int) -> tuple[_Inputs, list[Any]]:
    """The C view of `inputs`, and what it points into. Lengths are checked here, contents in C++."""

    def array(name: str, kind: DTypeLike, *shape: int | None) -> NDArray[np.generic]:
        given = np.asarray(getattr(inputs, name))
        if given.ndim != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, given.shape, strict=True)
        ):
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
    kept: list[Any] = [
        array("tokens", np.int32, rows),
        array("positions", np.int32, rows),
        starts,
        tables,
        array("sample_rows", np.int32, samples),
        array("temperature", np.float32, samples),
        array("top_k", np.int32, samples),
        array("top_p", np.float32, samples),
        array("min_p", np.float32, samples),
        array("seeds", np.uint64, samples),
    ]
    native = _Inputs(rows, sequences, tables.shape[1], samples, *(each.ctypes.data for each in kept))
    if inputs.adjustments is not None:
        check_adjustments(inputs.adjustments, samples, vocabulary_size)
        adjustments, arrays = _native_adjustments(inputs.adjustments)
        native.adjustments = ctypes.addressof(adjustments)
        kept += [adjustments, *arrays]
    if (asked := inputs.logprobs) is not None:
        check_logprobs(asked, samples, vocabulary_size)
        logprobs = _Logprobs(
            len(asked.samples),
            asked.top_ids.shape[1],
            *(getattr(asked, field.name).ctypes.data for field in fields(Logprobs)),
        )
        native.logprobs = ctypes.addressof(logprobs)
        kept.append(logprobs)
    if (told := inputs.hidden) is not None:
        check_hidden(told, rows, hidden_size)
        hidden = _Hidden(len(told.rows), told.rows.ctypes.data, told.values.ctypes.data)
        native.hidden = ctypes.addressof(hidden)
        kept.append(hidden)
    return native, kept


def _native_adjustments(given: Adjustments) -> tuple[_Adjustments, list[NDArray[np.generic]]]:
    if given.fill is not None:
        given.fill()
    arrays = [np.ascontiguousarray(getattr(given, field.name)) for field in fields(given) if field.name != "fill"]
    return _Adjustments(len(given.samples), given.masks.shape[1], *(each.ctypes.data for each in arrays)), arrays


def check_sizes(config: DecoderConfig, blocks: int, threads: int) -> None:
    """Raises ValueError when the step's layouts do not fit the model, or a number makes no sense."""
    if blocks < 1:
        raise ValueError(f"the KV cache needs at least one block of 16 tokens, got {blocks}: raise kv_bytes")
    if not 0 <= threads <= _MOST_THREADS_ASKED:
        raise ValueError(f"threads must be in 0..{_MOST_THREADS_ASKED}, got {threads}")
    dense = any(not config.is_mixture(layer) for layer in range(config.layers))
    for name, value, multiple in (
        ("hidden", config.hidden, _GROUP),
        ("ffn", config.ffn if dense else _GROUP, _GROUP),
        ("the experts' ffn", config.experts.ffn if config.experts else _GROUP, _GROUP),
        ("heads * head_dim", config.heads * config.head_dim, _GROUP),
        ("head_dim", config.head_dim, _LANES),
    ):
        if value % multiple:
            raise ValueError(f"{name} is {value}; the native step needs a multiple of {multiple}: use torch")


class _Fetching:
    """Matrices for mill_open, one at a time: what a checkpoint has to convert is there twice for no longer."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self.failure: Exception | None = None
        self._checkpoint, self._names = checkpoint, names
        self._rows: NDArray[np.generic] | None = None
        self.function = _Fetch(self._fetch)

    def _fetch(self, at: int) -> int | None:
        try:
            self._rows = None
            self._rows = np.ascontiguousarray(self._checkpoint.raw(self._names[at]).rows)
        except Exception as error:  # C++ cannot hand it on
            self.failure = error
            return None
        return self._rows.ctypes.data


def _describe(checkpoint: Checkpoint) -> tuple[list[str], ctypes.Array[_Tensor], list[NDArray[np.generic]]]:
    """The tensors in the order mill_open wants them: their names, what they are, and the vectors' numbers."""
    inside = [*(f"{name}.weight" for name in _LAYER), *_LAYER_EXTRAS]
    if (experts := checkpoint.config.experts) is not None:
        inside += ["router.weight", "router.bias"]
        inside += [f"experts.{at}.{part}" for at in range(experts.count) for part in _EXPERT]
    names = [f"layers.{layer}.{name}" for layer in range(checkpoint.config.layers) for name in inside]
    names += ["embedding.weight", "norm.weight", "norm.bias", "head.weight"]
    there = set(checkpoint.names())
    described = (_Tensor * len(names))()
    kept: list[NDArray[np.generic]] = []
    for at, name in enumerate(names):
        if name not in there:
            continue  # zeros: there is none
        kind, shape = checkpoint.kind(name), checkpoint.shape(name)
        if kind not in _TYPES:
            raise ValueError(f"{name} is stored as {kind}; the native step serves {', '.join(_TYPES)}: use torch")
        if len(shape) == 2:
            described[at] = _Tensor(None, _TYPES[kind], *shape)
        else:
            kept.append(_float32(*checkpoint.raw(name)))
            described[at] = _Tensor(kept[-1].ctypes.data, _TYPES["F32"], 1, shape[0])
    return names, described, kept


def _described_experts(config: DecoderConfig) -> tuple[float, ...]:
    """The last fields of _Config, from `experts` on."""
    experts = config.experts
    if experts is None:
        return ()
    clamped = (0,) if experts.clamped is None else (1, *experts.clamped)
    return experts.count, experts.per_token, experts.ffn, int(experts.normalised), *clamped


def _float32(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A vector's numbers. Raises ValueError for quantised ones."""
    flat = np.ascontiguousarray(rows).reshape(-1)
    if kind == "F32":
        return flat.view(np.float32)
    if kind == "F16":
        return flat.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"a vector stored as {kind} cannot be read; F32, F16 and BF16 can")


def usable_cpus() -> int:
    """CPUs this process may run on, or fewer where a control group grants less time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
