"""The messages in what a NATS server has sent, as far as they are whole.

Rule: only what the server sends all the time is read here, and only where all of it has come: `MSG` and `HMSG` from the
beginning on. Where anything else begins the client library goes on, which says what is wrong with it.
Pure. Source: the NATS client protocol.

    MSG <subject> <sid> [reply] <bytes>\\r\\n<payload>\\r\\n
    HMSG <subject> <sid> [reply] <bytes of headers> <bytes of both>\\r\\n<headers><payload>\\r\\n
"""

from typing import NamedTuple

_KINDS = b"MSG ", b"HMSG "


class Message(NamedTuple):
    """One message, which ended before byte `end`."""

    subscription: int
    subject: str
    payload: bytes
    headers: bytes | None
    end: int


def whole_messages(data: bytes) -> list[Message]:
    """Those that `data` begins with, in order. Stops before what it does not know."""
    found: list[Message] = []
    begin = 0
    while data.startswith(_KINDS, begin) and (line_end := data.find(b"\r\n", begin)) > 0:
        line = data[begin:line_end].split(b" ")
        header_fields = 1 if line[0] == b"HMSG" else 0
        if len(line) - header_fields not in (4, 5):
            break
        try:
            subscription, size = int(line[2]), int(line[-1])
            header_size = int(line[-2]) if header_fields else 0
            subject = line[1].decode()
        except ValueError:
            break
        start = line_end + 2
        stop = start + size
        if not 0 <= header_size <= size or data[stop:stop + 2] != b"\r\n":
            break
        found.append(Message(subscription, subject, data[start + header_size:stop],
                             data[start:start + header_size] if header_fields else None, stop + 2))
        begin = stop + 2
    return found
