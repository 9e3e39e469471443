"""Tenants over HTTP: who gets in, what each may, what its limits say, and that what was taken always comes back."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.access import Access
from gateway.prompt import ServedModel
from gateway.service import FOLLOW_S, Gateway
from gateway.tenants import Tenants
from gateway.tenants_file import TenantsFile, Unsettled, read
from shared.clock import LoopClock
from shared.errors import MillError, RateLimited
from shared.messages import Accepted, Generate, Reply, Residency, Tokens
from shared.tokens import pack
from tests.gateway.fake_mesh import MODEL, gateway_and_mesh, refusal, tiny_model
from tests.gateway.tenants_files import SECRET, bearer, rewrite, write
from tests.gateway.test_openai_client import served
from tests.models import default_folder

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
SAID = len(b"Hello, world!") + 1  # tokens of FakeMesh's answer
PROMPT = len("<user:Hi>") + len("<assistant:")  # of HELLO through the template


class Still(LoopClock):
    """No time passes, so nothing flows into the buckets."""

    def now(self) -> float:
        return 0.0


def body(path: str, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": "Hi"} if path == TEXT else {"messages": HELLO}
    return {"model": MODEL, "max_tokens": 20} | asked | more


def left(response: httpx.Response) -> int:
    return int(response.headers["x-ratelimit-remaining-tokens"])


async def tokens_left(client: httpx.AsyncClient, key: str) -> int:
    return left(await client.get("/v1/models", headers=bearer(key)))


async def test_nothing_but_health_and_figures_is_told_to_who_has_no_key(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, mesh, _):
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for method, path in (("GET", "/v1/models"), ("GET", f"/v1/models/{MODEL}"), ("POST", CHAT), ("POST", TEXT),
                             ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/requests/x/receipt"),
                             ("GET", "/nowhere"), ("GET", CHAT)):
            for headers in ({}, bearer("none"), bearer(keys["acme"][:-1] + "!")):
                response = await client.request(method, path, headers=headers | {"x-request-id": "mine"})
                assert response.status_code == 401, path
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-request-id"] == "mine"
        assert mesh.requests == []
        assert (await client.post(CHAT, json=body(CHAT), headers=bearer(keys["acme"]))).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_name_weight_salt_zones_and_tier_of_a_tenant_reach_the_mesh(tmp_path: Path, path: str) -> None:
    keys = write(tmp_path / "t.toml", acme={"weight": 2.5, "residency": "eu", "tiers": ["flex"]}, other={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml"), residency="eu,us") as (client, mesh, _):
        for name, headers in (("acme", {}), ("acme", {"x-tokenmill-residency": "eu-north1"}), ("other", {})):
            await client.post(path, json=body(path, prompt="word " * 20, messages=HELLO * 8),
                              headers=bearer(keys[name]) | headers)
        first, narrow, other = mesh.requests
        assert (first.tenant, first.weight, first.tier) == ("acme", 2.5, "flex")
        assert (other.tenant, other.weight, other.tier) == ("other", 1.0, "default")
        assert (first.residency, narrow.residency) == (Residency(("eu",)), Residency(("eu-north1",)))
        assert other.residency == Residency(("eu", "us"))
        assert first.tokens == other.tokens and first.cache_salt != other.cache_salt
        blocks = [{one.block_hashes[at:at + 16] for at in range(0, len(one.block_hashes), 16)} for one in mesh.requests]
        assert blocks[0] == blocks[1] and len(blocks[0]) >= 5 and not blocks[0] & blocks[2]


@pytest.mark.parametrize(("more", "headers", "param"), [
    ({"service_tier": "priority"}, {}, "service_tier"),
    ({}, {"x-tokenmill-residency": "us"}, None),
    ({"model": "best"}, {}, "model"),
])
async def test_what_a_tenant_may_not_is_403_and_takes_no_tokens(tmp_path: Path, more: dict[str, Any],
                                                               headers: dict[str, str], param: str | None) -> None:
    keys = write(tmp_path / "t.toml", acme={"residency": "eu", "tiers": ["default"], "models": [MODEL],
                                            "tokens_per_minute": 1000})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, mesh, gateway):
        other = tiny_model(name="of-others")
        other.name = "others"
        gateway.catalogue = type(gateway.catalogue)((tiny_model(), other), {"best": "others"})
        response = await client.post(CHAT, json=body(CHAT, **more), headers=bearer(keys["acme"]) | headers)
        assert response.status_code == 403
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("permission_error", "permission_denied", param)
        assert left(response) == 1000
        assert mesh.requests == []


async def test_a_tenant_sees_and_uses_its_models_alone_by_name_and_alias(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={"models": ["best"]}, none={"models": ["gone"]}, all={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, mesh, gateway):
        other = tiny_model(name="of-others")
        other.name = mesh.model = "others"
        gateway.catalogue = type(gateway.catalogue)((tiny_model(), other), {"best": "others"})

        async def listed(name: str) -> list[str]:
            found = await client.get("/v1/models", headers=bearer(keys[name]))
            return [entry["id"] for entry in found.json()["data"]]

        async def asked(name: str, model: str | None) -> tuple[int, str]:
            response = await client.post(CHAT, json=body(CHAT, model=model), headers=bearer(keys[name]))
            return response.status_code, response.json().get("error", {}).get("message", "")

        assert (await listed("acme"), await listed("none")) == (["others", "best"], [])
        assert await listed("all") == [MODEL, "others", "best"]
        for model in ("best", "others", "of-others", None):  # its only one needs no name
            assert await asked("acme", model) == (200, "")
        assert (await asked("acme", MODEL))[0] == 403
        assert await asked("acme", "nobodys") == (404, "the model 'nobodys' does not exist here: this gateway serves "
                                                       "'others'")
        assert (await asked("none", None))[0] == (await asked("none", "others"))[0] == 403
        assert (await client.get(f"/v1/models/{MODEL}", headers=bearer(keys["acme"]))).status_code == 403
        for path, what in (("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [1]})):
            for model, status in ((MODEL, 403), ("best", 200)):
                response = await client.post(path, json=what | {"model": model}, headers=bearer(keys["acme"]))
                assert response.status_code == status


async def test_a_receipt_is_for_its_own_tenant(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={}, other={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, _, __):
        answer = await client.post(CHAT, json=body(CHAT), headers=bearer(keys["acme"]) | {"x-request-id": "mine"})
        names = ["mine", answer.json()["id"], answer.json()["id"].removeprefix("chatcmpl-")]
        for name in names:
            for tenant, status in (("acme", 200), ("other", 404)):
                found = await client.get(f"/v1/requests/{name}/receipt", headers=bearer(keys[tenant]))
                assert found.status_code == status
        unknown = await client.get("/v1/requests/nothing/receipt", headers=bearer(keys["other"]))
        assert unknown.json() == found.json(), "another's request is as unknown as none"


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_over_the_rate_are_429_with_the_time_to_wait_and_every_answer_says_what_is_left(
        tmp_path: Path, stream: bool) -> None:
    keys = write(tmp_path / "t.toml", acme={"requests_per_minute": 2}, other={"requests_per_minute": 2}, free={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, mesh, _):
        async def ask(name: str) -> httpx.Response:
            return await client.post(CHAT, json=body(CHAT, stream=stream), headers=bearer(keys[name]))

        for remaining in ("1", "0"):
            response = await ask("acme")
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == remaining
            assert "x-ratelimit-limit-tokens" not in response.headers
        over = await ask("acme")
        assert over.status_code == 429
        assert (over.json()["error"]["type"], over.json()["error"]["code"]) == ("rate_limit_error",
                                                                               "rate_limit_exceeded")
        assert 29_000 < int(over.headers["retry-after-ms"]) <= 30_000
        assert over.headers["retry-after"] == "30" and over.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-should-retry" not in over.headers
        # who is over its limit still may look, and nobody else is held up
        assert (await client.get("/v1/models", headers=bearer(keys["acme"]))).status_code == 200
        assert (await ask("other")).status_code == 200
        free = await ask("free")
        assert free.status_code == 200 and not any(name.startswith("x-ratelimit") for name in free.headers)
        assert len(mesh.requests) == 4


async def test_what_could_never_fit_the_limits_is_429_without_a_retry(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={"tokens_per_minute": 50, "concurrency": 3})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, mesh, _):
        for more in ({"max_tokens": 100}, {"n": 4}):
            response = await client.post(CHAT, json=body(CHAT, **more), headers=bearer(keys["acme"]))
            assert response.status_code == 429
            assert response.headers["x-should-retry"] == "false" and "retry-after" not in response.headers
            assert left(response) == 50
        assert mesh.requests == []


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_tokens_are_set_aside_while_a_request_runs_and_charged_as_used(tmp_path: Path, path: str, stream: bool,
                                                                            n: int) -> None:
    keys = write(tmp_path / "t.toml", acme={"tokens_per_minute": 1000})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, _, gateway):
        gateway.access._clock = Still()
        response = await client.post(path, headers=bearer(keys["acme"]), json=body(
            path, stream=stream, n=n, **({"stream_options": {"include_usage": True}} if stream else {})))
        prompt = PROMPT if path == CHAT else 2
        assert left(response) == 1000 - prompt - 20 * n
        assert await tokens_left(client, keys["acme"]) == 1000 - prompt - SAID * n


async def test_streams_over_the_limit_are_429_until_one_ends(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={"concurrency": 3}, other={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, mesh, _):
        mesh.pause_s = 0.02

        async def ask(name: str, n: int) -> httpx.Response:
            return await client.post(CHAT, json=body(CHAT, n=n, stream=True), headers=bearer(keys[name]))

        two = asyncio.create_task(ask("acme", 2))
        while len(mesh.requests) < 2:
            await asyncio.sleep(0.001)
        refused = await ask("acme", 2)
        assert refused.status_code == 429 and refused.headers["retry-after-ms"] == "1000"
        assert "2 streams of this tenant are under way" in refused.json()["error"]["message"]
        statuses = [answer.status_code for answer in await asyncio.gather(ask("acme", 1), ask("other", 5), two)]
        assert statuses == [200, 200, 200]
        assert (await ask("acme", 3)).status_code == 200


def fails(code: str) -> Any:
    return lambda request: refusal(request, code, retryable=False)


def half(request: Generate) -> list[Reply]:
    """Two tokens and then an error."""
    name, attempt = request.request_id, request.attempt
    return [Accepted(name, attempt, "w1"), Tokens(name, attempt, 0, pack([72, 73])),
            *refusal(request, "worker_failed", retryable=False)]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("script", "used"), [
    (fails("overloaded"), 0), (fails("no_eligible_worker"), 0), (half, 2)])
async def test_what_a_refused_or_failed_request_took_comes_back(tmp_path: Path, path: str, stream: bool, n: int,
                                                               script: Any, used: int) -> None:
    keys = write(tmp_path / "t.toml", acme={"tokens_per_minute": 1000, "concurrency": 2})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml"), max_attempts=1) as (client, mesh, gateway):
        gateway.access._clock = Still()
        mesh.script = script
        await client.post(path, json=body(path, stream=stream, n=n), headers=bearer(keys["acme"]))
        spent = 1000 - await tokens_left(client, keys["acme"])
        prompt = PROMPT if path == CHAT else 2
        assert spent in ({prompt + used, prompt + used * n} if used else {0})  # the first failure ends the others
        assert under_way(gateway, "acme") == gateway.admission.active == 0
        mesh.script = lambda request: None
        assert (await client.post(path, json=body(path, n=2), headers=bearer(keys["acme"]))).status_code == 200


def under_way(gateway: Gateway, tenant: str) -> int:
    meter = gateway.access._meters.get(tenant)
    return meter.streams if meter is not None else 0


@pytest.mark.parametrize("more", [{"temperature": 9}, {"max_tokens": 10_000}, {"messages": 1}])
async def test_a_request_with_a_mistake_takes_a_request_and_no_tokens(tmp_path: Path, more: dict[str, Any]) -> None:
    keys = write(tmp_path / "t.toml", acme={"tokens_per_minute": 100_000, "requests_per_minute": 10, "concurrency": 1})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, _, gateway):
        response = await client.post(CHAT, json=body(CHAT, **more), headers=bearer(keys["acme"]))
        assert response.status_code == 400
        assert response.headers["x-ratelimit-remaining-requests"] == "9" and left(response) == 100_000
        assert under_way(gateway, "acme") == 0


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_gives_back_what_it_did_not_use(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, n: int, stream: bool) -> None:
    keys = write(tmp_path / "t.toml", acme={"tokens_per_minute": 1000, "concurrency": 3})
    async with served(monkeypatch, tenants=str(tmp_path / "t.toml")) as (url, mesh, _):
        mesh.pause_s = 0.05
        host, port = url.removeprefix("http://").split(":")
        data = json.dumps(body(path, n=n, stream=stream, max_tokens=100)).encode()
        for _ in range(3):
            before = len(mesh.requests)
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"POST {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {keys['acme']}\r\n"
                         f"content-length: {len(data)}\r\n\r\n".encode() + data)
            async with asyncio.timeout(5):
                while len(mesh.requests) < before + n:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.07)
            writer.transport.abort()
            async with asyncio.timeout(5):
                while len(mesh.cancels) < before + n:
                    await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            spent = 1000 - await tokens_left(client, keys["acme"])
            assert 0 < spent <= 3 * (PROMPT + SAID * n)
            mesh.pause_s = 0.0
            again = await client.post(path, json=body(path, n=3), headers=bearer(keys["acme"]))
            assert again.status_code == 200, "all three places are free again"


async def test_the_official_client_raises_its_own_errors_and_reads_the_limits(monkeypatch: pytest.MonkeyPatch,
                                                                            tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={"requests_per_minute": 3, "models": [MODEL], "tiers": ["default"]})
    async with served(monkeypatch, tenants=str(tmp_path / "t.toml")) as (url, mesh, _):
        def client(key: str) -> openai.AsyncOpenAI:
            return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

        async with client("tm-nonsense") as stranger:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await stranger.chat.completions.create(model=MODEL, messages=HELLO)
            assert unknown.value.code == "invalid_api_key" and unknown.value.request_id
        async with client(keys["acme"]) as acme:
            assert [model.id async for model in acme.models.list()] == [MODEL]
            with pytest.raises(openai.PermissionDeniedError) as denied:
                await acme.chat.completions.create(model=MODEL, messages=HELLO, service_tier="priority")
            assert denied.value.param == "service_tier"
            raw = await acme.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
            assert raw.headers["x-ratelimit-remaining-requests"] == "1"
            text = ""
            async for chunk in await acme.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert text == raw.parse().choices[0].message.content == "Hello, world!"
            with pytest.raises(openai.RateLimitError) as limited:
                await acme.chat.completions.create(model=MODEL, messages=HELLO)
            assert limited.value.code == "rate_limit_exceeded"
            assert 0 < int(limited.value.response.headers["retry-after-ms"]) <= 20_000
        assert len(mesh.requests) == 2


async def test_the_file_is_followed_and_one_that_goes_bad_changes_nothing_and_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    keys = write(path, acme={"requests_per_minute": 100}, gone={})
    async with gateway_and_mesh(tenants=str(path)) as (client, mesh, _):
        mesh.pause_s = 0.2

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers=bearer(key))).status_code

        async def figure() -> str:
            text = (await client.get("/metrics")).text
            return next(line for line in text.splitlines() if line.startswith("mill_gateway_tenants_refused"))

        running = asyncio.create_task(client.post(CHAT, json=body(CHAT), headers=bearer(keys["gone"])))
        while not mesh.requests:
            await asyncio.sleep(0.01)
        rewrite(path, keys | {"new": keys["gone"][:-1] + "A"}, acme={"requests_per_minute": 7})
        async with asyncio.timeout(10 * FOLLOW_S):
            while await status(keys["gone"]) == 200:
                await asyncio.sleep(0.02)
        assert (await running).status_code == 200, "what runs ends"
        seen = await client.get("/v1/models", headers=bearer(keys["acme"]))
        assert seen.headers["x-ratelimit-limit-requests"] == "7"
        assert await figure() == "mill_gateway_tenants_refused 0.0"
        with structlog.testing.capture_logs() as logged:
            path.write_text("secret = 1")
            async with asyncio.timeout(10 * FOLLOW_S):
                while await figure() != "mill_gateway_tenants_refused 1.0":
                    await asyncio.sleep(0.02)
            await asyncio.sleep(2.5 * FOLLOW_S)
        (said,) = [event for event in logged if event["event"] == "tenants_refused"]
        assert "needs a secret" in said["reason"] and said["kept"] == 1
        assert await status(keys["acme"]) == 200
        rewrite(path, keys, acme={}, gone={})
        async with asyncio.timeout(10 * FOLLOW_S):
            while await status(keys["gone"]) != 200:
                await asyncio.sleep(0.02)
        assert await figure() == "mill_gateway_tenants_refused 0.0"


async def test_a_gateway_of_several_tenants_keeps_nothing_of_the_words_it_reads(tmp_path: Path) -> None:
    """A word that was read before is faster: it would tell one tenant what another wrote."""
    keys = write(tmp_path / "t.toml", acme={})
    for tenants, learns in ((str(tmp_path / "t.toml"), False), ("", True)):
        model = ServedModel.load(default_folder(), MODEL)
        async with gateway_and_mesh(model, tenants=tenants) as (client, _, __):
            words = model.tokenizer._words
            assert words is not None
            before = set(words._known)
            response = await client.post(TEXT, json=body(TEXT, prompt="vorpal Jabberwock slithytoves"),
                                         headers=bearer(keys["acme"]))
            assert response.status_code == 200
            learned = set(words._known) - before
            assert ("vorpal" in learned) == bool(learned) == learns


async def test_logs_name_the_tenant_and_no_key(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={})
    async with gateway_and_mesh(tenants=str(tmp_path / "t.toml")) as (client, _, __):
        with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
            await client.post(CHAT, json=body(CHAT), headers=bearer(keys["acme"]))
            await client.post(CHAT, json=body(CHAT), headers=bearer(keys["acme"][:-1] + "?"))
        assert [event.get("tenant") for event in logged if event["event"] == "request_ended"] == ["acme"]
        assert [event.get("tenant") for event in logged if event["event"] == "request_refused"] == [None]
        assert keys["acme"][12:30] not in repr(logged)


def test_a_gateway_with_a_file_that_is_none_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the tenants file"):
        Access(TenantsFile(tmp_path / "none.toml"), LoopClock())


class Handed:
    """A source that has what a test puts there: tenants, or the error of reading them."""

    def __init__(self, found: Tenants) -> None:
        self.found: Tenants | BaseException = found

    def changed(self) -> bool:
        return True

    def read(self) -> Tenants:
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


def allowed(tokens: int) -> Tenants:
    return read(f'secret = "{SECRET}"\n[tenants.a]\ntokens_per_minute = {tokens}')


async def held_back(url: str, path: str, key: str, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request whose headers are sent and whose body is not."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
                 f"content-length: {len(data)}\r\n\r\n".encode())
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
async def test_a_body_held_back_until_its_key_was_revoked_starts_nothing(monkeypatch: pytest.MonkeyPatch,
                                                                        tmp_path: Path, path: str) -> None:
    file = tmp_path / "t.toml"
    keys = write(file, acme={}, gone={})
    async with served(monkeypatch, tenants=str(file)) as (url, mesh, _), asyncio.timeout(20):
        data = json.dumps(body(path)).encode()
        reader, writer = await held_back(url, path, keys["gone"], data)
        await asyncio.sleep(0.1)
        rewrite(file, {"acme": keys["acme"]}, acme={}, gone={})
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            while (await client.get("/v1/models", headers=bearer(keys["gone"]))).status_code == 200:
                await asyncio.sleep(0.02)
        writer.write(data)
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        assert mesh.requests == []
        writer.close()


async def test_a_body_is_served_for_the_tenant_that_its_key_has_when_it_is_here(monkeypatch: pytest.MonkeyPatch,
                                                                               tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    keys = write(file, acme={})
    async with served(monkeypatch, tenants=str(file)) as (url, mesh, _), asyncio.timeout(20):
        data = json.dumps(body(CHAT)).encode()
        reader, writer = await held_back(url, CHAT, keys["acme"], data)
        await asyncio.sleep(0.1)
        rewrite(file, keys, acme={"weight": 3.0, "tokens_per_minute": 700})
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            while "x-ratelimit-limit-tokens" not in (await client.get("/v1/models",
                                                                      headers=bearer(keys["acme"]))).headers:
                await asyncio.sleep(0.02)
        writer.write(data)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        assert [one.weight for one in mesh.requests] == [3.0]
        writer.close()


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_a_body_that_does_not_come_in_time_is_408_and_ends_its_connection(monkeypatch: pytest.MonkeyPatch,
                                                                               tmp_path: Path, path: str) -> None:
    keys = write(tmp_path / "t.toml", acme={})
    async with (served(monkeypatch, tenants=str(tmp_path / "t.toml"), body_s=0.2) as (url, mesh, _),
                asyncio.timeout(20)):
        reader, writer = await held_back(url, path, keys["acme"], b"x" * 100)
        writer.write(b"x" * 50)
        head, _, said = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        error = json.loads(said)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
        assert "within 0.2 s" in error["message"] and mesh.requests == []
        writer.close()


@pytest.mark.parametrize(("error", "reason"), [
    (ValueError("it is no TOML"), "it is no TOML"),
    (RecursionError("not to be told"), "failed with RecursionError"), (MemoryError("not to be told"), "MemoryError")])
async def test_whatever_goes_wrong_with_the_source_is_refused_said_once_and_ends_no_gateway(error: Exception,
                                                                                           reason: str) -> None:
    source = Handed(allowed(1000))
    access = Access(source, Still())
    source.found = error
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await access.follow()
    (said,) = logged
    assert reason in said["reason"] and "not to be told" not in said["reason"] and said["kept"] == 1
    assert access.refused and set(access._tenants.named) == {"a"}
    source.found = Unsettled("not to be told")
    await access.follow()
    assert access.refused, "nothing is known yet of what is being written"
    source.found = allowed(2000)
    await access.follow()
    assert not access.refused and access._tenants.named["a"].limits.tokens_per_minute == 2000


async def test_a_limit_lowered_in_the_file_holds_at_once_and_locks_nobody_out_for_what_was_used_before() -> None:
    """Old use over the new rate once refused a tenant for hours."""
    source = Handed(allowed(100_000))
    access, clock = Access(source, Still()), Still()
    before = access._tenants.named["a"]
    with access.under_way(before, 1) as use:
        use.reserve(100_000)
        source.found = allowed(1000)
        await access.follow()
        use.used_tokens = 100_000
    clock.now = lambda: 60.0  # type: ignore[method-assign]
    access._clock = clock
    for tenant in (access._tenants.named["a"], before):  # a request that came before the change is held to it too
        assert dict(access.headers(tenant))[b"x-ratelimit-remaining-tokens"] == b"1000"


steps = st.lists(st.tuples(st.sampled_from(["enter", "end", "fail"]), st.integers(1, 4), st.integers(0, 60),
                           st.floats(0, 1)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_however_requests_end_what_was_taken_comes_back_exactly_once(history: list[Any]) -> None:
    """Against a plain count of what is under way and of what was used."""
    class Fixed:
        def changed(self) -> bool:
            return False

        def read(self) -> Tenants:
            return found

    found = read(f'secret = "{SECRET}"\n[tenants.a]\nconcurrency = 6\ntokens_per_minute = 1000')
    access = Access(Fixed(), Still())
    tenant, used_tokens, reserved = found.named["a"], 0, 0
    open_requests: list[tuple[Any, Any, int, int]] = []
    for what, streams, tokens, share in history:
        if what == "enter":
            context = access.under_way(tenant, streams)
            running = sum(one[2] for one in open_requests)
            try:
                use = context.__enter__()
            except RateLimited:
                assert running + streams > 6
                continue
            assert running + streams <= 6
            try:
                use.reserve(tokens)
            except MillError as error:
                assert used_tokens + reserved + tokens > 1000
                context.__exit__(type(error), error, None)
                continue
            open_requests.append((context, use, streams, tokens))
            reserved += tokens
        elif open_requests and what in ("end", "fail"):
            context, use, _, tokens = open_requests.pop(streams % len(open_requests))
            use.used_tokens = int(share * tokens)
            used_tokens += use.used_tokens
            reserved -= tokens
            error = ValueError() if what == "fail" else None
            try:
                context.__exit__(type(error) if error else None, error, None)
            except ValueError:
                assert what == "fail"
        told = dict(access.headers(tenant))
        assert int(told[b"x-ratelimit-remaining-tokens"]) == max(0, 1000 - used_tokens - reserved)
        assert access._meter(tenant).streams == sum(one[2] for one in open_requests)
