"""The whole mesh in one process: the same services, no NATS, and nothing left behind."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from deploy import all_in_one, broker, first_answer
from deploy.all_in_one import OneProcess, serve
from deploy.local_mesh import Options, UpFailed, plan, until_ready
from gateway.model_files import load_card
from shared.clock import LoopClock
from tests.deploy.command import tokenmill, up
from tests.models import default_folder


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(model=default_folder(), data=tmp_path, port=broker.free_port(), engine="mock", drain_s=5.0)


@pytest.fixture
def logging_restored() -> Iterator[None]:
    handlers, configuration = logging.getLogger().handlers[:], structlog.get_config()
    yield
    logging.getLogger().handlers[:] = handlers
    structlog.configure(**configuration)
    structlog.contextvars.clear_contextvars()


def test_the_command_serves_from_one_process_logs_into_one_file_and_leaves_nothing(tmp_path: Path) -> None:
    port = broker.free_port()
    with tokenmill(tmp_path, *up(port, "--all-in-one")) as command:
        command.until_printed("running; SIGINT or SIGTERM drains and stops")
        assert re.search(r"ready in \d+\.\d s, all in this process, logs in ", command.output)
        assert re.search(r"TTFT \d+ ms, .* by worker-1 with drafter-1", command.output)
        assert command.pids() == [command.process.pid]
        command.interrupt()
        assert command.code() == 0
        assert command.output.endswith("draining ... (Ctrl-C again stops at once)\nstopped\n")
        assert command.errors == ""
    log = (tmp_path / "data" / str(port) / "logs" / all_in_one.LOG).read_text()
    assert re.search(r"gateway_serving .*id=gateway-1 .*service=gateway", log)
    assert re.search(r"worker_ready .*id=worker-1 .*service=worker", log)
    assert "Traceback" not in log


def test_a_second_ctrl_c_ends_it_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    port = broker.free_port()
    with tokenmill(tmp_path, *up(port, "--all-in-one", "--quiet", "--drain-s", "600")) as command:
        command.until_printed("running;")
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 8000, "ignore_eos": True}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60, trust_env=False) as response:
            next(response.iter_lines())
            command.interrupt()
            command.until_printed("draining ...")
            assert command.process.poll() is None
            command.interrupt()
            assert command.code() == 0
        assert command.errors == ""


async def test_the_environment_tells_services_in_one_process_what_it_tells_processes(
    options: Options, monkeypatch: pytest.MonkeyPatch, logging_restored: None
) -> None:
    monkeypatch.setenv("TOKENMILL_MAX_ACTIVE", "2")
    monkeypatch.setenv("TOKENMILL_LOG", "json")
    mesh = OneProcess(options)
    mesh.start()
    try:
        await mesh.until_ready()
        body = {"messages": [{"role": "user", "content": "a"}], "n": 3}
        async with httpx.AsyncClient(trust_env=False) as client:
            refused = await client.post(f"{options.url}/v1/chat/completions", json=body)
    finally:
        await mesh.stop()
    assert "at most 2 choices" in refused.json()["error"]["message"]
    lines = (options.data / "logs" / all_in_one.LOG).read_text().splitlines()
    assert {"gateway_serving", "request_refused"} <= {json.loads(line)["event"] for line in lines}


async def test_a_bad_setting_in_the_environment_is_one_sentence(
    options: Options, monkeypatch: pytest.MonkeyPatch, logging_restored: None
) -> None:
    monkeypatch.setenv("TOKENMILL_MAX_ACTIVE", "many")
    mesh = OneProcess(options)
    with pytest.raises(UpFailed, match="bad setting for gateway: TOKENMILL_MAX_ACTIVE = 'many'"):
        mesh.start()
    await mesh.stop()


async def test_services_together_answer_until_cancelled(options: Options) -> None:
    services = [settings for group in plan(options, nats="").values() for settings in group]
    serving = asyncio.create_task(serve(services, LoopClock()))
    await until_ready([], options.url)
    shown: list[str] = []
    answer = await first_answer.ask(options.url, load_card(options.model).name, shown.append, max_tokens=16)
    assert (answer.completion_tokens, answer.mesh["worker"]) == (16, "worker-1")
    assert "".join(shown) == answer.text != ""
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient(trust_env=False).get(options.url)


async def test_a_refusal_is_told_in_the_words_of_the_gateway(options: Options) -> None:
    services = [settings for group in plan(options, nats="").values() for settings in group]
    serving = asyncio.create_task(serve(services, LoopClock()))
    await until_ready([], options.url)
    with pytest.raises(first_answer.AnswerFailed, match="the model 'other' does not exist here"):
        await first_answer.ask(options.url, "other", lambda piece: None)
    serving.cancel()
    await asyncio.wait({serving})
    with pytest.raises(first_answer.AnswerFailed):
        await first_answer.ask(options.url, "other", lambda piece: None)


@pytest.mark.usefixtures("logging_restored")
async def test_a_service_that_fails_ends_the_mesh_with_its_reason(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ExceptionGroup("inside", [RuntimeError("the device is on fire")])

    monkeypatch.setitem(all_in_one.SERVE, all_in_one.WorkerSettings, fail)  # type: ignore[misc]
    mesh = OneProcess(options)
    mesh.start()
    with pytest.raises(UpFailed, match="worker-1 ended: the device is on fire"):
        await mesh.until_ready()
    await mesh.stop()
    assert {child.state for child in mesh.children} == {"stopped"}
    assert "the device is on fire" in (options.data / "logs" / all_in_one.LOG).read_text()
