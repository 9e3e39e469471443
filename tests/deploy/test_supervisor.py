"""The supervisor keeps children up, says so, and ends them in order."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from deploy.supervisor import Child, Supervisor, last_lines, service_command

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = "import time; print('up', flush=True); time.sleep(60)"


def _child(tmp_path: Path, code: str, **more: float) -> Child:
    return Child("one", [sys.executable, "-c", code], tmp_path / "one.log", **more)  # type: ignore[arg-type]


async def _until_up(child: Child, times: int = 1) -> int:
    async with asyncio.timeout(20):
        while not child.log.exists() or child.log.read_text().count("up") < times or child.pid is None:
            await asyncio.sleep(0.01)
    return child.pid


async def test_a_child_that_dies_is_started_again_and_the_terminal_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor, child = Supervisor(said.append), _child(tmp_path, POLITE)
    supervisor.start(child)
    first = await _until_up(child)
    os.kill(first, signal.SIGKILL)
    second = await _until_up(child, times=2)
    assert second != first
    assert child.restarts == 1
    assert "one ended by SIGKILL; starting it again" in said[0]
    await supervisor.stop([child])
    assert child.pid is None


async def test_a_child_that_ignores_sigterm_is_killed_after_its_time(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor, child = Supervisor(said.append), _child(tmp_path, STUBBORN)
    supervisor.start(child)
    pid = await _until_up(child)
    await supervisor.stop([child], drain_s=-1.5)
    assert child.process is not None and child.process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{pid}").exists()
    assert any("was killed" in line for line in said)


async def test_a_child_that_cannot_be_started_is_tried_again_and_the_terminal_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor, child = Supervisor(said.append), Child("one", [str(tmp_path / "missing")], tmp_path / "one.log")
    supervisor.start(child)
    async with asyncio.timeout(20):
        while child.restarts < 2:
            await asyncio.sleep(0.01)
    assert "one could not be started (No such file or directory); starting it again in 0.25 s" in said[0]
    assert "starting it again in 0.5 s" in said[1]
    await supervisor.stop([child])
    assert child.state == "stopped"


async def test_a_child_stopped_while_it_is_born_does_not_live(tmp_path: Path) -> None:
    supervisor, child = Supervisor(lambda line: None), _child(tmp_path, STUBBORN)
    supervisor.start(child)
    await supervisor.stop([child])
    assert child.process is None or child.process.returncode is not None


async def test_a_child_is_killed_with_all_it_started(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n"
        "print('up', p.pid, flush=True); time.sleep(60)"
    )
    supervisor, child = Supervisor(lambda line: None), _child(tmp_path, code)
    supervisor.start(child)
    await _until_up(child, times=2)
    grandchild = next(int(word) for word in child.log.read_text().split() if word.isdigit())
    supervisor.kill()
    await supervisor.stop([child])
    async with asyncio.timeout(20):
        while _state(grandchild) != "Z":
            await asyncio.sleep(0.01)


async def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({service_command('http.server', ['0', '--bind', '127.0.0.1'])!r})\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    # the child asks the kernel early in its life; wait until it runs our launcher's target
    async with asyncio.timeout(20):
        while "http.server" not in Path(f"/proc/{pid}/cmdline").read_text():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        parent.kill()
        await parent.wait()
        while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
            await asyncio.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_the_end_of_a_log_is_at_hand_for_an_error_message(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\n".join(str(i) for i in range(100)))
    assert last_lines(log, 3) == "97\n98\n99"
    assert last_lines(tmp_path / "missing.log") == ""
