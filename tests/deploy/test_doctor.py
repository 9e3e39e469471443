"""`tokenmill doctor` says of each thing that can be missing what it is and what mends it."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import doctor, nats_config
from deploy.doctor import Finding, Wanted
from deploy.models import Model
from deploy.nats_config import Listening
from tests.nats_server import NatsServer, free_port, nats_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nats")
    nats_config.write(made, ["observer", "worker@eu"], Listening())
    return made


@pytest.fixture(scope="module")
def asking(folder: Path) -> Iterator[NatsServer]:
    """A server that asks for credentials."""
    with nats_server("-c", str(folder / nats_config.CONFIG)) as running:
        yield running


def test_what_is_fine_needs_nothing_done() -> None:
    for found in (doctor.python(), doctor.packages(["msgspec", "nats-py"]), doctor.open_files(1 << 16),
                  doctor.clock(True, True), doctor.clock(False, False), doctor.port("127.0.0.1", free_port()),
                  doctor.model_files([Model(name="m", folder="m")]), doctor.nats(Wanted())):
        assert (found.state, found.do) == ("ok", ""), found


def test_what_is_not_says_what_mends_it(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    taken = socket.create_server(("127.0.0.1", 0))
    cases = [
        (doctor.python((3, 10, 4)), "broken", "3.11 or newer"),
        (doctor.packages(["msgspec", "no-such-package"]), "broken", "pip install no-such-package"),
        (doctor.model_files([]), "advice", "tokenmill pull"),
        (doctor.model_files([Model(name="m", folder="m", problem="too large")]), "broken", "tokenmill pull"),
        (doctor.model_files([Model(name="m", folder="m", problem="x"), Model(name="n", folder="n")]), "advice",
         "tokenmill models"),
        (doctor.open_files(256), "advice", "ulimit -n"),
        (doctor.disk([blocked]), "broken", "TOKENMILL_CACHE"),
        (doctor.clock(True, False), "advice", "chrony"),
        (doctor.port("127.0.0.1", taken.getsockname()[1]), "advice", "of yours"),
    ]
    taken.close()
    for found, state, do in cases:
        assert found.state == state and do in found.do, found


def test_a_server_without_protection_is_served_with_advice() -> None:
    with nats_server() as server:
        found = doctor.nats(Wanted(nats=server.url))
    assert found.state == "advice" and "lets us in" in found.said
    assert "anybody may connect" in found.do and "max_payload" in found.do


def test_a_server_as_nats_config_writes_it_is_fine_for_an_observer(asking: NatsServer, folder: Path) -> None:
    found = doctor.nats(Wanted(nats=asking.url, nats_creds=str(folder)))
    assert (found.state, found.do) == ("ok", "")


@pytest.mark.parametrize(("creds", "what"), [("", "does not let this service in"),
                                             ("worker@eu.seed", "does not let tokenmill-doctor subscribe"),
                                             ("missing.seed", "cannot read the NATS credential")])
def test_a_wrong_credential_is_told_from_a_missing_server(asking: NatsServer, folder: Path, creds: str,
                                                          what: str) -> None:
    shown = str(folder / creds) if creds else ""
    found = doctor.nats(Wanted(nats=asking.url, nats_creds=shown))
    assert found.state == "broken" and what in found.said and "nats-config" in found.do


def test_a_server_that_is_not_there_or_is_none_is_told_without_a_password() -> None:
    found = doctor.nats(Wanted(nats=f"nats://me:secret@127.0.0.1:{free_port()}"))
    assert found.state == "broken" and "does not answer" in found.said and "secret" not in found.said
    with socket.create_server(("127.0.0.1", 0)) as other:
        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        found = doctor.nats(Wanted(nats=f"127.0.0.1:{other.getsockname()[1]}"))
        thread.join()
    assert found.state == "broken" and "220 mail" in found.said


def test_each_server_that_is_named_is_asked(asking: NatsServer, folder: Path) -> None:
    there, gone = asking.url, f"nats://127.0.0.1:{free_port()}"
    for urls, state in ((f"{there},{there}", "ok"), (f"{there},{gone}", "advice"), (f"{gone}, {there}", "advice"),
                        (f"{gone},{gone}", "broken")):
        found = doctor.nats(Wanted(nats=urls, nats_creds=str(folder)))
        assert found.state == state, found
        assert found.said.count("does not answer") == urls.count(gone)
        assert found.said.count("lets us in") == urls.count(there)
    with nats_server() as small:
        found = doctor.nats(Wanted(nats=f"{there},{small.url}", nats_creds=str(folder)))
    assert found.state == "advice" and "max_payload" in found.do


def test_a_look_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise RuntimeError("a defect")

    monkeypatch.setattr(doctor, "cpu_step", broken)
    findings = doctor.examine(Wanted(port=free_port()))
    [found] = [finding for finding in findings if finding.name == "CPU step"]
    assert found.state == "broken" and "a defect" in found.said and len(findings) == 11
    assert doctor.exit_code(findings) == 2


@pytest.mark.parametrize(("states", "code"), [((), 0), (("ok", "ok"), 0), (("ok", "advice"), 1),
                                              (("broken", "advice"), 2)])
def test_the_exit_code_is_the_worst(states: tuple[doctor.State, ...], code: int) -> None:
    assert doctor.exit_code([Finding("x", state, "") for state in states]) == code


def test_the_command_prints_findings_and_their_json(tmp_path: Path) -> None:
    environment = os.environ | {"TOKENMILL_CACHE": str(tmp_path / "cache"), "TOKENMILL_DATA": str(tmp_path / "data")}
    command = [sys.executable, "-m", "deploy.cli", "doctor", "--port", str(free_port())]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT, env=environment)
    findings = {found["name"]: found for found in json.loads(done.stdout)}
    assert findings["models"]["state"] == findings["CPU step"]["state"] == "advice" and done.returncode == 1
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert shown.returncode == 1 and "-> `tokenmill pull`" in shown.stdout
    assert not (tmp_path / "cache").exists() and not (tmp_path / "data").exists(), "doctor changes nothing"
