"""Keep a set of processes running: restart what dies, say so, and end all of it in order.

Rule: a child is ended by SIGTERM and given time to drain; SIGKILL only after that. A child that dies by itself comes
back after a pause that doubles from 0.25 s to 8 s and starts over once it has lived for 30 s.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAUSE_S = (0.25, 8.0)
LIVED_S = 30.0

Say = Callable[[str], None]


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: Sequence[str]
    log: Path
    drain_s: float = 30.0
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    state: str = "starting"
    wanted: bool = True
    exited: asyncio.Event = field(default_factory=asyncio.Event)

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
        self._tasks[child.name] = asyncio.create_task(self._keep(child), name=f"keep {child.name}")

    async def stop(self, children: Sequence[Child], drain_s: float | None = None) -> None:
        """End these children together: SIGTERM, wait for their drain, SIGKILL what is left."""
        for child in children:
            child.wanted = False
            child.state = "stopping"
            _signal(child, signal.SIGTERM)
        await asyncio.gather(*(self._ended(child, child.drain_s if drain_s is None else drain_s) for child in children))

    async def _ended(self, child: Child, drain_s: float) -> None:
        task = self._tasks.pop(child.name, None)
        if task is None:
            return
        if child.pid is None:  # waiting to be restarted, or not yet started
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=drain_s + 2.0)
        if not done:
            self._say(f"{child.name} did not stop within {drain_s:.0f} s and was killed")
            _signal(child, signal.SIGKILL)
            await asyncio.wait({task}, timeout=5.0)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        child.state = "stopped"

    async def _keep(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        pause_s = PAUSE_S[0]
        while child.wanted:
            born = loop.time()
            await self._run_once(child)
            if not child.wanted:
                break
            if loop.time() - born > LIVED_S:
                pause_s = PAUSE_S[0]
            child.restarts += 1
            child.state = "restarting"
            code = child.process.returncode if child.process else None
            self._say(f"{child.name} ended {_how(code)}; starting it again in {pause_s:g} s (log: {child.log})")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_S[1])

    async def _run_once(self, child: Child) -> None:
        with child.log.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *child.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | child.environment,
                start_new_session=True,
            )
        child.state = "running"
        try:
            await child.process.wait()
        finally:
            if child.process.returncode is None:
                child.process.kill()


def service_command(module: str, flags: Sequence[str]) -> list[str]:
    """The command line of one of our services as a child."""
    return [sys.executable, "-m", "deploy.child", module, *flags]


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log, for an error message."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process and child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def _how(code: int | None) -> str:
    if code is None:
        return "without a trace"
    if code < 0:
        return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"
