"""`tokenmill up`, as a newcomer meets it: real processes, the mock engine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from deploy import broker, keys
from deploy.paths import claim
from tests.deploy.command import Command, tokenmill, up
from tests.nats_server import certificate, nats_server

RUNNING = "running; SIGINT or SIGTERM drains and stops"


def _curl_line(command: Command) -> str:
    return next(line for line in command.output.splitlines() if line.startswith("curl "))


def test_it_answers_says_where_to_send_more_and_leaves_nothing(tmp_path: Path) -> None:
    port = broker.free_port()
    with tokenmill(tmp_path, *up(port)) as command:
        command.until_printed(RUNNING)
        assert re.search(r"ready in \d+\.\d s, logs in ", command.output)
        assert "In one sentence: what does a mill do?" in command.output
        assert re.search(r"TTFT \d+ ms, \d+ tokens/s, \d+ tokens, by worker-1 with drafter-1", command.output)
        assert f"http://127.0.0.1:{port}/v1/chat/completions" in _curl_line(command)
        assert len(command.pids("nats-server")) == 1
        store = tmp_path / "data" / str(port) / "nats"
        assert (store / "jetstream").is_dir()
        command.interrupt()
        assert command.code() == 0
        assert command.output.splitlines()[-2:] == ["draining ... (Ctrl-C again stops at once)", "stopped"]
        assert command.errors == ""
        command.until_gone()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_quiet_leaves_out_the_first_answer_and_the_curl_line_works_as_pasted(tmp_path: Path) -> None:
    with tokenmill(tmp_path, *up(broker.free_port(), "--quiet", "--drafters", "0")) as command:
        command.until_printed(RUNNING)
        assert "what does a mill do" not in command.output
        assert "TTFT" not in command.output
        pasted = subprocess.run(["sh", "-c", _curl_line(command)], capture_output=True, text=True, timeout=60)
        assert pasted.returncode == 0
        assert pasted.stdout.count("data: {") > 1
        assert pasted.stdout.rstrip().endswith("data: [DONE]")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_with_a_certificate_all_of_it_speaks_https(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with tokenmill(tmp_path, *up(broker.free_port(), "--tls-cert", str(cert), "--tls-key", str(key))) as command:
        command.until_printed(RUNNING)
        assert re.search(r"TTFT \d+ ms", command.output)
        assert "https://127.0.0.1" in _curl_line(command)
        pasted = subprocess.run(["sh", "-c", _curl_line(command)], capture_output=True, text=True, timeout=60)
        assert pasted.returncode == 0 and pasted.stdout.rstrip().endswith("data: [DONE]")


def test_half_of_a_certificate_is_said_before_anything_starts(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    with tokenmill(tmp_path, *up(broker.free_port(), "--tls-cert", str(cert))) as command:
        assert command.code() == 1 and "belong together" in command.errors.replace("\n", " ")


def test_a_worker_that_dies_is_started_again_and_nothing_outlives_the_command(tmp_path: Path) -> None:
    port = broker.free_port()
    with tokenmill(tmp_path, *up(port, "--quiet")) as command:
        command.until_printed(RUNNING)
        [worker] = command.pids("--id=worker-1")
        os.kill(worker, signal.SIGKILL)
        log = tmp_path / "data" / str(port) / "logs" / "worker-1.log"
        command.until_printed(f"worker-1 ended by SIGKILL; starting it again in 0.25 s (log: {log})")
        command.until(lambda: command.pids("--id=worker-1") not in ([], [worker]))
        command.until(lambda: log.read_text().count("worker_ready") == 2)
        # and nothing outlives its supervisor, however that dies
        command.process.kill()
        command.process.wait()
        command.until_gone()


def test_a_second_ctrl_c_cuts_the_drain_short(tmp_path: Path) -> None:
    port = broker.free_port()
    with tokenmill(tmp_path, *up(port, "--quiet", "--drain-s", "600")) as command:
        command.until_printed(RUNNING)
        reading = _endless_stream(port)
        command.interrupt()
        command.until_printed("draining ...")
        assert command.process.poll() is None
        command.interrupt()
        assert command.code() == 0
        command.until_gone()
        reading.join()


def _endless_stream(port: int) -> threading.Thread:
    """A client in the middle of a long stream; it ends when the gateway does."""
    begun = threading.Event()

    def read() -> None:
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 8000, "ignore_eos": True}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60, trust_env=False) as response:
                for _ in response.iter_lines():
                    begun.set()
        except httpx.HTTPError:
            return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert begun.wait(60)
    return thread


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    with tokenmill(tmp_path, *up(broker.free_port())) as command:
        command.until(lambda: command.pids("--id=router-1"))
        command.interrupt()
        assert command.code() == 0
        command.until_gone()
        assert "curl" not in command.output


def test_the_table_fits_a_terminal_and_ctrl_c_leaves_no_trace_of_it(tmp_path: Path) -> None:
    with tokenmill(tmp_path, *up(broker.free_port(), "--workers", "2", "--quiet"), terminal=(80, 40)) as command:
        command.until_printed("Ctrl-C drains and stops")
        command.until(lambda: len(re.findall(r"^worker-\d +ready +\d+ ", command.output, re.MULTILINE)) >= 2)
        header = next(line for line in command.output.splitlines() if line.startswith("process"))
        assert header.split() == ["process", "state", "pid", "tokens/s", "KV", "blocks", "drafts", "load"]
        titles = re.compile(r"process|nats-|(router|worker|drafter)-\d ")
        table = [line for line in command.output.splitlines() if titles.match(line)]
        assert max(map(len, table)) <= 80
        command.type(b"\x03")
        assert command.code() == 0
        assert command.output.rstrip().endswith("stopped")
        command.until_gone()


def test_several_of_each_serve_on_ports_side_by_side(tmp_path: Path) -> None:
    port = broker.free_port()
    more = ("--workers", "2", "--routers", "2", "--gateways", "2", "--drafters", "2", "--quiet")
    with tokenmill(tmp_path, *up(port, *more)) as command:
        command.until_printed(RUNNING)
        assert all(len(command.pids(f"--id={kind}-2")) == 1 for kind in ("worker", "router", "gateway", "drafter"))
        second = f"http://127.0.0.1:{port + 1}/v1/models"
        command.until(lambda: _status(second) == 200)


def _status(url: str) -> int:
    try:
        return httpx.get(url, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def test_an_existing_broker_is_used_and_left_alone(tmp_path: Path) -> None:
    with nats_server() as server:
        arguments = up(broker.free_port(), "--nats", server.url)
        with tokenmill(tmp_path, *arguments) as command:
            command.until_printed(RUNNING)
            assert not command.pids("nats-server")
            # others may live on that broker: no two meshes share an id
            assert re.search(r"by worker-1-[a-z0-9]{6} with drafter-1-[a-z0-9]{6}", command.output)
            command.interrupt()
            assert command.code() == 0
            command.until_gone()
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            assert connection.recv(4) == b"INFO"


def test_a_broker_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    arguments = up(broker.free_port(), "--nats", "nats://127.0.0.1:9")
    _assert_one_sentence(tmp_path, arguments, "no NATS server took a connection at nats://127.0.0.1:9")


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expected = f"port {port} on 127.0.0.1 is in use: stop what listens there, or choose another with --port"
        _assert_one_sentence(tmp_path, up(port), expected)


def test_a_folder_in_use_is_one_sentence(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with claim(data):
        expected = f"another mesh (process {os.getpid()}) uses {data}: stop it, or choose another folder with --data"
        _assert_one_sentence(tmp_path, up(broker.free_port(), "--data", str(data)), expected)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data = tmp_path / "file" / "data"
    expected = f"cannot write to {data} (Not a directory): choose another folder with --data"
    _assert_one_sentence(tmp_path, up(broker.free_port(), "--data", str(data)), expected)


def _assert_one_sentence(folder: Path, arguments: list[str], expected: str) -> None:
    with tokenmill(folder, *arguments) as command:
        assert command.code() == 1
        assert command.errors.startswith(expected), command.errors
        assert command.errors.count("\n") == 1
        assert command.output == ""
        command.until_gone()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("one_process", [False, True])
def test_with_a_tenants_file_a_key_is_needed_and_the_curl_line_takes_it_from_the_environment(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: bool) -> None:
    port, tenants = broker.free_port(), tmp_path / "tenants.toml"
    key = keys.create(tenants, "acme", datetime.now(UTC)).key
    more = ("--all-in-one",) if one_process else ()
    monkeypatch.delenv("TOKENMILL_API_KEY", raising=False)
    with tokenmill(tmp_path, *up(port, "--drafters", "0", "--tenants", "tenants.toml", *more)) as command:
        command.until_printed(RUNNING)
        assert "what does a mill do" not in command.output, "there is no key to ask with"
        assert "with a key of tenants.toml in TOKENMILL_API_KEY" in command.output
        models = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(models, trust_env=False).status_code == 401
        for said, ends in ((key, "data: [DONE]"), ("", '"code":"invalid_api_key"}}')):
            pasted = subprocess.run(["sh", "-c", _curl_line(command)], capture_output=True, text=True, timeout=60,
                                    env=os.environ | {"TOKENMILL_API_KEY": said})
            assert pasted.stdout.rstrip().endswith(ends)
        command.interrupt()
        assert command.code() == 0


def test_with_a_key_in_the_environment_the_first_answer_is_asked_with_it(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = tmp_path / "tenants.toml"
    monkeypatch.setenv("TOKENMILL_API_KEY", keys.create(tenants, "acme", datetime.now(UTC)).key)
    with tokenmill(tmp_path, *up(broker.free_port(), "--tenants", str(tenants))) as command:
        command.until_printed(RUNNING)
        assert re.search(r"TTFT \d+ ms, \d+ tokens/s, \d+ tokens, by worker-1", command.output)
