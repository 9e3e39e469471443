"""The tier behind the pool: names are in one place, bytes follow the names, what is restored is what was computed."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.step import BlockStore, Decoder
from shared.blocks import split_hashes
from shared.messages import Failed, Finished, KvEvents, Stored
from shared.settings import WorkerSettings
from tests.kernels.test_native_step import step_of
from tests.kernels.tiny import Tiny, write_tiny_gguf
from tests.virtual_time import run_virtual
from tests.worker.builders import BLOCK, FAR, VOCABULARY, make_batch, mock_decoder, plain, request
from tests.worker.mesh import WALL_S, Mesh
from tests.worker.test_kv_blocks import apply, name
from worker.events import Advanced
from worker.kv_blocks import BlockPool
from worker.kv_tier import HostTier, Load, Save, TierMemory
from worker.mock_decoder import MockDecoder
from worker.runner import tier_for
from worker.scheduler import Limits, Scheduler


class Marks:
    """A store whose blocks hold one number each."""

    block_bytes = 8

    def __init__(self, blocks: int) -> None:
        self.blocks = np.zeros((blocks, 8), np.uint8)

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        to[:] = self.blocks[block]

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        self.blocks[block] = data


def mark(number: int) -> NDArray[np.uint8]:
    return np.frombuffer(number.to_bytes(8, "big"), np.uint8)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10), st.integers(1, 8), st.integers(0, 2**32))
def test_whatever_comes_and_goes_a_name_is_in_one_place_and_leads_to_its_own_bytes(
        blocks: int, slots: int, seed: int) -> None:
    rng = random.Random(seed)
    store = Marks(blocks)
    memory = TierMemory(store, slots)
    pool = BlockPool(blocks, tier := HostTier(slots))
    tables: list[list[int]] = []
    known: set[bytes] = set()
    for _ in range(150):
        number = rng.randrange(20)
        match rng.randrange(7):
            case 0 | 1:
                if (taken := pool.allocate(rng.randint(1, 4))) is not None:
                    tables.append(taken)
            case 2 if tables:
                pool.release(tables.pop(rng.randrange(len(tables))))
            case 3 | 4 if tables:
                # a step computes a block, and only then it gets its name
                memory.run(pool.take_copies())
                block = rng.choice(rng.choice(tables))
                if pool.find(pool._names[block], pool._contents[block]) is None:
                    store.write_block(block, mark(number))
                    pool.store(block, name(number), b"right")
            case 5:
                content = rng.choice([b"right", b"wrong"])
                block = pool.find(name(number), content)
                if block is not None:
                    pool.hold(block)
                elif (block := pool.restore(name(number), content)) is None:
                    assert not pool.available or not tier.holds(name(number), content)
                if block is not None:
                    assert content == b"right"
                    tables.append([block])
            case 6 if rng.random() < 0.1:
                pool.clear()
                assert pool.names() == []
        known = apply(known, pool.take_events())
        assert known == set(pool.names())
        assert len(pool.names()) == len(set(pool.names())) == pool.named + len(tier)
        assert len(tier) <= slots and memory._slots.nbytes == slots * store.block_bytes == memory.bytes
        held = {block for table in tables for block in table}
        assert pool.available == blocks - len(held)
        assert pool.audit(tables).repairs == 0
        if rng.random() < 0.5:
            memory.run(pool.take_copies())
            for each in range(20):
                if (block := pool.find(name(each), b"right")) is not None:
                    assert (store.blocks[block] == mark(each)).all()
                elif tier.holds(name(each), b"right"):
                    assert (memory._slots[tier._kept[name(each)].slot] == mark(each)).all()


def full_pool(blocks: int, slots: int) -> BlockPool:
    """Every block named 0, 1, ... and held by nobody; 0 goes first."""
    pool = BlockPool(blocks, HostTier(slots))
    for number in range(blocks):
        taken = pool.allocate(1)
        assert taken is not None
        pool.store(taken[0], name(number), b"c")
        pool.release(taken)
    pool.take_events()
    return pool


def test_routers_hear_of_a_block_only_when_it_leaves_pool_and_tier() -> None:
    pool = full_pool(3, 1)
    known = set(pool.names())
    taken = pool.allocate(1)
    assert taken == [0] and pool.take_events() == ()
    assert pool.take_copies() == (Save(0, 0),)
    assert pool.allocate(1) == [1]
    assert apply(known, pool.take_events()) == {name(1), name(2)}
    assert pool.tier is not None and pool.tier.names() == [name(1)] and pool.tier.dropped == 1


def test_a_block_swaps_with_the_tier_although_every_slot_is_taken() -> None:
    pool = full_pool(2, 2)
    for _ in range(2):
        taken = pool.allocate(1)
        assert taken is not None
        pool.store(taken[0], name(10 + taken[0]), b"c")
        pool.release(taken)
    pool.take_copies()
    assert pool.tier is not None and set(pool.tier.names()) == {name(0), name(1)}
    block = pool.restore(name(0), b"c")
    assert block is not None
    save, load = pool.take_copies()
    # the evicted block is in safety before the slot's own is read, whatever slot it got
    assert isinstance(save, Save) and isinstance(load, Load)
    assert save.block == load.block == block and save.slot != load.slot


def test_a_tier_of_one_slot_that_is_lent_loses_the_evicted_block() -> None:
    pool = full_pool(1, 1)
    taken = pool.allocate(1)
    assert taken is not None
    pool.store(taken[0], name(5), b"c")
    pool.release(taken)
    pool.take_events(), pool.take_copies()
    assert pool.restore(name(0), b"c") == 0
    assert pool.take_copies() == (Load(0, 0),)
    assert apply({name(0), name(5)}, pool.take_events()) == {name(0)} == set(pool.names())


def test_nothing_is_restored_without_room_or_for_other_content() -> None:
    pool = full_pool(1, 1)
    assert pool.allocate(1) is not None
    before = pool.take_copies(), pool.names()
    assert pool.restore(name(0), b"c") is None
    assert pool.restore(name(0), b"other") is None
    assert (pool.take_copies(), pool.names()) == ((), before[1])
    assert not pool.knows(name(0), b"other") and pool.knows(name(0), b"c")


def test_a_block_computed_again_is_in_the_pool_alone_and_not_announced_twice() -> None:
    pool = full_pool(1, 1)
    taken = pool.allocate(1)
    assert taken is not None
    assert not pool.store(taken[0], name(0), b"another prompt of that hash")
    assert pool.store(taken[0], name(0), b"c")
    assert pool.take_events() == ()
    assert pool.names() == [name(0)] and pool.tier is not None and len(pool.tier) == 0


@pytest.mark.parametrize("harm", ["leak", "twice", "both"])
def test_an_audit_mends_the_tier(harm: str) -> None:
    pool = full_pool(3, 3)
    held = pool.allocate(2)
    tier = pool.tier
    assert held is not None and tier is not None
    match harm:
        case "leak":
            tier._free.clear()
        case "twice":
            tier._kept[name(1)] = tier._kept[name(0)]
        case "both":
            pool.store(held[0], name(7), b"c")
            tier._kept[name(7)] = tier._kept.pop(name(0))
    assert pool.audit([held]).wrong_slots > 0
    assert pool.audit([held]).repairs == 0
    assert len(set(pool.names())) == len(pool.names())
    assert sorted([*tier._free, *(kept.slot for kept in tier._kept.values())]) == [0, 1, 2]


class Tiered:
    """A scheduler and a decoder with a tier, without bus, loop or time."""

    def __init__(self, decoder: Decoder, slots: int, **limits: int) -> None:
        assert isinstance(decoder, BlockStore)
        self.decoder = decoder
        self.memory = TierMemory(decoder, slots) if slots else None
        self.pool = BlockPool(decoder.blocks, HostTier(slots) if slots else None)
        self.scheduler = Scheduler(Limits(decoder.block_size_tokens, decoder.context_length, decoder.vocabulary_size,
                                          **limits), self.pool)
        self.batch = make_batch(self.scheduler)
        self.rows = 0

    def run(self, *prompts: list[int], max_tokens: int = 6) -> list[list[int]]:
        """Requests at once to their ends; what each said."""
        said: dict[str, list[int]] = {f"r{self.rows}-{at}": [] for at in range(len(prompts))}
        for key, prompt in zip(said, prompts, strict=True):
            self.scheduler.add(request(key, prompt, max_tokens), 0.0, FAR)
        while (step := self.scheduler.plan(0.0)) is not None:
            if self.memory is not None:
                self.memory.run(step.copies)
            assert self.memory is not None or not step.copies
            self.rows += step.rows
            chosen = self.decoder.step(self.batch.build(step)).tolist()
            for event in self.scheduler.commit(step, chosen, 0.0):
                if isinstance(event, Advanced):
                    said[event.sequence.key.request_id] += event.tokens
            assert self.scheduler.audit().repairs == 0
        return list(said.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_streams_over_a_small_pool_with_a_tier_are_those_of_a_large_pool(seed: int, slots: int) -> None:
    rng = random.Random(seed)
    roots = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(8, 30))] for _ in range(4)]
    rounds = [[rng.choice(roots) + [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 9))]
               for _ in range(rng.randint(1, 4))] for _ in range(6)]
    small = Tiered(mock_decoder(blocks=14), slots, step_tokens=24, max_running=4)
    large = Tiered(mock_decoder(blocks=400), 0, step_tokens=24, max_running=4)
    for prompts in rounds:
        assert small.run(*prompts) == large.run(*prompts)


def test_conversations_that_exceed_the_pool_are_found_in_the_tier() -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(41)] for _ in range(5)]
    with_tier, without = (Tiered(mock_decoder(blocks=16), slots, max_draft_tokens=0) for slots in (60, 0))
    first = [with_tier.run(prompt)[0] for prompt in prompts]
    assert first == [without.run(prompt)[0] for prompt in prompts]
    computed = with_tier.rows, without.rows
    assert [with_tier.run(prompt)[0] for prompt in prompts] == first == [without.run(prompt)[0] for prompt in prompts]
    assert without.rows == 2 * computed[1]
    assert with_tier.rows - computed[0] == 5 * (1 + 5)  # the last token of each prompt, and five more
    tier = with_tier.pool.tier
    assert tier is not None and tier.loaded > 0 and tier.dropped == 0


@pytest.mark.skipif(available() is not None, reason=str(available()))
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8"])
def test_a_restored_block_is_the_computed_one_to_the_bit(tmp_path: Path, kv_format: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny())
    prompts = [np.random.default_rng(seed).integers(0, 256, 85).tolist() for seed in range(4)]

    def last_logits(slots: int, blocks: int) -> tuple[list[NDArray[np.float32]], int]:
        decoder = NativeDecoder.load(path, blocks=blocks, threads=1, kv_format=kv_format)
        bench = Tiered(decoder, slots, max_draft_tokens=0)
        for prompt in prompts:
            bench.run(prompt, max_tokens=1)
        found = []
        for prompt in prompts:
            bench.scheduler.add(request(f"again{len(found)}", prompt, 1), 0.0, FAR)
            step = bench.scheduler.plan(0.0)
            assert step is not None and bench.memory is not None
            bench.memory.run(step.copies)
            inputs = bench.batch.build(step)
            found.append(decoder.logits(inputs))
            bench.scheduler.commit(step, decoder.step(inputs).tolist(), 0.0)
        assert bench.pool.tier is not None
        return found, bench.pool.tier.loaded

    restored, loads = last_logits(slots=40, blocks=8)
    kept, none = last_logits(slots=1, blocks=60)
    assert loads >= 15 and none == 0
    for a, b in zip(restored, kept, strict=True):
        assert (a.view(np.uint32) == b.view(np.uint32)).all()


def test_the_settings_size_the_tier_and_bad_ones_are_named() -> None:
    decoder = mock_decoder(blocks=4)
    assert tier_for(decoder, WorkerSettings(engine="mock")) is None
    tier = tier_for(decoder, WorkerSettings(engine="mock", kv_tier_mib=2))
    assert tier is not None and tier.slots == 32
    with pytest.raises(ValueError, match="kv_tier_mib must be 0 or more"):
        tier_for(decoder, WorkerSettings(kv_tier_mib=-1))
    with pytest.raises(ValueError, match="at least one slot"):
        HostTier(0)


class ForgetfulDecoder(MockDecoder):
    """A device whose copies can fail."""

    broken = False

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        if self.broken:
            self._kv[block] = 0
            raise RuntimeError("the link is down")
        super().write_block(block, data)


PROMPTS = [[number] * 3 + list(range(number, number + 38)) for number in range(1, 5)]


async def talk(mesh: Mesh, turn: int) -> dict[str, Finished | Failed]:
    """Every conversation once, one after the other."""
    ends = {}
    for number, prompt in enumerate(PROMPTS):
        end_of = f"{turn}-{number}"
        await mesh.send(request(end_of, prompt, deadline=WALL_S + 1000.0))
        ends[end_of] = await mesh.ended(end_of)
    return ends


def test_a_worker_copies_back_what_it_had_to_evict_and_its_routers_never_lost_it() -> None:
    async def scenario() -> None:
        async with Mesh(mock_decoder(blocks=16), kv_tier_mib=4, speculation=False) as mesh:
            for end in (await talk(mesh, 0)).values():
                assert isinstance(end, Finished) and end.cached_tokens == 0
            for end in (await talk(mesh, 1)).values():
                assert isinstance(end, Finished) and end.cached_tokens == 40
            for number, prompt in enumerate(PROMPTS):
                assert mesh.stream(f"1-{number}") == mesh.stream(f"0-{number}") == plain(request(prompt=prompt))
            await mesh.until(lambda: mesh.statuses[-1].kv_seq == max(message.seq for message in mesh.kv))
        events = [event for message in mesh.kv if isinstance(message, KvEvents) for event in message.events]
        assert all(isinstance(event, Stored) for event in events)
        stored = [name for event in events if isinstance(event, Stored) for name in split_hashes(event.hashes)]
        assert len(stored) == len(set(stored)) == 4 * (len(PROMPTS[0]) + 7) // BLOCK

    run_virtual(scenario(), timeout_s=600)


def test_a_copy_that_fails_ends_what_runs_and_never_serves_what_it_left_behind() -> None:
    async def scenario() -> None:
        decoder = ForgetfulDecoder(blocks=16, block_size_tokens=BLOCK, vocabulary_size=VOCABULARY, context_length=512)
        async with Mesh(decoder, kv_tier_mib=4, speculation=False) as mesh:
            await talk(mesh, 0)
            decoder.broken = True
            first, *others = (await talk(mesh, 1)).values()
            assert isinstance(first, Failed) and (first.code, first.retryable) == ("worker_failed", True)
            # nothing is known any more, so nothing has to be copied back
            assert all(isinstance(end, Finished) and end.cached_tokens == 0 for end in others)
            for number, prompt in enumerate(PROMPTS[1:], 1):
                assert mesh.stream(f"1-{number}") == plain(request(prompt=prompt))

    run_virtual(scenario(), timeout_s=600)


def test_a_torch_decoder_s_block_read_out_and_written_elsewhere_is_the_same_block(tmp_path: Path) -> None:
    decoder = TorchDecoder.load(write_tiny_gguf(tmp_path / "model.gguf"), blocks=8)
    assert isinstance(decoder, BlockStore)
    prompt = np.random.default_rng(7).integers(0, 256, 37).tolist()
    decoder.step(step_of((prompt, 0, (5, 2, 1))))
    expected = decoder.logits(step_of(([9], 37, (5, 2, 1))))
    memory = np.empty((3, decoder.block_bytes), np.uint8)
    for slot, block in enumerate((5, 2, 1)):
        decoder.read_block(block, memory[slot])
    for block in range(8):
        decoder.write_block(block, np.zeros(decoder.block_bytes, np.uint8))
    for slot, block in enumerate((0, 7, 3)):
        decoder.write_block(block, memory[slot])
    assert (decoder.logits(step_of(([9], 37, (0, 7, 3)))) == expected).all()
    with pytest.raises(RuntimeError):
        decoder.write_block(0, memory[0][:-4])
