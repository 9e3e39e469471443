"""Another engine beside ours: a driver in `peers/`, run by the interpreter of an environment of its own.

A driver is run as `PYTHON peers/run_X.py JOB.json` and prints one line of JSON as its last. The job:

    task                prepare (write what the peer needs), generate (one workload), stay (generate, one workload after
                        the other, for peers that take minutes to start), serve (HTTP), score (logits)
    model, tokenizer    files of the pulled model; `folder` is scratch that lasts as long as the benchmark
    threads, dtype      dtype of peers that keep no quantised weights
    warm                a prompt whose first token ends the cold start
    prompts, out_tokens, shared_tokens    token ids of each request; how many of them all have in common
    one_at_a_time       requests one after the other instead of at once

Every answer has `version`; that of `generate` also `first_s` (of each request, from the start), `end_s`, `tokens` (made
for each request), `rss_mib` and `cold_start_s`. One that stays reads a line of JSON for each workload, with the last
row of keys, and answers with a line; nothing of the one before may be left in its caches.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVERS = {
    "llama.cpp": "run_llama_cpp.py",
    "openvino": "run_openvino.py",
    "transformers": "run_transformers.py",
    "vllm": "run_vllm.py",
}
WITHIN_S = 1800.0  # compiling at the first start takes minutes
LOOK_EVERY_S = 0.1  # for an answer of one that stays: seldom enough to take nothing from it
SHOWN_ERROR = 400
SHOWN_LINES = 3

Ask = Callable[[Mapping[str, Any]], dict[str, Any]]


class PeerFailed(Exception):
    """A peer could not do what it was asked; the message is what it said last."""


@dataclass(frozen=True)
class Peer:
    """A driver and the interpreter that runs it."""

    name: str
    python: Path

    def ask(self, job: Mapping[str, Any], within_s: float = WITHIN_S) -> dict[str, Any]:
        """Run the driver once. Raises PeerFailed for a bad end, none in time, or no answer."""
        with self.start(job) as running:
            try:
                code = running.process.wait(timeout=within_s)
            except subprocess.TimeoutExpired as error:
                raise PeerFailed(f"no answer within {within_s:.0f} s: {running.last_words()}") from error
            if code:
                raise PeerFailed(running.last_words() or f"ended with {code}, without a word")
            try:
                answer: dict[str, Any] = json.loads(running.said.read_text(errors="replace").splitlines()[-1])
            except (IndexError, ValueError) as error:
                raise PeerFailed(f"its last line is no JSON: {running.last_words()}") from error
        return answer

    @contextmanager
    def stay(self, job: Mapping[str, Any]) -> Iterator[Ask]:
        """Ask one process for many workloads; what is yielded raises PeerFailed as `ask` does."""
        with self.start(dict(job) | {"task": "stay"}) as running:
            yield running.ask

    @contextmanager
    def start(self, job: Mapping[str, Any]) -> Iterator["Running"]:
        """The running driver; it and whatever it started end with the block."""
        driver = Path(__file__).parent / "peers" / DRIVERS[self.name]
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path, said, complaint = folder / "job.json", folder / "said", folder / "complaint"
            path.write_text(json.dumps(dict(job)))
            with said.open("wb") as out, complaint.open("wb") as err:
                try:
                    process = subprocess.Popen(
                        [str(self.python), str(driver), str(path)],
                        stdin=subprocess.PIPE,
                        stdout=out,
                        stderr=err,
                        cwd=folder,
                        env=environment,
                        start_new_session=True,
                    )
                except OSError as error:
                    raise PeerFailed(f"{self.python} cannot be run: {error.strerror}") from error
            try:
                yield Running(process, said, complaint)
            finally:
                _end(process)


@dataclass(frozen=True)
class Running:
    """A driver at work, and the files with what it says."""

    process: subprocess.Popen[bytes]
    said: Path
    complaint: Path

    def ask(self, run: Mapping[str, Any], within_s: float = WITHIN_S) -> dict[str, Any]:
        """The answer to one more workload. Raises PeerFailed when none comes in time or the driver ends."""
        known = len(self.answers())
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: found out below
            self.process.stdin.write(json.dumps(dict(run)).encode() + b"\n")
            self.process.stdin.flush()
        give_up = time.monotonic() + within_s
        while len(answers := self.answers()) == known:
            if self.process.poll() is not None:
                raise PeerFailed(self.last_words() or f"ended with {self.process.returncode}, without a word")
            if time.monotonic() > give_up:
                self.process.kill()  # a late answer must not be taken for that of the next workload
                raise PeerFailed(f"no answer within {within_s:.0f} s: {self.last_words()}")
            time.sleep(LOOK_EVERY_S)
        return answers[known]

    def answers(self) -> list[dict[str, Any]]:
        """All it has answered; other lines, and one that is not yet whole, are not answers."""
        found = []
        for line in self.said.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                if isinstance(value := json.loads(line), dict):
                    found.append(value)
        return found

    def last_words(self) -> str:
        """The last lines that say something, as one."""
        texts = [path.read_text(errors="replace") for path in (self.complaint, self.said)]
        lines = [line.strip() for text in texts if text.strip() for line in text.splitlines()[-SHOWN_LINES:]]
        return " | ".join(line for line in lines if line)[-SHOWN_ERROR:]


def parse(given: list[str]) -> list[Peer]:
    """`NAME=PYTHON` as on the command line. Raises SystemExit that says what is possible."""
    peers = []
    for text in given:
        name, _, python = text.partition("=")
        if name not in DRIVERS or not python:
            raise SystemExit(f"--peer {text}: write NAME=PYTHON, where NAME is one of {', '.join(DRIVERS)}")
        # absolute, yet not resolved: the python of a virtual environment is a link
        peers.append(Peer(name, Path(python).expanduser().absolute()))
    return peers


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the driver's whole session, finished or not: peers leave children behind."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
