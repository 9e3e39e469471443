"""OpenAI's `service_tier`: what is asked of the mesh, what the answer says, and how a full mesh is told to a client."""

import asyncio
import json
from typing import Any

import pytest

from shared.messages import Generate, Reply
from tests.gateway.fake_mesh import MODEL, gateway_and_mesh, refusal

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def body(path: str, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": "Hi"} if path == TEXT else {"messages": [{"role": "user", "content": "Hi"}]}
    return {"model": MODEL} | asked | more


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("asked", "used", "rank"), [
    ("auto", "default", 0), ("default", "default", 0), ("flex", "flex", -1), ("priority", "priority", 1)])
async def test_a_tier_reaches_the_mesh_and_the_answer_names_the_one_used(path: str, asked: str, used: str,
                                                                        rank: int) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        whole = (await client.post(path, json=body(path, service_tier=asked))).json()
        assert whole["service_tier"] == used
        (request,) = mesh.requests
        assert request.tier == used
        assert (request.priority > 100) - (request.priority < -100) == rank
        streamed = await client.post(path, json=body(path, service_tier=asked, stream=True,
                                                     stream_options={"include_usage": True}))
        documents = [json.loads(event.removeprefix("data: ")) for event in streamed.text.split("\n\n")[:-2]]
        assert len(documents) > 2
        assert {document["service_tier"] for document in documents} == {used}


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_answer_to_who_did_not_ask_for_a_tier_names_none(path: str) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        assert "service_tier" not in (await client.post(path, json=body(path, service_tier=None))).json()
        assert "service_tier" not in (await client.post(path, json=body(path, stream=True))).text
        assert [request.tier for request in mesh.requests] == ["default", "default"]


@pytest.mark.parametrize("wrong", ["scale", "Flex", ""])
async def test_an_unknown_tier_is_refused_by_name(wrong: str) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        response = await client.post(CHAT, json=body(CHAT, service_tier=wrong))
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "service_tier"
        assert "auto, default, flex, priority" in error["message"]
        assert mesh.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status"), [("rate_limit_exceeded", 429), ("overloaded", 503)])
async def test_a_full_mesh_and_a_tenant_over_its_share_are_told_apart_and_both_say_when(stream: bool, code: str,
                                                                                       status: int) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        refusals = []

        def refuse(request: Generate) -> list[Reply]:
            answer = mesh.reply(request.gateway, *refusal(request, code, True, 6.2), sender="r1")
            refusals.append(asyncio.ensure_future(answer))
            return []

        mesh.script = refuse
        response = await client.post(CHAT, json=body(CHAT, stream=stream))
        assert response.status_code == status
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("7", "6200")
        assert response.json()["error"]["code"] == code
        assert len(refusals) == 1
