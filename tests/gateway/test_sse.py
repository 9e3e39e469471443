"""The event stream, byte for byte."""

from gateway import sse


def test_events_are_framed_as_clients_split_them() -> None:
    assert sse.event(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert sse.events([b"1", b"2"]) == b"data: 1\n\ndata: 2\n\n"
    assert sse.DONE == b"data: [DONE]\n\n"
    assert sse.KEEP_ALIVE.startswith(b":") and sse.KEEP_ALIVE.endswith(b"\n\n")
