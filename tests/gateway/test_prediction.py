"""A predicted answer goes to the mesh as tokens, and the usage says how much of it came true."""

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prediction import PredictedText, PredictionMatch
from shared.tokens import unpack
from tests.gateway.fake_mesh import MODEL, gateway_and_mesh

CHAT = "/v1/chat/completions"


def accepted(predicted: list[int], said: list[int]) -> int:
    match = PredictionMatch(PredictedText(predicted))
    match.follow(said)
    return match.accepted


def test_what_is_said_as_predicted_is_accepted_until_the_first_difference() -> None:
    assert accepted([1, 2, 3, 4], [1, 2, 3, 4]) == 4
    assert accepted([1, 2, 3, 4], [1, 2, 3, 4, 5]) == 4
    assert accepted([1, 2, 3, 4], [1, 2, 9, 9]) == 2
    assert accepted([1, 2, 3, 4], []) == 0
    assert accepted([], [1, 2]) == 0


def test_behind_a_difference_two_words_in_a_row_find_the_place_again() -> None:
    assert accepted([1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 4, 5, 6, 7]) == 6  # a word was replaced
    assert accepted([1, 2, 3, 4, 5, 6, 7], [1, 2, 5, 6, 7]) == 5  # two were left out
    assert accepted([1, 2, 3, 4, 5, 6], [1, 2, 8, 9, 3, 4, 5, 6]) == 6  # two were put in
    assert accepted([1, 2, 3, 4], [9, 4]) == 0  # one word may be chance


tokens = st.lists(st.integers(0, 4), max_size=30)


@given(tokens, tokens)
def test_no_token_is_accepted_twice_on_either_side(predicted: list[int], said: list[int]) -> None:
    found = accepted(predicted, said)
    assert 0 <= found <= min(len(predicted), len(said))
    common = sum(min(predicted.count(token), said.count(token)) for token in set(predicted))
    assert found <= common
    if found < min(len(predicted), len(said), 1):
        assert not predicted or not said or predicted[0] != said[0]
    # told in pieces it is the same
    match = PredictionMatch(PredictedText(predicted))
    for token in said:
        match.follow([token])
    assert match.accepted == found


@given(st.integers(0, 2**32))
def test_an_edit_costs_little_more_than_what_it_changed(seed: int) -> None:
    rng = random.Random(seed)
    predicted = rng.sample(range(10_000), 200)
    at, size = rng.randrange(150), rng.randrange(1, 20)
    said = [*predicted[:at], *range(20_000, 20_000 + rng.randrange(20)), *predicted[at + size:]]
    assert accepted(predicted, said) == 200 - size
    assert all(later >= earlier for earlier, later in pairwise(
        [accepted(predicted, said[:length]) for length in range(0, len(said), 20)]))


def chat(prediction: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "prediction": prediction} | more


@pytest.mark.parametrize("content", [
    "Hello, earth!", [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "earth!"}]])
async def test_a_prediction_travels_as_tokens_and_is_accounted_for(content: Any) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        response = await client.post(CHAT, json=chat({"type": "content", "content": content}))
        assert response.status_code == 200
        assert bytes(unpack(mesh.requests[0].prediction)) == b"Hello, earth!"
        # Hello, world! was said, and the end token; behind `earth` the last letter alone is found by nobody
        details = response.json()["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == 7
        assert details["rejected_prediction_tokens"] == 6


async def test_each_choice_is_measured_against_the_prediction_and_streams_tell_it_too() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        body = chat({"type": "content", "content": "Hello, world!"}, n=2)
        details = (await client.post(CHAT, json=body)).json()["usage"]["completion_tokens_details"]
        assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (26, 0)
        assert [len(unpack(request.prediction)) for request in mesh.requests] == [13, 13]
        streamed = await client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}})
        assert '"accepted_prediction_tokens":26' in streamed.text


@pytest.mark.parametrize("prediction", [None, {"type": "content", "content": ""}, {"type": "content", "content": []}])
async def test_nothing_predicted_is_nothing_sent(prediction: Any) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        response = await client.post(CHAT, json=chat(prediction))
        assert response.status_code == 200
        assert mesh.requests[0].prediction == b""
        details = response.json()["usage"]["completion_tokens_details"]
        assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (0, 0)


@pytest.mark.parametrize(("prediction", "param"), [
    ({"type": "image", "content": "x"}, "prediction.type"),
    ({"type": "content", "content": [{"type": "image_url", "image_url": "x"}]}, "prediction.content"),
    ({"type": "content", "content": [{"type": "text"}]}, "prediction.content"),
    ({"type": "content"}, "prediction.content"),
    ("text", "prediction"),
])
async def test_what_is_no_prediction_is_refused_by_name(prediction: Any, param: str) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        response = await client.post(CHAT, json=chat(prediction))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert not mesh.requests
