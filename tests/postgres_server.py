"""A real PostgreSQL for tests: a cluster of its own on a free port, as a user without rights; nothing of it is kept."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nats_server import free_port

START_S = 30.0
USERS = ("postgres", "nobody")  # as whom it runs where the tests are root, which PostgreSQL refuses


def postgres_programs() -> Path:
    """The folder of initdb and postgres. Skips the test where there is none."""
    for folder in (*map(Path, os.environ.get("PATH", "").split(os.pathsep)),
                   *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    pytest.skip("there is no PostgreSQL here: install it (apt-get install postgresql) to test against it")


@contextlib.contextmanager
def postgres_server(fsync: bool = False) -> Iterator[str]:
    """A server while the block runs; its URL without a database's name: append one that `new_database` made.

    `fsync`: whether a commit waits for the disk.
    """
    programs = postgres_programs()
    user = _user()
    folder = Path(tempfile.mkdtemp(prefix="mill-pg-", dir="/tmp"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        subprocess.run([programs / "initdb", "-D", data, "-U", "mill", "--auth=trust", "-E", "UTF8", "--locale=C",
                        "--no-sync"], check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, env=_environment())
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c",
                 "listen_addresses=127.0.0.1", "-c", f"fsync={'on' if fsync else 'off'}", "-c", "max_connections=40",
                 "-c", "shared_buffers=16MB"],
                user=user, cwd=folder, stdout=log, stderr=log, env=_environment())
        try:
            _wait(server, programs, port, folder / "log")
            yield f"postgresql://mill@127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)  # without waiting for who is still connected
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server: str, name: str) -> str:
    """The URL of a database that is empty."""
    import psycopg

    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{server}/{name}"


def _user() -> str | None:
    if os.getuid():
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for user in USERS:
        if user in known:
            return user
    pytest.skip(f"PostgreSQL does not run as root, and there is no user {' or '.join(USERS)} here")


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}


def _wait(server: "subprocess.Popen[bytes]", programs: Path, port: int, log: Path) -> None:
    import psycopg

    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and server.poll() is None:
        with contextlib.suppress(psycopg.Error, socket.error):
            psycopg.connect(f"postgresql://mill@127.0.0.1:{port}/postgres", connect_timeout=2).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")
