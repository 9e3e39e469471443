"""`/v1/models`, `/tokenize` and `/detokenize`.

Pure.
"""

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from gateway.openai.chat import Message


class Model(Struct):
    """One name to ask for. `root`: what an alias stands for, or what a model's files call it."""

    id: str
    created: int
    root: str
    max_model_len: int
    tools: str  # how it writes calls, as was found or told: hermes, llama3, mistral, harmony or none
    reasoning: str  # how it writes thoughts: think, harmony or none
    ready: bool  # whether a worker serves it now; if not a request gets 503 and Retry-After, never 404
    object: str = "model"
    owned_by: str = "tokenmill"


class ModelList(Struct):
    data: list[Model]
    object: str = "list"


class TokenizeRequest(Struct, kw_only=True):
    """Text, or messages to be put through the chat template first."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    return_token_strs: bool | None = None


class TokenizeReply(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]


class DetokenizeReply(Struct):
    prompt: str
