"""A worker knows why it had less in its cache than its router had promised."""

import asyncio
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from shared.blocks import hash_chain, join_hashes
from shared.messages import Accepted, Cleared, Finished, Generate, Placement, Removed, Stored
from shared.tokens import unpack
from tests.virtual_time import run_virtual
from tests.worker.builders import BLOCK, mock_decoder, request
from tests.worker.mesh import WALL_S, Mesh
from worker.misses import Departed, miss_of, remembered
from worker.sequence import Sequence, from_request

DEADLINE = WALL_S + 1000.0
PROMPT = list(range(40))


def asked(name: str, cached_tokens: int, certain_tokens: int, prompt: list[int] = PROMPT, **more: object) -> Generate:
    """A request whose router promised so much of its prompt."""
    one = request(name, prompt, deadline=DEADLINE, **more)  # type: ignore[arg-type]
    placement = Placement("r", "w1", cached_tokens, certain_tokens=certain_tokens, receipt=b"opaque")
    return replace(one, block_hashes=join_hashes(hash_chain(unpack(one.tokens), one.cache_salt, BLOCK)),
                   placement=placement)


def sequence_of(one: Generate, cached_tokens: int, arrived_at: float = 10.0) -> Sequence:
    sequence = from_request(one, 0, arrived_at, 1e9, 1000)
    sequence.admitted_at = arrived_at + 1.0
    sequence.cached_tokens = cached_tokens
    return sequence


def test_each_cause_has_its_class() -> None:
    departed = Departed()
    one = asked("r", 32, 32)
    third = one.block_hashes[2 * 16:3 * 16]
    assert miss_of(sequence_of(one, 32), departed, BLOCK) is None
    assert miss_of(sequence_of(one, 36), departed, BLOCK) is None
    assert miss_of(sequence_of(one, 8), departed, BLOCK) == "event_lag"  # never had, or too long ago
    departed.take_in((Removed(third),), 9.0)
    assert miss_of(sequence_of(one, 8), departed, BLOCK) == "event_lag"
    departed.take_in((Stored(third), Removed(third)), 10.5)
    assert miss_of(sequence_of(one, 8), departed, BLOCK) == "evicted"
    assert miss_of(sequence_of(asked("r", 32, 8), 8), departed, BLOCK) == "expected"
    assert miss_of(sequence_of(asked("r", 32, 12), 8), departed, BLOCK) == "evicted"
    other = replace(one, block_hashes=bytes(len(one.block_hashes)))
    assert miss_of(sequence_of(other, 8), departed, BLOCK) == "hash_mismatch"


def test_a_cleared_cache_took_every_block() -> None:
    departed = Departed()
    departed.take_in((Cleared(),), 11.0)
    assert miss_of(sequence_of(asked("r", 32, 32), 8), departed, BLOCK) == "evicted"


def test_without_a_promise_nothing_is_missed() -> None:
    one = request("r", PROMPT)
    assert miss_of(sequence_of(one, 0), Departed(), BLOCK) is None
    never = sequence_of(asked("r", 32, 32), 0)
    never.admitted_at = None
    assert miss_of(never, Departed(), BLOCK) is None


def test_what_earlier_attempts_generated_is_not_missed() -> None:
    resumed = asked("r", 44, 44, generated=[1, 2, 3, 4, 5, 6], attempt=2)
    assert miss_of(sequence_of(resumed, 40), Departed(), BLOCK) is None


def test_a_bounded_number_of_departed_blocks_is_remembered() -> None:
    departed = Departed(most=100)
    for number in range(50):
        gone = b"".join((1000 * number + i).to_bytes(16, "big") for i in range(30))
        departed.take_in((Removed(gone),), float(number))
    departed.take_in((Removed(b"".join(i.to_bytes(16, "little") for i in range(500))),), 99.0)
    assert len(departed) == 100
    assert departed.gone_s((499).to_bytes(16, "little")) == 99.0
    assert departed.gone_s((0).to_bytes(16, "little")) is None


def test_a_small_cache_has_few_departed_blocks_worth_remembering() -> None:
    assert [remembered(blocks) for blocks in (1, 267, 1000, 100_000)] == [1024, 1068, 4000, 16_384]


def play(scenario: Callable[[Mesh], Awaitable[None]], mesh: Mesh) -> None:
    async def run() -> None:
        async with mesh:
            await scenario(mesh)
    run_virtual(run(), timeout_s=600)


def test_the_last_word_names_the_miss_and_the_first_hands_the_receipt_through() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(asked("first", 0, 0))
        await mesh.ended("first")
        await asyncio.sleep(0.1)
        await mesh.send(asked("kept", 36, 36))
        end = await mesh.ended("kept")
        assert isinstance(end, Finished) and (end.cached_tokens, end.miss) == (36, "")
        # something else fills the cache
        await mesh.send(asked("big", 0, 0, list(range(100, 160))))
        await mesh.ended("big")
        await asyncio.sleep(0.1)
        await mesh.send(asked("late", 36, 36))
        end = await mesh.ended("late")
        assert isinstance(end, Finished) and end.cached_tokens < 36 and end.miss == "event_lag"
        await mesh.send(asked("hopeful", 36, 0, list(range(159, 199))))
        end = await mesh.ended("hopeful")
        assert isinstance(end, Finished) and (end.cached_tokens, end.miss) == (0, "expected")
        assert {reply.receipt for reply in mesh.replies if isinstance(reply, Accepted)} == {b"opaque"}

    play(scenario, Mesh(mock_decoder(blocks=18)))


def test_a_block_that_gives_way_while_its_request_waits_is_evicted() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(asked("first", 0, 0))
        await mesh.ended("first")
        # this one takes the only place, and all blocks but few, for a while
        await mesh.send(asked("long", 0, 0, list(range(100, 140)), max_tokens=24))
        await mesh.until(lambda: len(mesh.stream("long")) >= 2)
        await mesh.send(asked("waits", 36, 36))
        end = await mesh.ended("waits")
        assert isinstance(end, Finished) and end.cached_tokens < 36
        assert end.miss == "evicted"

    play(scenario, Mesh(mock_decoder(blocks=17), max_running=1))
