"""Law 7 at the gateway: a request says where its tokens may be, and nothing goes anywhere else."""

import asyncio

import pytest

from gateway.residency import HEADER, policy_of
from shared.errors import BadRequest
from shared.messages import Residency
from shared.residency import parse
from tests.gateway.world import PROMPT, World, virtual, world

BODY = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}


def headers(*said: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"h"), *((HEADER.encode(), value.encode()) for value in said)]


@pytest.mark.parametrize(("tenants", "said", "policy"), [
    ("", [], ()), ("", ["eu"], ("eu",)), ("eu", [], ("eu",)), ("eu", ["any"], ("eu",)), ("any", ["any"], ()),
    ("eu", ["eu-north1, us"], ("eu-north1",)), ("eu,us", ["us"], ("us",)),
    ("", ["eu,us", "us,ap"], ("us",)),  # what a proxy adds narrows too
])
def test_a_header_narrows_the_policy(tenants: str, said: list[str], policy: tuple[str, ...]) -> None:
    assert policy_of(parse(tenants), headers(*said)) == Residency(policy)


@pytest.mark.parametrize(("tenants", "said", "why"), [
    ("eu", ["us"], "may use eu only"), ("", ["eu", "us"], "may use eu only"), ("", [""], "is empty"),
    ("eu", [" "], "is empty"), ("", [","], "is no zone"), ("", ["eu;us"], "is no zone"), ("", ["eu\xff"], "is no zone"),
])
def test_a_header_that_widens_it_or_is_no_policy_is_refused_and_never_passed_over(
        tenants: str, said: list[str], why: str) -> None:
    with pytest.raises(BadRequest, match=why) as caught:
        policy_of(parse(tenants), headers(*said))
    assert caught.value.param == HEADER


@virtual
async def test_a_request_goes_to_the_zone_it_asks_for_and_what_any_has_cached_elsewhere_is_no_reason() -> None:
    async with world(zones=("eu-north1", "us-east1")) as mesh:
        for zone, worker in (("us", "w2"), ("eu", "w1"), ("us-east1", "w2"), ("EU, us-west9", "w1")):
            response = await mesh.ask(headers={HEADER: zone})
            assert response.headers["x-mill-worker"] == worker


@virtual
async def test_no_worker_in_an_allowed_zone_is_a_503_that_says_what_to_do_before_anything_is_published() -> None:
    async with world(zones=("us-east1", "us-west1")) as mesh:
        await asyncio.sleep(2.5)  # the gateway has heard everybody by then
        published = mesh.buses[0].broker.published
        response = await mesh.client.post("/v1/completions", headers={HEADER: "eu"}, json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_eligible_worker")
        assert "(eu): there are some in us-east1, us-west1. Start one" in response.json()["error"]["message"]
        assert response.headers["x-should-retry"] == "false" and "retry-after" not in response.headers
        assert mesh.buses[0].broker.published == published


@virtual
async def test_a_gateway_that_has_just_started_leaves_it_to_the_router_which_says_the_same() -> None:
    async with world(zones=("us-east1",)) as mesh:
        response = await mesh.client.post("/v1/completions", headers={HEADER: "eu"}, json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_eligible_worker")
        assert "zone us-east1 is not allowed" in response.json()["error"]["message"]


@virtual
async def test_an_allowed_worker_that_is_gone_for_the_moment_is_worth_a_retry() -> None:
    async with world(zones=("eu", "us")) as mesh:
        await asyncio.sleep(2.5)
        mesh.buses[0].crash()
        await asyncio.sleep(3.0)
        response = await mesh.client.post("/v1/completions", headers={HEADER: "eu"}, json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "2"


@virtual
async def test_the_gateways_own_policy_holds_for_requests_that_say_nothing() -> None:
    async with world(zones=("eu", "us"), residency="us") as mesh:
        for _ in range(3):
            assert (await mesh.ask()).headers["x-mill-worker"] == "w2"
        response = await mesh.client.post("/v1/completions", headers={HEADER: "eu"}, json=BODY)
        assert (response.status_code, response.json()["error"]["param"]) == (400, HEADER)


@virtual
async def test_a_stream_whose_worker_dies_goes_on_in_its_zone_or_nowhere() -> None:
    async with world(zones=("eu", "us", "eu-west1")) as mesh:
        async def dies(worker: int) -> None:
            while not len(mesh.gateway.streams):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            mesh.buses[worker].crash()

        response = await _ask_while(mesh, dies)
        assert response["usage"]["mill"]["attempts"] == 2 and response["usage"]["completion_tokens"] == 120
        assert response["usage"]["mill"]["worker"] != "w2"


async def _ask_while(mesh: World, dies) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """A long answer under the policy `eu`, whose first worker dies."""
    first = (await mesh.ask(headers={HEADER: "eu"}, prompt_cache_key="k")).headers["x-mill-worker"]
    dying = asyncio.create_task(dies(int(first[1:]) - 1))
    response = await mesh.ask(headers={HEADER: "eu"}, prompt_cache_key="k", max_tokens=120, ignore_eos=True)
    await dying
    found: dict = response.json()  # type: ignore[type-arg]
    return found


def test_a_gateway_does_not_start_with_a_policy_that_is_none() -> None:
    async def start() -> None:
        async with world(residency="eu;us"):
            raise AssertionError("it started")

    with pytest.raises(ValueError, match="is no zone"):
        virtual(start)()
