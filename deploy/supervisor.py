"""Keep a set of processes running: restart what dies, say so, and end all of it in order.

Rule: a child is ended by SIGTERM and given time to drain; SIGKILL only after that. A child that dies by itself comes
back after a pause that doubles from 0.25 s to 8 s and starts over once it has lived for 30 s.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

PAUSE_S = (0.25, 8.0)
LIVED_S = 30.0

LAUNCHER = (sys.executable, "-P", str(Path(__file__).with_name("child.py")))

Say = Callable[[str], None]


@dataclass
class Child:
    """One supervised process. `state`: starting, running, restarting, stopping, stopped."""

    name: str
    command: Sequence[str]
    log: Path
    drain_s: float = 30.0
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    state: str = "starting"
    since: float = 0.0  # when the running process was started, in time.monotonic()
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None


class Supervisor:
    """Starts children and keeps them up until `stop`."""

    def __init__(self, say: Say) -> None:
        self.children: list[Child] = []
        self._say = say
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, child: Child) -> None:
        """Start `child` and keep it running."""
        self.children.append(child)
        self._begin(child)

    async def again(self, child: Child) -> Child:
        """End `child` as `stop` does and start it anew. The new one takes its place."""
        await self.stop([child])
        fresh = replace(child, process=None, restarts=0, state="starting", unwanted=asyncio.Event())
        self.children[self.children.index(child)] = fresh
        self._begin(fresh)
        return fresh

    async def drop(self, child: Child) -> None:
        """End `child` as `stop` does, and forget it."""
        await self.stop([child])
        self.children.remove(child)

    async def stop(self, children: Sequence[Child], drain_s: float | None = None) -> None:
        """End these children together: SIGTERM, wait for their drain, SIGKILL what is left."""
        for child in children:
            if child.name in self._tasks:
                child.unwanted.set()
                child.state = "stopping"
                _signal(child, signal.SIGTERM)
        await asyncio.gather(*(self._ended(child, child.drain_s if drain_s is None else drain_s) for child in children))

    def kill(self) -> None:
        """End every child at once; `stop` then returns soon."""
        for child in self.children:
            child.unwanted.set()
            _signal(child, signal.SIGKILL)

    def _begin(self, child: Child) -> None:
        self._tasks[child.name] = asyncio.create_task(self._keep(child), name=f"keep {child.name}")

    async def _ended(self, child: Child, drain_s: float) -> None:
        task = self._tasks.pop(child.name, None)
        if task is None:
            return
        done, _ = await asyncio.wait({task}, timeout=drain_s + 2.0)
        if not done:
            self._say(f"{child.name} did not stop within {drain_s:.0f} s and was killed")
            _signal(child, signal.SIGKILL)
        await task
        child.state = "stopped"

    async def _keep(self, child: Child) -> None:
        pause_s = PAUSE_S[0]
        while not child.unwanted.is_set():
            child.since = time.monotonic()
            how = await self._run_once(child)
            if child.unwanted.is_set():
                break
            if time.monotonic() - child.since > LIVED_S:
                pause_s = PAUSE_S[0]
            child.restarts += 1
            child.state = "restarting"
            self._say(f"{child.name} {how}; starting it again in {pause_s:g} s (log: {child.log})")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.unwanted.wait(), pause_s)
            pause_s = min(pause_s * 2, PAUSE_S[1])

    async def _run_once(self, child: Child) -> str:
        """Returns how it ended, or why it could not be started."""
        try:
            with child.log.open("ab") as log:
                child.process = await asyncio.create_subprocess_exec(
                    *child.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | child.environment,
                    start_new_session=True,
                )
        except OSError as error:
            return f"could not be started ({error.strerror or error})"
        child.state = "running"
        if child.unwanted.is_set():  # while it was being born: it has nothing to drain
            _signal(child, signal.SIGKILL)
        try:
            return f"ended {_how(await child.process.wait())}"
        finally:
            _signal(child, signal.SIGKILL)


def service_command(module: str, flags: Sequence[str]) -> list[str]:
    """The command line of one of our services as a child."""
    return [*LAUNCHER, module, *flags]


def foreign_command(command: Sequence[str]) -> list[str]:
    """The command line of somebody else's program as a child; `command` begins with the path of a binary."""
    return [*LAUNCHER, "--exec", *command]


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log, for an error message."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""


def _signal(child: Child, number: signal.Signals) -> None:
    """SIGKILL goes to all that the child started too: its process group."""
    if child.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(child.pid, number)
        else:
            os.kill(child.pid, number)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
