"""Server-sent events, byte for byte.

Rule: one JSON document per event, with a name where an API has names, comments to keep proxies awake.
Pure. Source: the HTML standard's event stream format, and what openai clients read of it.
"""

from collections.abc import Iterable

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
)
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(document: bytes) -> bytes:
    """One event around one JSON document without raw line breaks."""
    return b"data: " + document + b"\n\n"


def named(name: str, document: bytes) -> bytes:
    """One event that has a name."""
    return b"event: " + name.encode() + b"\n" + event(document)


def events(documents: Iterable[bytes]) -> bytes:
    """Several events in one write."""
    return b"".join(map(event, documents))
