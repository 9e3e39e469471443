"""What `tokenmill nats-config` writes, held against a real nats-server: it lets each role do what it must, no more."""

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy import broker, nats_config
from deploy.local_mesh import LocalMesh, Options
from deploy.nats_config import Listening, NatsConfigFailed
from gateway.model_files import load_card
from shared import subjects
from shared.bus import BusRefused, BusUnavailable
from shared.credentials import credentials
from shared.nats_bus import NatsBus
from tests.mesh.streams import chat, read
from tests.models import default_folder
from tests.nats_server import NatsServer, certificate, nats_server, nats_server_path

USERS = ("gateway", "router", "worker@eu", "worker@us", "worker.w7@eu", "drafter@eu", "drafter@us", "observer")

# every subject there is, and who says and hears it; zoned ones are of the zone eu
SAID = {
    subjects.generate("m"): {"gateway"},
    subjects.worker_generate("w"): {"router"},
    subjects.worker_generate("w", "eu"): {"router"},
    subjects.worker_cancel("w"): {"gateway"},
    subjects.router_cancel("r"): {"gateway"},
    subjects.replies("g"): {"router", "worker@eu", "worker@us"},
    subjects.worker_kv("w"): {"worker@eu", "worker@us"},
    subjects.worker_kv_request("w"): {"router"},
    subjects.drafter_follow("d", "eu"): {"worker@eu", "worker@us"},
    subjects.worker_drafts("w", "eu"): {"drafter@eu", "drafter@us"},
    subjects.placed("r"): {"router"},
    subjects.status("worker", "w"): {"worker@eu", "worker@us"},
    subjects.status("drafter", "d"): {"drafter@eu", "drafter@us"},
    subjects.status("router", "r"): {"router"},
    subjects.status("gateway", "g"): {"gateway"},
}
HEARD = {
    subjects.ALL_GENERATE: set(),  # beside the queue
    subjects.worker_generate("w"): {"worker@eu", "worker@us"},
    subjects.worker_generate("w", "eu"): {"worker@eu"},
    subjects.worker_generate("*", "us"): {"worker@us"},
    subjects.worker_cancel("w"): {"worker@eu", "worker@us"},
    subjects.router_cancel("r"): {"router"},
    subjects.replies("g"): {"gateway"},
    subjects.ALL_KV: {"router"},
    subjects.worker_kv_request("w"): {"worker@eu", "worker@us"},
    subjects.drafter_follow("d"): {"drafter@eu", "drafter@us"},
    subjects.drafter_follow("d", "eu"): {"drafter@eu"},
    subjects.drafter_follow("d", "us"): {"drafter@us"},
    subjects.worker_drafts("w", "eu"): {"worker@eu"},
    subjects.worker_drafts("w", "us"): {"worker@us"},
    subjects.ALL_PLACED: {"router"},
    subjects.status("worker", "*"): {"gateway", "router", "drafter@eu", "drafter@us", "observer"},
    subjects.status("drafter", "*"): {"worker@eu", "worker@us", "observer"},
    subjects.status("gateway", "*"): {"worker@eu", "worker@us", "observer"},
    subjects.status("router", "*"): {"gateway", "router", "worker@eu", "worker@us", "observer"},
    subjects.ALL_STATUS: {"observer"},
    f"{subjects.PREFIX}.>": set(),
    f"{subjects.PREFIX}.worker.>": set(),
    f"{subjects.PREFIX}.worker.*.generate.*": set(),
    "_INBOX.>": set(),
    "_INBOX.gateway.>": {"gateway"},
    ">": set(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nats")
    nats_config.write(made, USERS, Listening())
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[NatsServer]:
    with nats_server("-c", str(folder / nats_config.CONFIG)) as running:
        yield running


@pytest.fixture
async def connect(server: NatsServer, folder: Path) -> AsyncIterator[object]:
    made: list[NatsBus] = []

    async def connect_as(user: str) -> NatsBus:
        role, _, zone = user.partition("@")
        role, _, id = role.partition(".")
        shown = credentials(role, zone, id, str(folder), "")
        made.append(await NatsBus.connect(server.url, user, probe_s=3600.0, credentials=shown))
        return made[-1]

    yield connect_as
    for bus in made:
        await bus.close()


@pytest.mark.parametrize("user", [user for user in USERS if "." not in user])
async def test_each_role_says_and_hears_its_own_and_the_server_refuses_the_rest(connect, user):
    bus = await connect(user)
    for number, (subject, roles) in enumerate(SAID.items()):
        before = bus.refused
        await bus.publish(subject, b"")
        # once this stands the server has decided on what was published before
        await bus.subscribe(f"{bus._inbox}.probe{number}", lambda delivery: None)
        assert (bus.refused == before) == (user in roles), f"{user} publishes {subject}"
    for subject, roles in HEARD.items():
        if user in roles:
            await bus.subscribe(subject, lambda delivery: None)
        else:
            with pytest.raises(BusRefused, match="another role or zone"):
                await bus.subscribe(subject, lambda delivery: None)


async def test_what_a_wrong_zone_may_not_hear_does_not_reach_it(connect):
    router, there, elsewhere = await connect("router"), await connect("worker@eu"), await connect("worker@us")
    heard: list[str] = []
    with pytest.raises(BusRefused):
        await elsewhere.subscribe(subjects.worker_generate("w", "eu"), lambda delivery: heard.append("us"))
    await there.subscribe(subjects.worker_generate("w", "eu"), lambda delivery: heard.append("eu"))
    await router.publish(subjects.worker_generate("w", "eu"), b"tokens")
    async with asyncio.timeout(10):
        while not heard:
            await asyncio.sleep(0.01)
    await elsewhere.subscribe(subjects.worker_generate("w"), lambda delivery: None)
    assert heard == ["eu"]


async def test_a_router_joins_the_queue_but_cannot_listen_beside_it(connect):
    router = await connect("router")
    await router.subscribe(subjects.ALL_GENERATE, lambda delivery: None, subjects.ROUTER_QUEUE)
    with pytest.raises(BusRefused):
        await router.subscribe(subjects.ALL_GENERATE, lambda delivery: None, "mine")


async def test_a_credential_with_an_id_is_refused_under_another(connect):
    bus = await connect("worker.w7@eu")
    await bus.subscribe(subjects.worker_generate("w7", "eu"), lambda delivery: None)
    for subject in (subjects.worker_generate("w8", "eu"), subjects.worker_generate("w8"), subjects.worker_cancel("w8")):
        with pytest.raises(BusRefused):
            await bus.subscribe(subject, lambda delivery: None)


@pytest.mark.parametrize("shown", ["nothing", "a stranger's seed"])
async def test_without_a_known_credential_nobody_is_let_in(server, tmp_path, shown):
    stranger = credentials("worker", "eu", "", "", "")
    if shown != "nothing":
        nats_config.write(tmp_path, ["worker@eu"], Listening())
        stranger = credentials("worker", "eu", "", str(tmp_path), "")
    with pytest.raises(BusUnavailable, match="does not let this service in"):
        await NatsBus.connect(server.url, "stranger", timeout_s=1.0, credentials=stranger)


def test_a_worker_of_another_zone_ends_with_one_sentence(server, folder, tmp_path):
    arguments = ["--engine", "mock", "--nats", server.url, "--zone", "us", "--id", "w",
                 "--nats-creds", str(folder / "worker@eu.seed")]
    done = subprocess.run([sys.executable, "-m", "worker", *arguments], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "worker: NATS does not let w" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
async def test_a_mesh_serves_under_credentials_and_tls_and_is_refused_nothing(tmp_path):
    folder = tmp_path / "nats"
    made, key = certificate(tmp_path)
    nats_config.write(folder, ["gateway", "router", "worker@eu", "drafter@eu", "observer"],
                      Listening(certificate=made, key=key))
    with nats_server("-c", str(folder / nats_config.CONFIG)) as server:
        options = Options(model=default_folder(), data=tmp_path / "data", port=broker.free_port(), engine="mock",
                          drain_s=2.0, nats=server.url.replace("nats://", "tls://"), nats_creds=folder,
                          nats_ca=made, zone="eu", routers=2, workers=2)
        async with LocalMesh(options) as mesh:
            await mesh.until_ready()
            name = load_card(options.model).name
            for residency in ("", "eu"):
                headers = {"x-tokenmill-residency": residency} if residency else {}
                seen = await read(mesh.url, chat(name, "What is a mill?", max_tokens=40), headers=headers)
                assert seen.finish_reason == "length" and seen.usage["completion_tokens"] == 40
            bus = await mesh.connect()
            heard: set[str] = set()
            await bus.subscribe(subjects.ALL_STATUS, lambda delivery: heard.add(delivery.subject.split(".")[3]))
            async with asyncio.timeout(20):
                while heard != {"gateway", "router", "worker", "drafter"}:
                    await asyncio.sleep(0.05)
            await bus.close()
            with pytest.raises(BusUnavailable, match="certificate"):
                await NatsBus.connect(options.nats, timeout_s=1.0,
                                      credentials=credentials("observer", "", "", str(folder), ""))
        log = (server._folder / "nats.log").read_text()
    assert "Violation" not in log, log


def test_seeds_are_kept_readable_by_their_owner_alone_and_the_configuration_has_no_secret(folder):
    for path in folder.glob("*.seed"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for config in (nats_config.CONFIG, nats_config.USERS):
            assert path.read_text().strip() not in (folder / config).read_text()


def test_writing_again_keeps_the_seeds_and_a_user_more_is_one_more(tmp_path):
    first = nats_config.write(tmp_path, ["gateway"], Listening())
    again = nats_config.write(tmp_path, ["worker@eu"], Listening())
    assert again.made == ["worker@eu"] and set(first.users) < set(again.users) and len(again.users) == 2


async def test_a_rotated_seed_opens_beside_the_new_one_until_it_is_removed(tmp_path):
    nats_config.write(tmp_path, ["observer"], Listening())
    written = nats_config.write(tmp_path, [], Listening(), rotate=["observer"])
    assert [name for name, _ in written.users] == ["observer", "observer"] and written.made == ["observer"]
    old, new = (credentials("observer", "", "", str(tmp_path / name), "")
                for name in ("observer.old.seed", "observer.seed"))
    with nats_server("-c", str(written.config)) as server:
        for shown in (old, new):
            await (await NatsBus.connect(server.url, credentials=shown)).close()
        running = await NatsBus.connect(server.url, credentials=new)
        (tmp_path / "observer.old.seed").unlink()
        nats_config.write(tmp_path, [], Listening())
        subprocess.run([nats_server_path(), "--signal", f"reload={server.pid}"], check=True, capture_output=True)
        async with asyncio.timeout(20):
            while "Reloaded server configuration" not in (server._folder / "nats.log").read_text():
                await asyncio.sleep(0.02)
        with pytest.raises(BusUnavailable, match="does not let this service in"):
            await NatsBus.connect(server.url, timeout_s=1.0, credentials=old)
        await (await NatsBus.connect(server.url, credentials=new)).close()
        assert running.connected and not running.reconnects
        await running.close()


async def test_who_may_connect_changes_without_a_word_of_how_the_server_was_set_up(tmp_path):
    folder = tmp_path / "nats"
    made, key = certificate(tmp_path)
    first = nats_config.write(folder, ["observer"], Listening("0.0.0.0", 4333, monitor="127.0.0.1:8222",
                                                              certificate=made, key=key))
    server = first.config.read_text()
    again = nats_config.write(folder, ["gateway"], rotate=["observer"])
    assert first.anew and not again.anew and again.config.read_text() == server
    with nats_server("-c", str(again.config)) as running:
        for name in ("observer.seed", "observer.old.seed", "gateway.seed"):
            shown = credentials(name.split(".")[0], "", "", str(folder / name), str(made))
            await (await NatsBus.connect(running.url.replace("nats://", "tls://"), credentials=shown)).close()
    with pytest.raises(NatsConfigFailed, match="has TLS, and written anew it would have none"):
        nats_config.write(folder, [], Listening(port=4334))
    assert again.config.read_text() == server
    again.config.write_text(server.replace("include", "# include"))
    with pytest.raises(NatsConfigFailed, match=r"does not include users\.conf"):
        nats_config.write(folder, ["router"])
    assert not (folder / "router.seed").exists()


def test_a_second_rotation_waits_until_the_seed_before_is_gone(tmp_path):
    nats_config.write(tmp_path, ["gateway"])
    nats_config.write(tmp_path, [], rotate=["gateway"])
    before = state(tmp_path)
    with pytest.raises(NatsConfigFailed, match=r"gateway\.old\.seed still opens since the last rotation"):
        nats_config.write(tmp_path, [], rotate=["gateway"])
    assert state(tmp_path) == before
    (tmp_path / "gateway.old.seed").unlink()
    assert len(nats_config.write(tmp_path, [], rotate=["gateway"]).users) == 2


@pytest.mark.parametrize("stopped_at", range(8))
def test_a_rotation_that_is_stopped_anywhere_leaves_seeds_that_open_and_can_be_done_again(
        tmp_path, monkeypatch, stopped_at):
    nats_config.write(tmp_path, ["gateway", "router"])
    calls = iter(range(100))
    write, replace = os.fsync, Path.replace

    def once(kept):
        def counted(*arguments):
            if next(calls) == stopped_at:
                raise KeyboardInterrupt
            return kept(*arguments)

        return counted

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", once(write))
        patched.setattr(Path, "replace", once(replace))
        nats_config.write(tmp_path, ["worker"], rotate=["gateway"])
    listed = (tmp_path / nats_config.USERS).read_text()
    assert all(nats_config.public_key(tmp_path / f"{name}.seed") in listed for name in ("gateway", "router"))
    nats_config.write(tmp_path, [])
    if not (tmp_path / "gateway.old.seed").exists() or state(tmp_path, "gateway.old.seed") == state(
            tmp_path, "gateway.seed"):
        nats_config.write(tmp_path, ["worker"], rotate=["gateway"])
    names = [name for name, _ in nats_config.write(tmp_path, ["worker"]).users]
    assert names == ["gateway", "gateway", "router", "worker@local"]
    assert not list(tmp_path.glob("*.new"))


def test_a_disk_that_takes_no_more_leaves_everything_as_it_was(tmp_path, monkeypatch):
    nats_config.write(tmp_path, ["gateway"])
    before = state(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NatsConfigFailed, match="No space left"):
        nats_config.write(tmp_path, ["router"], Listening(port=4333), rotate=["gateway"])
    assert state(tmp_path) == before


def test_a_seed_named_after_nobody_is_told_by_its_path_and_nothing_is_written(tmp_path):
    nats_config.write(tmp_path, ["gateway"])
    (tmp_path / "backup.seed").write_text(nats_config.new_seed())
    before = state(tmp_path)
    with pytest.raises(NatsConfigFailed, match=r"backup\.seed is named after nobody .*: move it elsewhere"):
        nats_config.write(tmp_path, ["router"], rotate=["gateway"])
    assert state(tmp_path) == before


def state(folder: Path, name: str = "*") -> dict[str, str] | list[str]:
    """What lies there, by name; the texts alone of one name."""
    found = {path.name: path.read_text() for path in folder.glob(name)}
    return found if name == "*" else list(found.values())


@pytest.mark.parametrize(("users", "listening", "rotate", "what"), [
    (["miller"], Listening(), [], "begins with no role"),
    (["gateway"], Listening(certificate=Path("/no/file"), key=Path("/no/key")), [], "there is no file /no/file"),
    (["gateway"], Listening(certificate=Path("/no/file")), [], "give both, or neither"),
    (["gateway"], Listening(), ["router"], "nothing to rotate"), (["gateway.old"], None, [], "choose another id"),
])
def test_what_cannot_be_written_is_said_and_nothing_is(tmp_path, users, listening, rotate, what):
    with pytest.raises(NatsConfigFailed, match=what):
        nats_config.write(tmp_path / "nats", users, listening, rotate)
    assert not (tmp_path / "nats").exists()


@pytest.mark.parametrize(("content", "what"), [(None, "cannot read"), ("hello", "neither an NKey seed")])
def test_a_credential_that_is_none_is_refused_by_its_path(tmp_path, content, what):
    path = tmp_path / "a.seed"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=what) as refused:
        credentials("router", "", "", str(path), "")
    assert str(path) in str(refused.value) and "hello" not in str(refused.value)


def test_a_folder_without_the_services_own_says_how_to_make_it(folder):
    with pytest.raises(ValueError, match=r"tokenmill nats-config --out .* --user worker@mars"):
        credentials("worker", "mars", "", str(folder), "")


def test_a_seed_shows_in_no_repr(folder):
    shown = credentials("router", "", "", str(folder), "")
    assert shown.seed.startswith("SU") and shown.seed not in repr(shown)
