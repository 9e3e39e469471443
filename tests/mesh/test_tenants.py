"""Tenants as their users meet them: real processes, the official client, two keys of one mesh."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from deploy import broker, explain, keys
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card
from tests.models import default_folder

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

RULES = " ".join(f"Rule {number}: the {number}th miller pays {number * 7} coins." for number in range(40))


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants") / "tenants.toml"


@pytest.fixture(scope="module")
def key(tenants: Path) -> dict[str, str]:
    made = {name: keys.create(tenants, name, datetime.now(UTC)).key for name in ("acme", "other", "small")}
    text = tenants.read_text()
    tenants.write_text(text.replace("[tenants.small]\n", "[tenants.small]\nrequests_per_minute = 1\n"))
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, tenants: Path,
               key: dict[str, str]) -> AsyncIterator[LocalMesh]:
    options = Options(model=default_folder(), data=tmp_path_factory.mktemp("mesh"), port=broker.free_port(), workers=1,
                      drafters=1, engine="mock", drain_s=5.0, tenants=tenants)
    async with LocalMesh(options) as running:
        await running.until_ready()
        yield running


def client(mesh: LocalMesh, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key=key, max_retries=0)


async def cached_tokens(asking: openai.AsyncOpenAI, model: str, question: str) -> int:
    seen = 0
    stream = await asking.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"{RULES} {question}"}], max_tokens=4, stream=True,
        stream_options={"include_usage": True})
    async for chunk in stream:
        if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
            seen = chunk.usage.prompt_tokens_details.cached_tokens or 0
    return seen


async def test_two_keys_ask_the_same_and_neither_finds_what_the_other_has_asked(mesh: LocalMesh,
                                                                             key: dict[str, str]) -> None:
    model = load_card(mesh.options.model).name
    async with client(mesh, key["acme"]) as acme, client(mesh, key["other"]) as other:
        assert await cached_tokens(acme, model, "Who pays most?") == 0
        assert await cached_tokens(acme, model, "Who pays most?") > 400
        assert await cached_tokens(other, model, "Who pays most?") == 0
        assert await cached_tokens(other, model, "Who pays least?") > 400
        assert [found.id async for found in other.models.list()] == [model]


async def test_strangers_and_those_over_their_limits_get_the_clients_own_errors(mesh: LocalMesh,
                                                                              key: dict[str, str]) -> None:
    model = load_card(mesh.options.model).name
    async with client(mesh, "sk-nobodys") as stranger:
        with pytest.raises(openai.AuthenticationError):
            await cached_tokens(stranger, model, "?")
    async with client(mesh, key["small"]) as small:
        await cached_tokens(small, model, "?")
        with pytest.raises(openai.RateLimitError) as limited:
            await cached_tokens(small, model, "?")
        assert 0 < int(limited.value.response.headers["retry-after-ms"]) <= 60_000
        assert limited.value.response.headers["x-ratelimit-limit-requests"] == "1"


async def test_a_receipt_is_explained_to_its_own_tenant(mesh: LocalMesh, key: dict[str, str]) -> None:
    model = load_card(mesh.options.model).name
    async with client(mesh, key["acme"]) as acme:
        answer = await acme.completions.create(model=model, prompt="Once", max_tokens=4)
    receipt = await asyncio.to_thread(explain.fetch, [mesh.url], answer.id, key["acme"])
    assert receipt["response_id"] == answer.id
    for stranger, reason in ((key["other"], "no receipt of this request is kept"), ("", "no API key came")):
        with pytest.raises(explain.ExplainFailed, match=reason):
            await asyncio.to_thread(explain.fetch, [mesh.url], answer.id, stranger)


async def test_a_key_made_while_it_runs_opens_it_and_one_that_is_revoked_no_longer_does(mesh: LocalMesh,
                                                                                     tenants: Path) -> None:
    row = await asyncio.to_thread(keys.create, tenants, "late", datetime.now(UTC))
    async with client(mesh, row.key) as late:
        async def opens() -> bool:
            try:
                await late.models.list()
            except openai.AuthenticationError:
                return False
            return True

        async with asyncio.timeout(20):
            while not await opens():
                await asyncio.sleep(0.1)
        await asyncio.to_thread(keys.revoke, tenants, row.prefix, datetime.now(UTC))
        async with asyncio.timeout(20):
            while await opens():
                await asyncio.sleep(0.1)
