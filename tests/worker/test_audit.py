"""What a worker says so that its router need not believe: its block names, the digest of its cache, its recipe."""

import asyncio
from collections.abc import Awaitable, Callable

from shared import subjects
from shared.blocks import fold, join_hashes, split_hashes
from shared.messages import (
    Cleared,
    Failed,
    Finished,
    KvEvents,
    KvMessage,
    KvSnapshot,
    Removed,
    RouterStatus,
    Stored,
    encode,
)
from shared.parity import expected_answer
from tests.virtual_time import run_virtual
from tests.worker.builders import BLOCK, mock_decoder, plain, request
from tests.worker.mesh import WALL_S, Mesh
from worker.kv_blocks import BlockPool
from worker.outbox import Outbox
from worker.probe import probe_answer

DEADLINE = WALL_S + 1000.0


def play(scenario: Callable[[Mesh], Awaitable[None]], mesh: Mesh) -> Mesh:
    async def run() -> Mesh:
        async with mesh:
            await scenario(mesh)
        return mesh
    return run_virtual(run(), timeout_s=600)


def held_after(messages: list[KvMessage]) -> dict[int, set[bytes]]:
    """The cache behind each number, as one who heard everything would have it."""
    held: set[bytes] = set()
    behind: dict[int, set[bytes]] = {0: set()}
    for message in messages:
        if isinstance(message, KvSnapshot):
            assert set(split_hashes(message.hashes)) == held
            continue
        for event in message.events:
            match event:
                case Stored(hashes):
                    held = held | set(split_hashes(hashes))
                case Removed(hashes):
                    held = held - set(split_hashes(hashes))
                case Cleared():
                    held = set()
        behind[message.seq] = held
    return behind


def test_the_probe_is_answered_by_the_code_that_names_blocks_and_agrees_with_the_mesh() -> None:
    for size in (1, 4, 16, 32, 64):
        assert probe_answer("w1", 5, size) == expected_answer("w1", 5, size) != b""
    assert probe_answer("w1", 5, 128) == b""
    answers = {probe_answer(name, epoch, size) for name in ("a", "b") for epoch in (1, 2) for size in (8, 16)}
    assert len(answers) == 8


def test_every_status_carries_the_digest_of_the_cache_behind_its_number() -> None:
    async def scenario(mesh: Mesh) -> None:
        for number in range(12):  # more than fits: blocks give way all the time
            await mesh.send(request(f"r{number}", list(range(number * 7, number * 7 + 30)), deadline=DEADLINE))
        for number in range(12):
            assert isinstance(await mesh.ended(f"r{number}"), Finished)
        await asyncio.sleep(1.0)

    mesh = play(scenario, Mesh(mock_decoder(blocks=24), heartbeat_s=0.013))
    behind = held_after(list(mesh.kv))
    assert any(isinstance(event, Removed) for message in mesh.kv if isinstance(message, KvEvents)
               for event in message.events)
    spoken = [status for status in mesh.statuses if status.state == "ready"]
    assert len({status.kv_seq for status in spoken}) > 5
    for status in spoken:
        assert int.from_bytes(status.kv_digest, "little") == fold(join_hashes(sorted(behind[status.kv_seq])))
        assert status.parity == expected_answer("w1", status.epoch, BLOCK)


def test_a_snapshot_mends_a_digest_that_the_events_got_wrong() -> None:
    pool, outbox = BlockPool(8), Outbox("w1", 1)
    block = (pool.allocate(1) or [0])[0]
    pool.store(block, b"n" * 16, b"content")
    outbox.kv_events(pool)
    assert outbox.kv_digest == b"n" * 16
    outbox._digest ^= 1
    outbox.snapshot(pool)
    assert (outbox.kv_digest, outbox.wrong_digests) == (b"n" * 16, 1)
    outbox.snapshot(pool)
    assert outbox.wrong_digests == 1


def test_a_stream_that_began_under_another_recipe_is_handed_on_not_continued() -> None:
    async def scenario(mesh: Mesh) -> None:
        own = mesh.decoder.recipe
        await mesh.send(request("other", generated=[9], attempt=2, recipe="int8", deadline=DEADLINE),
                        request("same", generated=[9], attempt=2, recipe=own, deadline=DEADLINE))
        end = await mesh.ended("other", 2)
        assert isinstance(end, Failed) and end.retryable and "int8" in end.message
        assert isinstance(await mesh.ended("same", 2), Finished)
        assert {batch.recipe for batch in mesh.batches} == {own}

    mesh = play(scenario, Mesh())
    assert mesh.stream("other", 2) == []
    assert mesh.stream("same", 2) == plain(request("same", generated=[9], attempt=2))


def test_a_router_that_has_just_started_is_answered_at_once_and_once() -> None:
    async def scenario(mesh: Mesh) -> None:
        await asyncio.sleep(0.1)
        had = len(mesh.statuses)

        async def says(epoch: int, state: str) -> int:
            await mesh.bus.publish(subjects.status("router", "r1"), encode(RouterStatus("r1", epoch, state)))
            await asyncio.sleep(0.01)
            return len(mesh.statuses) - had

        assert [await says(1, "starting"), await says(1, "starting"), await says(1, "ready")] == [1, 1, 1]
        assert [await says(2, "ready"), await says(2, "starting")] == [1, 2]

    play(scenario, Mesh(heartbeat_s=100.0))


def test_a_snapshot_of_a_large_cache_fits_into_messages_of_a_broker() -> None:
    pool, outbox = BlockPool(70_000), Outbox("w1", 1)
    names = [number.to_bytes(16, "big") for number in range(70_000)]
    for block, name in zip(pool.allocate(70_000) or [], names, strict=True):
        pool.store(block, name, b"")
    changes, *parts = [out.message for out in outbox.snapshot(pool)]
    assert isinstance(changes, KvEvents)
    assert all(len(encode(part)) < 1_000_000 for part in parts)
    assert [(part.part, part.parts, part.seq) for part in parts if isinstance(part, KvSnapshot)] == [
        (0, 3, 1), (1, 3, 1), (2, 3, 1)]
    assert b"".join(part.hashes for part in parts if isinstance(part, KvSnapshot)) == b"".join(pool.names())
