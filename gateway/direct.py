"""A way past the layers between an answer and its connection, for bytes that need none of them.

Nearly all that a gateway writes is the middle of a stream: a chunk of a body whose headers are out, to a client that
reads. An answer may hand it to the transport on the spot, while it handles the message that brought the tokens, instead
of waking a task that awaits `send` through every middleware. Who is slow, gone or not yet answered is not written to
here: `write` says no, and the usual way deals with it. That a client hung up is told by a call: no task waits for it.

Rule: an extension of ASGI, absent under any other server (and in tests without a socket); nothing may depend on it.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.openai.common import error_json
from shared.errors import MillError, RequestTimeout, TooLarge

EXTENSION = "tokenmill.direct"
MAX_HEAD_BYTES, MAX_HEADERS = 64 << 10, 256  # of one request; and what arrived with the byte that was too much
_TOO_LARGE = "431 Request Header Fields Too Large"
HEAD_S = 30.0  # from the first byte of a head, or from the connection, to its end


class DirectBody:
    """The body of one response, where its connection takes it at once.

    It stands in the scope that uvicorn's cycle holds: with more than a weak reference back to that, all of a request
    would be left to the collector.
    """

    __slots__ = ("_cycle", "_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = ref(cycle)
        self._left: Callable[[], None] | None = None

    @property
    def asked_in_full(self) -> bool:
        """Whether all of the request's body is here."""
        cycle = self._cycle()
        return cycle is not None and not cycle.more_body

    def when_left(self, call: Callable[[], None] | None) -> bool:
        """Have `call` made when the client hangs up before its answer is complete. False when it has already."""
        self._left = call
        return not self._gone

    def left(self) -> None:
        """The connection is gone."""
        if self._left is not None and self._gone:
            self._left()

    @property
    def _gone(self) -> bool:
        cycle = self._cycle()
        return cycle is None or cycle.disconnected

    def write(self, data: bytes) -> bool:
        """Send `data`, not empty, as the next chunk. False, and nothing sent, when that would wait or be wrong."""
        cycle = self._cycle()
        if (cycle is None or cycle.flow.write_paused or cycle.disconnected or not cycle.response_started
                or cycle.response_complete or not cycle.chunked_encoding):
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's connection; every request finds its `DirectBody` among the extensions of its scope.

    The addresses of both ends are not in it: nobody here reads them, and to learn them uvloop makes a socket object.
    A head that is too large or does not come to its end in time ends its connection: the server itself sets no bounds.
    """

    _head_bytes: int | None = 0  # of the head that is being read; None: a body is
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head_timer = self.loop.call_later(HEAD_S, self._too_slow)
        self.connections.add(self)
        self.transport, self.flow = transport, FlowControl(transport)
        self.scheme = "https" if self.config.is_ssl else "http"

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.headers is not None and len(self.headers) > MAX_HEADERS:
            self._refuse(_TOO_LARGE, TooLarge(f"a request has at most {MAX_HEADERS} headers"))
        elif self._head_bytes:
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(_TOO_LARGE, TooLarge(f"address and headers have at most {MAX_HEAD_BYTES} bytes"))
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_S, self._too_slow)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_bytes = 0

    def _too_slow(self) -> None:
        self._refuse("408 Request Timeout", RequestTimeout(f"the headers did not arrive within {HEAD_S:g} s"))

    def _refuse(self, status: str, error: MillError) -> None:
        """Say why, unless an answer is under way, and end the connection."""
        if self.transport.is_closing():
            return
        if self._head_bytes and (self.cycle is None or self.cycle.response_complete):
            body = error_json(error)
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                                 b"connection: close\r\n\r\n%b" % (status.encode(), len(body), body))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()
        # the application has not run yet: it does so in a task, or behind the requests before it
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope.setdefault("extensions", {})[EXTENSION] = DirectBody(self.cycle)  # type: ignore[typeddict-item, assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()
        if self.cycle is not None and (body := direct_body(self.cycle.scope)) is not None:
            body.left()


def direct_body(scope: Mapping[str, Any]) -> DirectBody | None:
    """The way of this request, if the server has one."""
    found = scope.get("extensions", {}).get(EXTENSION)
    return found if isinstance(found, DirectBody) else None
