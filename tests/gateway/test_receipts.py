"""A request can be asked why it went where it went, and what the cache gave."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import explain
from gateway.receipts import HEADER_BYTES, Kept, Note, Outcome, ReceiptNotFound, Receipts, document, found, header
from shared import receipts
from shared.messages import Failed
from shared.receipts import MISSES, MOST_CANDIDATES, Receipt, Wall, Weighed, classify
from tests.gateway.fake_mesh import gateway_and_mesh
from tests.gateway.world import PROMPT, World, virtual, world

TOKENS = st.integers(0, 10_000)


@virtual
async def test_a_request_is_explained_from_its_candidates_to_what_was_cached() -> None:
    async with world() as mesh:
        first = await mesh.ask()
        told = await mesh.receipt(first.headers["x-request-id"])
        assert told["response_id"] == first.json()["id"] and told["model"] == "tiny"
        (choice,) = told["choices"]
        (attempt,) = choice["attempts"]
        assert {row["worker"] for row in attempt["candidates"]} == {"w1", "w2"} and attempt["considered"] == 2
        assert attempt["worker"] == choice["worker"] == first.headers["x-mill-worker"]
        assert attempt["runner_up"] == ({"w1", "w2"} - {attempt["worker"]}).pop()
        for row in attempt["candidates"]:
            assert {"queue", "prefill", "decode", "others"} <= set(row["terms_ms"])
            assert row["cost_ms"] >= row["terms_ms"]["prefill"] > 0
        assert (attempt["predicted_cached_tokens"], choice["actual_cached_tokens"], choice["miss"]) == (0, 0, "none")
        # once more: it goes where the cache is, and that is what came of it
        second = await mesh.ask(headers={"x-request-id": "mine"})
        (choice,) = (await mesh.receipt("mine"))["choices"]
        (again,) = choice["attempts"]
        assert again["worker"] == attempt["worker"]
        assert again["predicted_cached_tokens"] == again["certain_tokens"] == again["most_cached_tokens"] == 144
        assert (choice["actual_cached_tokens"], choice["miss"], choice["missed_tokens"]) == (144, "none", 0)
        # by any of its names
        for name in (second.json()["id"], second.json()["id"].removeprefix("cmpl-") + "-0"):
            assert (await mesh.receipt(name))["request_id"] == "mine"
        assert mesh.gateway.metrics.predicted_cached_tokens._value.get() == 144
        assert mesh.gateway.metrics.found_cached_tokens._value.get() == 144
        assert mesh.gateway.metrics.placements.labels("none")._value.get() == 2
        shown = "\n".join(explain.page(await mesh.receipt("mine")))
        assert "144 tokens were cached (none: as much as any worker held)" in shown
        assert f"r1 chose {again['worker']} among 2 because it cost least" in shown


@virtual
async def test_the_header_comes_with_the_answer_when_it_is_asked_for() -> None:
    async with world() as mesh:
        assert "x-tokenmill-receipt" not in (await mesh.ask()).headers
        whole = await mesh.ask(headers={"x-tokenmill-explain": "1"})
        line = json.loads(whole.headers["x-tokenmill-receipt"])
        assert (line["predicted_cached_tokens"], line["actual_cached_tokens"], line["miss"]) == (144, 144, "none")
        assert line["worker"] == whole.headers["x-mill-worker"] and len(line["candidates"]) == 2
        stream = await mesh.ask(headers={"x-tokenmill-explain": "1"}, stream=True)
        line = json.loads(stream.headers["x-tokenmill-receipt"])
        assert line["predicted_cached_tokens"] == 144


@virtual
async def test_blocks_that_gave_way_unheard_are_event_lag() -> None:
    async with world(zones=("eu",), blocks=16, heartbeat_s=1.5) as mesh:
        await mesh.ask()
        # the router does not hear of what pushes the first prompt out
        mute(mesh)
        await mesh.ask("Another text altogether, and quite as long as the first. " * 3)
        response = await mesh.ask()
        (choice,) = (await mesh.receipt(response.headers["x-request-id"]))["choices"]
        assert choice["attempts"][0]["certain_tokens"] == 144
        assert choice["actual_cached_tokens"] < 144
        assert choice["miss"] == "event_lag"
        assert choice["missed_tokens"] == 144 - choice["actual_cached_tokens"]
        assert mesh.gateway.metrics.placements.labels("event_lag")._value.get() == 1


def mute(mesh: World) -> None:
    """No cache event reaches anybody from now on."""
    index = mesh.gateway.bus.broker._index  # type: ignore[attr-defined]
    route = index.route("mill.v1.worker.w1.kv")
    for subscription in list(route.all):
        index.remove(subscription.pattern, subscription)


async def test_a_refused_request_has_a_receipt_of_the_walls() -> None:
    walls = (Wall("zone us is not allowed", 5, ("w1", "w2", "w3", "w4")),)
    packed = receipts.pack(receipt(worker="", cached_tokens=0, refused="no_eligible_worker", walls=walls,
                                    turned_away=5))
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.script = lambda request: [
            Failed(request.request_id, request.attempt, "no_eligible_worker", "nobody", receipt=packed)]
        response = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4})
        assert response.status_code == 503
        told = (await client.get(f"/v1/requests/{response.headers['x-request-id']}/receipt")).json()
        (choice,) = told["choices"]
        assert choice["ended"] in ("no_eligible_worker", "overloaded") and choice["miss"] is None
        assert choice["attempts"][0]["filtered"][0]["reason"] == "zone us is not allowed"
        shown = "\n".join(explain.page(told))
        assert "refused by r (no_eligible_worker)" in shown
        assert "not eligible: zone us is not allowed: 5 (w1, w2, w3, w4, ...)" in shown


@virtual
async def test_an_unknown_request_is_a_404_that_says_where_to_ask() -> None:
    async with world(zones=("eu",)) as mesh:
        response = await mesh.client.get("/v1/requests/nobody/receipt")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "receipt_not_found"
        assert "gateway that answered" in response.json()["error"]["message"]


@given(TOKENS, TOKENS, TOKENS, st.one_of(st.sampled_from(MISSES), st.text(max_size=8)))
def test_every_prediction_and_outcome_has_exactly_one_class(predicted: int, more: int, actual: int, says: str) -> None:
    most = predicted + more
    miss = classify(predicted, most, actual, says)
    assert miss in MISSES
    assert (miss == "none") == (actual >= most)
    assert (miss == "lost_to_load") == (predicted <= actual < most)
    if actual < predicted and says in ("expected", "evicted", "event_lag", "hash_mismatch"):
        assert miss == says


def receipt(**fields: Any) -> Receipt:
    values = {"router": "r", "policy": "cost", "prompt_tokens": 100, "worker": "w1", "cached_tokens": 64,
              "certain_tokens": 64, "most_cached_tokens": 80}
    return Receipt(**(values | fields))


def outcome(told: Receipt | None = None, **fields: Any) -> Outcome:
    notes = (Note(1, "w1", receipts.pack(told or receipt())),)
    values = {"notes": notes, "prompt_tokens": 100, "ended": "stop", "worker": "w1", "attempts": 1,
              "cached_tokens": 64}
    return Outcome(**(values | fields))


def test_what_is_missed_is_measured_against_what_was_wanted() -> None:
    assert found(outcome()) == (64, 64, 16, "lost_to_load")
    assert found(outcome(cached_tokens=16, worker_says="evicted")) == (64, 16, 48, "evicted")
    assert found(outcome(cached_tokens=96)) == (64, 96, 0, "none")
    # a resubmission's receipt counts what was generated too, its worker only the prompt
    resumed = receipt(cached_tokens=160, most_cached_tokens=160)
    assert found(outcome(resumed, cached_tokens=100)) == (100, 100, 0, "none")
    assert found(outcome(attempts=2)) is None  # the receipt of the second attempt did not come
    assert found(outcome(cached_tokens=None)) is None
    assert found(outcome(receipt(worker="", refused="overloaded"))) is None


def test_the_store_keeps_the_newest_and_finds_no_other() -> None:
    store = Receipts(most=3)
    for number in range(5):
        store.keep(Kept(f"x{number % 4}", f"chatcmpl-{number}", "m", 0.0, (), "default"))
    assert len(store) == 3
    assert store.find("x0", "default").response_id == "chatcmpl-4"  # named twice: the newest
    assert store.find("2", "default").request_id == "x2"
    for gone in ("x1", "chatcmpl-0", "chatcmpl-1", "", "-"):
        with pytest.raises(ReceiptNotFound):
            store.find(gone, "default")


@given(st.integers(0, MOST_CANDIDATES), st.integers(0, 8), st.text(max_size=40))
def test_the_header_stays_small_and_plain(workers: int, walls: int, reason: str) -> None:
    told = receipt(
        candidates=tuple(Weighed(f"worker-{number:060}", 10**6, 10**9, (10**9,) * 9) for number in range(workers)),
        terms=tuple("abcdefghi"), considered=10**6, turned_away=10**6,
        walls=tuple(Wall(reason, 9, tuple(f"worker-{name:060}" for name in range(4))) for _ in range(walls)))
    line = header([outcome(told)])
    assert len(line) <= HEADER_BYTES and line.isascii()
    if reason.isascii():
        assert json.loads(line)["predicted_cached_tokens"] == 64
    assert json.loads(json.dumps(document(Kept("x", "chatcmpl-1", "m", 0.0, (outcome(told),), "a"))))


def test_a_receipt_that_cannot_be_read_explains_nothing_and_breaks_nothing() -> None:
    for data in (b"", b"\xc1", b"\x93\x01\x02\x03", b"text"):
        broken = outcome(notes=(Note(1, "w1", data),))
        assert found(broken) is None and header([broken]) == ""
        assert document(Kept("x", "chatcmpl-1", "m", 0.0, (broken,), "a"))["choices"][0]["attempts"] == []


def test_a_receipt_is_found_by_its_own_tenant_alone_also_when_two_chose_the_same_request_id() -> None:
    store = Receipts(most=3)
    store.keep(Kept("mine", "chatcmpl-1", "m", 0.0, (), "acme"))
    store.keep(Kept("mine", "cmpl-2", "m", 0.0, (), "other"))
    assert store.find("mine", "acme").response_id == "chatcmpl-1"
    assert store.find("mine", "other").response_id == "cmpl-2"
    reasons = set()
    for name, tenant in (("chatcmpl-1", "other"), ("1-0", "other"), ("cmpl-2", "acme"), ("mine", "third"),
                         ("nothing", "third")):
        with pytest.raises(ReceiptNotFound) as unknown:
            store.find(name, tenant)
        reasons.add(unknown.value.message)
    assert len(reasons) == 1
    for number in (3, 4, 5):
        store.keep(Kept("mine", f"cmpl-{number}", "m", 0.0, (), "third"))
    with pytest.raises(ReceiptNotFound):
        store.find("mine", "acme")
    assert store.find("mine", "third").response_id == "cmpl-5"
