"""One worker on a memory bus, and ears for everything it says."""

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernels.step import StepInputs
from shared import subjects
from shared.bus import Delivery
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    Cancel,
    DrafterStatus,
    Drafts,
    Failed,
    Finished,
    Follow,
    GatewayStatus,
    Generate,
    KvEvents,
    KvMessage,
    KvSnapshot,
    Reply,
    SnapshotRequest,
    StepReplies,
    Tokens,
    Wire,
    WorkerStatus,
    decode,
    encode,
)
from shared.settings import WorkerSettings
from shared.tokens import unpack
from tests.worker.builders import mock_decoder
from worker.mock_decoder import MockDecoder
from worker.service import serve

WALL_S = 1_700_000_000.0


class PoisonedDecoder(MockDecoder):
    """A device that dies of one token."""

    poison = 13
    dead = False

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        if self.dead or (inputs.tokens == self.poison).any():
            raise RuntimeError("device-side assert")
        return super().step(inputs)


class Mesh:
    """The world of worker `w1`: a gateway `g1`, a drafter `d1`, a router, all of them this object."""

    def __init__(self, decoder: MockDecoder | None = None, **settings: object) -> None:
        self.clock = LoopClock(WALL_S)
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.worker_bus = MemoryBus(self.broker)
        self.decoder = decoder or mock_decoder()
        self.settings = WorkerSettings(**{"id": "w1", "engine": "mock", "model_name": "m"} | settings)  # type: ignore[arg-type]
        self.batches: list[StepReplies] = []
        self.replies: list[Reply] = []
        self.follows: list[Follow] = []
        self.kv: list[KvEvents | KvSnapshot] = []
        self.statuses: list[WorkerStatus] = []
        self.on_follow: Callable[[Follow], None] = lambda follow: None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "Mesh":
        for subject, handler in [
            (subjects.replies("g1"), self._on_replies),
            (f"{subjects.drafter_follow('d1')}.>", self._on_follow),
            (subjects.worker_kv("w1"), self._on_kv),
            (subjects.status("worker", "w1"), self._on_status),
        ]:
            await self.bus.subscribe(subject, handler)
        ready = asyncio.Event()
        self.serving = asyncio.ensure_future(serve(self.worker_bus, self.settings, self.clock, ready, self.decoder))
        await ready.wait()
        await asyncio.sleep(0.001)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.serving.cancel()
        await asyncio.wait([self.serving])
        if not self.serving.cancelled() and (failure := self.serving.exception()) is not None:
            raise failure

    async def send(self, *messages: Wire) -> None:
        """Each message to where it belongs."""
        for message in messages:
            match message:
                case Generate():
                    subject = subjects.worker_generate("w1")
                case Cancel():
                    subject = subjects.worker_cancel("w1")
                case Drafts():
                    subject = subjects.worker_drafts("w1")
                case SnapshotRequest():
                    subject = subjects.worker_kv_request("w1")
                case DrafterStatus(id=name):
                    subject = subjects.status("drafter", name)
                case GatewayStatus(id=name):
                    subject = subjects.status("gateway", name)
                case _:
                    raise AssertionError(f"nobody takes {message}")
            await self.bus.publish(subject, encode(message))

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def ended(self, name: str, attempt: int = 1) -> Finished | Failed:
        """The last word on a stream."""
        await self.until(lambda: self.ends(name, attempt))
        (end,) = self.ends(name, attempt)
        return end

    def ends(self, name: str, attempt: int = 1) -> list[Finished | Failed]:
        return [reply for reply in self.replies if isinstance(reply, Finished | Failed)
                and (reply.request_id, reply.attempt) == (name, attempt)]

    def stream(self, name: str, attempt: int = 1) -> list[int]:
        return [token for reply in self.replies if isinstance(reply, Tokens)
                and (reply.request_id, reply.attempt) == (name, attempt) for token in unpack(reply.tokens)]

    def drafter(self, epoch: int = 1, **fields: object) -> DrafterStatus:
        return DrafterStatus(**{"id": "d1", "epoch": epoch} | fields)  # type: ignore[arg-type]

    def _on_replies(self, delivery: Delivery) -> None:
        batch = decode(delivery.data, StepReplies)
        self.batches.append(batch)
        self.replies += batch.replies
        self._changed.set()

    def _on_follow(self, delivery: Delivery) -> None:
        follow = decode(delivery.data, Follow)
        self.follows.append(follow)
        self.on_follow(follow)
        self._changed.set()

    def _on_kv(self, delivery: Delivery) -> None:
        message: KvEvents | KvSnapshot = decode(delivery.data, KvMessage)  # type: ignore[arg-type]
        self.kv.append(message)
        self._changed.set()

    def _on_status(self, delivery: Delivery) -> None:
        self.statuses.append(decode(delivery.data, WorkerStatus))
        self._changed.set()


def future(mesh: Mesh, seconds: float = 1000.0) -> float:
    """A deadline so far from now."""
    return mesh.clock.wall() + seconds
