"""Requests whose grammars are still to be compiled, which threads do beside the engine.

Rules: a tenant has one of the threads at a time, the one that was served longest ago goes first, and what is compiled
already waits for nobody. Nobody waits past a deadline. A grammar that takes too long ends its request with an error and
is refused from then on; its thread cannot be stopped, so it is left to itself, and while too many are left so nothing
new is compiled.

    add(arrival) --> waiting --begin in a thread--> submit(arrival with its state, or with an error)
                        `-- cancelled, late, drained: submit(arrival as it came), and the scheduler says why not
"""

import asyncio
import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Container

import structlog

from shared.clock import Clock
from shared.errors import BadRequest, MillError, Overloaded
from shared.messages import Cancel, Generate
from shared.tokens import unpack
from worker.engine import Arrival
from worker.grammar import Grammars, GrammarState

QUEUE_LIMIT, TENANT_LIMIT = 256, 64
THREADS, MOST_LEFT = 3, 3
# a schema of 1,000 optional properties takes 0.4 s
COMPILE_S = 5.0
# a request that waits longer is told to have been accepted: its gateway asks elsewhere after 2 s
TELL_AFTER_S = 0.5

_log = structlog.get_logger("worker.grammar_queue")

Key = tuple[str, int]


class GrammarQueue:
    """The arrivals of one worker that have no state yet."""

    def __init__(self, grammars: Grammars, clock: Clock, submit: Callable[[Arrival], None],
                 accept: Callable[[Generate], None]) -> None:
        """`submit`: where arrivals go; `accept`: called of a request that waits for longer than a moment."""
        self.slow = 0  # grammars that took too long
        self.refused = 0  # requests whose grammar could not be used
        self.compile_s = 0.0
        self._grammars = grammars
        self._clock = clock
        self._submit = submit
        self._accept = accept
        self._pending: dict[Key, Arrival] = {}  # in order
        self._in_hand: dict[Key, str] = {}  # the tenant of each that has a thread
        self._left = 0  # threads that are left to themselves
        self._turns: OrderedDict[str, int] = OrderedDict()  # the turn of tenants served of late; others go first
        self._served = 0
        self._wanted = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, arrival: Arrival) -> bool:
        """Take one in. False when there is no room; one that is there already changes nothing."""
        request = arrival.request
        key = _key(request)
        if key in self._pending:
            return True
        tenants = Counter(other.request.tenant for other in self._pending.values())
        if len(self._pending) >= QUEUE_LIMIT or tenants[request.tenant] >= TENANT_LIMIT:
            return False
        self._pending[key] = arrival
        self._wanted.set()
        asyncio.get_running_loop().call_later(TELL_AFTER_S, self._tell, key)
        return True

    def cancel(self, cancel: Cancel) -> None:
        """Hand on what nobody wants any more; the scheduler has heard of it."""
        self._hand_on(lambda request: request.request_id == cancel.request_id and request.attempt <= cancel.attempt)

    def drop_gateways(self, gateways: Container[str]) -> None:
        """Forget what nobody hears any more."""
        for key in [key for key, arrival in self._pending.items() if arrival.request.gateway in gateways]:
            del self._pending[key]

    def clear(self) -> None:
        """Hand everything on as it is: the scheduler has closed its doors."""
        self._hand_on(lambda request: True)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._wait()
                self._wanted.clear()
                self._expire()
                while len(self._in_hand) < THREADS and (arrival := self._next()) is not None:
                    request = arrival.request
                    self._in_hand[_key(request)] = request.tenant
                    self._take_turn(request.tenant)
                    tasks.create_task(self._serve(arrival))

    async def _wait(self) -> None:
        """Until there is something to do, or the next deadline."""
        first = min((arrival.deadline for arrival in self._pending.values()), default=float("inf"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, first - self._clock.now())):
                await self._wanted.wait()

    def _expire(self) -> None:
        now = self._clock.now()
        for arrival in [arrival for arrival in self._pending.values() if now >= arrival.deadline]:
            self._settle(arrival)

    def _next(self) -> Arrival | None:
        busy = set(self._in_hand.values())
        free = [arrival for key, arrival in self._pending.items() if key not in self._in_hand
                and (arrival.request.tenant not in busy or self._known(arrival.request))]
        return min(free, key=lambda arrival: self._turns.get(arrival.request.tenant, 0), default=None)

    def _take_turn(self, tenant: str) -> None:
        self._served += 1
        self._turns[tenant] = self._served
        self._turns.move_to_end(tenant)
        # more cannot wait at once, and one that is forgotten was served before all others
        if len(self._turns) > QUEUE_LIMIT:
            self._turns.popitem(last=False)

    async def _serve(self, arrival: Arrival) -> None:
        request, began = arrival.request, self._clock.now()
        grammar = request.grammar
        assert grammar is not None
        try:
            if self._left >= MOST_LEFT and not self._known(request):
                self._settle(arrival._replace(grammar=Overloaded("too many grammars are being compiled",
                                                                 retry_after_s=COMPILE_S)))
                return
            future = _in_thread(lambda: self._grammars.begin(grammar, unpack(request.generated), request.cache_salt))
            await asyncio.wait({future}, timeout=COMPILE_S)
            self.compile_s += self._clock.now() - began
            if not future.done():
                self._leave(future)
                error = BadRequest(f"the grammar took more than {COMPILE_S:g} s to compile: send a simpler one",
                                   param="grammar")
                self._grammars.refuse(grammar, request.cache_salt, error)
                self._settle(arrival._replace(grammar=error))
            else:
                self._settle(arrival._replace(grammar=self._outcome(future)))
        finally:
            del self._in_hand[_key(request)]
            self._wanted.set()

    def _outcome(self, future: "asyncio.Future[GrammarState]") -> GrammarState | MillError:
        try:
            return future.result()
        except MillError as error:
            self.refused += 1
            return error
        except Exception as error:
            self.refused += 1
            _log.error("grammar_failed", error=repr(error))
            return BadRequest("the grammar could not be used", param="grammar")

    def _leave(self, future: "asyncio.Future[GrammarState]") -> None:
        self.slow += 1
        self._left += 1

        def ended(future: "asyncio.Future[GrammarState]") -> None:
            self._left -= 1
            future.exception()

        future.add_done_callback(ended)

    def _known(self, request: Generate) -> bool:
        assert request.grammar is not None
        return self._grammars.knows(request.grammar, request.cache_salt)

    def _hand_on(self, which: Callable[[Generate], bool]) -> None:
        for arrival in [arrival for arrival in self._pending.values() if which(arrival.request)]:
            self._settle(arrival)

    def _settle(self, arrival: Arrival) -> None:
        """Hand on, unless that has been done."""
        if self._pending.pop(_key(arrival.request), None) is not None:
            self._submit(arrival)

    def _tell(self, key: Key) -> None:
        if (arrival := self._pending.get(key)) is not None:
            self._accept(arrival.request)


def _key(request: Generate) -> Key:
    return request.request_id, request.attempt


def _in_thread(work: Callable[[], GrammarState]) -> "asyncio.Future[GrammarState]":
    """What `work` returns, of a thread that a process which ends does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[GrammarState] = loop.create_future()

    def tell(result: GrammarState | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        # the loop may be gone
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name="grammar", daemon=True).start()
    return future
