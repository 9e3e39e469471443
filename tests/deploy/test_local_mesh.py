"""What a local mesh consists of, and each way it can fail to start as one sentence."""

import errno
import os
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest

from deploy import broker, local_mesh
from deploy.all_in_one import OneProcess
from deploy.local_mesh import LocalMesh, Options, UpFailed, check_ports, plan
from gateway.model_files import load_card
from shared.settings import DrafterSettings, GatewaySettings, WorkerSettings
from tests.models import default_folder


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(model=default_folder(), data=tmp_path / "data", port=broker.free_port(), engine="mock", drain_s=1.0)


def test_a_plan_names_every_process_and_gives_gateways_ports_in_a_row(options: Options) -> None:
    services = plan(replace(options, gateways=2, workers=2, drafters=0), "nats://127.0.0.1:1")
    assert [settings.id for group in services.values() for settings in group] == [
        "router-1", "worker-1", "worker-2", "gateway-1", "gateway-2"]
    ports = [settings.port for settings in services["gateway"] if isinstance(settings, GatewaySettings)]
    assert ports == [options.port, options.port + 1]


def test_everyone_but_gateways_gets_a_port_for_figures_when_asked(options: Options) -> None:
    def ports(metrics_port: int) -> dict[str, int]:
        services = plan(replace(options, workers=2, metrics_port=metrics_port), "nats://127.0.0.1:1")
        return {settings.id: settings.metrics_port for group in services.values() for settings in group}

    assert ports(9000) == {"router-1": 9000, "drafter-1": 9001, "worker-1": 9002, "worker-2": 9003, "gateway-1": 0}
    assert set(ports(0).values()) == {0}


def test_ports_for_figures_are_checked_like_those_of_gateways(options: Options) -> None:
    with pytest.raises(UpFailed, match=f"of --metrics-port .{options.port - 1} to {options.port + 1}. overlap"):
        check_ports(replace(options, metrics_port=options.port - 1))
    free = broker.free_port()
    with socket.create_server(("127.0.0.1", free)), pytest.raises(UpFailed, match="choose another with --metrics-port"):
        check_ports(replace(options, metrics_port=free))


async def test_a_port_in_the_environment_moves_no_gateway(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_PORT", str(broker.free_port()))
    async with LocalMesh(replace(options, port=GatewaySettings().port, host="127.0.0.3")) as mesh:
        await mesh.until_ready()


async def test_routers_and_workers_serve_their_figures_where_told(options: Options) -> None:
    first = broker.free_port()
    async with LocalMesh(replace(options, metrics_port=first, drafters=0)) as mesh:
        await mesh.until_ready()
        async with httpx.AsyncClient(trust_env=False) as client:
            router, worker = [(await client.get(f"http://127.0.0.1:{first + i}/metrics")).text for i in range(2)]
    assert "mill_router_workers 1.0" in router
    assert "mill_worker_running 0.0" in worker


def test_workers_share_the_cores_and_speculate_only_with_drafters(options: Options) -> None:
    def workers(count: int, drafters: int) -> list[WorkerSettings]:
        made = plan(replace(options, workers=count, drafters=drafters), "")["worker"]
        return [settings for settings in made if isinstance(settings, WorkerSettings)]

    [alone] = workers(1, 1)
    assert alone.speculation
    assert alone.threads == len(os.sched_getaffinity(0))
    assert {(worker.threads, worker.speculation) for worker in workers(99, 0)} == {(1, False)}


def test_two_meshes_on_one_broker_never_share_an_id(options: Options) -> None:
    shared = replace(options, nats="nats://127.0.0.1:1")
    one, two = ({settings.id for group in plan(shared, shared.nats).values() for settings in group} for _ in range(2))
    assert not one & two


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"),
     ("10.0.0.7", "http://10.0.0.7:80")])
def test_the_url_is_one_a_client_on_this_machine_can_use(options: Options, host: str, url: str) -> None:
    assert replace(options, host=host, port=80).url == url


def test_the_port_of_any_gateway_may_be_the_one_in_use(options: Options) -> None:
    with socket.create_server(("127.0.0.1", options.port)), pytest.raises(UpFailed, match=f"port {options.port} on"):
        check_ports(replace(options, port=options.port - 1, gateways=2))


def test_a_port_beyond_the_last_is_said(options: Options) -> None:
    with pytest.raises(UpFailed, match="there is no port 65536: choose a lower one with --port"):
        check_ports(replace(options, port=65535, gateways=2))


def test_an_address_of_another_machine_is_said(options: Options) -> None:
    with pytest.raises(UpFailed, match=r"cannot listen on 192.0.2.1 .* choose an address of its own with --host"):
        check_ports(replace(options, host="192.0.2.1"))


async def test_a_full_disk_is_one_sentence(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local_mesh, "claim", full)
    with pytest.raises(UpFailed, match=r"the disk of .* is full: free some space, or choose a folder elsewhere"):
        async with LocalMesh(options):
            pass


async def test_a_folder_is_free_again_once_its_mesh_has_stopped(options: Options) -> None:
    async with LocalMesh(replace(options, workers=0, drafters=0)):
        with pytest.raises(UpFailed, match=f"another mesh .process {os.getpid()}. uses"):
            async with LocalMesh(replace(options, port=broker.free_port())):
                pass
    async with LocalMesh(replace(options, workers=0, drafters=0)):
        pass


async def test_a_service_that_dies_again_and_again_ends_the_wait_with_its_last_words(options: Options) -> None:
    said: list[str] = []
    mesh = LocalMesh(replace(options, engine="steam"), said.append)
    async with mesh:
        with pytest.raises(UpFailed, match=r"worker-1 does not start; the end of .*worker-1.log:\n(.|\n)*steam"):
            await mesh.until_ready()
    assert len(said) == local_mesh.KEEP_TRYING
    assert [line for line in said if "worker-1 ended with exit code 1; starting it again in" in line] == said
    assert all(child.pid is None for child in mesh.children)


def test_a_free_port_is_none_that_outgoing_connections_are_given() -> None:
    assert broker.free_port() in broker.PORTS


def test_a_folder_with_any_name_can_hold_the_broker(tmp_path: Path) -> None:
    data = tmp_path / 'a "quoted" näme'
    config = Path(broker.command(4222, data)[2])
    assert f'store_dir: "{tmp_path}/a \\"quoted\\" näme/nats"' in config.read_text()
    assert "listen: 127.0.0.1:4222" in config.read_text()


@pytest.mark.parametrize(("changes", "what"), [
    ({"drafter_kind": "oracle"}, "choose one of suffix, model, hybrid"),
    ({"drafter_kind": "model"}, "needs --drafter-model: a small model of the same vocabulary.*tokenmill distil"),
    ({"drafter_kind": "suffix", "drafter_model": "small"}, "kind suffix has no model"),
    ({"drafter_kind": "hybrid", "drafter_model": "small", "drafters": 0}, "leave out --drafters 0"),
    ({"drafter_kind": "hybrid", "drafter_model": "small", "engine": "mock"}, "the mock engine speaks no model's ids"),
    ({"drafter_kind": "model", "drafter_model": "other"}, "speaks other token ids"),
])
def test_a_drafter_that_could_not_draft_is_refused_before_anything_starts(
        options: Options, tmp_path: Path, changes: dict[str, object], what: str) -> None:
    card = load_card(options.model)
    for name, vocabulary in (("small", card.vocabulary), ("other", "elsewhere")):
        (tmp_path / name).mkdir()
        changed = msgspec.structs.replace(card, vocabulary=vocabulary)
        (tmp_path / name / "card.json").write_bytes(msgspec.json.encode(changed))
    if "drafter_model" in changes:
        changes = changes | {"drafter_model": tmp_path / str(changes["drafter_model"])}
    wrong = replace(options, **({"engine": "cpu"} | changes))  # type: ignore[arg-type]
    for mesh in (LocalMesh(wrong), OneProcess(wrong)):
        with pytest.raises(UpFailed, match=what):
            mesh.start()
        assert not mesh.children


def test_drafters_are_told_their_kind_and_model(options: Options, tmp_path: Path) -> None:
    [said] = plan(replace(options, drafter_kind="hybrid", drafter_model=tmp_path), "")["drafter"]
    assert isinstance(said, DrafterSettings)
    assert (said.kind, said.model) == ("hybrid", str(tmp_path))


def test_the_embedded_broker_leaves_cores_to_others_unless_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMAXPROCS", raising=False)
    assert [broker.environment(cores)["GOMAXPROCS"] for cores in (1, 2, 7, 16)] == ["1", "1", "1", "4"]
    monkeypatch.setenv("GOMAXPROCS", "3")
    assert broker.environment(16) == {}
