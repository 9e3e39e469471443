"""The HTTP face, over the memory bus: what a client may send, and byte for byte what it gets."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from gateway.catalogue import Catalogue
from gateway.metrics import MAX_TENANTS, Metrics
from gateway.service import Gateway
from shared import subjects
from shared.blocks import hash_chain, join_hashes, tenant_salt
from shared.messages import Accepted, Adjust, Failed, Finished, GatewayStatus, Generate, Reply, Tokens, decode
from shared.noise import choice_seed
from shared.tokens import pack, unpack
from tests.gateway.fake_mesh import END, MODEL, START, FakeMesh, gateway_and_mesh, refusal, tiny_model

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO} | more


def events(response: httpx.Response) -> list[Any]:
    """The JSON of every event but the last, which must be [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def said(response: httpx.Response, index: int = 0) -> str:
    return "".join(choice["delta"].get("content", "") for event in events(response) for choice in event["choices"]
                   if choice["index"] == index)


async def test_a_chat_answer_in_one_piece_has_openais_shape() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        response = await client.post(CHAT, json=chat())
        assert response.status_code == 200
        body = response.json()
        assert body.pop("id").startswith("chatcmpl-")
        assert body.pop("created") > 1_600_000_000
        assert body.pop("system_fingerprint").startswith("fp_")
        prompt = len(unpack(mesh.requests[0].tokens))
        assert body == {
            "object": "chat.completion",
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
                         "finish_reason": "stop", "logprobs": None}],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": 14, "total_tokens": prompt + 14,
                "prompt_tokens_details": {"cached_tokens": 16},
                "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0,
                                              "rejected_prediction_tokens": 0},
                "mill": {"worker": "w1", "drafter": "d1", "draft_tokens": 8, "accepted_draft_tokens": 6,
                         "attempts": 1}},
        }
        assert response.headers["x-mill-worker"] == "w1"
        assert len(gateway.streams) == 0 and gateway.admission.active == 0


async def test_a_stream_is_framed_byte_for_byte() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.says, mesh.batch = b"Hi!", 2
        response = await client.post(CHAT, json=chat(stream=True))
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        first = events(response)[0]
        head = (f'{{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
                f'"model":"tiny","system_fingerprint":"{first["system_fingerprint"]}","choices":[{{"index":0,"delta":')
        assert response.content == (
            f'data: {head}{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]}}\n\n'
            f'data: {head}{{"content":"Hi"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
            f'data: {head}{{"content":"!"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
            f'data: {head}{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
            "data: [DONE]\n\n").encode()


async def test_usage_comes_only_when_asked_for_and_then_in_a_chunk_of_its_own() -> None:
    async with gateway_and_mesh() as (client, _, _):
        asked = events(await client.post(CHAT, json=chat(stream=True, stream_options={"include_usage": True})))
        assert [event["usage"] for event in asked[:-1]] == [None] * (len(asked) - 1)
        assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 14
        unasked = events(await client.post(CHAT, json=chat(stream=True)))
        assert not any("usage" in event for event in unasked)
        assert all(event["choices"] for event in unasked)
        steady = {"include_usage": True, "continuous_usage_stats": True}
        counts = [event["usage"]["completion_tokens"] for event in
                  events(await client.post(CHAT, json=chat(stream=True, stream_options=steady))) if event["usage"]]
        assert counts == sorted(counts) and counts[-1] == 14 and len(counts) > 2


async def test_a_text_completion_has_the_older_shape() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post(TEXT, json={"model": MODEL, "prompt": "Say hello"})).json()
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
        assert body["choices"] == [{"text": "Hello, world!", "index": 0, "logprobs": None, "finish_reason": "stop"}]
        assert bytes(unpack(mesh.requests[0].tokens)) == b"Say hello"
        streamed = events(await client.post(TEXT, json={"model": MODEL, "prompt": "Say hello", "stream": True}))
        assert "".join(event["choices"][0]["text"] for event in streamed) == "Hello, world!"
        assert [event["choices"][0]["finish_reason"] for event in streamed][-2:] == [None, "stop"]


@pytest.mark.parametrize(("prompt", "sent"), [
    ("ab", [[97, 98]]), (["a", "b"], [[97], [98]]), ([1, 2, 3], [[1, 2, 3]]), ([[1, 2], [3]], [[1, 2], [3]])])
async def test_a_prompt_may_be_text_or_tokens_one_or_several(prompt: Any, sent: list[list[int]]) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post(TEXT, json={"model": MODEL, "prompt": prompt, "n": 2})).json()
        assert [unpack(request.tokens) for request in mesh.requests] == [ids for ids in sent for _ in range(2)]
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(sent)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, sent))
        assert body["usage"]["completion_tokens"] == 14 * 2 * len(sent)


async def test_the_mesh_gets_tokens_hashes_sampling_and_a_seed_per_choice() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        await client.post(CHAT, json=chat(
            n=2, seed=-1, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, max_tokens=5, max_completion_tokens=3,
            stop_token_ids=[7], priority=3, prompt_cache_key="session", user="someone", unknown_field={"a": 1}))
        first, second = mesh.requests
        ids = unpack(first.tokens)
        assert ids[0] == START and bytes(ids[1:8]) == b"user:Hi" and ids[8] == END
        assert bytes(ids[10:]) == b"assistant:"
        assert first.block_hashes == join_hashes(hash_chain(ids, tenant_salt(b"tokenmill", "default")))
        assert first.cache_salt == tenant_salt(b"tokenmill", "default")
        sampling = first.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
        assert [request.sampling.seed for request in mesh.requests] == [choice_seed(2**64 - 1, i) for i in (0, 1)]
        assert (first.max_tokens, first.stop_token_ids, first.priority) == (3, (END, 7), -3)
        assert (first.cache_hint, first.model, first.gateway, first.attempt) == ("session", MODEL, "g1", 1)
        assert first.request_id != second.request_id
        assert 590 < first.deadline - gateway.clock.wall() <= 600


async def test_a_request_id_of_the_client_gives_the_same_seed_and_none_gives_another_each_time() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        for _ in range(2):
            response = await client.post(CHAT, json=chat(), headers={"X-Request-Id": "abc-1"})
            assert response.headers["x-request-id"] == "abc-1"
            assert (await client.post(CHAT, json=chat())).headers["x-request-id"] != "abc-1"
        seeds = [request.sampling.seed for request in mesh.requests]
        assert seeds[0] == seeds[2] and len(set(seeds)) == 3
        assert len({request.request_id for request in mesh.requests}) == 4


async def test_ignore_eos_asks_for_exactly_so_many_tokens() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post(CHAT, json=chat(max_tokens=20, ignore_eos=True))).json()
        assert mesh.requests[-1].stop_token_ids == ()
        assert body["choices"][0]["finish_reason"] == "length"


async def test_what_shifts_or_masks_logits_travels_as_ids_and_numbers() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        await client.post(CHAT, json=chat(
            presence_penalty=0.5, frequency_penalty=-0.25, repetition_penalty=1.5, min_tokens=3, stop_token_ids=[9],
            logit_bias={"70": -100, "65": 2.5, "66": 0}, allowed_token_ids=[70, 65, 65], bad_words=["no", " yes"]))
        assert mesh.requests[-1].adjust == Adjust(
            repetition_penalty=1.5, frequency_penalty=-0.25, presence_penalty=0.5, biased=pack([65, 70]),
            biases=np.array([2.5, -100], "<f4").tobytes(), min_tokens=3, allowed=pack([65, 70]),
            bad_words=tuple(pack([*word]) for word in (b"no", b" no", b" yes")))
        assert mesh.requests[-1].stop_token_ids == (END, 9)
        await client.post(CHAT, json=chat(presence_penalty=0, repetition_penalty=1, logit_bias={}, min_tokens=0))
        assert mesh.requests[-1].adjust is None


async def test_a_stop_string_counts_only_behind_min_tokens() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.says = b"no no no"
        for batch in (1, 3, 100):
            mesh.batch = batch
            body = (await client.post(CHAT, json=chat(stop=["no"], min_tokens=4))).json()
            assert body["choices"][0]["message"]["content"] == "no no "
            assert body["usage"]["completion_tokens"] == 8


async def test_without_max_tokens_the_answer_fits_what_is_left_of_the_context() -> None:
    async with gateway_and_mesh(default_max_tokens=300) as (client, mesh, _):
        await client.post(TEXT, json={"prompt": "a" * 50})
        await client.post(TEXT, json={"prompt": "a" * 250})
        assert [request.max_tokens for request in mesh.requests] == [300, 150]


async def test_a_stop_string_ends_the_answer_counts_to_its_token_and_stops_the_worker() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        for batch in (1, 4, 100):
            mesh.batch = batch
            body = (await client.post(CHAT, json=chat(stop=["wor"]))).json()
            assert body["choices"][0]["message"]["content"] == "Hello, "
            assert body["choices"][0]["finish_reason"] == "stop"
            assert body["usage"]["completion_tokens"] == 10
        await asyncio.wait_for(mesh.cancelled.wait(), 2)
        assert mesh.cancels[0].request_id == mesh.requests[0].request_id
        whole = (await client.post(CHAT, json=chat(stop="wor", include_stop_str_in_output=True))).json()
        assert whole["choices"][0]["message"]["content"] == "Hello, wor"


async def test_characters_leave_whole_however_their_bytes_are_batched() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.says, mesh.batch = "Grüße, 世界".encode(), 1
        response = await client.post(CHAT, json=chat(stream=True))
        assert said(response) == "Grüße, 世界"
        assert "\ufffd" not in response.text


async def test_several_choices_stream_side_by_side() -> None:
    async with gateway_and_mesh() as (client, _, _):
        response = await client.post(CHAT, json=chat(stream=True, n=3, stream_options={"include_usage": True}))
        assert [said(response, i) for i in range(3)] == ["Hello, world!"] * 3
        ends = [choice for event in events(response) for choice in event["choices"] if choice["finish_reason"]]
        assert sorted(choice["index"] for choice in ends) == [0, 1, 2]
        assert events(response)[-1]["usage"]["completion_tokens"] == 42


async def test_token_ids_come_back_when_asked_for() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post(CHAT, json=chat(return_token_ids=True))).json()
        assert body["choices"][0]["token_ids"] == [*b"Hello, world!", END]
        assert body["prompt_token_ids"] == unpack(mesh.requests[0].tokens)
        streamed = events(await client.post(CHAT, json=chat(return_token_ids=True, stream=True)))
        assert streamed[0]["prompt_token_ids"] == body["prompt_token_ids"]
        ids = [token for event in streamed for choice in event["choices"] for token in choice.get("token_ids", [])]
        assert ids == body["choices"][0]["token_ids"]


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"), ({"n": 0}, "n"), ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"seed": 1 << 70}, "seed"), ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"priority": 1000}, "priority"),
    ({"min_tokens": -3}, "min_tokens"), ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"logprobs": 3}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs with stream"),
    ({"logit_bias": {"five": 1}}, "logit_bias"), ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"), ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {str(id): 1 for id in range(1025)}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"), ({"allowed_token_ids": [258]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"), ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": [*range(1025)]}, "stop_token_ids"), ({"bad_words": ["a" * 65]}, "bad_words"),
    ({"bad_words": ["a" * 1025]}, "bad_words"), ({"bad_words": ["a", " "]}, "bad_words"),
    ({"bad_words": [str(i) for i in range(129)]}, "bad_words"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"), ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "a" * 200_000}, "guided_grammar"), ({"guided_choice": "a"}, "guided_choice"),
    ({"presence_penalty": 2.5}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"), ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "hi"}, "messages"),
]


@pytest.mark.parametrize(("more", "param"), WRONG, ids=[json.dumps(more)[:40] for more, _ in WRONG])
async def test_what_is_wrong_or_not_supported_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        response = await client.post(CHAT, json=chat(**more))
        assert response.status_code == 400
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"] and response.headers["x-request-id"]
        assert not mesh.requests and gateway.admission.active == 0


@pytest.mark.parametrize("more", [
    {"temperature": None, "stop": None, "max_tokens": None, "seed": None, "n": None, "stream_options": None},
    {"logprobs": False, "tools": [], "presence_penalty": 0, "response_format": {"type": "text"}, "logit_bias": {}},
    {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "reasoning_effort": "low", "tool_choice": "auto"},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be kind"}]}, *HELLO]},
])
async def test_null_defaults_and_unknown_fields_are_accepted(more: dict[str, Any]) -> None:
    async with gateway_and_mesh() as (client, _, _):
        assert (await client.post(CHAT, json=chat(**more))).status_code == 200


@pytest.mark.parametrize(("more", "param"), [
    ({}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["a", [1]]}, "prompt"), ({"prompt": ""}, "prompt"),
    ({"prompt": [999]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "logprobs": True}, "logprobs"), ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens")])
async def test_a_text_completion_is_refused_by_name_too(more: dict[str, Any], param: str) -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        response = await client.post(TEXT, json={"model": MODEL, **more})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert not mesh.requests and gateway.admission.active == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"x": ' + b"[" * 5000, b"null"])
async def test_a_body_that_is_no_request_is_a_clear_400(body: bytes) -> None:
    async with gateway_and_mesh() as (client, _, _):
        response = await client.post(CHAT, content=body)
        assert response.status_code == 400
        assert "body" in response.json()["error"]["message"]


async def test_a_missing_field_is_said_plainly_and_an_error_tells_its_length() -> None:
    async with gateway_and_mesh() as (client, _, _):
        response = await client.post(CHAT, json={"messages": [{"content": "a"}]})
        assert response.json()["error"]["message"] == "messages[0].role is missing"
        assert response.headers["content-length"] == str(len(response.content))


async def test_an_error_repeats_no_text_that_could_be_a_prompt_and_no_long_name() -> None:
    async with gateway_and_mesh() as (client, _, _):
        swapped = await client.post(CHAT, json=chat(messages=[{"role": "my secret", "content": "user"}]))
        assert swapped.status_code == 400 and "secret" not in swapped.text
        unknown = await client.post(CHAT, json=chat(model="m" * 10_000))
        assert unknown.status_code == 404 and len(unknown.content) < 400


def no_grammar(request: Generate) -> list[Reply]:
    return [Failed(request.request_id, request.attempt, "invalid_request", "the grammar cannot be used: my secret")]


@pytest.mark.parametrize("more", [
    {"model": "my secret"}, {"service_tier": "my secret"}, {"logit_bias": {"my secret": 1}},
    {"messages": [{"role": "my secret", "content": "a"}]}, {"stream": "my secret"}, {"guided_regex": "my secret"},
    {"tools": [{"type": "function", "function": {"name": "my.secret"}}] * 2},
    {"messages": [{"role": "user", "content": "a", "name": "my secret"}], "chat_template_kwargs": {"fails": True}}])
async def test_no_log_has_what_a_client_sent(more: dict[str, Any]) -> None:
    template = "{% if fails %}{{ raise_exception(messages[0].name) }}{% endif %}{{ messages[0].content }}"
    offered = tiny_model(context_length=4000, chat_template=template + "{# <tool_call> #}")
    async with gateway_and_mesh(offered) as (client, mesh, _):
        mesh.script = no_grammar
        for stream in (False, True):
            with structlog.testing.capture_logs() as lines:
                response = await client.post(CHAT, json=chat(stream=stream) | more)
            assert response.status_code in (400, 404), response.text
            [refused] = [line for line in lines if line["event"] == "request_refused"]
            assert refused["code"] and "secret" not in str(lines)


async def test_what_others_count_below_nothing_counts_as_nothing() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        mesh.script = lambda request: [
            Accepted(request.request_id, 1, "w1", cached_tokens=-7),
            Tokens(request.request_id, 1, 0, pack([*b"Hi"])),
            Finished(request.request_id, 1, "stop", completion_tokens=2, cached_tokens=-7, draft_tokens=-3,
                     accepted_draft_tokens=-2)]
        body = (await client.post(CHAT, json=chat())).json()
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        text = gateway.metrics.exposition()[0].decode()
        for name in ("cached", "draft", "accepted_draft", "found_cached"):
            assert f"mill_gateway_{name}_tokens_total 0.0" in text


async def test_an_over_long_prompt_is_refused_before_any_worker_sees_it() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        for more in ({"prompt": "a" * 400}, {"prompt": "a" * 390, "max_tokens": 20}):
            response = await client.post(TEXT, json=more)
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        error = (await client.post(CHAT, json=chat(messages=[{"role": "user", "content": "a" * 400}]))).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert not mesh.requests


async def test_a_body_over_the_limit_is_413_told_by_its_header_or_as_it_comes() -> None:
    async with gateway_and_mesh(max_body_bytes=1000) as (client, _, _):
        assert (await client.post(CHAT, content=b"x" * 1001)).status_code == 413

        async def parts() -> Any:
            for _ in range(100):
                yield b"x" * 100

        response = await client.post(CHAT, content=parts())
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


async def test_an_unknown_model_is_404_and_both_names_of_the_served_one_are_known() -> None:
    async with gateway_and_mesh() as (client, _, _):
        response = await client.post(CHAT, json=chat(model="gpt-9"))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.post(CHAT, json=chat(model="tiny-of-bytes"))).json()["model"] == MODEL
        assert (await client.get("/v1/models/gpt-9")).status_code == 404


async def test_unknown_paths_and_methods_have_the_same_shape_of_error() -> None:
    async with gateway_and_mesh() as (client, _, _):
        for response, status in ((await client.get("/v2/chat"), 404), (await client.get(CHAT), 405)):
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.headers["x-request-id"]


# --- the mesh in trouble ---------------------------------------------------------------------------------------------


async def test_an_overloaded_mesh_is_a_real_503_with_retry_after_also_for_a_stream() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.script = lambda request: refusal(request, "overloaded", True, 2.5)
        for stream in (False, True):
            mesh.requests.clear()
            response = await client.post(CHAT, json=chat(stream=stream))
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "overloaded"
            assert "retry-after" in response.headers


async def test_a_router_that_refuses_says_when_to_come_back() -> None:
    async with gateway_and_mesh() as (client, mesh, _):

        async def refuse(request: Generate) -> None:
            await mesh.reply(request.gateway, *refusal(request, "overloaded", True, 2.5), sender="r1")

        mesh.script = lambda request: (asyncio.ensure_future(refuse(request)), [])[1]
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.headers["retry-after"], response.headers["retry-after-ms"]) == (
            503, "3", "2500")
        assert len(mesh.requests) == 1


async def test_no_eligible_worker_says_that_a_retry_is_no_use_unless_one_was_heard_lately() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        mesh.script = lambda request: refusal(request, "no_eligible_worker")
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "2" and "x-should-retry" not in response.headers
        mesh.model = "other"
        while gateway.fleet.workers(MODEL):
            await asyncio.sleep(0.01)
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_eligible_worker")
        assert response.headers["x-should-retry"] == "false"


async def test_no_router_at_all_is_503_soon_and_a_router_that_comes_back_in_time_is_enough() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        await mesh.bus.close()
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "mesh_unavailable")
        assert response.headers["retry-after"] == "1"
        late = FakeMesh(mesh.bus.broker)
        asking = asyncio.create_task(client.post(CHAT, json=chat()))
        await asyncio.sleep(0.1)
        await late.start()
        assert (await asking).status_code == 200


async def test_a_broker_that_is_gone_is_503_with_retry_after() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        mesh.bus.broker.stop()
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "mesh_unavailable")
        assert "retry-after" in response.headers


async def test_a_broker_restart_in_mid_stream_is_a_pause_and_nothing_else() -> None:
    async with gateway_and_mesh(silence_s=0.3) as (client, mesh, gateway):
        mesh.batch, mesh.pause_s = 1, 0.02
        asking = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
        while not any(len(stream.state.delivered) > 3 for stream in gateway.streams._streams.values()):
            await asyncio.sleep(0.01)
        mesh.bus.broker.stop()
        while mesh.tasks:
            await asyncio.sleep(0.01)
        mesh.bus.broker.start()
        assert said(await asking) == "Hello, world!"
        assert mesh.requests[-1].attempt > 1 and mesh.requests[-1].generated


async def test_a_gap_in_the_stream_is_mended_without_a_trace_in_the_text() -> None:
    async with gateway_and_mesh() as (client, mesh, _):

        def script(request: Generate) -> list[Reply] | None:
            if request.attempt > 1:
                return None
            name = request.request_id
            return [Accepted(name, 1, "w1"), Tokens(name, 1, 0, pack([*b"Hel"])), Tokens(name, 1, 5, pack([*b", "]))]

        mesh.script = script
        response = await client.post(CHAT, json=chat(stream=True, stream_options={"include_usage": True}))
        assert said(response) == "Hello, world!"
        usage = events(response)[-1]["usage"]
        assert (usage["completion_tokens"], usage["mill"]["attempts"]) == (14, 2)
        again = mesh.requests[1]
        assert (bytes(unpack(again.generated)), again.attempt) == (b"Hel", 2)
        assert mesh.cancels[0].attempt == 1
        text = (await client.get("/metrics")).text
        assert 'mill_gateway_resubmissions_total{cause="gap"} 1.0' in text


async def test_an_error_after_the_headers_is_an_event_and_the_end() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):

        def script(request: Generate) -> list[Reply] | None:
            name = request.request_id
            return [Accepted(name, 1, "w1"), Tokens(name, 1, 0, pack([*b"Hel"])),
                    Failed(name, 1, "invalid_request", "cannot go on")]

        mesh.script = script
        response = await client.post(CHAT, json=chat(stream=True))
        assert response.status_code == 200
        *chunks, last, empty = response.text.split("\n\n")
        assert empty == "" and "[DONE]" not in response.text
        assert json.loads(last.removeprefix("data: ")) == {"error": {
            "message": "cannot go on", "type": "invalid_request_error", "param": None, "code": "invalid_request"}}
        assert '"content":"Hel"' in chunks[-1]
        assert gateway.admission.active == 0 and len(gateway.streams) == 0


async def test_headers_come_though_the_queue_is_long_and_comments_keep_the_line_open(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.answer.HEADERS_WITHIN_S", 0.05)
    async with gateway_and_mesh(keep_alive_s=0.05, accept_s=5.0) as (client, mesh, _):
        released = asyncio.Event()
        mesh.script = lambda request: [] if not released.is_set() else None
        asking = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
        while not mesh.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        released.set()
        await mesh._serve(mesh.requests[0])
        response = await asking
        assert response.text.startswith(": keep-alive\n\n")
        assert '"content":"Hell"' in response.text


async def test_more_streams_than_places_are_refused_at_once() -> None:
    async with gateway_and_mesh(max_active=2) as (client, mesh, gateway):
        mesh.pause_s = 0.1
        running = asyncio.create_task(client.post(CHAT, json=chat(n=2)))
        while gateway.admission.active < 2:
            await asyncio.sleep(0)
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert (await running).status_code == 200
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_more_choices_than_there_ever_are_places_is_the_clients_mistake() -> None:
    async with gateway_and_mesh(max_active=2) as (client, _, _):
        response = await client.post(CHAT, json=chat(n=3))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


async def test_a_leaving_gateway_finishes_what_runs_and_takes_nothing_new() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        mesh.pause_s = 0.05
        running = asyncio.create_task(client.post(CHAT, json=chat()))
        while not mesh.requests:
            await asyncio.sleep(0)
        draining = asyncio.create_task(gateway.drain())
        await asyncio.sleep(0)
        refused = await client.post(CHAT, json=chat())
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await running).json()["choices"][0]["message"]["content"] == "Hello, world!"
        await draining


async def test_what_does_not_end_in_time_ends_with_an_error_when_the_gateway_leaves() -> None:
    async with gateway_and_mesh(drain_s=0.05) as (client, mesh, gateway):
        mesh.script = lambda request: [Accepted(request.request_id, 1, "w1")]
        running = asyncio.create_task(client.post(CHAT, json=chat()))
        while not mesh.requests:
            await asyncio.sleep(0)
        await gateway.drain()
        assert (await running).status_code == 503
        await asyncio.wait_for(mesh.cancelled.wait(), 2)


async def test_a_message_nobody_can_read_is_counted_and_harms_nobody() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        await mesh.bus.publish(subjects.replies("g1"), b"\xc1 not msgpack")
        await mesh.bus.publish(subjects.status("worker", "w9"), b"")
        await mesh.reply("g1", Tokens("stranger", 1, 0, pack([1])), Finished("stranger", 1, "stop"))
        assert (await client.post(CHAT, json=chat())).status_code == 200
        assert "mill_gateway_bad_messages_total 2.0" in (await client.get("/metrics")).text
        await asyncio.wait_for(mesh.cancelled.wait(), 2)
        assert [cancel.request_id for cancel in mesh.cancels] == ["stranger"]


async def test_a_sender_whose_name_fits_no_subject_does_not_end_the_gateways_sending() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        refused = gateway.bus.publish

        async def publish(subject: str, *rest: Any) -> None:
            if " " in subject:
                raise ValueError("a subject with a space")  # as a broker's client does
            await refused(subject, *rest)

        gateway.bus.publish = publish  # type: ignore[method-assign]
        await mesh.reply("g1", Tokens("stranger", 1, 0, pack([1])), sender="not a name")
        assert (await client.post(CHAT, json=chat())).status_code == 200


# --- the other endpoints ---------------------------------------------------------------------------------------------


async def test_ready_names_what_is_missing_and_who_is_there() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        await client.get("/health")
        body = (await client.get("/ready")).json()
        assert body["ready"] and [worker["id"] for worker in body["workers"]] == ["w1"]
        assert body["workers"][0]["running"] == 0 and [router["id"] for router in body["routers"]] == ["r1"]
        mesh.bus.broker.stop()
        response = await client.get("/ready")
        assert response.status_code == 503 and "bus" in response.json()["reasons"][0]
        mesh.bus.broker.start()
        gateway.fleet.forget_silent(gateway.clock.now() + 100, 2.0)
        reasons = (await client.get("/ready")).json()["reasons"]
        assert "router" in reasons[0] and MODEL in reasons[1]


async def test_models_are_listed_with_their_context() -> None:
    async with gateway_and_mesh() as (client, _, _):
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        (model,) = listed["data"]
        assert (model["id"], model["object"], model["owned_by"], model["max_model_len"]) == (
            MODEL, "model", "tokenmill", 400)
        assert (await client.get(f"/v1/models/{MODEL}")).json() == model


async def test_text_to_tokens_and_back() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post("/tokenize", json={"prompt": "Hé<|end|>"})).json()
        assert body == {"count": 4, "max_model_len": 400, "tokens": [72, 0xC3, 0xA9, END]}
        assert (await client.post("/detokenize", json={"tokens": body["tokens"]})).json() == {"prompt": "Hé<|end|>"}
        chatted = (await client.post("/tokenize", json={"messages": HELLO})).json()
        await client.post(CHAT, json=chat())
        assert chatted["tokens"] == unpack(mesh.requests[0].tokens)
        assert (await client.post("/tokenize", json={})).status_code == 400
        assert (await client.post("/detokenize", json={"tokens": [258]})).status_code == 400


async def test_metrics_tell_requests_tokens_latencies_and_workers() -> None:
    async with gateway_and_mesh() as (client, _, _):
        await client.post(CHAT, json=chat())
        await client.post(CHAT, json=chat(n=0))
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        for line in ('mill_gateway_requests_total{route="/v1/chat/completions",status="200"} 1.0',
                     'mill_gateway_requests_total{route="/v1/chat/completions",status="400"} 1.0',
                     "mill_gateway_completion_tokens_total 14.0", "mill_gateway_cached_tokens_total 16.0",
                     "mill_gateway_active_streams 0.0", "mill_time_to_first_token_seconds_count 1.0",
                     'mill_gateway_refused_total{code="invalid_request"} 1.0',
                     'mill_gateway_refused_total{code="overloaded"} 0.0',
                     'mill_gateway_tenant_tokens_total{kind="completion",tenant="default"} 14.0',
                     'mill_gateway_tenant_tokens_total{kind="cached",tenant="default"} 16.0',
                     "process_resident_memory_bytes",
                     "gen_ai_server_request_duration_seconds_bucket", 'mill_fleet_running{model="tiny",',
                     "# TYPE mill_fleet_tokens_total counter"):
            assert line in response.text, line
        for family in text_string_to_metric_families(response.text):
            assert family.documentation, family.name
            assert not family.name.endswith("_total") or family.type == "counter", family.name


async def test_each_message_of_a_stream_behind_its_first_counts_for_the_latency_between_tokens() -> None:
    async with gateway_and_mesh() as (client, _, gateway):
        await client.post(CHAT, json=chat())  # fourteen tokens, four in a message
        assert gateway.metrics.registry.get_sample_value("mill_inter_token_latency_seconds_count") == 3


async def test_names_that_clients_make_up_add_no_series() -> None:
    async with gateway_and_mesh() as (client, _, _):
        async def series() -> set[str]:
            text = (await client.get("/metrics")).text
            return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

        async def odd(number: int) -> None:
            await client.post(CHAT, json=chat(model=f"made-up-{number}"))
            await client.get(f"/made/up/{number}")
            await client.get("/v1/models", headers={"authorization": f"Bearer made-up-{number}"})

        await odd(0)
        await series()  # being read is a request too
        before = await series()
        for number in range(1, 20):
            await odd(number)
        assert await series() == before


def test_tenants_beyond_the_bound_are_counted_together() -> None:
    metrics = Metrics(lambda: [])
    for number in range(MAX_TENANTS + 50):
        metrics.used(f"t{number}", 3, 1, 2)
    metrics.used("t0", 3, 1, 2)
    text = metrics.exposition()[0].decode()
    lines = [line for line in text.splitlines() if line.startswith("mill_gateway_tenant_tokens_total{")]
    assert len(lines) == 3 * (MAX_TENANTS + 1)
    assert 'mill_gateway_tenant_tokens_total{kind="prompt",tenant="other"} 150.0' in lines
    assert 'mill_gateway_tenant_tokens_total{kind="completion",tenant="t0"} 4.0' in lines


async def test_the_log_joins_the_clients_id_with_the_one_that_the_mesh_knows() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
            await client.post(CHAT, json=chat(), headers={"x-request-id": "theirs"})
        [ended] = [line for line in lines if line["event"] == "request_ended"]
        assert ended["request_id"] == "theirs"
        assert f"{ended['response'].removeprefix('chatcmpl-')}-0" == mesh.requests[0].request_id


async def test_a_long_prompt_is_tokenised_aside_and_gives_the_same() -> None:
    async with gateway_and_mesh(tiny_model(context_length=100_000)) as (client, mesh, _):
        text = "words and words " * 1000
        assert (await client.post(TEXT, json={"prompt": text})).status_code == 200
        assert bytes(unpack(mesh.requests[0].tokens)).decode() == text


async def test_a_prompt_larger_than_a_message_is_413() -> None:
    async with gateway_and_mesh(tiny_model(context_length=1_000_000)) as (client, _, gateway):
        response = await client.post(TEXT, json={"prompt": "a" * 300_000})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert gateway.admission.active == 0


async def test_the_gateway_beats_with_its_load() -> None:
    async with gateway_and_mesh(heartbeat_s=0.02) as (_, mesh, gateway):
        heard: list[GatewayStatus] = []
        changed = asyncio.Event()

        def note(delivery: Any) -> None:
            heard.append(decode(delivery.data, GatewayStatus))
            changed.set()

        await mesh.bus.subscribe(subjects.status("gateway", "g1"), note)
        await asyncio.wait_for(changed.wait(), 2)
        assert (heard[0].id, heard[0].epoch, heard[0].state) == ("g1", gateway.epoch, "ready")
        await gateway.drain()
        while heard[-1].state != "draining":
            changed.clear()
            await asyncio.wait_for(changed.wait(), 2)


async def test_a_gateway_without_a_model_says_so() -> None:
    async with gateway_and_mesh() as (client, _, gateway):
        gateway.catalogue = Catalogue(())
        assert (await client.post(CHAT, json=chat())).status_code == 404
        assert (await client.get("/v1/models")).json()["data"] == []
        assert (await client.get("/ready")).status_code == 503


def test_gateway_is_what_its_users_import() -> None:
    assert Gateway.__module__ == "gateway.service"
