"""Whether a service lives and whether it should be given work, asked over HTTP by whoever runs it.

    GET /health   200 while its event loop turns; 503: start it again
    GET /ready    200 while it takes work; 503: it starts, or it leaves
    anything else goes on to the figures

A gateway has both on its own port, with reasons.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

ALIVE_WITHIN_S = 5.0  # a step of a slow model may hold the loop for a second

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def probed(figures: Wsgi, loop: asyncio.AbstractEventLoop, ready: Callable[[], bool]) -> Wsgi:
    """An application that answers for the service on `loop`, from threads of its own."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path not in ("/health", "/ready"):
            return figures(environ, start_response)
        well = alive(loop) and (path == "/health" or ready())
        start_response("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"yes\n" if well else b"no\n"]

    return answer


def alive(loop: asyncio.AbstractEventLoop, within_s: float = ALIVE_WITHIN_S) -> bool:
    """Whether `loop` comes round within this time. Blocks; for other threads than the loop's."""
    turned = threading.Event()
    try:
        loop.call_soon_threadsafe(turned.set)
    except RuntimeError:  # closed
        return False
    return turned.wait(within_s)
