"""Whether a service lives and whether it should be given work, asked over HTTP by whoever runs it.

    GET /health   200 while its event loop turns; 503: start it again
    GET /ready    200 while it takes work; 503: it starts, or it leaves
    anything else goes on to the figures

A gateway has both on the port of its API too, with reasons.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

ALIVE_WITHIN_S = 5.0  # a step of a slow model may hold the loop for a second

T = TypeVar("T")

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def probed(figures: Wsgi, loop: asyncio.AbstractEventLoop, ready: Callable[[], bool]) -> Wsgi:
    """An application that answers for the service on `loop`, from threads of its own; `ready` is called on the loop."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path not in ("/health", "/ready"):
            return figures(environ, start_response)
        try:
            well = on_loop(loop, ready if path == "/ready" else lambda: True)
        except TimeoutError:
            well = False
        start_response("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"yes\n" if well else b"no\n"]

    return answer


def on_loop(loop: asyncio.AbstractEventLoop, ask: Callable[[], T], within_s: float = ALIVE_WITHIN_S) -> T:
    """What `ask` gives on `loop`, where what it looks at changes. Blocks; for threads beside the loop's.

    Raises TimeoutError where the loop is closed, or does not come round in time.
    """
    answer: Future[T] = Future()

    def give() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    try:
        loop.call_soon_threadsafe(give)
    except RuntimeError:
        raise TimeoutError("the loop is closed") from None
    return answer.result(within_s)
