"""Where a step runs: on the one thread that belongs to the device, or in the mock's imagined time.

Rule: one step at a time, always from the same thread, and never on the event loop (the mock's microseconds aside).
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.checkpoint_config import HEAD_IDS
from kernels.ranks import DistributedRanks, Ranks
from kernels.shards import cuts
from kernels.step import Ahead, BlockStore, Decoder, StepInputs, Streaks
from shared.clock import Clock
from shared.settings import WorkerSettings
from shared.timeline import Timeline
from shared.vocabulary import FILE, Vocabulary, load_vocabulary
from worker.kv_tier import Copy, TierMemory
from worker.mock_decoder import MockDecoder
from worker.ranks import RankedDecoder, load_ranked

ENGINES = ("auto", "cpu", "cuda", "reference", "mock")
KV_FORMATS = ("fp16", "int8", "fp8")
MOCK_BLOCKS_PER_MIB = 16
# without one of these there is no CUDA device, and no need to spend two seconds on importing torch to learn that
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))

_log = structlog.get_logger("worker.runner")


class _Card(msgspec.Struct):
    vocabulary: str = ""


class Runner(Protocol):
    decoder: Decoder
    tier: TierMemory | None
    queues: bool  # whether `submit` and `collect` work: the device takes a step while it runs one
    goes_on: bool  # whether `streak` works; not where steps are queued

    async def execute(self, inputs: StepInputs) -> list[int]:
        """The chosen token of each sampled row. Raises what the decoder raises."""

    async def streak(self, inputs: StepInputs, lengths: list[int]) -> list[int]:
        """As `kernels.step.Streaks`: all tokens of the first sequence, then those of the second, ..."""

    async def submit(self, inputs: StepInputs, carried: NDArray[np.int32] | None) -> Any:
        """As `kernels.step.Ahead`."""

    async def collect(self, step: Any) -> list[int]:
        """As `execute`, of a step that was submitted."""

    async def copy(self, copies: Sequence[Copy]) -> None:
        """Move blocks between the decoder and the tier, in order. Raises what the decoder raises."""

    def close(self) -> None:
        """Let the device go. Waits for the step under way."""


class ThreadRunner:
    """A real decoder on a thread of its own."""

    def __init__(self, decoder: Decoder, tier: TierMemory | None = None) -> None:
        self.decoder = decoder
        self.tier = tier
        self.queues = isinstance(decoder, Ahead)
        self._streaks = decoder if isinstance(decoder, Streaks) else None
        self.goes_on = self._streaks is not None and not self.queues
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def execute(self, inputs: StepInputs) -> list[int]:
        loop = asyncio.get_running_loop()
        chosen: list[int] = await loop.run_in_executor(self._thread, lambda: self.decoder.step(inputs).tolist())
        return chosen

    async def streak(self, inputs: StepInputs, lengths: list[int]) -> list[int]:
        assert self._streaks is not None
        loop = asyncio.get_running_loop()
        return _flat(await loop.run_in_executor(self._thread, self._streaks.streak, inputs, lengths))

    async def submit(self, inputs: StepInputs, carried: NDArray[np.int32] | None) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: _queue_of(self.decoder).submit(inputs, carried))

    async def collect(self, step: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        chosen: list[int] = await loop.run_in_executor(
            self._thread, lambda: _queue_of(self.decoder).collect(step).tolist())
        return chosen

    async def copy(self, copies: Sequence[Copy]) -> None:
        if self.tier is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.tier.run, copies)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if isinstance(self.decoder, RankedDecoder):
            self.decoder.close()


class TimedRunner:
    """A decoder whose step takes the time that a formula says: the mock, on any clock."""

    def __init__(self, decoder: Decoder, clock: Clock, *, step_s: float, row_s: float, token_s: float,
                 tier: TierMemory | None = None) -> None:
        self.decoder = decoder
        self.tier = tier
        self.queues = isinstance(decoder, Ahead)
        self._streaks = decoder if isinstance(decoder, Streaks) else None
        self.goes_on = self._streaks is not None and not self.queues
        self._clock = clock
        self._step_s, self._row_s, self._token_s = step_s, row_s, token_s
        self._free_at = 0.0  # when what was submitted is computed

    async def execute(self, inputs: StepInputs) -> list[int]:
        await self._clock.sleep(self._seconds(inputs))
        chosen: list[int] = self.decoder.step(inputs).tolist()
        return chosen

    async def streak(self, inputs: StepInputs, lengths: list[int]) -> list[int]:
        await self._clock.sleep(max(lengths) * self._step_s + sum(lengths) * self._row_s)
        assert self._streaks is not None
        return _flat(self._streaks.streak(inputs, lengths))

    async def submit(self, inputs: StepInputs, carried: NDArray[np.int32] | None) -> Any:
        submitted = _queue_of(self.decoder).submit(inputs, carried)
        self._free_at = max(self._free_at, self._clock.now()) + self._seconds(inputs)
        return submitted, self._free_at

    async def collect(self, step: Any) -> list[int]:
        submitted, ready_at = step
        await self._clock.sleep(max(0.0, ready_at - self._clock.now()))
        chosen: list[int] = _queue_of(self.decoder).collect(submitted).tolist()
        return chosen

    def _seconds(self, inputs: StepInputs) -> float:
        sampled = len(inputs.sample_rows)
        prefilled = len(inputs.tokens) - sampled
        return self._step_s + sampled * self._row_s + prefilled * self._token_s

    async def copy(self, copies: Sequence[Copy]) -> None:
        """Takes no time: computing a block takes a hundred times as long."""
        if self.tier is not None:
            self.tier.run(copies)

    def close(self) -> None:
        """Nothing to let go."""


def _queue_of(decoder: Decoder) -> Ahead:
    assert isinstance(decoder, Ahead)
    return decoder


def _flat(streaks: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(streaks))


def engine_of(settings: WorkerSettings) -> str:
    """The engine that `auto` means on this machine. Raises ValueError for a name that is none."""
    if settings.engine not in ENGINES:
        raise ValueError(f"engine is {settings.engine!r}: choose one of {', '.join(ENGINES)}")
    if settings.engine != "auto":
        return settings.engine
    if not any(device.exists() for device in GPU_DEVICES):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_decoder(settings: WorkerSettings, timeline: Timeline | None = None) -> Decoder:
    """The decoder that the settings ask for. Blocking, for seconds. Raises ValueError when there is no model.

    On the CPU `timeline` is marked with `native_library`: found in the cache, or compiled if that took seconds.
    """
    engine = engine_of(settings)
    if settings.kv_format not in KV_FORMATS:
        raise ValueError(f"kv_format is {settings.kv_format!r}: choose one of {', '.join(KV_FORMATS)}")
    if settings.kv_format != "fp16" and engine != "cpu":
        raise ValueError(f"engine {engine} has no KV format {settings.kv_format}: leave out --kv-format, or use "
                         "--engine cpu")
    if settings.tensor_parallel < 1 or settings.rank_timeout_s <= 0:
        raise ValueError(f"tensor_parallel is {settings.tensor_parallel}, rank_timeout_s {settings.rank_timeout_s:g}: "
                         "say 1 or more ranks, and more than 0 seconds")
    if engine == "mock":
        if settings.tensor_parallel > 1:
            raise ValueError("the mock engine has nothing to share: leave out --tensor-parallel")
        return MockDecoder(blocks=settings.kv_blocks or settings.kv_mib * MOCK_BLOCKS_PER_MIB,
                           vocabulary_size=settings.mock_vocabulary)
    if not settings.model:
        raise ValueError(f"engine {engine} needs a model: pass --model with the path of a pulled one, or --engine mock")
    path = Path(settings.model)
    if (path if path.is_dir() else path.parent).joinpath(HEAD_IDS).exists():
        raise ValueError(f"{path} is a drafter's model, whose head knows a part of the vocabulary: serve the model "
                         "that it was made of, and give this one to a drafter")
    if settings.tensor_parallel > 1:
        if settings.kv_tier_mib:
            raise ValueError("several ranks have no tier in host memory: leave out --kv-tier-mib or --tensor-parallel")
        cuts(open_checkpoint(path).config, settings.tensor_parallel)
        return load_ranked(settings, device_of(settings), partial(load_part, settings, timeline=timeline))
    return load_part(settings, None, timeline)


def device_of(settings: WorkerSettings) -> str:
    """cuda or cpu."""
    return "cuda" if engine_of(settings) == "cuda" else "cpu"


def load_part(settings: WorkerSettings, ranks: DistributedRanks | None, timeline: Timeline | None = None) -> Decoder:
    """What one process computes of a real model: all of it, or its rank's part. Blocking. Raises ValueError."""
    path, blocks = Path(settings.model), settings.kv_blocks or None
    kv_bytes = settings.kv_mib << 20
    if engine_of(settings) == "cpu":
        try:
            return _recipe_decoder(settings, path, blocks, ranks, timeline)
        except ValueError as error:
            if ranks is not None:
                raise
            if settings.kv_format != "fp16":
                raise ValueError(f"only the native step has KV format {settings.kv_format}, and it is not available "
                                 f"({error}): leave out --kv-format") from error
            _log.warning("recipe_unavailable", error=str(error), instead="the float32 reference: other numbers, so no "
                         "stream can move between it and the native step, and four bytes a weight")
    import torch

    from kernels.decoder import TorchDecoder

    device = device_of(settings)
    if device == "cuda" and ranks is None:
        return _queueing_decoder(settings, path, blocks)
    if ranks is not None and device == "cuda":
        device = f"cuda:{ranks.rank}"
    torch_decoder: Decoder = TorchDecoder.load(path, blocks=blocks, kv_bytes=kv_bytes, device=device, ranks=ranks,
                                               dtype=torch.bfloat16 if device != "cpu" else torch.float32)
    return torch_decoder


def _queueing_decoder(settings: WorkerSettings, path: Path, blocks: int | None) -> Decoder:
    """On one GPU: steps are replayed and queued, and the cache has what the largest of them leaves.

    Activations and dense weights have 16 bits; weights that are stored in four stay in four.
    """
    import torch

    from kernels.device_memory import CudaMemory, blocks_that_fit, worst_step
    from kernels.replay import CudaRecorder, ReplayingDecoder

    decoder = ReplayingDecoder(open_checkpoint(path), recorder=CudaRecorder(), most_rows=settings.step_tokens,
                               most_sequences=settings.max_running, blocks=blocks or 1, device="cuda",
                               dtype=torch.bfloat16, four_bits=True)
    if blocks is None:
        worst = worst_step(settings.step_tokens, settings.max_running, decoder.context_length,
                           decoder.block_size_tokens, decoder.vocabulary_size)
        decoder.make_cache(blocks_that_fit(CudaMemory(), settings.device_share, decoder.block_bytes,
                                           lambda: decoder.step(worst)))
    return decoder


def _recipe_decoder(settings: WorkerSettings, path: Path, blocks: int | None, ranks: Ranks | None,
                    timeline: Timeline | None) -> Decoder:
    """The recipe of the native step: compiled, or where nothing can be compiled the same numbers, slowly.

    Raises ValueError when the recipe does not know the model, or has no such KV format or no ranks without a compiler.
    """
    kv_bytes, threads = settings.kv_mib << 20, settings.threads
    try:
        from kernels.native.build import build
        from kernels.native.decoder import NativeDecoder, usable_cpus

        if ranks is not None:
            threads = max(1, (threads or usable_cpus()) // ranks.size)
        if timeline is not None:
            timeline.mark("engine_imports")
            build()
            timeline.mark("native_library")
        native: Decoder = NativeDecoder.load(path, blocks=blocks, kv_bytes=kv_bytes, threads=threads,
                                             kv_format=settings.kv_format, ranks=ranks)
        return native
    except (ImportError, OSError, RuntimeError) as error:
        if ranks is not None:
            raise ValueError(f"several ranks need the native step, which is not available ({error}): leave out "
                             "--tensor-parallel") from error
        if settings.kv_format != "fp16":
            raise ValueError(str(error)) from error
        _log.warning("native_step_unavailable", error=str(error),
                     instead="the same numbers from numpy and torch, some thirty times slower")
    from kernels.native.uncompiled import UncompiledDecoder

    uncompiled: Decoder = UncompiledDecoder.load(path, blocks=blocks, kv_bytes=kv_bytes, threads=settings.threads)
    return uncompiled


def vocabulary_of(settings: WorkerSettings) -> str:
    """The digest that drafters compare, out of the card beside the model; empty when there is none."""
    model = Path(settings.model) if settings.model else None
    if model is None or settings.engine == "mock":
        return ""
    card = (model if model.is_dir() else model.parent) / "card.json"
    try:
        return msgspec.json.decode(card.read_bytes(), type=_Card).vocabulary
    except FileNotFoundError:
        return ""
    except msgspec.MsgspecError as error:
        raise ValueError(f"{card} is no model card ({error}): run `tokenmill pull` again") from None


def vocabulary_file(settings: WorkerSettings) -> Vocabulary | None:
    """The bytes of the model's tokens, as they lie beside it; None when they do not. Raises ValueError."""
    if not settings.model:
        return None
    model = Path(settings.model)
    return load_vocabulary((model if model.is_dir() else model.parent) / FILE)


def runner_for(decoder: Decoder, settings: WorkerSettings, clock: Clock) -> Runner:
    """How this decoder is run."""
    tier = tier_for(decoder, settings)
    if isinstance(decoder, MockDecoder):
        return TimedRunner(decoder, clock, step_s=settings.mock_step_s, row_s=settings.mock_row_s,
                           token_s=settings.mock_token_s, tier=tier)
    return ThreadRunner(decoder, tier)


def tier_for(decoder: Decoder, settings: WorkerSettings) -> TierMemory | None:
    """Host memory for evicted blocks, as much as the settings say. A mock's blocks count as if they were large."""
    if settings.kv_tier_mib < 0:
        raise ValueError(f"kv_tier_mib must be 0 or more, got {settings.kv_tier_mib}")
    if not settings.kv_tier_mib:
        return None
    if not isinstance(decoder, BlockStore):
        _log.warning("kv_tier_unavailable", recipe=decoder.recipe, why="its blocks cannot be copied")
        return None
    slots = (settings.kv_tier_mib * MOCK_BLOCKS_PER_MIB if isinstance(decoder, MockDecoder)
             else (settings.kv_tier_mib << 20) // decoder.block_bytes)
    if slots < 1:
        raise ValueError(f"kv_tier_mib={settings.kv_tier_mib} holds no block of {decoder.block_bytes} bytes: raise it")
    return TierMemory(decoder, slots)
