"""Bodies of every endpoint that takes one: changed documents, bent bytes, nests, numbers and strings that are none.

Whatever comes is answered, or refused with a status of the 400s and a sentence in the shape of its API; and nothing of
it stays behind.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shared.messages import Finished, Generate, Reply
from tests.gateway.fake_mesh import gateway_and_mesh, tiny_model
from tests.gateway.test_any_body import BODIES, SCHEMA
from tests.laws.mutations import DEEP, ODD, bent, changed, nested

Play = Callable[[int], None]
BODIES_OF_ONE = 25
MORE: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny", "prompt": ["Hi", "Ho"], "max_tokens": 5, "n": 2, "logprobs": 2, "echo": True,
        "stop": ["x", "yy"], "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 7,
        "logit_bias": {"65": 5},
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_tokens": 1,
        "stop_token_ids": [3], "bad_words": ["no"], "allowed_token_ids": [1, 2], "user": "u", "suffix": None,
        "stream_options": {"include_usage": True}, "prompt_logprobs": 1, "service_tier": "auto",
        "structured_outputs": {"json": SCHEMA}, "guided_regex": "a+", "guided_choice": ["a"]},
    "/v1/embeddings": {"model": "tiny", "input": ["Hi", "Ho"], "encoding_format": "float", "user": "u"},
    "/v1/tokenize": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True,
                     "chat_template_kwargs": {"a": 1}, "tools": [], "return_token_strs": True},
    "/tokenize": {"model": "tiny", "prompt": "Hi", "add_special_tokens": False},
    "/detokenize": {"model": "tiny", "tokens": [72, 105]},
    "/v1/messages/count_tokens": {key: value for key, value in BODIES["/v1/messages"].items() if key != "max_tokens"},
}
PATHS = BODIES | MORE
ALL = [value for value in ODD if not isinstance(value, bytes)]
REFUSED = (400, 404)


def body(chooser: random.Random) -> tuple[str, bytes]:
    """A path, and what is sent there."""
    path = chooser.choice([*PATHS])
    document = PATHS[path]
    if path == "/v1/completions":  # not all of these go together
        document = {key: value for key, value in document.items()
                    if key in ("model", "prompt") or chooser.random() < 0.3}
    if chooser.random() < 0.9:
        document = changed(document, chooser, ALL, most=2)
    if chooser.random() < 0.2 and isinstance(document, dict):
        document = document | {"stream": chooser.choice((True, 1, "yes"))}
    text = json.dumps(document).encode()
    match chooser.randrange(12):
        case 0:
            text = bent(text, chooser)
        case 1:
            text = nested(chooser.choice((50, DEEP)), chooser)
        case 2:
            deep = nested(chooser.choice((50, DEEP)), chooser)
            text = text[:-1] + b', "' + chooser.choice(KEYS) + b'": ' + deep + b"}"
        case 3:
            text = text.replace(b"0.5", b"1e" + b"9" * chooser.choice((3, 3000)))
            text = text.replace(b"1", b"1" * chooser.choice((1, 5000)))
        case 4:
            text = text.replace(b'"Hi"', chooser.choice(STRINGS))
    return path, text


STRINGS = (b'"\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\x00"', b'"\\u0000"')
KEYS = (b"messages", b"prompt", b"tools", b"metadata", b"chat_template_kwargs", b"response_format", b"unheard_of",
        b"input")


def _vector(request: Generate) -> list[Reply] | None:
    if not request.pooling:
        return None
    return [Finished(request.request_id, request.attempt, "stop", "w1", len(request.tokens) // 4, embedding=VECTOR)]


VECTOR = np.array([0.6, 0.8], "<f4").tobytes()


@contextlib.contextmanager
def bodies() -> Iterator[Play]:
    yield lambda seed: asyncio.run(_played(seed))


async def _played(seed: int) -> None:
    chooser = random.Random(seed)
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, gateway):
        mesh.says = b"{}"
        mesh.script = _vector
        for _ in range(BODIES_OF_ONE):
            path, sent = body(chooser)
            async with asyncio.timeout(5.0):
                response = await client.post(path, content=sent)
            shown = (path, response.status_code, sent[:300], response.text[:300])
            assert response.status_code == 200 or response.status_code in REFUSED, shown
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"] and error["type"], shown
        assert len(gateway.streams) == 0 and gateway.admission.active == 0
