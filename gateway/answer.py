"""The streams of one HTTP request, and their way to the client.

Rules: errors before the first byte have their real status, so headers of a stream wait for a sign of life from the
mesh, a few seconds at most; all tokens of one wake-up leave in one write; a client that leaves stops its workers at
once; whoever reads too slowly is taken for gone. Every stream opened here is ended here.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from opentelemetry.trace import SpanKind
from starlette.types import Message, Receive, Scope, Send

from gateway import replies, sse
from gateway.billing import Account, Counts
from gateway.dialects.dialect import Reading
from gateway.dialects.parts import Part, Said, joined
from gateway.direct import DirectBody, direct_body
from gateway.openai import common
from gateway.openai.logprobs import Spelling, Told
from gateway.openai.parameters import MAX_CHOICES, Options, prompt_likeliest
from gateway.prediction import PredictedText, PredictionMatch
from gateway.prompt import Prompt, ServedModel
from gateway.receipts import Found, Kept, Outcome, found, header, outcome_of
from gateway.replies import ReadChoice
from gateway.reply import Head, Reply
from gateway.speculation import RequestMetrics, metrics_of
from gateway.streams import NOBODY, Stream
from gateway.tenants import Tenant
from shared import telemetry
from shared import trace_names as names
from shared.errors import MillError, WorkerFailed
from shared.logprobs import unpack_likely
from shared.messages import Adjust, Finished, Generate, Residency
from shared.noise import choice_seed
from shared.pricing import NANOS, shown, worker_cost
from shared.tiers import priority
from shared.tokens import count, pack

if TYPE_CHECKING:
    from gateway.service import Gateway

HEADERS_WITHIN_S = 3.0  # a client in a long queue gets its headers by then; later refusals come as events
WRITE_S = 30.0  # for a client to take what was written
LAST_WORD_S = 0.5  # for a worker to say, between two steps, what drafts brought a stream that a stop string ended
EXPLAIN = b"x-tokenmill-explain"  # a request with this gets what is known of its placement as a header
COST = b"x-tokenmill-cost"  # and with this what it comes to
MOST_WORKER_S = 1e6  # more is no time that one request can take
_REASONS = ("stop", "length", "tool_calls")

log = structlog.get_logger("gateway.answer")


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class Piece(msgspec.Struct, frozen=True):
    """What one wake-up added to choice `index`; `reason` when it ended with that."""

    index: int
    parts: list[Part]
    tokens: list[int]
    reason: str | None
    told: list[Told] | None = None  # how likely they were, where asked for


class Answer:
    """One request from its prompts to its last byte."""

    def __init__(self, gateway: "Gateway", operation: str, reply: Callable[[Head], Reply],
                 model: ServedModel, options: Options, prompts: list[Prompt], scope: Scope, began_s: float,
                 tenant: Tenant, residency: Residency, prediction: list[int],
                 account: Account, adjust: Adjust | None = None, reading: Reading | None = None) -> None:
        """`operation` is the conventions' name for it, `reply` builds its documents; `began_s` monotonic seconds;
        `residency`: the tenant's, narrowed; `prediction`: tokens that the client expects; `account`: who is told what
        it comes to; `reading`: how to look for calls and thoughts."""
        self._gateway = gateway
        self._operation = operation
        self._model = model
        self._options = options
        self._prompts = prompts
        self._scope = scope
        self._began_s = began_s
        self._tenant = tenant
        self._residency = residency
        self._prediction = pack(prediction)
        self._adjust = adjust
        self._changed = asyncio.Event()
        self._direct = direct_body(scope)
        self._resting = False  # the task waits for more of a stream whose headers are out, and all is written
        self._unwritten: list[bytes] = []  # taken from the streams by `set`, left to the task
        self._broke: Exception | None = None  # in `set`, for the task to raise
        self._client_left = False
        self._writing_s: float | None = None  # since when the client has been taking what was written
        self._written_s = began_s
        self._signed = False  # somebody works on it, or the client has waited for that long enough
        self._task: asyncio.Task[Any] | None = None
        choices = len(prompts) * options.choices
        self._opened = [False] * choices
        self._choices = [model.choice(options, reading) for _ in range(choices)]
        self._read = isinstance(self._choices[0], ReadChoice)
        predicted = PredictedText(prediction)
        self._matches = [PredictionMatch(predicted) for _ in range(choices)] if prediction else []
        self._plain = (choices == 1 and not self._read and not prediction and not options.stop
                       and not options.prompt_only and not options.return_token_ids and not options.continuous_usage
                       and options.logprobs < 0)
        self._reasons: list[str | None] = [None] * choices
        self._shown = [0] * choices  # tokens taken of each choice
        self._error: MillError | None = None
        self._streams: list[Stream] = []  # of the first choices, until others have ended
        self._headers: dict[str, str] = {}  # that go with each request
        self._written_tokens = 0  # of all choices, as far as the client was told of them
        self._outcome = ""
        self._account_of = account
        self._says_cost = account.price is not None and asks(scope, COST)
        account.counts = self._counts
        account.hear_out, account.hear_no_more = self._hear_out, self._hear_no_more
        self._id = account.request
        self._reply = reply(Head(
            self._id, int(gateway.clock.wall()), model.name,
            fingerprint(model.name, model.card.vocabulary, gateway.recipe(model)),
            options.include_usage, options.tier if options.show_tier else None,
            Spelling(model.tokenizer.token_bytes, model.tokenizer.special_ids if options.skip_special else ()),
            model.dialect.id_length))
        self._plain = self._plain and self._reply.quick

    async def give(self, receive: Receive, send: Send) -> None:
        """Open the streams, answer, end what is left. Raises MillError while the answer has not begun."""
        span = self._open_span()
        watching: asyncio.Task[None] | None = None
        error = MillError.code  # unless it is known otherwise
        self._task = asyncio.current_task()
        self._gateway.answers.add(self)
        try:
            self._headers = telemetry.inject(span.context)
            if traced := telemetry.ids_in(self._traceparent):
                self._scope["state"]["bound"] |= structlog.contextvars.bind_contextvars(**traced)
            self._open_streams(self._options.at_once(len(self._choices)))
            if self._direct is None:
                watching = asyncio.create_task(self._watch(receive))
            elif not self._direct.when_left(self._stop):
                self._stop()
            await (self._stream(send) if self._options.stream else self._whole(send))
            error = self._error.code if self._error else ""
        except MillError as failed:
            error = failed.code
            raise
        except ClientLeft:
            error = "client_left"
            raise
        except asyncio.CancelledError:
            error = "client_left" if self._client_left else "cancelled"
            if self._client_left and self._task is not None and not self._task.uncancel():
                raise ClientLeft from None
            raise
        finally:
            self._gateway.answers.discard(self)
            if watching is not None:
                watching.cancel()
            elif self._direct is not None:
                self._direct.when_left(None)
            for stream in self._streams:
                self._gateway.streams.cancel(stream)
                stream.changed = NOBODY  # else the two would keep each other
            self._outcome = error or next((reason for reason in self._reasons if reason), "")
            self._account(span, error)

    @property
    def _traceparent(self) -> str:
        return self._headers.get("traceparent", "")

    @property
    def used_tokens(self) -> int:
        """What it has cost its tenant so far: prompts that a worker took, each once, and tokens of answers."""
        return self._begun_tokens + self._taken_tokens

    @property
    def _begun_tokens(self) -> int:
        begun = {index // self._options.choices for index, stream in enumerate(self._streams) if stream.state.begun}
        return sum(len(self._prompts[index].tokens) for index in begun)

    @property
    def _taken_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    # --- streams ------------------------------------------------------------------------------------------------------

    def _open_streams(self, count: int) -> None:
        """The next so many."""
        gateway, options = self._gateway, self._options
        timeout_s = gateway.settings.request_timeout_s
        seed = self._seed()
        for index in range(len(self._streams), min(len(self._streams) + count, len(self._choices))):
            prompt = self._prompts[index // options.choices]
            request = Generate(
                request_id=f"{self._id}-{index}", attempt=1, gateway=gateway.id, model=self._model.name,
                # a vector has no tokens, and none of none would be all of them
                tokens=prompt.packed, max_tokens=max(1, prompt.max_tokens), deadline=gateway.clock.wall() + timeout_s,
                sampling=msgspec.structs.replace(options.sampling, seed=choice_seed(seed, index)),
                tenant=self._tenant.name, weight=self._tenant.weight, cache_salt=self._tenant.salt,
                # a mean is of what the cache would save computing
                block_hashes=b"" if options.pooling == "mean" else prompt.block_hashes,
                stop_token_ids=self._model.end_tokens(options),
                priority=priority(options.tier, options.priority), cache_hint=options.cache_hint,
                vocabulary=self._model.card.vocabulary, tier=options.tier, residency=self._residency,
                prediction=self._prediction, adjust=self._adjust, logprobs=options.logprobs,
                prompt_logprobs=self._prompt_likeliest(index), grammar=options.grammar,
                pooling=options.pooling)
            self._streams.append(gateway.streams.open(request, self._headers, self,
                                                      gateway.clock.now() + timeout_s))

    def _prompt_likeliest(self, index: int) -> int:
        """How many of the likeliest tokens to ask for at each place of the prompt; -1: nothing is to be told of it."""
        return prompt_likeliest(self._options) if self._scored_by(index) == index else -1

    def _scored_by(self, index: int) -> int:
        """The choice that is told about the prompt of this one: the first that has it, for scoring is computing anew.

        In a stream each for itself, since no choice can wait for another.
        """
        return index if self._options.stream else index - index % self._options.choices

    def _seed(self) -> int:
        """The client's; or one that follows from its idempotency key or request id, so that asking again gives the
        same; or any."""
        if self._options.seed is not None:
            return self._options.seed
        state = self._scope["state"]
        if (given := state.get("idempotency_key") or state.get("client_request_id")) is not None:
            return int.from_bytes(blake2b(given.encode(), digest_size=8).digest(), "little")
        return secrets.randbits(64)

    async def _watch(self, receive: Receive) -> None:
        """Wait until the client hangs up, and stop everything then."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stop()

    def _stop(self) -> None:
        self._client_left = True
        for stream in self._streams:
            self._gateway.streams.cancel(stream)
        self._changed.set()

    def tick(self, now_s: float) -> None:
        """Time has passed: wake a stream that was silent for long, part from a client that does not read.

        Timers of one's own would cost each chunk a third of its CPU time (26 us with, 18 us without).
        """
        if self._writing_s is None:
            patience_s = self._gateway.settings.keep_alive_s if self._signed else HEADERS_WITHIN_S
            if self._options.stream and now_s - self._written_s >= patience_s:
                self._changed.set()
        elif now_s - self._writing_s >= WRITE_S and not self._client_left:
            log.warning("client_too_slow")
            self._stop()
            if self._task is not None:
                self._task.cancel()

    def set(self) -> None:
        """Called when streams have changed. Writes the middle of a stream on the spot; wakes the task for all else."""
        if self._resting and self._direct is not None and not self._changed.is_set():
            try:
                if self._write_now(self._direct):
                    return
            except Exception as error:
                self._broke = error
        self._changed.set()

    def _write_now(self, direct: DirectBody) -> bool:
        """Write what has come. False when the task has to go on: with an end, an error or a client that lags behind."""
        for stream in self._streams:
            if stream.ended is not None:
                return False
        documents = self._plain_documents() if self._plain and self._opened[0] else self._documents()
        if self._error is None and None in self._reasons and (
                not documents or direct.write(self._reply.events(documents))):
            if documents:
                self._written_s = self._gateway.clock.now()
                self._written_tokens = self._taken_tokens
            return True
        self._unwritten = documents
        return False

    def _plain_documents(self) -> list[bytes]:
        """`_documents` of what nearly every stream is: one choice, begun, of which nothing is told but its text."""
        text = self._choices[0].text(self._streams[0].take())
        return [self._reply.content(0, text)] if text else []

    async def _wait(self) -> None:
        """Until something changed. Raises ClientLeft."""
        await self._changed.wait()
        self._changed.clear()
        if self._client_left:
            raise ClientLeft

    async def _last_words(self) -> None:
        """Until workers have said what drafts brought the streams that stop strings ended, or for a moment."""
        if not any(stream.parting for stream in self._streams):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                while any(stream.parting for stream in self._streams):
                    await self._wait()

    def _advance(self) -> list[Piece]:
        """What has come since the last call, by choice. The first failure lands in `_error`."""
        pieces = []
        for index, stream in enumerate(self._streams):
            if self._reasons[index] is not None or not (stream.pending or stream.ended):
                continue
            ended = stream.ended
            choice = self._choices[index]
            added = choice.push([] if self._options.prompt_only else stream.take())
            told = self._told(index, added.tokens) if self._options.logprobs >= 0 else None
            if self._matches:
                self._matches[index].follow(added.tokens)
            parts, reason = self._parts(added), None
            if added.stopped:
                reason = "stop"
                self._gateway.streams.stop(stream)
            elif isinstance(ended, MillError):
                self._error = self._error or ended
            elif ended is not None:
                rest = choice.flush()
                parts = joined([*parts, *self._parts(rest)])
                reason = "stop" if rest.stopped else ended.reason
            if reason == "stop" and choice.called:
                reason = "tool_calls"
            self._reasons[index] = reason
            pieces.append(Piece(index, parts, added.tokens, reason, told))
        if len(self._streams) < len(self._choices) and self._error is None:
            self._open_streams(sum(piece.reason is not None for piece in pieces))
        return pieces

    def _parts(self, added: replies.Piece) -> list[Part]:
        if self._read:
            return list(added.parts)
        return [Said(added.text)] if added.text else []

    def _told(self, index: int, tokens: list[int]) -> list[Told]:
        """How likely these were, the next of a choice. A record that did not come is left out."""
        records, first = self._streams[index].state.logprobs, self._shown[index]
        self._shown[index] += len(tokens)
        return [Told(token, unpack_likely(records.pop(number))) for number, token in enumerate(tokens, first)
                if number in records]

    def _prompt_told(self, index: int, most: int) -> list[Told]:
        """How likely each token of a choice's prompt was, the first aside, with the `most` likeliest."""
        records = self._streams[self._scored_by(index)].state.prompt_logprobs
        told = []
        for number, token in enumerate(self._prompt_of(index).tokens):
            likely = unpack_likely(records[number]) if number in records else None
            told.append(Told(token, likely and likely._replace(top=likely.top[:most])))
        return told

    def _embedding(self, index: int) -> bytes:
        ended = self._streams[index].ended
        if not self._options.pooling or not isinstance(ended, Finished):
            return b""
        if not ended.embedding:
            raise WorkerFailed("a worker ended a request for a vector without one: retry")
        return ended.embedding

    def _echo(self, index: int) -> common.Echo | None:
        if not self._options.echo:
            return None
        text = self._model.tokenizer.decode(self._prompt_of(index).tokens, self._options.skip_special)
        return common.Echo(text, self._prompt_told(index, self._options.logprobs)
                           if self._options.logprobs >= 0 else None)

    # --- one piece ----------------------------------------------------------------------------------------------------

    async def _whole(self, send: Send) -> None:
        parts: list[list[Part]] = [[] for _ in self._choices]
        tokens: list[list[int]] = [[] for _ in self._choices]
        told: list[list[Told]] = [[] for _ in self._choices]
        while None in self._reasons:
            await self._wait()
            for piece in self._advance():
                parts[piece.index] += piece.parts
                tokens[piece.index] += piece.tokens
                told[piece.index] += piece.told or []
            if self._error is not None:
                raise self._error
        await self._last_words()
        ids = self._options.return_token_ids
        scores, scores_prompt = self._options.logprobs >= 0, self._options.prompt_logprobs >= 0
        document = self._reply.whole([
            common.WholeChoice(
                joined(parts[i]), self._reasons[i] or "stop", tokens[i] if ids else None,
                self._prompt_of(i).tokens if ids else None, told[i] if scores else None,
                self._prompt_told(i, self._options.prompt_logprobs) if scores_prompt else None, self._echo(i),
                self._choices[i].stopped, self._embedding(i))
            for i in range(len(self._choices))], self._usage(), self._metrics())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(document)).encode())]
        if self._says_cost:
            headers.append((b"x-tokenmill-cost", shown(self._cost(self._taken_tokens)).encode()))
        await self._start(send, 200, headers)
        await self._write(send, document, last=True)

    # --- a stream -----------------------------------------------------------------------------------------------------

    async def _stream(self, send: Send) -> None:
        await self._first_sign()
        await self._start(send, 200, list(sse.HEADERS))
        while True:
            if self._broke is not None:
                raise self._broke
            documents = self._unwritten + self._documents()
            self._unwritten = []
            if self._error is not None:
                log.warning("stream_failed", code=self._error.code, reason=self._error.reason)
                await self._write(send, self._reply.events([*documents, self._reply.failed(self._error)]), last=True)
                return
            if None not in self._reasons:
                if self._options.include_usage:
                    if documents and any(stream.parting for stream in self._streams):
                        await self._write(send, self._reply.events(documents))
                        documents = []
                    await self._last_words()
                documents += self._reply.totals(self._usage(), self._metrics())
                await self._write(send, self._reply.events(documents) + self._reply.done, last=True)
                return
            if documents:
                await self._write(send, self._reply.events(documents))
            elif self._gateway.clock.now() - self._written_s >= self._gateway.settings.keep_alive_s:
                await self._send(send, {"type": "http.response.body", "body": sse.KEEP_ALIVE, "more_body": True})
            self._resting = True
            try:
                await self._wait()
            finally:
                self._resting = False

    async def _first_sign(self) -> None:
        """Until a worker works on some choice, a few seconds at most. Raises the MillError of a choice that failed."""
        give_way_s = self._written_s = self._gateway.clock.now()
        give_way_s += HEADERS_WITHIN_S
        while True:
            for stream in self._streams:
                if isinstance(stream.ended, MillError) and not stream.state.delivered:
                    raise stream.ended
            if self._gateway.clock.now() >= give_way_s or any(
                    stream.alive or stream.ended for stream in self._streams):
                self._signed = True
                return
            await self._wait()

    def _documents(self) -> list[bytes]:
        documents = []
        opened = self._opened
        ids, usage = self._options.return_token_ids, None
        pieces = self._advance()
        if self._options.continuous_usage and pieces:
            usage = self._usage()
        for piece in pieces:
            if not opened[piece.index]:
                opened[piece.index] = True
                documents += self._reply.opening(piece.index, self._prompt_of(piece.index).tokens if ids else None,
                                                 self._echo(piece.index), self._usage)
            documents += self._reply.piece(piece.index, piece.parts, piece.tokens if ids else None, usage, piece.told)
            if piece.reason is not None:
                documents += self._reply.closing(piece.index, piece.reason, usage,
                                                 self._choices[piece.index].stopped)
        return documents

    # --- writing ------------------------------------------------------------------------------------------------------

    async def _start(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        worker = self._streams[0].worker
        if worker:
            headers.append((b"x-mill-worker", worker.encode()))
        if self._options.ignored:
            headers.append((b"x-tokenmill-ignored", ", ".join(self._options.ignored).encode()))
        if asks(self._scope, EXPLAIN) and (line := header(self._outcomes())):
            headers.append((b"x-tokenmill-receipt", line.encode()))
        await self._send(send, {"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, send: Send, data: bytes, last: bool = False) -> None:
        taken = self._taken_tokens
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": not last})
        self._written_tokens = taken

    async def _send(self, send: Send, message: Message) -> None:
        self._writing_s = self._written_s = self._gateway.clock.now()
        try:
            await send(message)
        except OSError as error:
            raise ClientLeft from error
        finally:
            self._writing_s = None

    # --- figures ------------------------------------------------------------------------------------------------------

    def _prompt_of(self, index: int) -> Prompt:
        return self._prompts[index // self._options.choices]

    def _ends(self) -> list[Finished]:
        return [stream.ended for stream in self._streams if isinstance(stream.ended, Finished)]

    def _outcomes(self) -> list[Outcome]:
        """Each choice as its receipt shows it. One that a stop string ended is not ended for its worker."""
        outcomes = [
            outcome_of(stream.notes, len(self._prompt_of(index).tokens), stream.ended, stream.worker,
                       stream.state.attempt, stream.state.cached_tokens)
            for index, stream in enumerate(self._streams)]
        return [outcome._replace(ended=outcome.ended or self._reasons[index] or "")
                for index, outcome in enumerate(outcomes)]

    def _usage(self) -> common.Usage:
        """Counts of all choices; a prompt with several choices counts once."""
        ends = self._ends()
        firsts = self._streams[::self._options.choices]
        drafters = [end.drafter for end in ends if end.drafter]
        accepted = sum(match.accepted for match in self._matches)
        return common.usage(
            sum(len(prompt.tokens) for prompt in self._prompts),
            sum(choice.completion_tokens for choice in self._choices),
            sum(stream.cached_tokens for stream in firsts),
            common.MillUsage(
                worker=self._streams[0].worker, drafter=drafters[0] if drafters else "",
                draft_tokens=sum(end.draft_tokens for end in ends),
                accepted_draft_tokens=sum(end.accepted_draft_tokens for end in ends),
                attempts=max(stream.state.attempt for stream in self._streams)), accepted,
            count(self._prediction) * len(self._matches) - accepted,
            sum(choice.reasoning_tokens for choice in self._choices),
            self._cost(self._taken_tokens) if self._says_cost else None)

    def _cost(self, generated_tokens: int) -> int:
        """Nano-dollars that it comes to if so many tokens are its answer."""
        return self._account_of.record(0, self._counted(generated_tokens)).amount

    def _counts(self) -> Counts:
        return self._counted(self._written_tokens)

    def _hear_out(self, call: Callable[[], None]) -> int:
        """Have `call` made for each stream whose worker has yet to say what it took; how many these are."""
        return sum(self._gateway.streams.hear_out(stream, call) for stream in self._streams if stream.state.begun)

    def _hear_no_more(self) -> None:
        for stream in self._streams:
            self._gateway.streams.hear_no_more(stream)

    def _counted(self, generated_tokens: int) -> Counts:
        """What it is charged for: nothing of what failed before the client was told of it."""
        failed = self._outcome not in ("", "client_left", *_REASONS) or self._error is not None
        charged = bool(generated_tokens) or not failed
        ends = [end for end in map(last_word, self._streams) if end is not None]
        return Counts(
            prompt_tokens=self._begun_tokens if charged else 0,
            cached_tokens=sum(stream.cached_tokens for stream in self._streams[::self._options.choices]
                              if stream.state.begun) if charged else 0,
            generated_tokens=generated_tokens, draft_tokens=sum(end.draft_tokens for end in ends),
            accepted_draft_tokens=sum(end.accepted_draft_tokens for end in ends),
            attempts=max((stream.state.attempt for stream in self._streams), default=1), outcome=self._outcome,
            worker_us=sum(worker_us(end) for end in ends), cost=self._our_cost())

    def _our_cost(self) -> int | None:
        """Nano-dollars; None while not all workers have said what they did, or what they cost."""
        sheet, cost = self._gateway.billing.sheet, 0
        for stream in self._streams:
            if not stream.state.begun:
                continue
            status = self._gateway.fleet.worker(stream.worker)
            hour = None if sheet is None or status is None else sheet.hour(status.sku, status.price_usd_per_hour)
            end = last_word(stream)
            if hour is None or end is None or not worker_us(end):
                return None
            cost += worker_cost(hour, worker_us(end)) + drafter_cost(end)
        return cost

    def _metrics(self) -> RequestMetrics | None:
        """What one stream took and drafts brought it; None of several, and where its worker said nothing of drafts."""
        ended = self._streams[0].ended
        return metrics_of(ended) if len(self._streams) == 1 and isinstance(ended, Finished) else None

    def _open_span(self) -> telemetry.OpenSpan:
        options, sampling = self._options, self._options.sampling
        carried = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._scope["headers"]
                   if name in (b"traceparent", b"tracestate")}
        if not telemetry.traces():
            return telemetry.open_span("", 0.0, telemetry.extract(carried))
        attributes: dict[str, telemetry.Attribute] = {
            names.OPERATION_NAME: self._operation, names.PROVIDER_NAME: names.PROVIDER,
            names.REQUEST_MODEL: self._model.name, names.REQUEST_ID: self._scope["state"]["request_id"],
            names.REQUEST_MAX_TOKENS: self._prompts[0].max_tokens, names.REQUEST_TEMPERATURE: sampling.temperature,
            names.REQUEST_TOP_P: sampling.top_p, names.REQUEST_TOP_K: sampling.top_k,
            names.REQUEST_CHOICE_COUNT: options.choices, names.REQUEST_STREAM: options.stream,
            names.HTTP_ROUTE: self._scope["path"], names.GATEWAY: self._gateway.id, names.TENANT: self._tenant.name}
        if self._residency.zones:
            attributes[names.RESIDENCY] = list(self._residency.zones)
        return telemetry.open_span(f"{self._operation} {self._model.name}", self._unix(self._began_s),
                                   telemetry.extract(carried), attributes, SpanKind.SERVER)

    def _account(self, span: telemetry.OpenSpan, error: str) -> None:
        """Everything that is known at the end: metrics, span, log."""
        gateway, operation, model = self._gateway, self._operation, self._model.name
        now_s = gateway.clock.now()
        usage = self._usage()
        mill = usage.mill if isinstance(usage.mill, common.MillUsage) else common.MillUsage()
        cached = usage.prompt_tokens_details.cached_tokens
        metrics = gateway.metrics
        exemplar = telemetry.exemplar_in(self._traceparent)
        metrics.ended(operation, model, now_s - self._began_s, error, exemplar)
        metrics.completion_tokens.inc(usage.completion_tokens)
        prompt, found_cached = (0, 0) if error else (usage.prompt_tokens, cached)
        metrics.used(self._tenant.name, prompt, found_cached, usage.completion_tokens)
        for end in self._ends():
            metrics.drafted(model, end)
        metrics.prompt_tokens.inc(prompt)
        metrics.cached_tokens.inc(found_cached)
        for stream, choice in zip(self._streams, self._choices, strict=False):
            if stream.first_token_s is not None and not error:
                metrics.stream_ended(operation, model, stream.first_token_s - self._began_s,
                                     stream.last_token_s - self._began_s, choice.completion_tokens, exemplar)
        outcomes = self._outcomes()
        gateway.receipts.keep(Kept(self._scope["state"]["request_id"], self._reply.id, model,
                                   self._unix(self._began_s), tuple(outcomes[:MAX_CHOICES]), self._tenant.name))
        known = [truth for truth in map(found, outcomes) if truth is not None]
        for truth in known:
            metrics.placed(truth)
        if span.recorded:
            self._close_span(span, usage, mill, known, now_s, error)
        # routers and workers log `request=` the response's number and that of the choice
        gateway.log.info("request_ended", response=self._reply.id, operation=operation,
                         prompt_tokens=usage.prompt_tokens, cached_tokens=cached,
                         completion_tokens=usage.completion_tokens, worker=mill.worker, attempts=mill.attempts,
                         seconds=round(now_s - self._began_s, 4), error=error or None)

    def _close_span(self, span: telemetry.OpenSpan, usage: common.Usage, mill: common.MillUsage,
                    known: Sequence[Found], now_s: float, error: str) -> None:
        attributes: dict[str, telemetry.Attribute] = {
            names.RESPONSE_ID: self._reply.id, names.RESPONSE_MODEL: self._model.name, names.WORKER: mill.worker,
            names.RESPONSE_FINISH_REASONS: [reason or "error" for reason in self._reasons],
            names.USAGE_INPUT_TOKENS: usage.prompt_tokens, names.USAGE_OUTPUT_TOKENS: usage.completion_tokens,
            names.USAGE_CACHE_READ_TOKENS: usage.prompt_tokens_details.cached_tokens,
            names.DRAFT_TOKENS: mill.draft_tokens, names.DRAFT_ACCEPTED_TOKENS: mill.accepted_draft_tokens,
            names.ATTEMPT: mill.attempts, names.LATENCY_END_TO_END: now_s - self._began_s}
        firsts = [stream.first_token_s for stream in self._streams if stream.first_token_s is not None]
        if firsts:
            attributes[names.LATENCY_FIRST_TOKEN] = min(firsts) - self._began_s
            span.event("first_token", self._unix(min(firsts)))
            span.event("last_token", self._unix(max(stream.last_token_s for stream in self._streams)))
        if ends := self._ends():
            if mill.drafter:
                attributes |= {names.DRAFTER: mill.drafter,
                               names.DRAFT_LATE_TOKENS: sum(end.late_draft_tokens for end in ends),
                               names.DRAFT_SAVED_S: sum(end.draft_saved_s for end in ends),
                               names.DRAFTER_S: sum(end.drafter_s for end in ends),
                               names.DRAFTER_USD: sum(end.drafter_usd for end in ends)}
            attributes |= {names.LATENCY_IN_QUEUE: ends[0].queue_s, names.LATENCY_PREFILL: ends[0].prefill_s,
                           names.LATENCY_DECODE: ends[0].decode_s}
        if known:
            attributes |= {names.PLACEMENT_CACHED_TOKENS: known[0].predicted_tokens,
                           names.CACHED_TOKENS: known[0].cached_tokens, names.CACHE_MISS: known[0].miss}
        span.end(self._unix(now_s), attributes, error)

    def _unix(self, monotonic_s: float) -> float:
        return self._gateway.clock.wall() - (self._gateway.clock.now() - monotonic_s)


def last_word(stream: Stream) -> Finished | None:
    """What its worker said at its end, here or there."""
    return stream.ended if isinstance(stream.ended, Finished) else stream.last_word


def worker_us(end: Finished) -> int:
    """Microseconds of the device's time; 0 for what can be none."""
    return round(1_000_000 * end.worker_s) if 0.0 <= end.worker_s < MOST_WORKER_S else 0


def drafter_cost(end: Finished) -> int:
    """Nano-dollars that its drafter cost; 0 for what can be none."""
    return round(NANOS * end.drafter_usd) if 0.0 <= end.drafter_usd < MOST_WORKER_S else 0


def asks(scope: Scope, header: bytes) -> bool:
    """Whether a request has this header, and not as 0."""
    return dict(scope["headers"]).get(header, b"0") not in (b"", b"0")


@lru_cache(1024)
def fingerprint(model: str, vocabulary: str, recipe: str) -> str:
    """Equal for two answers exactly when the same seed gives the same tokens: model, vocabulary and numeric recipe."""
    digest = blake2b("\0".join((model, vocabulary, recipe)).encode(), digest_size=6)
    return f"fp_{digest.hexdigest()}"
