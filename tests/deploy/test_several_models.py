"""One mesh, several models: each with workers of its own, known by name and alias; unknown and unserved ones say so."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest

from deploy import broker
from deploy.local_mesh import LocalMesh, Options, UpFailed, check_aliases, plan
from gateway.model_files import ModelCard, load_card
from shared.settings import GatewaySettings, WorkerSettings
from tests.models import default_folder


def named(folder: Path, name: str) -> Path:
    """A pulled model that is the default one under another name."""
    folder.mkdir()
    for file in ("model.gguf", "tokenizer.json"):
        (folder / file).symlink_to((default_folder() / file).resolve())
    card: ModelCard = msgspec.structs.replace(load_card(default_folder()), name=name)
    (folder / "card.json").write_bytes(msgspec.json.encode(card))
    return folder


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(model=named(tmp_path / "a", "alpha"), more_models=[named(tmp_path / "b", "beta")],
                   data=tmp_path / "data", port=broker.free_port(), engine="mock", drain_s=1.0,
                   aliases={"fast": "beta"})


def test_every_model_gets_as_many_workers_and_every_gateway_serves_them_all(options: Options) -> None:
    services = plan(replace(options, workers=2, gateways=2), "nats://127.0.0.1:1")
    workers = [one for one in services["worker"] if isinstance(one, WorkerSettings)]
    assert [(one.id, one.model_name) for one in workers] == [
        ("worker-1", "alpha"), ("worker-2", "alpha"), ("worker-3", "beta"), ("worker-4", "beta")]
    assert {one.model for one in workers} == {str(options.model), str(options.more_models[0])}
    for gateway in services["gateway"]:
        assert isinstance(gateway, GatewaySettings)
        assert (gateway.model_name, gateway.models, gateway.aliases) == (
            "alpha", f"beta={options.more_models[0]}", "fast=beta")


def test_models_of_one_name_and_aliases_that_lead_nowhere_are_one_sentence(options: Options, tmp_path: Path) -> None:
    twin = named(tmp_path / "c", "alpha")
    with pytest.raises(UpFailed, match="are both called 'alpha'"):
        plan(replace(options, more_models=[twin]), "")
    with pytest.raises(UpFailed, match="'beta' is the name of a model"):
        check_aliases(replace(options, aliases={"beta": "alpha"}))
    with pytest.raises(UpFailed, match="no such model here, the names are alpha, beta"):
        check_aliases(replace(options, aliases={"best": "gamma"}))
    shutil.rmtree(twin)


@pytest.fixture
async def mesh(options: Options, tmp_path: Path) -> AsyncIterator[LocalMesh]:
    # `orphan`: gateways serve it, and no worker does
    models = f"beta={options.more_models[0]},orphan={named(tmp_path / 'o', 'orphan')}"
    async with LocalMesh(replace(options, settings={"gateway": {"models": models}})) as running:
        await running.until_ready()
        yield running


async def test_requests_reach_the_workers_of_their_model_and_others_are_told_why_not(mesh: LocalMesh) -> None:
    async with httpx.AsyncClient(base_url=mesh.url, trust_env=False, timeout=30.0) as client:
        async def ask(model: str) -> httpx.Response:
            body = {"model": model, "prompt": "one two three", "max_tokens": 4}
            return await client.post("/v1/completions", json=body)

        listed = {model["id"]: model["ready"] for model in (await client.get("/v1/models")).json()["data"]}
        assert listed == {"alpha": True, "beta": True, "fast": True, "orphan": False}
        served = {model: (await ask(model)).json()["usage"]["mill"]["worker"] for model in ("alpha", "beta", "fast")}
        assert served == {"alpha": "worker-1", "beta": "worker-2", "fast": "worker-2"}
        unserved = await ask("orphan")
        assert unserved.status_code == 503
        assert unserved.json()["error"]["code"] == "no_eligible_worker"
        assert "no worker serves orphan" in unserved.json()["error"]["message"]
        assert int(unserved.headers["retry-after"]) >= 1
        unknown = await ask("gamma")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert "retry-after" not in unknown.headers
