"""What drafts brought a request, in the shapes that tools read; and that nothing else of an answer shows them."""

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace

from gateway.service import Gateway
from gateway.speculation import accepted_at, metrics_of
from shared.messages import Accepted, Cancel, Finished, Generate, Reply, Tokens
from shared.tokens import pack
from tests.gateway.fake_mesh import END, gateway_and_mesh
from tests.gateway.world import virtual, world
from tests.laws.liars import lying

VLLM = {"mean_acceptance_length": 3.0, "draft_acceptance_rate": 0.75, "acceptance_histogram": [0, 1, 0, 1],
        "num_spec_steps": 2, "num_accepted_draft_tokens": 4, "num_draft_tokens": 6, "num_spec_tokens": 3}
VLLM["draft_acceptance_rate"] = 4 / 6
OURS = {"late_draft_tokens": 5, "time_saved_ms": 12.5, "drafter_ms": 2.0, "drafter_usd": 1e-6, "drafter": "d1"}


def script(request: Generate) -> list[Reply]:
    """A stream of seven tokens in which drafts took part."""
    name = request.request_id
    tokens = [*b"Hello!", END]
    return [Accepted(name, 1, "w1"), Tokens(name, 1, 0, pack(tokens)),
            Finished(name, 1, "stop", "w1", 5, 0, len(tokens), 6, 4, "d1", 0.25, 0.5, 1.5, draft_steps=2,
                     accepted_counts=(0, 1, 0, 1), late_draft_tokens=5, draft_saved_s=0.0125, drafter_s=0.002,
                     drafter_usd=1e-6)]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_what_drafts_brought_as_vllm_does(path: str, stream: bool) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "stream": stream,
                            "stream_options": {"include_usage": True}}
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.script = script
        response = await client.post(path, json=body)
        if stream:
            events = [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-2]]
            assert all("metrics" not in event for event in events[:-1])
            document = events[-1]
            assert document["choices"] == []
        else:
            document = response.json()
    assert document["metrics"] == {
        "time_to_first_token_ms": 500.0, "generation_time_ms": 1500.0, "queue_time_ms": 250.0, "mean_itl_ms": 250.0,
        "tokens_per_second": pytest.approx(7 / 1.5, abs=1e-3), "speculative_decoding": VLLM | OURS}


def unended(request: Generate) -> list[Reply]:
    """The stream of `script` before its end, of which a stop string in it is not the worker's business."""
    return script(replace(request, max_tokens=100))[:2]


def last_words(cancel: Cancel) -> list[Reply]:
    """What its worker says of it: it had gone on for two tokens."""
    *_, end = script(Generate(cancel.request_id, 1, gateway="g1", model="tiny", tokens=b"", max_tokens=9, deadline=0.0))
    assert isinstance(end, Finished)
    return [Tokens(cancel.request_id, 1, 7, pack([65, 66])), replace(end, reason="cancelled", completion_tokens=9)]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_a_stop_string_ended_says_it_too(path: str, stream: bool) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "stream": stream,
                            "stream_options": {"include_usage": True}, "stop": "lo"}
    async with gateway_and_mesh() as (client, mesh, gateway):
        mesh.script, mesh.last_words, mesh.drafter = unended, last_words, "d1"
        await heard_drafter(gateway)
        response = await client.post(path, json=body, headers={"x-request-id": "asked"})
        if stream:
            events = [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-2]]
            assert [event["choices"][0]["finish_reason"] for event in events[-2:-1]] == ["stop"]
            document = events[-1]
        else:
            document = response.json()
            assert document["choices"][0]["finish_reason"] == "stop"
        (receipt,) = (await client.get("/v1/requests/asked/receipt")).json()["choices"]
    assert document["usage"]["completion_tokens"] == 5
    assert document["metrics"]["speculative_decoding"] == VLLM | OURS
    # of all that the worker did
    assert document["metrics"]["tokens_per_second"] == pytest.approx(9 / 1.5, abs=1e-3)
    assert receipt["ended"] == "stop" and receipt["speculation"]["drafter"] == "d1"
    assert not gateway.streams._parting


async def test_a_last_word_that_does_not_come_or_is_anothers_is_waited_for_for_a_moment_and_only_where_drafts_are(
        ) -> None:
    def alien(cancel: Cancel) -> list[Reply]:
        return [replace(last_words(cancel)[-1], attempt=2)]

    body = {"prompt": "Hi", "stop": "lo"}
    async with gateway_and_mesh() as (client, mesh, gateway):
        mesh.script, mesh.last_words = unended, last_words
        without = await client.post("/v1/completions", json=body)
        mesh.drafter = "d1"
        await heard_drafter(gateway)
        answers = []
        for mesh.last_words in (lambda cancel: [], alien):
            answers.append(await client.post("/v1/completions", json=body))
            assert not gateway.streams._parting
    for response in (without, *answers):
        assert response.status_code == 200 and "metrics" not in response.json()
        assert response.json()["choices"][0]["text"] == "Hel"
    assert len(mesh.cancels) == 3


async def heard_drafter(gateway: Gateway) -> None:
    """Until the gateway knows that the worker follows a drafter."""
    while (worker := gateway.fleet.worker("w1")) is None or not worker.drafter:
        await asyncio.sleep(0.01)


async def test_of_several_streams_and_of_one_without_a_drafter_nothing_is_said() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.script = script
        several = await client.post("/v1/completions", json={"prompt": "Hi", "n": 2})
        mesh.script = lambda request: None  # what comes then says nothing of steps, as an older worker
        older = await client.post("/v1/completions", json={"prompt": "Hi"})
    assert "metrics" not in several.json() and "metrics" not in older.json()


async def test_prometheus_has_it_under_vllms_names_and_ours() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.script = script
        for _ in range(2):
            await client.post("/v1/completions", json={"prompt": "Hi"})
        text = (await client.get("/metrics")).text
    for line in ('vllm:spec_decode_num_drafts_total{model_name="tiny"} 4.0',
                 'vllm:spec_decode_num_draft_tokens_total{model_name="tiny"} 12.0',
                 'vllm:spec_decode_num_accepted_tokens_total{model_name="tiny"} 8.0',
                 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="0"} 4.0',
                 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="2"} 2.0',
                 "mill_gateway_late_draft_tokens_total 10.0", "mill_gateway_draft_saved_seconds 0.025",
                 "mill_gateway_drafter_seconds_total 0.004", "mill_gateway_drafter_usd_total 2e-06"):
        assert line in text, line


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
async def test_a_workers_figure_that_is_none_costs_no_request_its_receipt(wrong: float) -> None:
    def forged(request: Generate) -> list[Reply]:
        *before, end = script(request)
        assert isinstance(end, Finished)
        return [*before, replace(end, drafter_s=wrong, drafter_usd=wrong, late_draft_tokens=-1)]

    async with gateway_and_mesh() as (client, mesh, gateway):
        for mesh.script in (forged, script):
            assert (await client.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200
        text = (await client.get("/metrics")).text
        assert len(gateway.receipts) == 2
    assert "mill_gateway_drafter_seconds_total 0.002" in text and "mill_gateway_drafter_usd_total 1e-06" in text


def test_what_was_accepted_at_each_place_follows_from_how_many_each_step_accepted() -> None:
    counts = (3, 2, 0, 1)
    end = Finished("r", 1, "stop", accepted_counts=counts)
    assert accepted_at(end) == [3, 1, 1]
    assert sum(accepted_at(end)) == sum(accepted * steps for accepted, steps in enumerate(counts))


def test_of_a_stream_that_moved_nothing_is_said_of_all_its_tokens_over_its_last_workers_time() -> None:
    """Its last worker counts 102 tokens and has said two of them, in 20 ms."""
    end = Finished("r", 2, "stop", completion_tokens=102, drafter="d1", accepted_counts=(1, 1), draft_steps=2,
                   decode_s=0.02)
    moved, first = metrics_of(end), metrics_of(replace(end, attempt=1))
    assert moved is not None and (moved.mean_itl_ms, moved.tokens_per_second) == (None, None)
    assert moved.generation_time_ms == 20.0
    assert first is not None and first.tokens_per_second == 5100.0


# whatever a request may ask for: with drafts it gets what it gets without
ASKS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 0.8, "seed": 7, "n": 4},
    {"temperature": 1.3, "seed": 8, "top_k": 20, "n": 2},
    {"temperature": 1.0, "seed": 9, "top_p": 0.6, "min_p": 0.02},
    {"temperature": 0.8, "seed": 10, "ignore_eos": True, "return_token_ids": True},
    {"temperature": 0.8, "seed": 11, "max_tokens": 1},
    {"temperature": 0.8, "seed": 12, "n": 3, "stop_token_ids": list(range(40, 60)), "return_token_ids": True},
    {"temperature": 0, "prompt": ["The mill turns. " * 8, "The wheel stands. " * 8], "n": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.9, "seed": 13, "frequency_penalty": 0.8, "n": 2},
    # so few words that they repeat, and drafts agree under the penalty too
    {"temperature": 0.7, "seed": 14, "allowed_token_ids": [97, 98], "presence_penalty": 0.2, "n": 2},
    {"temperature": 0, "logit_bias": {"97": 100}, "bad_words": ["aaaa"]},
    {"temperature": 0.8, "seed": 15, "logprobs": 2, "return_token_ids": True},
    {"temperature": 0.8, "seed": 16, "min_tokens": 30, "stop_token_ids": list(range(100))},
)


async def answers(drafters: int, asks: tuple[dict[str, Any], ...], stream: bool) -> tuple[list[Any], int]:
    """What clients get, and how many drafts were accepted."""
    found: list[Any] = []
    accepted = 0
    async with world(zones=("eu",), drafters=drafters) as mesh:
        for ask in asks:
            body = {"max_tokens": 60, "stream": stream, "stream_options": {"include_usage": True}} | ask
            response = await mesh.ask(**body)
            documents = ([json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-2]]
                         if stream else [response.json()])
            texts: dict[int, list[Any]] = {}
            for document in documents:
                for choice in document["choices"]:
                    text, ids, logprobs, reason = texts.setdefault(choice["index"], ["", [], [], None])
                    texts[choice["index"]] = [text + choice["text"], ids + choice.get("token_ids", []),
                                              logprobs + (choice["logprobs"] or {}).get("token_logprobs", []),
                                              reason or choice["finish_reason"]]
            usage = documents[-1]["usage"]
            accepted += usage["mill"]["accepted_draft_tokens"]
            found.append((texts, usage["completion_tokens"]))
    return found, accepted


@virtual
async def test_whatever_a_request_asks_for_it_gets_the_same_with_drafts_and_without() -> None:
    for stream in (False, True):
        plain, _ = await answers(0, ASKS, stream)
        with lying(5, vocabulary=258):
            drafted, accepted = await answers(1, ASKS, stream)
        assert drafted == plain
        assert accepted > 100


@virtual
async def test_a_stop_string_ends_an_answer_at_the_same_place_with_drafts_and_without() -> None:
    plain, _ = await answers(0, ASKS[:2], False)
    # pieces of what will be said, each of which ends it somewhere else
    stops = [[text[at:at + length]] for texts, _ in plain for text, *_ in texts.values()
             for at in (3, 17, 30) for length in (1, 2, 3) if text[at:at + length]]
    asks = tuple({"temperature": 0, "stop": stop, "include_stop_str_in_output": bool(number % 2)}
                 for number, stop in enumerate(stops))
    assert len(asks) > 8
    without, _ = await answers(0, asks, False)
    with lying(6, vocabulary=258):
        drafted, _ = await answers(1, asks, False)
    assert drafted == without
    assert any(reason == "stop" for texts, _ in without for *_, reason in texts.values())
