"""A real worker and a drafter of kind model or hybrid: same tokens, fewer steps, and nobody is drafted for in vain."""

import asyncio
from pathlib import Path

import pytest
import structlog
from msgspec.structs import replace

import drafter.service
import worker.service
from kernels.native.build import available
from shared import subjects
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    Finished,
    Generate,
    Sampling,
    Status,
    StepReplies,
    Tokens,
    WorkerStatus,
    decode,
    encode,
)
from shared.settings import DrafterSettings, WorkerSettings
from shared.tokens import unpack
from tests.drafter.small_models import decoder_of, said, write_model
from tests.worker.builders import request

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

COUNT = 200
SAMPLINGS = [Sampling(temperature=0.0), Sampling(temperature=5.0, seed=21),
             Sampling(temperature=4.0, seed=22, top_k=50, top_p=0.95)]
REQUESTS = [request(f"r{number}", [number + 5, 6, 7, 80 - number, 91], max_tokens=COUNT, sampling=sampling,
                    deadline=2e6) for number, sampling in enumerate(SAMPLINGS)]


async def served(folder: Path, kind: str, drafts_with: Path,
                 requests: list[Generate]) -> tuple[dict[str, list[int]], dict[str, Finished], str]:
    """Streams and ends by request, and which drafter the worker followed."""
    broker, clock = MemoryBroker(), LoopClock(1e6)
    bus = MemoryBus(broker)
    streams: dict[str, list[int]] = {one.request_id: [] for one in requests}
    ends: dict[str, Finished] = {}
    done, here = asyncio.Event(), asyncio.Event()

    def hear(data: bytes) -> None:
        for reply in decode(data, StepReplies).replies:
            if isinstance(reply, Tokens):
                streams[reply.request_id] += unpack(reply.tokens)
            elif isinstance(reply, Finished):
                ends[reply.request_id] = reply
                if len(ends) == len(requests):
                    done.set()

    await bus.subscribe(subjects.replies("g1"), lambda delivery: hear(delivery.data))
    followed = [""]

    def hear_worker(data: bytes) -> None:
        status = decode(data, Status)
        if isinstance(status, WorkerStatus):
            followed.append(status.drafter)

    await bus.subscribe(subjects.status("drafter", "*"), lambda _: here.set())
    await bus.subscribe(subjects.status("worker", "*"), lambda delivery: hear_worker(delivery.data))
    its = WorkerSettings(id="w1", engine="cpu", model=str(folder), model_name="m", threads=1, kv_mib=2, drain_s=0.0,
                         heartbeat_s=0.05)
    theirs = DrafterSettings(id="d1", kind=kind, model=str(drafts_with), kv_mib=1, heartbeat_s=0.05)
    ready = asyncio.Event()
    async with asyncio.timeout(60):
        tasks = [asyncio.create_task(drafter.service.serve(MemoryBus(broker), theirs, clock)),
                 asyncio.create_task(worker.service.serve(MemoryBus(broker), its, clock, ready))]
        await here.wait()
        await ready.wait()
        await asyncio.sleep(0.3)
        for one in requests:
            await bus.publish(subjects.worker_generate("w1"), encode(one))
        await done.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return streams, ends, max(followed)


@pytest.mark.parametrize("kind", ["model", "hybrid"])
async def test_every_stream_is_token_identical_and_drafts_of_the_same_model_are_all_accepted(
        tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path)
    truths = {one.request_id: said(decoder_of(folder), unpack(one.tokens), COUNT, one.sampling) for one in REQUESTS}
    streams, ends, followed = await served(folder, kind, folder, REQUESTS)
    assert streams == truths
    assert followed == "d1"
    drafted = sum(end.draft_tokens for end in ends.values())
    accepted = sum(end.accepted_draft_tokens for end in ends.values())
    assert drafted > 0
    if kind == "model":
        assert accepted == drafted


async def test_a_model_that_is_often_wrong_changes_no_token(tmp_path: Path) -> None:
    folder, other = write_model(tmp_path / "target"), write_model(tmp_path / "other", seed=9)
    truths = {one.request_id: said(decoder_of(folder), unpack(one.tokens), COUNT, one.sampling) for one in REQUESTS}
    streams, _, followed = await served(folder, "model", other, REQUESTS)
    assert streams == truths
    assert followed == "d1"


async def test_a_model_of_another_vocabulary_is_not_followed_and_says_so(tmp_path: Path) -> None:
    folder, other = write_model(tmp_path / "target"), write_model(tmp_path / "other", vocabulary="elsewhere")
    one = replace(REQUESTS[0], max_tokens=20)
    with structlog.testing.capture_logs() as logs:
        streams, ends, followed = await served(folder, "model", other, [one])
    assert streams == {one.request_id: said(decoder_of(folder), unpack(one.tokens), 20, one.sampling)}
    assert (followed, ends[one.request_id].draft_tokens) == ("", 0)
    (told,) = [entry for entry in logs if entry["event"] == "vocabulary_differs"]
    assert (told["worker"], told["its"], told["own"]) == ("w1", "abcd", "elsewhere")


