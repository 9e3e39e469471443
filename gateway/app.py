"""The HTTP face: routes, small endpoints, and what every response has.

Rules: every error is `{"error": {message, type, param, code}}`, or has Anthropic's shape on its paths; every response
carries `x-request-id`, and what is left of its tenant's limits. Where keys are needed everything needs one but what
`_OPEN` lists.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/messages/count_tokens, /v1/embeddings
    GET /v1/models, /v1/models/{id}     POST /v1/tokenize, /v1/detokenize
    GET /v1/requests/{id}/receipt: why it went where it went
    GET /v1/usage: what was used and charged     GET /v1/prices: what tokens cost
    GET /health: the process lives     GET /ready: a request would be served     GET /metrics: Prometheus
"""

import asyncio
import math
import re
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import billing, receipts
from gateway.answer import ClientLeft
from gateway.anthropic import messages
from gateway.detokenize import Detokenizer
from gateway.endpoints import Chat, Embeddings, Generation, Messages, Responses, TextCompletion, read_body
from gateway.openai.chat import template_messages
from gateway.openai.common import BodyDecoder, encode, error_json
from gateway.openai.models import DetokenizeReply, DetokenizeRequest, Model, ModelList, TokenizeReply, TokenizeRequest
from gateway.openai.tools import tools_of
from gateway.prompt import ServedModel
from gateway.tenants import Tenant
from gateway.usage import NoLedger, asked_usage, told_usage
from shared.errors import BadRequest, MillError, NotAuthorised, RateLimited, RequestTimeout

if TYPE_CHECKING:
    from gateway.service import Gateway

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_UNKNOWN_ROUTE = "other"
MESSAGES = "/v1/messages"
READERS = 2  # of the ledger at once: it has other things to do
_OPEN = frozenset({"/health", "/ready", "/metrics"})
_CLIENT_LEFT = 499

log = structlog.get_logger("gateway.app")


def build_app(gateway: "Gateway") -> ASGIApp:
    """The application of one gateway; the caller keeps `gateway.running()`."""
    api = _Api(gateway)
    generating = [
        Route("/v1/chat/completions", Generation(gateway, Chat()), methods=["POST"]),
        Route("/v1/completions", Generation(gateway, TextCompletion()), methods=["POST"]),
        Route("/v1/responses", Generation(gateway, Responses()), methods=["POST"]),
        Route(MESSAGES, Generation(gateway, Messages()), methods=["POST"]),
        Route("/v1/embeddings", Generation(gateway, Embeddings()), methods=["POST"]),
    ]
    routes = [
        *generating,
        Route(f"{MESSAGES}/count_tokens", api.count_tokens, methods=["POST"]),
        Route("/v1/responses/{id:path}", api.response, methods=["GET", "POST", "DELETE"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/v1/requests/{id:path}/receipt", api.receipt),
        Route("/v1/usage", api.usage),
        Route("/v1/prices", api.prices),
        *(Route(path, api.tokenize, methods=["POST"]) for path in ("/tokenize", "/v1/tokenize")),
        *(Route(path, api.detokenize, methods=["POST"]) for path in ("/detokenize", "/v1/detokenize")),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics),
    ]
    others = Starlette(routes=routes, middleware=[Middleware(_Envelope, gateway=gateway)],
                       exception_handlers={HTTPException: _http_error})
    return _FrontDoor({route.path: (route, _Envelope(route.app, gateway)) for route in generating}, others)


class _FrontDoor:
    """Requests that generate go straight to their endpoint, which takes any error; all others through a router."""

    def __init__(self, generating: dict[str, tuple[Route, ASGIApp]], others: ASGIApp) -> None:
        self._generating = generating
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._generating.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if found is None:
            await self._others(scope, receive, send)
            return
        scope["route"], app = found
        await app(scope, receive, send)


class _Api:
    """The endpoints that do not generate."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway
        self._created = int(gateway.clock.wall())
        self._reading = asyncio.Semaphore(READERS)
        self._decode_tokenize = BodyDecoder(TokenizeRequest)
        self._decode_detokenize = BodyDecoder(DetokenizeRequest)

    async def models(self, request: Request) -> Response:
        offered = self._gateway.models_of(_tenant(request))
        return _json(ModelList([self._model(name, model) for name, model in offered.names()]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"].rstrip("/")
        if not name:  # the list again, by a client that ends its addresses with a slash
            return await self.models(request)
        found = self._gateway.model_named(name, _tenant(request))
        return _json(self._model(name if name in self._gateway.catalogue.aliases else found.name, found))

    async def receipt(self, request: Request) -> Response:
        return _json(receipts.document(self._gateway.receipts.find(request.path_params["id"],
                                                                           _tenant(request).name)))

    async def usage(self, request: Request) -> Response:
        tenant = _tenant(request)
        tenant.need("usage")
        if self._gateway.billing.database is None:
            raise NoLedger("this gateway keeps no ledger: start it with --database and --prices")
        asked = asked_usage(request.query_params, self._gateway.clock.wall())
        async with self._reading:
            await self._gateway.billing.flush()
            return await told_usage(self._gateway.billing.database, tenant, asked)

    async def prices(self, request: Request) -> Response:
        return _json(billing.document(self._gateway.billing.sheet))

    async def tokenize(self, request: Request) -> Response:
        raw = await read_body(request, self._gateway)
        body: TokenizeRequest = self._decode_tokenize(raw)
        model = self._gateway.model_named(body.model, _tenant(request))
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("send either prompt or messages", param="prompt")
        now_s = self._gateway.clock.wall()

        def work() -> list[int]:
            if body.messages is None:
                return model.text(body.prompt or "", body.add_special_tokens is not False)
            return model.chat(template_messages(body.messages), now_s=now_s,
                              add_generation_prompt=body.add_generation_prompt is not False,
                              variables=body.chat_template_kwargs, tools=tools_of(body.tools, None, None))

        tokens = await self._gateway.aside(len(raw), work)
        words = [model.tokenizer.decode([token]) for token in tokens] if body.return_token_strs else UNSET
        return _json(TokenizeReply(len(tokens), model.card.context_length, tokens, words))

    async def count_tokens(self, request: Request) -> Response:
        raw = await read_body(request, self._gateway)
        body = messages.decode_to_count(raw)
        model = self._gateway.model_named(body.model, _tenant(request))
        endpoint, now_s = Messages(), self._gateway.clock.wall()

        def work() -> int:
            (tokens,) = endpoint.prompts(body, endpoint.options(body), model, now_s)
            return len(tokens())

        return _json({"input_tokens": await self._gateway.aside(len(raw), work)})

    async def response(self, request: Request) -> Response:
        raise HTTPException(404, "this gateway keeps no responses: POST /v1/responses answers at once")

    async def detokenize(self, request: Request) -> Response:
        raw = await read_body(request, self._gateway)
        body: DetokenizeRequest = self._decode_detokenize(raw)
        model = self._gateway.model_named(body.model, _tenant(request))
        if any(not 0 <= token < model.card.vocabulary_size for token in body.tokens):
            raise BadRequest(f"tokens holds an id outside 0..{model.card.vocabulary_size - 1}", param="tokens")

        def work() -> str:
            detokenizer = Detokenizer(model.tokenizer, skip_special=False)
            return detokenizer.push(body.tokens) + detokenizer.flush()

        return _json(DetokenizeReply(await self._gateway.aside(len(raw), work)))

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        reasons = self._gateway.not_ready()
        found = {"ready": not reasons, "reasons": reasons, "gateway": self._gateway.id,
                 "workers": [_status(worker) for worker in self._gateway.workers()],
                 "routers": [_status(router) for router in self._gateway.routers()]}
        return _json(found, 503 if reasons else 200, {"retry-after": "1"} if reasons else None)

    async def metrics(self, request: Request) -> Response:
        text, content_type = self._gateway.metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    def _model(self, name: str, model: ServedModel) -> Model:
        root = model.card.name if name == model.name else model.name
        return Model(name, self._created, root, model.card.context_length, model.dialect.calls,
                     model.dialect.thoughts, self._gateway.serves(model))


class _Envelope:
    """Around every request: its id, its tenant, its errors, its figures."""

    def __init__(self, app: ASGIApp, gateway: "Gateway") -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = self._gateway.clock.now()
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        client_id = given if _REQUEST_ID.fullmatch(given) else None
        request_id = client_id or secrets.token_hex(12)
        scope.setdefault("state", {}).update(request_id=request_id, client_request_id=client_id)
        access = self._gateway.access
        anthropic = scope["path"].startswith(MESSAGES)  # whose clients read the id under another name
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                tenant = scope["state"].get("tenant")
                taken_ms = round(1000 * (self._gateway.clock.now() - began_s))
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()),
                                      *(((b"request-id", request_id.encode()),) if anthropic else ()),
                                      (b"openai-processing-ms", str(taken_ms).encode()),
                                      *(access.headers(tenant) if tenant is not None else ())]
            await send(message)

        # endpoints bind more: what is bound holds until the error, if there is one, is in the log too
        bound = scope["state"]["bound"] = dict(structlog.contextvars.bind_contextvars(request_id=request_id))
        try:
            if scope["path"] not in _OPEN:
                tenant = scope["state"]["tenant"] = access.asking(scope["headers"])
                if access.keyed:
                    bound |= structlog.contextvars.bind_contextvars(tenant=tenant.name)
                if scope["method"] == "POST":
                    access.count(tenant)
                    tenant.need("generate")
            await self._app(scope, receive, send_on)
        except MillError as error:
            self._gateway.metrics.refused.labels(error.code).inc()
            log.info("request_refused", path=scope["path"], code=error.code, reason=error.reason)
            await _send_error(send_on, error, scope)
        except ClientLeft:
            status = _CLIENT_LEFT
            log.info("client_left", path=scope["path"])
        except Exception:
            log.exception("request_broke", path=scope["path"])
            if status:
                raise  # the answer has begun: all that can be done is to cut it off
            await _send_error(send_on, MillError("this is a fault of the gateway: its log knows more"), scope)
        finally:
            structlog.contextvars.reset_contextvars(**bound)
            route = scope.get("route")
            self._gateway.metrics.answered(getattr(route, "path", _UNKNOWN_ROUTE), status)


async def _send_error(send: Send, error: MillError, scope: Scope) -> None:
    body = _error_body(error, scope)
    await send({"type": "http.response.start", "status": error.status, "headers": _error_headers(error, len(body))})
    await send({"type": "http.response.body", "body": body})


def _error_body(error: MillError, scope: Scope) -> bytes:
    """In the shape of the API that the path belongs to."""
    if scope["path"].startswith(MESSAGES):
        return messages.error_json(error, scope["state"]["request_id"])
    return error_json(error)


def _error_headers(error: MillError, length: int) -> list[tuple[bytes, bytes]]:
    """When to come back, in both units that clients read; when not to; and how to show who one is."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    if error.retry_after_s is not None:
        headers += [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()),
                    (b"retry-after-ms", str(math.ceil(1000 * error.retry_after_s)).encode())]
    if (error.status >= 500 or error.status == RateLimited.status) and not error.retryable:
        headers.append((b"x-should-retry", b"false"))
    if error.status == RequestTimeout.status:
        headers.append((b"connection", b"close"))  # what still comes is no other request
    if error.status == NotAuthorised.status:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    shown = BadRequest(f"{request.method} {request.url.path}: {error.detail}")
    shown.code = "not_found" if error.status_code == 404 else "method_not_allowed"
    shown.status = error.status_code
    return Response(_error_body(shown, request.scope), error.status_code,
                    {**(error.headers or {}), "content-type": "application/json"})


def _tenant(request: Request) -> Tenant:
    """Whose request it is, as the envelope has found."""
    found: Tenant = request.scope["state"]["tenant"]
    return found


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, {"content-type": "application/json", **(headers or {})})


def _status(status: msgspec.Struct) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(status).items() if name != "replies_sent"}
