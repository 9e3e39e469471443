"""The endpoints that generate: from a body to the prompts and options of an `Answer`.

Rules: everything a client can get wrong is found here, before any place is taken or any worker hears of it. Whose
request it is, is asked again once its body is here: a key may end while a client holds it back.
"""

import asyncio
import contextlib
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway.answer import Answer, ClientLeft
from gateway.anthropic import messages
from gateway.dialects.dialect import Reading
from gateway.dialects.grammars import enforced
from gateway.direct import direct_body
from gateway.openai import chat, common, completions, embeddings, responses
from gateway.openai.parameters import Options, check_length, check_scored, names_tier
from gateway.prompt import Prompt, ServedModel
from gateway.reply import Head, Reply
from gateway.residency import policy_of
from gateway.tenants import Tenant
from shared.errors import BadRequest, RequestTimeout, TooLarge
from shared.pricing import Usage

if TYPE_CHECKING:
    from gateway.service import Gateway

IDEMPOTENCY_KEY = b"idempotency-key"
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")


class Endpoint(ABC):
    """What differs between the generating endpoints.

    `operation` is the convention's name for the span, `source` the field that prompts come in.
    """

    operation: str
    source: str
    decode: Callable[[bytes], Any]

    @abstractmethod
    def reply(self, body: Any, head: Head) -> Reply:
        """What makes documents of the answer."""

    @abstractmethod
    def options(self, body: Any) -> Options:
        """What is asked of the mesh. Raises BadRequest."""

    @abstractmethod
    def prompts(self, body: Any, options: Options, model: ServedModel,
                now_s: float) -> list[Callable[[], list[int]]]:
        """One function per prompt that gives its tokens; slow, for a thread. Raises BadRequest."""

    def reading(self, options: Options, model: ServedModel, prompts: list[Prompt]) -> tuple[Options, Reading | None]:
        """How the answer is to be read for calls and thoughts, and what it has to be; nothing but text, where nothing
        is said. Raises BadRequest."""
        return options, None

    def prediction(self, body: Any, model: ServedModel) -> list[int]:
        """The tokens that the client expects, none if it expects nothing; slow, for a thread."""
        return []


class Chat(Endpoint):
    operation, source = "chat", "messages"
    decode = staticmethod(chat.decode)

    def reply(self, body: chat.ChatRequest, head: Head) -> Reply:
        return chat.ChatReply(head)

    def options(self, body: chat.ChatRequest) -> Options:
        return chat.chat_options(body)

    def prompts(self, body: chat.ChatRequest, options: Options, model: ServedModel,
                now_s: float) -> list[Callable[[], list[int]]]:
        shown = chat.template_messages(body.messages)
        continues = bool(body.continue_final_message)
        opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
        variables = chat.template_variables(body)
        return [lambda: model.chat(shown, now_s=now_s, add_generation_prompt=opens,
                                   continue_final_message=continues, variables=variables, tools=options.tools)]

    def reading(self, options: Options, model: ServedModel, prompts: list[Prompt]) -> tuple[Options, Reading | None]:
        return read_as(options, model, prompts[0])

    def prediction(self, body: chat.ChatRequest, model: ServedModel) -> list[int]:
        text = chat.predicted_text(body.prediction)
        return model.text(text, add_special=False)[:model.card.context_length] if text else []


class Responses(Endpoint):
    operation, source = "chat", "input"
    decode = staticmethod(responses.decode)

    def __init__(self) -> None:
        self._chat = Chat()

    def reply(self, body: responses.Asked, head: Head) -> Reply:
        return responses.ResponsesReply(head, body)

    def options(self, body: responses.Asked) -> Options:
        return self._chat.options(body.chat)

    def prompts(self, body: responses.Asked, options: Options, model: ServedModel,
                now_s: float) -> list[Callable[[], list[int]]]:
        return self._chat.prompts(body.chat, options, model, now_s)

    def reading(self, options: Options, model: ServedModel, prompts: list[Prompt]) -> tuple[Options, Reading | None]:
        return read_as(options, model, prompts[0])


class Messages(Chat):
    decode = staticmethod(messages.decode)

    def reply(self, body: chat.ChatRequest, head: Head) -> Reply:
        return messages.MessagesReply(head)


def read_as(options: Options, model: ServedModel, prompt: Prompt) -> tuple[Options, Reading]:
    """As the model's dialect has it. Raises BadRequest for tools that it cannot call."""
    tools, opened = options.tools, model.opens_thought(prompt.tokens)
    grammar = enforced(model.dialect, tools, options.grammar, opened, model.card.special_tokens)
    if grammar is not None:
        check_length(grammar, "tools")
    return msgspec.structs.replace(options, grammar=grammar), Reading(
        frozenset() if tools is None else tools.callable, tools is not None and not tools.parallel, opened,
        options.shows_thoughts)


class TextCompletion(Endpoint):
    operation, source = "text_completion", "prompt"
    decode = staticmethod(common.BodyDecoder(completions.CompletionRequest))

    def reply(self, body: completions.CompletionRequest, head: Head) -> Reply:
        return completions.CompletionReply(head)

    def options(self, body: completions.CompletionRequest) -> Options:
        return completions.completion_options(body)

    def prompts(self, body: completions.CompletionRequest, options: Options, model: ServedModel,
                now_s: float) -> list[Callable[[], list[int]]]:
        return [partial(_tokens, prompt, model) for prompt in completions.prompts(body)]


class Embeddings(Endpoint):
    operation, source = "embeddings", "input"
    decode = staticmethod(common.BodyDecoder(embeddings.EmbeddingRequest))

    def reply(self, body: embeddings.EmbeddingRequest, head: Head) -> Reply:
        return embeddings.EmbeddingReply(head, body.encoding_format or "float")

    def options(self, body: embeddings.EmbeddingRequest) -> Options:
        return embeddings.embedding_options(body)

    def prompts(self, body: embeddings.EmbeddingRequest, options: Options, model: ServedModel,
                now_s: float) -> list[Callable[[], list[int]]]:
        return [partial(_tokens, text, model) for text in embeddings.inputs(body)]


def _tokens(prompt: str | list[int], model: ServedModel) -> list[int]:
    return model.text(prompt) if isinstance(prompt, str) else prompt


class Generation:
    """The ASGI application of one generating endpoint."""

    def __init__(self, gateway: "Gateway", endpoint: Endpoint) -> None:
        self._gateway = gateway
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, endpoint = self._gateway, self._endpoint
        gateway.check_open()
        began_s = gateway.clock.now()
        raw = await read_body(Request(scope, receive), gateway)
        body = endpoint.decode(raw)
        tenant: Tenant = scope["state"]["tenant"]
        model = gateway.model_named(body.model, tenant)
        residency = tenant.within(policy_of(gateway.residency, scope["headers"]))
        gateway.check_reachable(model, residency)
        options = endpoint.options(body)
        if (tier := tenant.tier_of(options.tier, names_tier(body))) != options.tier:
            options = msgspec.structs.replace(options, tier=tier)
        texts = endpoint.prompts(body, options, model, gateway.clock.wall())
        streams = options.at_once(len(texts) * options.choices)
        with gateway.access.under_way(tenant, streams) as use, gateway.places(streams):
            prompts, prediction, adjust = await gateway.aside(len(raw), lambda: ([
                model.prompt(tokens(), options.max_tokens, gateway.settings.default_max_tokens, tenant.salt,
                             endpoint.source)
                for tokens in texts], endpoint.prediction(body, model), model.adjust(options)))
            asked, reading = endpoint.reading(options, model, prompts)
            check_scored(options, sum(len(prompt.tokens) for prompt in prompts))
            most = Usage(sum(len(prompt.tokens) for prompt in prompts),
                         generated_tokens=options.choices * sum(prompt.max_tokens for prompt in prompts))
            use.reserve(most.prompt_tokens + most.generated_tokens)
            async with gateway.billing.account(
                    secrets.token_hex(12), tenant, model.name, tier, gateway.billing.price(model.name, tier, residency),
                    most, once_of(scope, raw)) as account:
                answer = Answer(gateway, endpoint.operation, partial(endpoint.reply, body), model, asked, prompts,
                                scope, began_s, tenant, residency, prediction, account, adjust, reading)
                try:
                    await answer.give(receive, send)
                finally:
                    use.used_tokens = answer.used_tokens


def once_of(scope: Scope, body: bytes) -> tuple[str, str] | None:
    """Digests of a request's idempotency key and of all that it says; None without a key. Raises BadRequest."""
    given = dict(scope["headers"]).get(IDEMPOTENCY_KEY)
    if given is None:
        return None
    if not _KEY.fullmatch(given):
        raise BadRequest("an idempotency key has 1 to 255 letters, digits and signs without spaces",
                         param="idempotency-key")
    scope["state"]["idempotency_key"] = given.decode("latin-1")
    said = b"\0".join((scope["path"].encode(), body))
    return blake2b(given, digest_size=16).hexdigest(), blake2b(said, digest_size=16).hexdigest()


async def read_body(request: Request, gateway: "Gateway") -> bytes:
    """The whole body; the tenant in the request's state is from then on who it is now.

    Raises TooLarge as soon as it is known to be, RequestTimeout, ClientLeft when it never ends, and NotAuthorised.
    """
    within_s = gateway.settings.body_s
    direct = direct_body(request.scope)
    try:
        # short ones come with their headers, and a timer costs half of what reading them does
        async with asyncio.timeout(None if direct is not None and direct.asked_in_full else within_s):
            body = await _body(request, gateway.settings.max_body_bytes)
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {within_s:g} s: send it at once, or raise "
                             "--body-s") from None
    state = request.scope["state"]
    del state["tenant"]  # nobody's, if it is refused
    state["tenant"] = gateway.access.asking(request.scope["headers"])
    return body


async def _body(request: Request, most_bytes: int) -> bytes:
    too_large = TooLarge(f"the body is larger than {most_bytes} bytes: shorten it, or raise --max-body-bytes")
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > most_bytes:
            raise too_large
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most_bytes:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)
