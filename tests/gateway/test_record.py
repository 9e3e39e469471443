"""A record of traffic has times, lengths and names of blocks, and nothing else; a replay reads it."""

from pathlib import Path

import msgspec
import pytest

from deploy.replay_trace import Trace, read
from gateway.record import Record
from gateway.service import Gateway
from gateway.streams import Wake
from shared.blocks import BLOCK_SIZE_TOKENS, hash_chain, join_hashes
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Accepted, Finished, Generate, Residency, StepReplies, Tokens
from shared.settings import GatewaySettings
from shared.tokens import pack

MOST = 1 << 20


def request(number: int, tokens: list[int], answered: int = 0) -> Generate:
    hashes = join_hashes(hash_chain(tokens + [7] * answered, b"salt"))
    return Generate(f"request-{number}", 1, "gateway-1", "m", pack(tokens), 99, 1e12, tenant="acme",
                    block_hashes=hashes, residency=Residency(("eu",)))


def test_a_record_is_a_trace_in_which_equal_beginnings_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    record = Record(path, MOST)
    shared = list(range(100, 164))
    record.note(50.0, request(1, [*shared, 1, 2, 3]), 11)
    record.note(52.5, request(2, [*shared, *range(32)], answered=32), 12)
    record.note(53.0, request(3, [9]), 13)
    record.write()
    first, second, third = read(path)
    assert [(one.at_s, one.prompt_tokens, one.output_tokens) for one in (first, second, third)] == [
        (0.0, 67, 11), (2.5, 96, 12), (3.0, 1, 13)]
    assert first.parts == second.parts[:4] and len(second.parts) == 6
    trace = Trace([first, second, third], BLOCK_SIZE_TOKENS)
    assert trace.hashes(0)[:64] == trace.hashes(1)[:64]


def test_a_record_says_nothing_of_text_tokens_tenants_or_names(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    record = Record(path, MOST)
    asked = request(1, list(range(5000, 5040)))
    record.note(50.0, asked, 11)
    record.write()
    line = path.read_bytes()
    assert set(msgspec.json.decode(line)) == {"at_s", "prompt_tokens", "output_tokens", "block_size_tokens", "hashes"}
    assert not any(told in line for told in (b"acme", b"request-1", b"eu", b"5001"))
    assert asked.block_hashes[:16].hex().encode() not in line


def test_a_request_that_got_no_answer_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path / "traffic.jsonl", MOST)
    record.note(50.0, request(1, [1] * 40), 0)
    assert not record.some_wait and not record.lost


def test_a_file_grows_to_its_bound_and_no_further_also_when_it_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    for _ in range(2):
        record = Record(path, 1000)
        for number in range(20):
            record.note(float(number), request(number, [number] * 64), 5)
            record.write()
        assert 0 < record.lost < 21
        assert 800 < path.stat().st_size <= 1000
    assert len(read(path)) + record.lost > 20


def test_a_disk_that_fails_costs_the_record_and_no_request(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    record = Record(folder / "traffic.jsonl", MOST)
    (folder / "traffic.jsonl").unlink()
    folder.rmdir()
    record.note(1.0, request(1, [1] * 40), 5)
    record.write()
    assert record.lost == 1 and not record.some_wait


def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Record(tmp_path / "nowhere" / "traffic.jsonl", MOST)


async def test_a_gateway_records_what_it_served_once_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    settings = GatewaySettings(id="g", record=str(path), heartbeat_s=0.01)
    gateway = Gateway(MemoryBus(MemoryBroker()), settings, LoopClock(), None)
    async with gateway.running():
        ended, cancelled = (gateway.streams.open(request(number, [number] * 33), {}, _Unheard(), 1e9)
                            for number in (1, 2))
        replies = tuple(reply for number in (1, 2) for reply in (
            Accepted(f"request-{number}", 1, "w"), Tokens(f"request-{number}", 1, 0, pack([5] * number))))
        gateway.streams.hear(StepReplies("w", 1, 1, (*replies, Finished("request-1", 1, "stop", completion_tokens=1))))
        assert ended.ended is not None and cancelled.ended is None
        gateway.streams.cancel(cancelled)
    assert sorted((one.prompt_tokens, one.output_tokens) for one in read(path)) == [(33, 1), (33, 2)]


class _Unheard(Wake):
    def set(self) -> None:
        pass
