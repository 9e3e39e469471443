"""The tutorial, block by block, as it stands: two shells are the two machines."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import broker
from tests.models import default_folder

HOME = Path(__file__).resolve().parents[2]
PAGE = HOME / "docs" / "tutorial.md"
PORTS = ("4222", "8000", "8001", "9100", "9102", "9111", "9112", "9090")
NEEDED = ("openssl", "curl", "prometheus")
GIVE_UP_S = 60.0


class Machine:
    """A shell in a folder of its own, which lives from block to block."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir()
        self._said = folder / "said.txt"
        with self._said.open("wb") as said:
            self._shell = subprocess.Popen(["bash", "-eu"], cwd=folder, env=environment,
                                           stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True)
        self._blocks = 0

    def run(self, block: str) -> str:
        """What the block printed. Raises AssertionError with it when a command of it fails."""
        assert self._shell.stdin is not None
        before = len(self._said.read_text(errors="replace"))
        self._blocks += 1
        done = f"block {self._blocks} is done"
        self._shell.stdin.write(f"{block}\necho; echo {done}\n".encode())
        self._shell.stdin.flush()
        give_up = time.monotonic() + GIVE_UP_S
        while f"\n{done}\n" not in (said := self._said.read_text(errors="replace")[before:]):
            assert self._shell.poll() is None and time.monotonic() < give_up, f"{block}\n\nsaid:\n{said}"
            time.sleep(0.05)
        return said

    def end(self) -> None:
        """With all that runs on it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._shell.pid, number)
            time.sleep(0.5)
        self._shell.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, Machine]]:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in {
        "tokenmill": f'exec "{sys.executable}" -m deploy.cli "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        # the other machine is the folder beside
        "scp": f'cp "${{@/#*:tokenmill/{tmp_path / "A"}}}"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    scripts = sysconfig.get_path("scripts")
    cache = default_folder().parents[1]
    environment = {"PATH": f"{tools}:{scripts}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(HOME),
                   "TOKENMILL_CACHE": str(cache), "TOKENMILL_THREADS": "1"}
    both = {name: Machine(tmp_path / name, environment) for name in "AB"}
    yield both
    for machine in both.values():
        machine.end()


def blocks() -> list[tuple[str, str]]:
    """Machine and commands of each block that is to be run, on this machine and on ports that are free."""
    ports = {port: str(broker.free_port()) for port in PORTS}
    found = re.findall(r"^```bash\n# on ([AB])\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    pattern = re.compile(rf"(?<=[: ])(?:{'|'.join(PORTS)})\b")
    here = [(where, re.sub(r"10\.0\.0\.[12](?!:tokenmill)", "127.0.0.1", text)) for where, text in found]
    return [(where, pattern.sub(lambda match: ports[match[0]], text)) for where, text in here]


def test_every_block_of_the_page_says_where_it_runs_or_that_it_does_not() -> None:
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert fences and {language for language, _ in fences} == {"bash", "console"}
    for language, text in fences:
        assert text.startswith(("# on A\n", "# on B\n") if language == "bash" else "$ "), text
    assert [where for where, _ in blocks()] == ["A", "A", "A", "B", "A", "B", "A", "B", "A"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_tutorial_does_what_it_says(machines: dict[str, Machine]) -> None:
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"the tutorial uses {', '.join(missing)}, not installed here")
    said = [machines[where].run(text) for where, text in blocks()]
    _, first_half, asked, _, residency, shut_out, watched, _, alone = said
    assert re.search(r"ok +NATS", first_half)
    first, elsewhere, last = _answer(asked), _answer(residency), _answer(alone)
    assert first["usage"]["mill"]["worker"] == last["usage"]["mill"]["worker"] == "worker-a"
    assert elsewhere["usage"]["mill"]["worker"] == "worker-b"
    assert "no credential for a worker in nats" in shut_out
    texts = {answer["choices"][0]["message"]["content"] for answer in (first, elsewhere, last)}
    assert len(texts) == 1 and len(texts.pop()) > 40
    assert re.search(r"worker +smollm2-135m-instruct +2 +2 ", watched)
    found = {one["metric"]["job"]: one["value"][1] for one in _answer(watched)["data"]["result"]}
    assert found == {"gateway": "1", "router": "1", "worker": "2", "drafter": "1"}
    assert "no_eligible_worker" in alone


def _answer(said: str) -> dict:  # type: ignore[type-arg]
    """The first JSON document over several lines in what was printed."""
    found: dict = json.JSONDecoder().raw_decode(said[said.index("{\n"):])[0]  # type: ignore[type-arg]
    return found
