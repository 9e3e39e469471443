"""What a request is charged, over HTTP: by what was delivered, once, never beyond a budget, and told to who asks."""

import asyncio
import contextlib
import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from gateway.state.database import open_database
from gateway.state.directory import Directory
from gateway.state.tables import leases
from shared.messages import Accepted, Finished, Generate, Reply, Tokens
from shared.pricing import shown
from shared.tokens import pack
from tests.gateway.billed import MICRO, PRICES, Billed, billed_gateway
from tests.gateway.fake_mesh import MODEL, gateway_and_mesh, refusal

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAID = len(b"Hello, world!") + 1
PROMPT = 40  # tokens, of which FakeMesh says that 16 were cached
COST = {"x-tokenmill-cost": "1"}


@pytest.fixture
def billed(tmp_path: Path) -> Billed:
    return Billed(tmp_path)


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "p" * PROMPT, "max_tokens": 20} | more


async def test_a_request_is_charged_by_its_tokens_and_says_so_where_asked(billed: Billed) -> None:
    acme = billed.project("acme", concurrency=9)
    async with billed_gateway(billed) as (client, _, _):
        told = await client.post(TEXT, json=body(), headers=acme | COST)
        silent = await client.post(TEXT, json=body(), headers=acme)
        flex = await client.post(TEXT, json=body(service_tier="flex"), headers=acme | COST)
    worth = (PROMPT - 16) + 8 + 4 * SAID  # micro-dollars
    assert told.json()["usage"]["cost"] == worth / 1_000_000
    assert told.headers["x-tokenmill-cost"] == shown(worth * MICRO)
    assert "cost" not in silent.json()["usage"] and "x-tokenmill-cost" not in silent.headers
    assert flex.json()["usage"]["cost"] == (PROMPT + 4 * SAID) / 2_000_000  # cached ones are as dear there
    first, second, third = billed.records()
    assert first.amount == second.amount == worth * MICRO and third.tier == "flex"
    assert (first.tenant, first.model, first.outcome, first.attempts) == ("acme", MODEL, "stop", 1)
    assert (first.prompt_tokens, first.cached_tokens, first.generated_tokens) == (PROMPT, 16, SAID)
    assert (first.draft_tokens, first.accepted_draft_tokens) == (8, 6)
    assert acme["authorization"].startswith(f"Bearer {first.key}")
    assert billed.check().problems == []


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
async def test_every_api_tells_the_cost_in_its_usage_also_of_a_stream(billed: Billed, path: str) -> None:
    acme = billed.project("acme")
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}]}
    if path == "/v1/responses":
        asked = {"model": MODEL, "max_output_tokens": 20, "input": "Hi"}
    async with billed_gateway(billed) as (client, _, _):
        whole = await client.post(path, json=asked, headers=acme | COST)
        more = {"stream_options": {"include_usage": True}} if path == CHAT else {}
        stream = await client.post(path, json=asked | {"stream": True} | more, headers=acme | COST)
    first, second = billed.records()
    assert shown(first.amount) in whole.text and whole.json()["usage"]["cost"] == float(shown(first.amount))
    documents = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    usages = [found for one in documents for found in (one.get("usage"), one.get("response", {}).get("usage")) if found]
    assert usages[-1]["cost"] == float(shown(second.amount)) and first.amount == second.amount


@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_before_a_token_is_told_costs_nothing_and_what_broke_off_what_was_told(
        billed: Billed, stream: bool) -> None:
    acme = billed.project("acme")
    async with billed_gateway(billed) as (client, mesh, _):
        mesh.script = lambda request: refusal(request, "overloaded")
        assert (await client.post(TEXT, json=body(stream=stream), headers=acme)).status_code == 503

        def breaks(request: Generate) -> list[Reply]:
            began: list[Reply] = [Accepted(request.request_id, request.attempt, "w1", 16),
                                  Tokens(request.request_id, request.attempt, 0, pack([72, 105]))]
            return began + refusal(request, "invalid_request")

        mesh.script = breaks
        response = await client.post(TEXT, json=body(stream=stream), headers=acme)
        assert response.status_code == (200 if stream else 400)
    refused, broken = billed.records()
    assert (refused.amount, refused.outcome, refused.prompt_tokens) == (0, "overloaded", 0)
    assert broken.outcome == "invalid_request"
    assert (broken.prompt_tokens, broken.generated_tokens) == ((PROMPT, 2) if stream else (0, 0))


async def test_choices_share_their_prompt_and_a_resubmitted_stream_is_charged_once(billed: Billed) -> None:
    acme = billed.project("acme")
    async with billed_gateway(billed) as (client, mesh, _):
        await client.post(TEXT, json=body(n=3), headers=acme)

        def dies(request: Generate) -> list[Reply] | None:
            if request.attempt > 1:
                return None
            return [Accepted(request.request_id, 1, "w1", 16), Tokens(request.request_id, 1, 0, pack(list(b"Hell"))),
                    *refusal(request, "worker_failed", retryable=True)]

        mesh.script = dies
        again = await client.post(TEXT, json=body(), headers=acme)
        assert again.json()["choices"][0]["text"] == "Hello, world!"
    three, moved = billed.records()
    assert (three.prompt_tokens, three.generated_tokens) == (PROMPT, 3 * SAID)
    assert (moved.prompt_tokens, moved.generated_tokens, moved.attempts) == (PROMPT, SAID, 2)


async def test_our_cost_is_the_workers_time_at_the_price_of_its_sku(billed: Billed) -> None:
    acme = billed.project("acme")
    async with billed_gateway(billed) as (client, mesh, _):
        before = mesh.finished

        def finished(request: Generate, tokens: list[int]) -> Finished:
            return replace(before(request, tokens), worker_s=0.25, drafter_usd=0.000_01)

        mesh.finished = finished  # type: ignore[method-assign]
        await client.post(TEXT, json=body(), headers=acme)
        mesh.finished = lambda request, tokens: replace(  # type: ignore[method-assign]
            before(request, tokens), worker_s=float("inf"), drafter_usd=float("nan"))
        await client.post(TEXT, json=body(), headers=acme)
        figures = (await client.get("/metrics")).text
    known, unknown = billed.records()
    # 0.25 s of 3.60 dollars an hour
    assert (known.worker_us, known.cost) == (250_000, 260 * MICRO) and (unknown.worker_us, unknown.cost) == (0, None)
    assert f'mill_gateway_charged_usd_total{{model="{MODEL}"}} ' in figures
    assert f'mill_gateway_cost_usd_total{{model="{MODEL}"}} 0.00026' in figures


async def test_a_stream_that_ended_here_costs_what_its_worker_says_a_moment_later(billed: Billed) -> None:
    acme = billed.project("acme")
    async with billed_gateway(billed) as (client, mesh, gateway):
        mesh.pause_s = 0.02  # it is still at work when the stop string comes
        mesh.last_words = lambda cancel: [Finished(cancel.request_id, cancel.attempt, "cancelled", "w1", worker_s=0.1)]
        stopped = await client.post(TEXT, json=body(stop=["world"]), headers=acme)
        assert stopped.json()["choices"][0]["text"] == "Hello, "
        await gateway.billing.flush()
        mesh.last_words = lambda cancel: []  # lost, or never said
        await client.post(TEXT, json=body(stop=["world"]), headers=acme)
        await gateway.billing.flush()
        assert len(billed.records()) == 2
        mesh.last_words = lambda cancel: [Finished(cancel.request_id, 7, "cancelled", "w1", worker_s=9.0)]  # of another
        await client.post(TEXT, json=body(stop=["world"]), headers=acme)
        await mesh.cancelled.wait()
        await mesh.reply("g1", Finished(f"{stopped.json()['id'].removeprefix('cmpl-')}-0", 1, "cancelled", "w1",
                                        worker_s=9.0))  # a second time
    said, lost, strange = billed.records()
    assert (said.worker_us, said.cost) == (100_000, 100 * MICRO)
    assert (lost.cost, strange.cost, strange.worker_us) == (None, None, 0)
    assert said.amount == lost.amount == strange.amount and billed.check().problems == []


async def test_a_budget_refuses_before_it_is_overrun_and_says_what_is_left(billed: Billed) -> None:
    worth = (PROMPT - 16) + 8 + 4 * SAID
    most = PROMPT + 4 * 20
    acme = billed.project("acme", spend_per_day=(2 * worth + most - 1) * MICRO)
    async with billed_gateway(billed) as (client, mesh, _):
        answers = [await client.post(TEXT, json=body(), headers=acme) for _ in range(4)]
        small = await client.post(TEXT, json=body(prompt="p", max_tokens=1), headers=acme)
        assert len(mesh.requests) == 3
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    error = answers[2].json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert f"may come to ${shown(most * MICRO)}" in error["message"]
    assert f"${shown((most - 1) * MICRO)} is left" in error["message"]
    assert answers[2].headers["x-should-retry"] == "false"
    assert small.status_code == 200  # there is still room for this one
    assert billed.check().problems == []


async def test_what_runs_holds_its_share_of_a_budget_and_gives_back_what_it_did_not_use(billed: Billed) -> None:
    most = PROMPT + 4 * 20
    acme = billed.project("acme", spend_per_day=(most + 10) * MICRO, spend_per_month=10**15)
    async with billed_gateway(billed) as (client, mesh, _):
        mesh.pause_s = 0.2
        first = asyncio.create_task(client.post(TEXT, json=body(), headers=acme))
        while not mesh.requests:
            await asyncio.sleep(0)
        second = await client.post(TEXT, json=body(), headers=acme)
        assert second.status_code == 429 and second.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(second.headers["retry-after-ms"]) > 0 and "set aside for requests under way" in second.text
        assert (await first).status_code == 200
        await asyncio.sleep(1.1)
        third = await client.post(TEXT, json=body(prompt="p", max_tokens=2), headers=acme)
        assert third.status_code == 200
    assert billed.check().problems == []


async def test_a_budget_of_a_day_is_whole_again_on_the_next_and_that_of_the_month_is_not(
        billed: Billed, monkeypatch: pytest.MonkeyPatch) -> None:
    worth = (PROMPT - 16) + 8 + 4 * SAID
    most = PROMPT + 4 * 20
    acme = billed.project("acme", spend_per_day=(worth + most) * MICRO, spend_per_month=(3 * worth + most) * MICRO)
    monkeypatch.setattr("gateway.billing.KEEP_HOUSE_S", 0.05)
    statuses, days = [], ["2026-11-28"]
    monkeypatch.setattr("gateway.billing.day_of", lambda at: days[-1])
    async with billed_gateway(billed) as (client, _, gateway):
        for day in ("2026-11-28", "2026-11-29", "2026-11-30", "2026-12-01"):
            days.append(day)
            for _ in range(3):
                statuses.append((await client.post(TEXT, json=body(), headers=acme)).status_code)
                await gateway.billing.flush()
            await asyncio.sleep(0.2)
            assert len(gateway.billing._purses) <= 1  # those of days that have passed were given back
    #                    two fit into a day       two into what is left of the month      a month of its own
    assert statuses == [200, 200, 429,   200, 200, 429,   429, 429, 429,   200, 200, 429]
    assert [record.day[-2:] for record in billed.records()] == ["28", "28", "29", "29", "01", "01"]
    assert billed.check().problems == []


async def test_two_gateways_share_one_budget(billed: Billed, tmp_path: Path) -> None:
    worth = (PROMPT - 16) + 8 + 4 * SAID
    limit = 20 * worth * MICRO
    acme = billed.project("acme", spend_per_month=limit)
    async with billed_gateway(billed) as (one, _, _), billed_gateway(
            billed, id="g2", journal=str(tmp_path / "journal2")) as (two, _, _):
        statuses = [(await client.post(TEXT, json=body(), headers=acme)).status_code
                    for _ in range(15) for client in (one, two)]
    assert statuses[:4] == [200] * 4 and statuses[-4:] == [429] * 4
    spent = sum(record.amount for record in billed.records())
    assert statuses.count(200) == len(billed.records())
    # each gateway keeps a little of it from the other, and nothing more
    assert limit - 3 * limit // 16 - (PROMPT + 4 * 20) * MICRO < spent <= limit
    assert billed.check().problems == []


async def test_a_request_sent_again_under_its_key_is_charged_once_and_gets_the_same_tokens(billed: Billed) -> None:
    acme = billed.project("acme")
    key = {"idempotency-key": "order-7"}
    async with billed_gateway(billed) as (client, mesh, gateway):
        mesh.pause_s = 0.05
        first = asyncio.create_task(client.post(TEXT, json=body(), headers=acme | key))
        while not mesh.requests:
            await asyncio.sleep(0)
        meanwhile = await client.post(TEXT, json=body(), headers=acme | key)
        assert (meanwhile.status_code, meanwhile.json()["error"]["code"]) == (409, "request_in_progress")
        assert (await first).status_code == 200
        await gateway.billing.flush()
        again = await client.post(TEXT, json=body(), headers=acme | key | COST)
        assert again.json()["choices"][0]["text"] == "Hello, world!" and again.json()["usage"]["cost"] == 0
        other = await client.post(TEXT, json=body(max_tokens=3), headers=acme | key)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert mesh.requests[0].sampling.seed == mesh.requests[1].sampling.seed
        bad = await client.post(TEXT, json=body(), headers=acme | {"idempotency-key": "a b"})
        assert bad.status_code == 400
        bolt = billed.project("bolt")
        await gateway.access.follow()
        assert (await client.post(TEXT, json=body(), headers=bolt | key)).status_code == 200  # a key of its own
    assert [(record.tenant, record.generated_tokens, record.prompt_tokens) for record in billed.records()] == [
        ("acme", SAID, PROMPT), ("acme", 0, 0), ("bolt", SAID, PROMPT)]
    assert billed.check().problems == []


async def test_a_refused_request_leaves_its_idempotency_key_free(billed: Billed) -> None:
    acme = billed.project("acme")
    key = {"idempotency-key": "order-8"}
    async with billed_gateway(billed) as (client, mesh, gateway):
        mesh.script = lambda request: refusal(request, "overloaded")
        assert (await client.post(TEXT, json=body(), headers=acme | key)).status_code == 503
        mesh.script = lambda request: None
        await gateway.billing.flush()
        assert (await client.post(TEXT, json=body(), headers=acme | key)).status_code == 200
    assert [record.amount > 0 for record in billed.records()] == [False, True]


async def test_usage_is_told_to_whose_it_is_and_what_it_cost_us_to_who_looks_after_all(billed: Billed) -> None:
    acme, bolt = billed.project("acme-web", organisation="acme"), billed.project("bolt")
    now = datetime.now(UTC)
    with_database = open_database(billed.url)
    directory = Directory(with_database)
    people = {name: {"authorization": f"Bearer {directory.create_admin('viewer', organisation, now).key}"}
              for name, organisation in (("ann", "acme"), ("root", None))}
    silent = {"authorization": f"Bearer {directory.create_key('acme-web', now, scopes=['generate']).key}"}
    with_database.close()
    async with billed_gateway(billed) as (client, _, _):
        for headers in (acme, acme, bolt):
            assert (await client.post(TEXT, json=body(), headers=headers)).status_code == 200
        mine = (await client.get("/v1/usage", headers=acme)).json()  # at once: what has ended is in it
        assert [line["requests"] for line in mine["data"]] == [2] and mine["by"] == ["day"]
        assert mine["data"][0]["day"] == now.date().isoformat() and "cost_usd" not in mine["data"][0]
        assert mine["data"][0]["generated_tokens"] == 2 * SAID
        anns = (await client.get("/v1/usage?by=tenant", headers=people["ann"])).json()
        assert [line["tenant"] for line in anns["data"]] == ["acme-web"]
        all_of_it = (await client.get("/v1/usage?by=tenant,model", headers=people["root"])).json()
        assert [(line["tenant"], line["requests"], line["requests_without_cost"]) for line in all_of_it["data"]] == [
            ("acme-web", 2, 2), ("bolt", 1, 1)]
        sheet = await client.get("/v1/usage?by=tenant,outcome&format=csv", headers=people["root"])
        assert sheet.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(sheet.text.splitlines()))
        assert [(row["tenant"], row["outcome"], row["requests"]) for row in rows] == [
            ("acme-web", "stop", "2"), ("bolt", "stop", "1")]
        for headers, query, status in ((acme, "?tenant=bolt", 403), (people["ann"], "?tenant=bolt", 403),
                                       (silent, "", 403), ({}, "", 401), (acme, "?since=x", 400),
                                       (acme, "?by=hour", 400), (acme, "?since=2020-01-01", 400),
                                       (acme, "?format=xml", 400), (people["root"], "?tenant=bolt", 200)):
            assert (await client.get(f"/v1/usage{query}", headers=headers)).status_code == status, query
        assert (await client.post(TEXT, json=body(), headers=people["root"])).status_code == 403
        prices = (await client.get("/v1/prices", headers=acme)).json()
        assert prices["data"][0] == {"model": "*", "tier": "*", "region": "*", "input": "1.00", "cached_input": "0.50",
                                     "output": "4.00"}


async def test_without_a_ledger_there_are_prices_but_no_usage(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    async with gateway_and_mesh(prices=str(tmp_path / "prices.toml")) as (client, _, _):
        told = await client.post(TEXT, json=body(), headers=COST)
        assert told.json()["usage"]["cost"] > 0
        assert (await client.get("/v1/usage")).status_code == 404
    async with gateway_and_mesh() as (client, _, _):
        assert "cost" not in (await client.post(TEXT, json=body(), headers=COST)).json()["usage"]
        assert (await client.get("/v1/prices")).json()["data"] == []


async def test_a_database_that_is_away_stops_nobody_without_a_budget_and_hears_of_all_when_it_is_back(
        billed: Billed, monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.state.books import Books
    from gateway.state.database import DatabaseFailed

    acme, bolt = billed.project("acme"), billed.project("bolt", spend_per_day=10**12)
    settle, grant = Books.settle, Books.grant

    def away(*anything: object) -> Any:
        raise DatabaseFailed("it is away")

    async with billed_gateway(billed) as (client, mesh, gateway):
        monkeypatch.setattr(Books, "settle", away)
        monkeypatch.setattr(Books, "grant", away)
        for _ in range(3):
            assert (await client.post(TEXT, json=body(), headers=acme)).status_code == 200
        refused = await client.post(TEXT, json=body(), headers=bolt)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert len(mesh.requests) == 3
        assert "mill_gateway_ledger_failing 1.0" in (await client.get("/metrics")).text
        assert "mill_gateway_ledger_unwritten 3.0" in (await client.get("/metrics")).text
        monkeypatch.setattr(Books, "settle", settle)
        monkeypatch.setattr(Books, "grant", grant)
        await gateway.billing.flush()
        assert "mill_gateway_ledger_failing 0.0" in (await client.get("/metrics")).text
        assert (await client.post(TEXT, json=body(), headers=bolt)).status_code == 200
    assert [record.tenant for record in billed.records()] == ["acme"] * 3 + ["bolt"]
    assert billed.check().problems == []


async def test_when_too_much_is_unwritten_new_requests_are_refused(billed: Billed,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.state.books import Books
    from gateway.state.database import DatabaseFailed

    def away(*anything: object) -> Any:
        raise DatabaseFailed("it is away")

    acme, settle = billed.project("acme"), Books.settle
    monkeypatch.setattr("gateway.billing.MOST_UNWRITTEN", 2)
    async with billed_gateway(billed) as (client, _mesh, _):
        monkeypatch.setattr(Books, "settle", away)
        assert [(await client.post(TEXT, json=body(), headers=acme)).status_code for _ in range(4)] == [
            200, 200, 503, 503]
        monkeypatch.setattr(Books, "settle", settle)
    assert len(billed.records()) == 2


@pytest.mark.parametrize(("settings", "reason"), [
    ({"prices": ""}, "a ledger needs prices: say --prices FILE"),
    ({"prices": "/nowhere/prices.toml"}, "cannot read the price sheet /nowhere/prices.toml"),
    ({"database": "nonsense"}, "names no database"),
])
async def test_a_gateway_that_cannot_charge_does_not_start(billed: Billed, settings: dict[str, str],
                                                           reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        async with billed_gateway(billed, **settings):
            pass


async def test_a_model_without_a_price_is_said_at_the_start(tmp_path: Path) -> None:
    billed = Billed(tmp_path, prices=PRICES.replace("[[prices]]\ninput = 1.00", "[[prices]]\nmodel='b'\ninput = 1.00"))
    with pytest.raises(ValueError, match=f"has no price for {MODEL} at priority, {MODEL} at default"):
        async with billed_gateway(billed):
            pass


async def test_a_tenants_file_goes_before_the_database_and_may_limit_what_is_spent(billed: Billed) -> None:
    from tests.gateway.tenants_files import bearer, write

    keys = write(billed.folder / "t.toml", acme={"spend_per_day": 0.0001, "spend_per_month": 5})
    async with billed_gateway(billed, tenants=str(billed.folder / "t.toml")) as (client, _, _):
        statuses = [(await client.post(TEXT, json=body(max_tokens=8), headers=bearer(keys["acme"]))).status_code
                    for _ in range(3)]
    assert statuses == [200, 429, 429]
    with pytest.raises(ValueError, match="acme may spend so much and no more, and this gateway has no ledger"):
        async with gateway_and_mesh(tenants=str(billed.folder / "t.toml")):
            pass


async def test_what_a_killed_gateway_had_not_written_is_settled_by_the_next_one(
        billed: Billed, monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.billing import Billing

    acme = billed.project("acme", spend_per_day=10**9)

    async def killed(self: Billing, *anything: object) -> None:
        assert self._journal is not None
        self._journal.close(clean=False)

    with monkeypatch.context() as patch:
        patch.setattr(Billing, "_stop", killed)
        patch.setattr(Billing, "_write", lambda self, books: asyncio.sleep(3600))
        async with billed_gateway(billed) as (client, mesh, _gateway):
            assert (await client.post(TEXT, json=body(), headers=acme)).status_code == 200
            mesh.script = lambda request: [Accepted(request.request_id, 1, "w1", 0),
                                           Tokens(request.request_id, 1, 0, pack(list(b"Hell")))]
            running = asyncio.create_task(client.post(TEXT, json=body(stream=True), headers=acme))
            whole = asyncio.create_task(client.post(TEXT, json=body(), headers=acme))
            await asyncio.sleep(1.5)  # a note on each that runs is written once a second
            # what comes of them later is not known to who starts now
            left = {path: path.read_bytes() for path in (billed.folder / "journal").glob("*.jsonl")}
            assert billed.records() == []
            for task in (running, whole):
                task.cancel()
            await asyncio.gather(running, whole, return_exceptions=True)
    for path, data in left.items():
        path.write_bytes(data + b'{"record":{"request":"half a li')
    assert billed.check().sums.held > 0
    async with billed_gateway(billed):
        pass
    records = {record.outcome: record for record in billed.records()}
    assert set(records) == {"stop", "gateway_died"} and len(billed.records()) in (2, 3)
    assert records["stop"].generated_tokens == SAID
    assert sorted(record.generated_tokens for record in billed.records() if record.outcome == "gateway_died")[-1] == 4
    checked = billed.check()
    assert (checked.problems, checked.sums.held, checked.sums.open_leases) == ([], 0, 0)
    assert list((billed.folder / "journal").glob("*.jsonl")) == []


async def test_a_tenant_without_a_budget_has_one_lease_a_day_and_who_nears_one_is_told_of_in_the_log(
        billed: Billed) -> None:
    worth = (PROMPT - 16) + 8 + 4 * SAID
    acme, bolt = billed.project("acme"), billed.project("bolt", spend_per_day=20 * worth * MICRO)
    with structlog.testing.capture_logs() as logs:
        async with billed_gateway(billed) as (client, _, gateway):
            for _ in range(5):
                await client.post(TEXT, json=body(), headers=acme)
                await gateway.billing.flush()
            while (await client.post(TEXT, json=body(), headers=bolt)).status_code == 200:
                pass
    assert [(log["tenant"], log["share"]) for log in logs if log["event"] == "budget_used"] == [
        ("bolt", "50%"), ("bolt", "75%"), ("bolt", "90%")]
    with contextlib.closing(open_database(billed.url)) as database, database.reading() as connection:
        found = connection.execute(leases.select()).all()
    assert sorted(lease.tenant for lease in found) == ["acme", "bolt"] and all(lease.closed for lease in found)
    assert billed.check().problems == []


async def test_two_gateways_do_not_share_a_journal(billed: Billed) -> None:
    async with billed_gateway(billed):
        with pytest.raises(OSError, match=r"another gateway keeps its journal in .*: give each a folder of its own"):
            async with billed_gateway(billed, id="g2"):
                pass


async def test_the_journal_turns_over_and_keeps_no_more_than_is_unwritten(
        billed: Billed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.journal.FULL_BYTES", 1000)
    acme = billed.project("acme")
    async with billed_gateway(billed) as (client, _, gateway):
        for _ in range(12):
            assert (await client.post(TEXT, json=body(), headers=acme)).status_code == 200
        await gateway.billing.flush()
        assert len(list((billed.folder / "journal").glob("*.jsonl"))) == 1
    assert len(billed.records()) == 12

