"""How likely tokens were, as the official client and evaluation tools read it: whole, streamed, of prompts."""

import math
from typing import Any

import pytest

from gateway.openai.logprobs import Spelling, Told, text_logprobs
from shared.logprobs import Likely, record_bytes, unpack_likely
from shared.messages import Accepted, Generate, Reply, Scored, Tokens
from shared.tokens import pack, unpack
from tests.gateway.fake_mesh import END, MODEL, gateway_and_mesh, likely
from tests.gateway.test_api import CHAT, TEXT, chat, events
from tests.gateway.test_openai_client import HELLO, client_of, served


def test_a_record_is_read_as_it_was_packed() -> None:
    packed = likely([65, 66], 2)
    assert len(packed) == 2 * record_bytes(2)
    assert unpack_likely(packed[record_bytes(2):]) == Likely(-66 / 256, 67, [(67, 0.0), (68, -1.0)])
    with pytest.raises(ValueError):
        unpack_likely(packed[:12])


async def test_the_official_client_reads_logprobs_of_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, _), client_of(url) as client:
        mesh.says = "Né".encode()
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == "Né" and whole.choices[0].logprobs
        content = whole.choices[0].logprobs.content
        assert content and [entry.token for entry in content] == ["N", "\ufffd", "\ufffd", "<|end|>"]
        assert bytes(byte for entry in content[:-1] for byte in entry.bytes or []).decode() == "Né"
        assert content[0].logprob == -ord("N") / 256
        assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("O", 0.0), ("P", -1.0)]
        streamed: list[Any] = []
        async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True,
                                                                logprobs=True, top_logprobs=2):
            for choice in chunk.choices:
                streamed += choice.logprobs.content or [] if choice.logprobs else []
        assert streamed == content
        plain = await client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
        assert plain.choices[0].logprobs and plain.choices[0].logprobs.content
        assert plain.choices[0].logprobs.content[0].top_logprobs == []


async def test_the_official_client_reads_logprobs_and_echo_of_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, _), client_of(url) as client:
        mesh.says = b"!?"
        whole = await client.completions.create(model=MODEL, prompt="Hi", logprobs=1, echo=True)
        choice = whole.choices[0]
        assert choice.text == "Hi!?" and choice.logprobs
        assert choice.logprobs.tokens == ["H", "i", "!", "?", "<|end|>"]
        assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
        assert choice.logprobs.token_logprobs == [None, *(-code / 256 for code in b"i!?"), -END / 256]
        assert choice.logprobs.top_logprobs
        assert choice.logprobs.top_logprobs[1] == {"j": 0.0, "i": -ord("i") / 256}
        tokens, text = [], ""
        async for chunk in await client.completions.create(model=MODEL, prompt="Hi", logprobs=1, echo=True,
                                                           stream=True):
            text += chunk.choices[0].text
            told = chunk.choices[0].logprobs
            tokens += list(zip(told.tokens or [], told.text_offset or [], strict=True)) if told else []
        assert text == "Hi!?"
        assert tokens == list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))


async def test_a_prompt_alone_is_scored_without_an_answer() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post(TEXT, json={"prompt": "Hi", "echo": True, "max_tokens": 0, "logprobs": 0})).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
        assert choice["logprobs"]["tokens"] == ["H", "i"]
        assert body["usage"]["completion_tokens"] == 0
        assert mesh.requests[-1].max_tokens == 1


async def test_prompt_logprobs_have_vllms_shape() -> None:
    async with gateway_and_mesh() as (client, _, _):
        body = (await client.post(CHAT, json=chat(prompt_logprobs=1))).json()
        prompt = body["prompt_logprobs"]
        assert prompt[0] is None and len(prompt) == body["usage"]["prompt_tokens"]
        assert all(len(entry) == 2 for entry in prompt[1:])
        body = (await client.post(TEXT, json={"prompt": "ab", "prompt_logprobs": 0})).json()
        assert body["choices"][0]["prompt_logprobs"] == [
            None, {"98": {"logprob": -98 / 256, "rank": 99, "decoded_token": "b"}}]
        assert body["choices"][0]["logprobs"] is None and body["choices"][0]["text"] == "Hello, world!"


async def test_a_prompt_is_scored_once_for_all_its_choices() -> None:
    """Each of 16 choices had all of the prompt computed anew, for the same numbers."""
    async with gateway_and_mesh() as (client, mesh, _):
        asked = {"prompt": ["ab", "cde"], "n": 3, "seed": 1, "prompt_logprobs": 0, "echo": True, "logprobs": 1}
        body = (await client.post(TEXT, json=asked)).json()
        assert sorted(request.prompt_logprobs for request in mesh.requests) == [-1, -1, -1, -1, 1, 1]
        for choice in body["choices"]:
            prompt = ["ab", "cde"][choice["index"] // 3]
            assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [1] * (len(prompt) - 1)
            assert "".join(choice["logprobs"]["tokens"][:len(prompt)]) == prompt
            assert None not in choice["logprobs"]["token_logprobs"][1:len(prompt)]


async def test_more_about_prompts_than_an_answer_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.openai.parameters.MAX_SCORES", 100)
    async with gateway_and_mesh() as (client, mesh, _):
        for more, status in (({"n": 2}, 200), ({"n": 4}, 400), ({"prompt_logprobs": 10}, 400)):
            body = {"prompt": "abcdefghij", "prompt_logprobs": 3, "seed": 1, **more}
            response = await client.post(TEXT, json=body)
            assert response.status_code == status, more
        assert response.json()["error"]["param"] == "prompt_logprobs" and len(mesh.requests) == 2


async def test_a_stop_string_cuts_logprobs_where_it_cuts_tokens() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        for batch in (1, 4, 100):
            mesh.batch = batch
            body = (await client.post(CHAT, json=chat(stop=["wor"], logprobs=True))).json()
            told = "".join(entry["token"] for entry in body["choices"][0]["logprobs"]["content"])
            assert told == "Hello, wor" and body["usage"]["completion_tokens"] == 10
            streamed = events(await client.post(CHAT, json=chat(stop=["wor"], logprobs=True, stream=True)))
            assert told == "".join(entry["token"] for event in streamed for choice in event["choices"]
                                   for entry in (choice["logprobs"] or {}).get("content", []))


async def test_logprobs_survive_a_second_attempt_and_lost_ones_are_asked_again() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        lost = []

        def script(request: Generate) -> list[Reply] | None:
            """The first attempt loses what it told of the prompt; the second breaks off after two tokens."""
            lost.append(request)
            name, attempt, prompt = request.request_id, request.attempt, unpack(request.tokens)
            if attempt == 1:
                return [Accepted(name, 1, "w1"), Tokens(name, 1, 0, pack(b"H"), likely([72], 0))]
            if attempt == 2:
                return [Accepted(name, 2, "w1"), Scored(name, 2, 1, likely(prompt[1:], 0)),
                        Tokens(name, 2, 0, pack([72, 101]), likely([72, 101], 0)),
                        Tokens(name, 2, 3, pack([9]), likely([9], 0))]
            return None

        mesh.script = script
        body = (await client.post(TEXT, json={"prompt": "abc", "echo": True, "logprobs": 0})).json()
        assert [request.prompt_logprobs for request in lost] == [0, 0, -1]
        assert unpack(lost[2].generated) == [72, 101]
        assert body["choices"][0]["text"] == "abcHello, world!"
        assert body["choices"][0]["logprobs"]["tokens"] == [*"abcHello, world!", "<|end|>"]


async def test_nobody_who_did_not_ask_is_told() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = (await client.post(CHAT, json=chat())).json()
        assert body["choices"][0]["logprobs"] is None and "prompt_logprobs" not in body
        assert mesh.requests[-1].logprobs == mesh.requests[-1].prompt_logprobs == -1


def test_half_characters_hidden_tokens_and_endless_numbers_can_be_shown() -> None:
    spelling = Spelling({1: b"\xe2\x82", 2: b"\xac", 3: b"<s>", 4: "€".encode()}.__getitem__, hidden=(3,))
    told = [Told(3, None), Told(1, Likely(-math.inf, 5, [(4, -0.5)])), Told(2, Likely(-1.0, 1, []))]
    shown, offset = text_logprobs(told, spelling, 7)
    assert shown.tokens == ["<s>", "bytes:\\xe2\\x82", "bytes:\\xac"]
    assert shown.text_offset == [7, 7, 21] and offset == 31
    assert shown.token_logprobs == [None, -9999.0, -1.0]
    assert shown.top_logprobs[1] == {"€": -0.5, "bytes:\\xe2\\x82": -9999.0}
