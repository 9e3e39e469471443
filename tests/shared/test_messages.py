"""The wire format stands still, and versions mix."""

from typing import Any

import msgspec
import pytest

from shared import messages
from shared.messages import (
    Accepted,
    Failed,
    Finished,
    Generate,
    KvMessage,
    Sampling,
    Status,
    StepReplies,
    Tokens,
    Wire,
    WorkerStatus,
    decode,
    encode,
)
from tests.shared.golden_messages import EXAMPLES, FOLDER

STRUCTS = [kind for kind in vars(messages).values()
           if isinstance(kind, type) and issubclass(kind, Wire) and kind is not Wire]


def test_every_struct_has_an_example_with_every_field_off_its_default_and_golden_bytes():
    assert {kind.__name__ for kind in STRUCTS} == set(EXAMPLES) == {path.stem for path in FOLDER.iterdir()}
    for message in EXAMPLES.values():
        for field in msgspec.structs.fields(message):
            assert getattr(message, field.name) != field.default, (type(message).__name__, field.name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_bytes_on_the_wire_are_the_golden_ones(name):
    golden = (FOLDER / f"{name}.bin").read_bytes()
    assert encode(EXAMPLES[name]) == golden
    assert decode(golden, type(EXAMPLES[name])) == EXAMPLES[name]


def with_news(value: Any) -> Any:
    """The same maps, each with a field that only a later version knows."""
    if isinstance(value, dict) and "gateway-a" not in value:
        return {key: with_news(item) for key, item in value.items()} | {"from_a_later_version": {"nested": [1]}}
    return [with_news(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", EXAMPLES)
def test_fields_of_a_later_version_are_ignored(name):
    later = with_news(msgspec.msgpack.decode((FOLDER / f"{name}.bin").read_bytes()))
    assert later["from_a_later_version"]
    assert decode(msgspec.msgpack.encode(later), type(EXAMPLES[name])) == EXAMPLES[name]


def test_a_message_of_an_earlier_version_gets_defaults():
    bare = msgspec.msgpack.encode({"type": "worker", "id": "w", "epoch": 1, "model": "m"})
    assert decode(bare, Status) == WorkerStatus(id="w", epoch=1, model="m")


def test_defaults_are_not_sent():
    assert encode(Sampling()) == b"\x80"
    sent = msgspec.msgpack.decode(encode(EXAMPLES["Cancel"]))
    assert sent == {"type": "cancel", "request_id": "r-1", "attempt": 2}


def test_a_union_is_told_apart_by_its_tag():
    for name in ("WorkerStatus", "RouterStatus", "DrafterStatus", "GatewayStatus"):
        assert decode(encode(EXAMPLES[name]), Status) == EXAMPLES[name]
    for name in ("KvEvents", "KvSnapshot"):
        assert decode(encode(EXAMPLES[name]), KvMessage) == EXAMPLES[name]
    replies = decode(encode(EXAMPLES["StepReplies"]), StepReplies).replies
    assert [type(reply) for reply in replies] == [Accepted, Tokens, Finished, Failed]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"text", b"\x80", encode(EXAMPLES["Cancel"]),
                                  encode(EXAMPLES["Generate"])[:-1], b"\x81\xa4type\xa8gener\xffte",
                                  b"\x81\xa4type" * 20_000 + b"\x01"])
def test_other_bytes_are_refused(data):
    with pytest.raises(msgspec.DecodeError):
        decode(data, Generate)


def test_a_wrong_type_in_a_field_is_refused():
    with pytest.raises(msgspec.DecodeError, match="attempt"):
        decode(msgspec.msgpack.encode({"type": "cancel", "request_id": "r", "attempt": "two"}), messages.Cancel)
