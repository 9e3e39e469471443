"""Messages of a NATS server, taken from what it sends where they are whole."""

import asyncio
import random

import pytest
from nats.aio.client import Client

from shared.nats_bus import _Client
from shared.nats_frames import Message, whole_messages

FIRST = b"MSG a.b 7 5\r\nhello\r\n"
SECOND = b"HMSG a.c 8 _INBOX.x.1 12 15\r\nNATS/1.0\r\n\r\nabc\r\n"
TOLD = [Message(7, "a.b", b"hello", None, len(FIRST)),
        Message(8, "a.c", b"abc", b"NATS/1.0\r\n\r\n", len(FIRST + SECOND))]


def test_whole_messages_are_read_and_half_ones_left() -> None:
    both = FIRST + SECOND
    for end in range(len(both) + 1):
        assert whole_messages(both[:end]) == TOLD[:(end >= len(FIRST)) + (end >= len(both))]


@pytest.mark.parametrize("other", [
    b"PING\r\n", b"+OK\r\n", b"-ERR 'no'\r\n", b"INFO {}\r\n", b"MSG a 1\r\n", b"MSG a 1 2 3 4\r\nx\r\n",
    b"MSG a one 5\r\nhello\r\n", b"MSG a 1 five\r\nhello\r\n", b"MSG a 1 4\r\nhello\r\n", b"MSG a 1 -9\r\nhello\r\n",
    b"HMSG a 1 9 5\r\nhello\r\n", b"HMSG a 1 5\r\nhello\r\n", b"MSG \xff 1 5\r\nhello\r\n", b"MSGS a 1 5\r\nhello\r\n"])
def test_what_is_no_message_stops_the_reading_and_is_left_to_others(other: bytes) -> None:
    assert whole_messages(other) == []
    assert whole_messages(FIRST + other + SECOND) == TOLD[:1]


@pytest.mark.parametrize("seed", range(20))
async def test_in_whatever_pieces_it_comes_all_is_heard_once_and_in_order(seed: int) -> None:
    """Some messages are handed over where they arrive, others by the library: which, nobody can tell."""
    choose = random.Random(seed)
    heard: list[tuple[str, bytes]] = []
    sent: list[tuple[str, bytes]] = []
    stream = b""
    for number in range(200):
        match choose.choice(("message", "message", "message", "headers", "pong", "ok", "stranger")):
            case "message":
                data = str(number).encode() * choose.choice((0, 1, 40))
                stream += b"MSG plain 1 %d\r\n%b\r\n" % (len(data), data)
                sent.append(("plain", data))
            case "headers":
                stream += b"HMSG headed 2 14 17\r\nNATS/1.0\r\nA:\r\n%03d\r\n" % number
                sent.append(("headed", b"%03d" % number))
            case "pong":
                stream += b"PONG\r\n"
            case "ok":
                stream += b"+OK\r\n"
            case "stranger":
                stream += b"MSG gone 9 5\r\nhello\r\n"
    client = _Client()
    client.receivers = dict.fromkeys((1, 2), lambda subject, data, headers: heard.append((subject, data)))
    reader = asyncio.StreamReader()
    client._transport = Held(reader)
    client._status = Client.CONNECTED
    client._reading_task = asyncio.create_task(client._read_loop())
    await asyncio.sleep(0)
    while stream:
        size = choose.choice((1, 7, 30, 200, 2000))
        piece, stream = stream[:size], stream[size:]
        reader.feed_data(piece)
        if choose.random() < 0.5:
            await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    client._reading_task.cancel()
    assert heard == sent
    assert client.stats["in_msgs"] >= len(sent)


class Held:
    """A transport with nothing behind it."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._io_reader = reader
        self._io_writer = None

    def at_eof(self) -> bool:
        return self._io_reader.at_eof()

    async def read(self, size: int) -> bytes:
        return await self._io_reader.read(size)
