"""A worker of several ranks: processes that each compute their part of every step (tensor parallelism, decision 0026).

    rank 0            the worker: schedules, chooses tokens, and tells each step before it computes its own part
    rank 1, 2, ...    `python -m worker.rank`: woken over a pipe, told over the process group; no bus, no scheduler

Rules: every wait has an end. A rank that dies closes its pipe, which rank 0 sees at once; one that is silent fails the
step after `rank_timeout_s`; a rank whose rank 0 is gone finds its own pipe closed and ends. A lost rank is never
replaced: the blocks that it held are gone, so the worker hands its streams back and ends.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from kernels.native.inputs import checked
from kernels.ranks import DistributedRanks, RankLost
from kernels.step import Decoder, Embedding, StepInputs
from shared.settings import WorkerSettings, to_flags

if TYPE_CHECKING:
    from torch import Tensor

READY_WITHIN_S = 600.0  # weights from a slow disk; a rank that dies meanwhile ends the wait at once
# for a process to be seen dead after its connections broke, and for the others to end after their pipe was closed
GRACE_S = 5.0
LOOKS = 100  # at who has ended, in that time
LENGTH_BYTES = 8
BEREFT = 3  # exit code of a rank that ends because it has lost another
ROOT = str(Path(__file__).resolve().parents[1])
HERE, READY = b"here\n", b"ready\n"

Result = TypeVar("Result")

_log = structlog.get_logger("worker.ranks")


class ToldStep(msgspec.Struct, array_like=True):
    """What a rank that chooses nothing needs of `StepInputs`, as int32 bytes."""

    tokens: bytes
    positions: bytes
    sequence_starts: bytes
    block_tables: bytes
    sample_rows: bytes

    @classmethod
    def of(cls, inputs: StepInputs) -> "ToldStep":
        return cls(*(np.ascontiguousarray(getattr(inputs, name), np.int32).tobytes() for name in cls.__struct_fields__))

    def inputs(self) -> StepInputs:
        """The step with greedy choices, which nobody asks for."""
        tokens, positions, starts, tables, samples = (
            np.frombuffer(getattr(self, name), np.int32) for name in self.__struct_fields__)
        zeros, ones = np.zeros(len(samples), np.float32), np.ones(len(samples), np.float32)
        return StepInputs(tokens, positions, starts, tables.reshape(len(starts) - 1, -1), samples, zeros,
                          np.zeros(len(samples), np.int32), ones, zeros, np.zeros(len(samples), np.uint64))


class Others:
    """The processes of ranks 1 and up, seen from rank 0."""

    def __init__(self, settings: WorkerSettings, folder: Path) -> None:
        """Start them. `folder` is where the ranks meet."""
        self.meeting_point = str(folder / "ranks")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watchers: list[threading.Thread] = []
        self._closing = False
        # their settings are this worker's, wherever it had them from
        ours = {f"TOKENMILL_{field.upper()}" for field in (*settings.__struct_fields__, "config")}
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, environment.get("PYTHONPATH"))))
        for rank in range(1, settings.tensor_parallel):
            # not what lies where the user stands, whatever it is called
            command = [sys.executable, "-P", "-m", "worker.rank", str(rank), self.meeting_point, *to_flags(settings)]
            # buffered pipes would keep what has come from whoever waits for it
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                                    env=environment))

    def await_all(self, word: bytes) -> None:
        """Until each has said it. Raises RankLost for one that ends instead, or that takes too long."""
        for rank, process in enumerate(self._processes, 1):
            late = threading.Timer(READY_WITHIN_S, process.kill)
            late.start()
            try:
                if _pipe(process.stdout).readline() != word:
                    raise RankLost(self._fate(rank, "before it was ready"))
            finally:
                late.cancel()

    def watch(self, tell: Callable[[str], None]) -> None:
        """Call `tell` from a thread when a process ends that should not."""
        def wait(rank: int, process: subprocess.Popen[bytes]) -> None:
            _pipe(process.stdout).read(1)  # nothing comes but the end
            if not self._closing:
                tell(self._culprit("while the worker ran") or self._fate(rank, "while the worker ran"))

        for rank, process in enumerate(self._processes, 1):
            self._watchers.append(threading.Thread(target=wait, args=(rank, process), daemon=True,
                                                   name=f"rank-{rank}"))
            self._watchers[-1].start()

    def wake(self, length: int) -> None:
        """Say that so many bytes are about to be told."""
        for rank, process in enumerate(self._processes, 1):
            try:
                _pipe(process.stdin).write(length.to_bytes(LENGTH_BYTES, "little"))
            except OSError:
                raise RankLost(self._fate(rank, "between two steps")) from None

    def explained(self, error: RankLost, when: str = "during a step") -> RankLost:
        """The same, with the rank that is to blame where one has died."""
        if culprit := self._culprit(when):
            return RankLost(culprit)
        silent = ", ".join(f"rank {rank} (process {process.pid})" for rank, process in enumerate(self._processes, 1))
        return RankLost(f"{error}; still there, and stuck: {silent}")

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End them: their pipes close, and who has not gone soon is killed."""
        self._closing = True
        for process in self._processes:
            with contextlib.suppress(OSError):
                _pipe(process.stdin).close()
        for process in self._processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for watcher in self._watchers:
            watcher.join(GRACE_S)
        for process in self._processes:
            _pipe(process.stdout).close()

    def _culprit(self, when: str) -> str | None:
        """What became of a rank that ended by itself; those that ended for want of it say so by their exit code."""
        pause = threading.Event()
        for looks_left in reversed(range(LOOKS)):
            ended = {rank: process.poll() for rank, process in enumerate(self._processes, 1)}
            for rank, code in ended.items():
                if code is not None and (code != BEREFT or not looks_left):
                    return self._fate(rank, when)
            pause.wait(GRACE_S / LOOKS)
        return None

    def _fate(self, rank: int, when: str) -> str:
        process = self._processes[rank - 1]
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return f"rank {rank} (process {process.pid}) closed its pipe {when} and does not end"
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} (process {process.pid}) {how} {when}"


class RankedDecoder:
    """A `kernels.step.Decoder`: rank 0's part, of which the others hear what they are to compute with it."""

    def __init__(self, own: Decoder, ranks: DistributedRanks, others: Others, folder: tempfile.TemporaryDirectory[str]
                 ) -> None:
        self.vocabulary_size = own.vocabulary_size
        self.context_length = own.context_length
        self.block_size_tokens = own.block_size_tokens
        self.blocks = own.blocks
        self.recipe = own.recipe
        if isinstance(own, Embedding):
            self.hidden_size = own.hidden_size
        self.others = others
        self._own = own
        self._ranks = ranks
        self._folder = folder

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """As `Decoder`. Raises RankLost, which says which rank, and from then on always."""
        return self._together(inputs, self._own.step)

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """As `Decoder`."""
        return self._together(inputs, self._own.logits)

    def close(self) -> None:
        """End the other ranks."""
        self.others.close()
        self._ranks.close()
        self._folder.cleanup()

    def _together(self, inputs: StepInputs, compute: Callable[[StepInputs], Result]) -> Result:
        # what is refused here the others never hear of; behind it they wait for what this rank computes
        inputs = checked(inputs, self)
        if inputs.adjustments is not None and inputs.adjustments.fill is not None:
            inputs.adjustments.fill()
            inputs = replace(inputs, adjustments=replace(inputs.adjustments, fill=None))
        words = msgspec.msgpack.encode(ToldStep.of(inputs))
        try:
            self.others.wake(len(words))
            self._ranks.tell(_tensor(bytearray(words)))
            return compute(inputs)
        except RankLost as error:
            raise self.others.explained(error) from None


def follow(decoder: Decoder, ranks: DistributedRanks, wakes: IO[bytes]) -> None:
    """Run every step that rank 0 tells, until it closes the pipe. Raises RankLost when it falls silent in a step."""
    while len(head := wakes.read(LENGTH_BYTES)) == LENGTH_BYTES:
        words = bytearray(int.from_bytes(head, "little"))
        ranks.tell(_tensor(words))
        decoder.logits(msgspec.msgpack.decode(words, type=ToldStep).inputs())


def meet(settings: WorkerSettings, rank: int, meeting_point: str, device: str) -> DistributedRanks:
    """Join the process group. Gloo is told to use loopback: all ranks of a worker are on one machine."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return DistributedRanks(rank, settings.tensor_parallel, meeting_point, device=device,
                            timeout_s=settings.rank_timeout_s)


def load_ranked(settings: WorkerSettings, device: str, load: Callable[[DistributedRanks], Decoder]) -> RankedDecoder:
    """Start the other ranks and load this one's part meanwhile. Raises what `load` raises, and ValueError when one of
    the others does not come up.
    """
    folder = tempfile.TemporaryDirectory(prefix="tokenmill-ranks-")
    others = Others(settings, Path(folder.name))
    try:
        others.await_all(HERE)
        ranks = meet(settings, 0, others.meeting_point, device)
        own = load(ranks)
        others.await_all(READY)
    except BaseException as error:
        lost = others.explained(error, "before it was ready") if isinstance(error, RankLost) else None
        others.close()
        folder.cleanup()
        if lost is not None:
            raise ValueError(f"{lost}; its own words stand before these") from error
        raise
    _log.info("ranks_ready", ranks=settings.tensor_parallel, processes=others.pids)
    return RankedDecoder(own, ranks, others, folder)


def _tensor(words: bytearray) -> "Tensor":
    import torch

    return torch.frombuffer(words, dtype=torch.uint8)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
