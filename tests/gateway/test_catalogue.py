"""Several models in one mesh: each with its own tokenizer, template, workers and names."""

import asyncio
from pathlib import Path

import pytest

from gateway.catalogue import Catalogue, pairs_of
from gateway.model_files import ModelCard
from gateway.prompt import ServedModel
from gateway.service import folders_of
from gateway.template import ChatTemplate
from shared.errors import BadRequest, ModelNotFound
from shared.settings import GatewaySettings
from tests.gateway.fake_mesh import byte_tokenizer, tiny_model
from tests.gateway.world import virtual, world

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def model(name: str, own: str = "", template: str = "{{ messages[0].content }}") -> ServedModel:
    card = ModelCard(name=own or f"{name}-files", architecture="test", context_length=300, vocabulary_size=258,
                     vocabulary="v", chat_template=template)
    return ServedModel(name, card, byte_tokenizer(), ChatTemplate.of(card))


def test_a_model_is_found_by_each_of_its_names() -> None:
    one, two = model("one"), model("two")
    catalogue = Catalogue((one, two), {"fast": "two", "one-files": "two"})
    for name, found in (("one", one), ("two", two), ("two-files", two), ("fast", two), ("one-files", two)):
        assert catalogue.named(name) is found
    assert [name for name, _ in catalogue.names()] == ["one", "two", "fast", "one-files"]


def test_an_absent_name_means_the_only_model_and_none_of_several() -> None:
    one = model("one")
    assert Catalogue((one,)).named(None) is one
    with pytest.raises(BadRequest, match="serves 'one', 'two'"):
        Catalogue((one, model("two"))).named(None)
    with pytest.raises(ModelNotFound, match="start it with --model"):
        Catalogue(()).named(None)


def test_what_is_not_served_here_is_not_found_and_says_whether_the_mesh_has_it() -> None:
    catalogue = Catalogue((model("one", own="same"), model("two", own="same")))
    with pytest.raises(ModelNotFound, match="does not exist here: this gateway serves 'one', 'two'"):
        catalogue.named("same")  # two models' files call themselves that
    with pytest.raises(ModelNotFound, match="workers serve the model 'three', but this gateway has no tokenizer"):
        catalogue.named("three", elsewhere=["three"])


@pytest.mark.parametrize(("aliases", "why"), [({"one": "one"}, "is the name of a model"),
                                              ({"fast": "three"}, "does not serve: it serves 'one'")])
def test_an_alias_that_is_taken_or_leads_nowhere_is_refused(aliases: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Catalogue((model("one"),), aliases)


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="the same name"):
        Catalogue((model("one"), model("one")))


def test_pairs_are_read_and_what_is_none_is_refused_by_its_flag() -> None:
    assert pairs_of(" a = /x , b=/y=z,", "--models") == {"a": "/x", "b": "/y=z"}
    assert pairs_of("", "--models") == {}
    for said, why in (("a", "got 'a'"), ("=x", "got '=x'"), ("a=", "got 'a='"), ("a=x,a=y", "'a' twice")):
        with pytest.raises(ValueError, match=f"--models .*{why}"):
            pairs_of(said, "--models")


def test_folders_come_from_both_settings() -> None:
    folder = str(Path("/models/one"))
    assert folders_of(GatewaySettings(model=folder, model_name="one", models="two=/models/two")) == [
        ("one", folder), ("two", "/models/two")]
    assert folders_of(GatewaySettings()) == []


@virtual
async def test_each_model_answers_from_its_own_workers_through_its_own_template() -> None:
    offers = (tiny_model(), model("plain"))
    async with world(zones=("eu", "eu", "eu"), serving=("tiny", "plain", "plain"), offers=offers,
                     aliases="best=plain") as mesh:
        async def ask(name: str) -> tuple[str, str, int]:
            response = await mesh.client.post(CHAT, json={"model": name, "messages": HELLO, "max_tokens": 4})
            body = response.json()
            return body["model"], response.headers["x-mill-worker"], body["usage"]["prompt_tokens"]

        for _ in range(4):
            assert await ask("tiny") == ("tiny", "w1", len("<user:Hello><assistant:"))
            served, worker, tokens = await ask("best")
            assert (served, tokens) == ("plain", len("Hello")) and worker in ("w2", "w3")
        body = {"model": "plain", "messages": HELLO}
        assert (await mesh.client.post("/tokenize", json=body)).json()["count"] == len("Hello")
        assert (await mesh.client.post(CHAT, json={"messages": HELLO})).json()["error"]["param"] == "model"


@virtual
async def test_models_are_listed_with_their_aliases_with_and_without_a_slash_at_the_end() -> None:
    async with world(zones=("eu",), offers=(tiny_model(), model("plain")), aliases="best=plain") as mesh:
        listed = (await mesh.client.get("/v1/models")).json()
        assert [(entry["id"], entry["root"], entry["ready"]) for entry in listed["data"]] == [
            ("tiny", "tiny-of-bytes", True), ("plain", "plain-files", False), ("best", "plain", False)]
        assert (await mesh.client.get("/v1/models/")).json() == listed
        for entry in listed["data"]:
            for slash in ("", "/"):
                assert (await mesh.client.get(f"/v1/models/{entry['id']}{slash}")).json() == entry


@virtual
async def test_an_unknown_model_is_404_and_one_whose_workers_are_gone_is_503_with_retry_after() -> None:
    async with world(zones=("eu", "eu"), serving=("tiny", "plain"), offers=(tiny_model(), model("plain"))) as mesh:
        async def ask(name: str) -> tuple[int, str, str]:
            response = await mesh.client.post(CHAT, json={"model": name, "messages": HELLO, "max_tokens": 4})
            code = response.json().get("error", {}).get("code", "")
            return response.status_code, code, response.headers.get("retry-after", "")

        await asyncio.sleep(0.5)
        assert await ask("nobodys") == (404, "model_not_found", "")
        assert await ask("plain") == (200, "", "")
        mesh.buses[1].crash()
        await asyncio.sleep(3.0)
        assert (await ask("plain"))[:2] == (503, "overloaded") and float((await ask("plain"))[2]) >= 1
        assert await ask("tiny") == (200, "", "")
        assert not mesh.gateway.not_ready(), "one model without workers takes no gateway out of service"
