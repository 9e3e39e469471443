"""Steps of a GPU as recordings: what a step launches is recorded once for each size of step, and replayed from then on.

    submit    host arrays -> memory of the device that never moves -> replay -> chosen tokens, on their way to the host
    collect   wait until they are there

Rules: a recording depends on its size alone: how many rows, and how far back the furthest of them sees, both padded up.
What else a step says lies in memory that never moves. Padded rows stand at position -1, which every operator passes
over. A size is recorded when it is first needed, never at start. Steps that no recording fits (many rows, masks,
adjustments, logprobs, hidden rows) run launch by launch, to the same numbers.

Tokens stay on the device: a row may stand for what the step before it chose (`carried`), so a step can be submitted
before anybody has seen the tokens of the one before it, and the device never waits for the host.

Not yet run on a GPU: the tests replay recordings on a CPU (`tests/kernels/recording.py`).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.checkpoint import Checkpoint
from kernels.decoder import StepTensors, TorchDecoder, check_step
from kernels.ops import Ops
from kernels.reference import fill_logprobs
from kernels.step import StepInputs

# Padding to the next of these wastes a third at most; a step of more rows is not bound by its launches.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LEAST_LONGEST = 512
MOST_UNDER_WAY = 2
FRESH = -1  # of `carried`: the row's token is the one that the step says


class Size(NamedTuple):
    """What a recording is made for."""

    rows: int
    longest: int  # positions that the furthest row may see


class Recorder(Protocol):
    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What `run` does on the device, as a call that does it again. `run` may be called for it, more than once."""


class CudaRecorder:
    """CUDA graphs; all of a decoder share one pool of memory, since only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        # what is done once (compiling, choosing a kernel, handles of libraries) must not come into the recording
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


class UnderWay(NamedTuple):
    """A step that was submitted: where its tokens will be, and what tells that they are."""

    tokens: Tensor  # [L] on the host
    arrived: "torch.cuda.Event | None"


def size_of(rows: int, longest: int, context_length: int) -> Size | None:
    """The size whose recording serves a step; None: it runs launch by launch."""
    padded = next((size for size in ROWS if size >= rows), None)
    if padded is None:
        return None
    return Size(padded, min(context_length, max(LEAST_LONGEST, 1 << (longest - 1).bit_length())))


class _Fixed:
    """The inputs of steps, in memory that never moves; the host has two copies, for the step that is still read."""

    NAMES = ("tokens", "carried", "positions", "sequences", "sample_rows", "seeds", "new_positions")

    def __init__(self, rows: int, sequences: int, blocks: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.numbers = torch.zeros((len(self.NAMES), rows), dtype=torch.int64, device=device)
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.tables = torch.full((sequences, blocks), -1, dtype=torch.int32, device=device)
        self.before = torch.zeros(rows, dtype=torch.int32, device=device)  # what the step before this one chose
        self.chosen = torch.zeros(rows, dtype=torch.int32, device=device)
        self._host = [
            (torch.zeros((len(self.NAMES), rows), dtype=torch.int64, pin_memory=pinned),
             torch.zeros(rows, dtype=torch.float32, pin_memory=pinned))
            for _ in range(MOST_UNDER_WAY)
        ]  # fmt: skip
        self.arrived = [torch.zeros(rows, dtype=torch.int32, pin_memory=pinned) for _ in range(MOST_UNDER_WAY)]
        self._known_tables: NDArray[np.int32] | None = None
        self.table_copies = 0

    def put(self, inputs: StepInputs, carried: NDArray[np.int32] | None, turn: int) -> None:
        """All of a step but its block tables; rows beyond its own become padding."""
        numbers, temperature = (part.numpy() for part in self._host[turn])
        rows, samples, counts = len(inputs.tokens), len(inputs.sample_rows), np.diff(inputs.sequence_starts)
        parts: dict[str, NDArray[np.generic] | int] = {
            "tokens": inputs.tokens,
            "carried": FRESH if carried is None else carried,
            "positions": inputs.positions,
            "sequences": np.repeat(np.arange(len(counts)), counts),
            "sample_rows": inputs.sample_rows,
            "seeds": inputs.seeds.view(np.int64),
            "new_positions": inputs.positions[inputs.sample_rows] + 1,
        }
        for row, name in zip(numbers, self.NAMES, strict=True):
            count = samples if name in ("sample_rows", "seeds", "new_positions") else rows
            row[:count], row[count:] = parts[name], -1 if name in ("positions", "carried") else 0
        temperature[:samples], temperature[samples:] = inputs.temperature, 0
        for fixed, host in zip((self.numbers, self.temperature), self._host[turn], strict=True):
            fixed.copy_(host, non_blocking=True)

    def put_tables(self, tables: NDArray[np.int32]) -> None:
        """Block tables, where they are others than the last: whoever builds steps hands out the same array again."""
        if tables is self._known_tables:
            return
        self._known_tables = tables
        self.table_copies += 1
        self.tables[: len(tables), : tables.shape[1]].copy_(torch.from_numpy(tables), non_blocking=True)

    def row(self, name: str, rows: int) -> Tensor:
        return self.numbers[self.NAMES.index(name), :rows]


class ReplayingDecoder(TorchDecoder):
    """A `TorchDecoder` that replays its short steps, and takes a step before the tokens of the last one are known."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        recorder: Recorder,
        most_rows: int,
        most_sequences: int,
        blocks: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        four_bits: bool = False,
        ops: Ops | None = None,
    ) -> None:
        """`most_rows` and `most_sequences`: of one step. Others as `TorchDecoder`."""
        self.recordings: dict[Size, Callable[[], None]] = {}
        super().__init__(checkpoint, blocks=blocks, device=device, dtype=dtype, four_bits=four_bits, ops=ops)
        self.recorder = recorder
        self.most_sequences = most_sequences
        blocks_of_one = -(-self.context_length // self.block_size_tokens)
        self._fixed = _Fixed(max(ROWS[-1], most_rows), most_sequences, blocks_of_one, self.device)
        self._turn = 0
        self._under_way = 0

    def make_cache(self, blocks: int) -> None:
        """As `TorchDecoder.make_cache`. Recordings are of the cache that they were made with."""
        self.recordings.clear()
        super().make_cache(blocks)

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """As `TorchDecoder.step`."""
        return self.collect(self.submit(inputs))

    def submit(self, inputs: StepInputs, carried: NDArray[np.int32] | None = None) -> UnderWay:
        """Begin a step. At most two are under way; they are collected in order.

        `carried` [R]: which sample of the step submitted before chooses the token of a row; FRESH: `inputs.tokens` says
        it. Raises ValueError for a malformed step, of which nothing is then under way.
        """
        check_step(inputs, self)
        samples = len(inputs.sample_rows)
        if self._under_way == MOST_UNDER_WAY:
            raise RuntimeError(f"{MOST_UNDER_WAY} steps are under way: collect one first")
        most_rows = len(self._fixed.chosen)
        if len(inputs.tokens) > most_rows or len(inputs.sequence_starts) - 1 > self.most_sequences:
            raise ValueError(f"a step has at most {most_rows} rows in {self.most_sequences} sequences")
        self._turn = (self._turn + 1) % MOST_UNDER_WAY
        with torch.inference_mode():
            self._fixed.before.copy_(self._fixed.chosen)
            longest = int(inputs.positions.max()) + 1
            size = size_of(len(inputs.tokens), longest, self.context_length)
            # how many rows an expert has only the step's own numbers say
            if size is None or self.config.experts is not None or not _is_plain(inputs):
                self._launch(inputs, carried)
            else:
                self._fixed.put(inputs, carried, self._turn)
                self._fixed.put_tables(inputs.block_tables)
                self._recording(size)()
            tokens = self._fixed.arrived[self._turn][:samples]
            tokens.copy_(self._fixed.chosen[:samples], non_blocking=True)
        self._under_way += 1
        if self.device.type != "cuda":
            return UnderWay(tokens, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return UnderWay(tokens, arrived)

    def collect(self, step: UnderWay) -> NDArray[np.int32]:
        """Wait for the tokens [L] of the oldest step under way."""
        self._under_way -= 1
        if step.arrived is not None:
            step.arrived.synchronize()
        tokens: NDArray[np.int32] = step.tokens.numpy().copy()
        return tokens

    def _recording(self, size: Size) -> Callable[[], None]:
        if size not in self.recordings:
            self.recordings[size] = self.recorder.record(lambda: self._run(size))
        return self.recordings[size]

    def _run(self, size: Size) -> None:
        """What is recorded: from the fixed inputs to the fixed choices, whatever they hold."""
        fixed = self._fixed

        def row(name: str) -> Tensor:
            return fixed.row(name, size.rows)

        tokens = _carried(row("tokens"), row("carried"), fixed.before)
        rows = StepTensors(tokens, row("positions"), row("sequences"), fixed.tables, row("sample_rows"), size.longest)
        logits = self._head_of(rows)
        temperature = fixed.temperature[: size.rows]
        fixed.chosen[: size.rows] = self.ops.sample(logits, temperature, row("seeds"), row("new_positions"))

    def _launch(self, inputs: StepInputs, carried: NDArray[np.int32] | None) -> None:
        """A step without a recording."""
        rows = self._rows(inputs)
        if carried is not None:
            which = torch.from_numpy(carried.astype(np.int64)).to(self.device)
            rows = rows._replace(tokens=_carried(rows.tokens, which, self._fixed.before))
        raw = self._head_of(rows, inputs.hidden)
        chosen = self.ops.sample(*self._masked(inputs, raw))
        self._fixed.chosen[: len(chosen)] = chosen
        if inputs.logprobs is not None:
            fill_logprobs(inputs.logprobs, raw, chosen)


def _carried(tokens: Tensor, carried: Tensor, before: Tensor) -> Tensor:
    """The tokens of rows, of which some are what the step before chose."""
    return torch.where(carried >= 0, before[carried.clamp(min=0)].long(), tokens)


def _is_plain(inputs: StepInputs) -> bool:
    """Whether nothing but temperature stands between logits and choices."""
    if inputs.adjustments is not None or inputs.logprobs is not None or inputs.hidden is not None:
        return False
    return bool(((inputs.top_k == 0) & (inputs.top_p >= 1) & (inputs.min_p == 0)).all())
