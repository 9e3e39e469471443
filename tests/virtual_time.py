"""A loop whose time jumps: seconds of mesh life in milliseconds of test, the same on every run.

Rule: when nothing is ready, time moves to the next scheduled callback; when nothing is scheduled either, everyone waits
for someone who will never come, and that is an error with the names of those who wait. Tasks hash by birth order, so
that sets of them (TaskGroup keeps one) iterate alike in every run. No sockets, pipes or threads: nobody would wait for
them.

    def test_something():
        run_virtual(scenario(), timeout_s=60)
"""

import asyncio
import contextvars
import itertools
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Nothing is ready and nothing is scheduled."""


class VirtualTimeout(TimeoutError):
    """The scenario did not end within its virtual seconds."""


def run_virtual(coro: Coroutine[Any, Any, T], timeout_s: float = 3600.0) -> T:
    """The result of `coro`, run on a fresh loop that starts at second 0.

    Raises Deadlock when nothing can ever happen again, VirtualTimeout when the next thing would happen after
    `timeout_s`.
    Tasks left behind are cancelled, as `asyncio.run` does.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        loop.limit_s = timeout_s
        try:
            return runner.run(coro)
        finally:
            # clean-up may sleep past the limit
            loop.limit_s = float("inf")


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop over a selector that never waits."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.limit_s = float("inf")
        super().__init__(_JumpingSelector(self))
        births = itertools.count()
        self.set_task_factory(lambda loop, coro, **options: _OrderedTask(next(births), loop, coro, options))

    def time(self) -> float:
        return self.now_s

    def jump(self) -> None:
        """Move time to the next scheduled callback."""
        if not self._scheduled:
            raise Deadlock(f"nothing is ready and nothing is scheduled at {self.now_s:.6f} s; {self._waiting()}")
        next_s = self._scheduled[0].when()
        if next_s > self.limit_s:
            raise VirtualTimeout(f"not finished after {self.limit_s} virtual seconds; {self._waiting()}")
        self.now_s = max(self.now_s, next_s)

    def _waiting(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=hash)
        return "waiting: " + ("; ".join(_where(task) for task in tasks) or "no task")


class _JumpingSelector(selectors.SelectSelector):
    """Finds nothing ready, ever, and lets the loop jump instead of waiting."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._loop.jump()
        return []


class _OrderedTask(asyncio.Task):
    """A task that hashes by birth order instead of by address."""

    def __init__(self, birth: int, loop: asyncio.AbstractEventLoop, coro: Any, options: dict[str, Any]) -> None:
        self._birth = birth
        context: contextvars.Context | None = options.pop("context", None)
        super().__init__(coro, loop=loop, context=context, **options)

    def __hash__(self) -> int:
        return self._birth


def _where(task: "asyncio.Task[Any]") -> str:
    """`name at file:line in function`, of the innermost awaited coroutine."""
    coro: Any = task.get_coro()
    while getattr(coro, "cr_await", None) is not None and hasattr(coro.cr_await, "cr_frame"):
        coro = coro.cr_await
    frame = getattr(coro, "cr_frame", None)
    if frame is None:
        return task.get_name()
    return f"{task.get_name()} at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
