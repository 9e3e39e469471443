"""`POST /v1/embeddings`: texts or token ids come in, and for each a vector of length 1 goes out.

Rules: a vector is the mean of what the decoder makes of a text's tokens, or the last of it (`pooling`, an extension).
It has all its dimensions: the first few alone are of use only where a model was trained for that, and none says so.
Pure. Field order is the order on the wire.
"""

import base64
from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType, structs

from gateway.dialects.parts import Part
from gateway.openai.common import Usage, WholeChoice, encode
from gateway.openai.logprobs import Told
from gateway.openai.parameters import Options, Parameters, Texts, options, refuse, texts_or_ids
from gateway.reply import Head, Reply
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest

MAX_INPUTS = 2048
FORMATS = ("float", "base64")
POOLINGS: tuple[Literal["mean", "last"], ...] = ("mean", "last")


class EmbeddingRequest(Struct, kw_only=True):
    model: str | None = None
    input: Texts | None = None
    encoding_format: str | None = None
    user: str | None = None
    service_tier: str | None = None
    # extensions
    pooling: str | None = None
    priority: int | None = None
    # not supported
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None


def embedding_options(body: EmbeddingRequest) -> Options:
    """Check everything but the input. Raises BadRequest naming the parameter."""
    if body.dimensions is not None:
        raise refuse("dimensions", "leave it out: a vector has as many as the model")
    if body.truncate_prompt_tokens is not None:
        raise refuse("truncate_prompt_tokens")
    if body.encoding_format not in (None, *FORMATS):
        raise BadRequest(f"encoding_format must be {' or '.join(FORMATS)}", param="encoding_format")
    pooling = next((known for known in POOLINGS if known == (body.pooling or "mean")), None)
    if pooling is None:
        raise BadRequest(f"pooling must be {' or '.join(POOLINGS)}", param="pooling")
    found = options(Parameters(temperature=0.0, service_tier=body.service_tier, priority=body.priority), None)
    return structs.replace(found, max_tokens=0, pooling=pooling)


def inputs(body: EmbeddingRequest) -> list[str] | list[list[int]]:
    """The texts, or the token ids of each. Raises BadRequest when there are none, too many, or both kinds."""
    found = texts_or_ids("input", body.input)
    if len(found) > MAX_INPUTS:
        raise BadRequest(f"input takes at most {MAX_INPUTS} texts, got {len(found)}: send several requests",
                         param="input")
    return found


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int
    cost: Raw | UnsetType = UNSET  # dollars, exact, where asked for


class EmbeddingItem(Struct):
    object: str
    index: int
    embedding: list[float] | str


class EmbeddingList(Struct):
    object: str
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class EmbeddingReply(Reply):
    """One document; there is no stream of it."""

    def __init__(self, head: Head, encoding_format: str) -> None:
        self.id = "embd-" + head.number
        self._model = head.model
        self._encoding_format = encoding_format

    def piece(self, index: int, parts: Sequence[Part], tokens: list[int] | None = None, usage: Usage | None = None,
              told: list[Told] | None = None) -> list[bytes]:
        return []

    def closing(self, index: int, reason: str, usage: Usage | None, stopped: str | None = None) -> list[bytes]:
        return []

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> list[bytes]:
        return []

    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        items = [EmbeddingItem("embedding", index, self._shown(choice.embedding))
                 for index, choice in enumerate(choices)]
        used = EmbeddingUsage(usage.prompt_tokens, usage.prompt_tokens, usage.cost)
        return encode(EmbeddingList("list", items, self._model, used))

    def _shown(self, embedding: bytes) -> list[float] | str:
        if self._encoding_format == "base64":
            return base64.b64encode(embedding).decode()
        numbers: list[float] = np.frombuffer(embedding, "<f4").tolist()
        return numbers
