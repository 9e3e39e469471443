"""A router and a worker in thirty lines, and a model whose tokens are bytes: enough mesh to test a gateway alone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gateway.app import build_app
from gateway.model_files import ModelCard
from gateway.prompt import ServedModel
from gateway.service import Gateway
from gateway.template import ChatTemplate
from gateway.tokenizer import Tokenizer
from shared import subjects
from shared.bus import BusUnavailable, Delivery
from shared.clock import LoopClock
from shared.logprobs import pack_likely
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    Generate,
    Reply,
    RouterStatus,
    Scored,
    StepReplies,
    Tokens,
    WorkerStatus,
    decode,
    encode,
)
from shared.settings import GatewaySettings
from shared.tokens import pack, unpack

MODEL = "tiny"
START, END = 256, 257
TEMPLATE = ("{% for message in messages %}<|start|>{{ message.role }}:{{ message.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant:{% endif %}")


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    library = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|start|>", "<|end|>"])
    return Tokenizer(library, 258)


def _byte_of(character: str) -> int:
    code = ord(character)
    if code < 256:
        return code
    others = [byte for byte in range(256) if not (0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF)]
    return others[code - 256]


def tiny_model(**card: Any) -> ServedModel:
    fields = dict(name="tiny-of-bytes", architecture="test", context_length=400, vocabulary_size=258, vocabulary="v",
                  eos_token_id=END, stop_token_ids=(END,), chat_template=TEMPLATE)
    made = ModelCard(**(fields | card))
    return ServedModel(MODEL, made, byte_tokenizer(), ChatTemplate.of(made))


class FakeMesh:
    """Answers every request with `says`, `batch` tokens per message. `script` may take a request over."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.bus = MemoryBus(broker)
        self.model = MODEL  # that w1 says it serves
        self.says = b"Hello, world!"
        self.batch = 4
        self.pause_s = 0.0
        self.script: Callable[[Generate], list[Reply] | None] = lambda request: None
        self.drafter = ""  # that w1 says it follows
        self.last_words: Callable[[Cancel], list[Reply]] = lambda cancel: []  # what w1 says to gateway g1 then
        self.requests: list[Generate] = []
        self.headers: list[dict[str, str]] = []
        self.cancels: list[Cancel] = []
        self.cancelled = asyncio.Event()
        self.seq = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self.bus.subscribe(subjects.ALL_GENERATE, self._on_generate, subjects.ROUTER_QUEUE)
        await self.bus.subscribe(subjects.worker_cancel("w1"), self._on_cancel)
        await self.announce()

    async def announce(self) -> None:
        worker = WorkerStatus("w1", 1, self.model, recipe="r", running=len(self.tasks), drafter=self.drafter,
                              replies_sent={"g1": self.seq})
        await self.bus.publish(subjects.status("worker", "w1"), encode(worker))
        await self.bus.publish(subjects.status("router", "r1"), encode(RouterStatus("r1", 1)))

    async def beat(self) -> None:
        while True:
            with contextlib.suppress(BusUnavailable):
                await self.announce()
            await asyncio.sleep(0.05)

    async def reply(self, gateway: str, *replies: Reply, sender: str = "w1") -> None:
        self.seq += 1
        await self.bus.publish(subjects.replies(gateway), encode(StepReplies(sender, 1, self.seq, replies)))

    def _on_generate(self, delivery: Delivery) -> None:
        request = decode(delivery.data, Generate)
        self.requests.append(request)
        self.headers.append(dict(delivery.headers))
        self._keep(self._serve(request))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _on_cancel(self, delivery: Delivery) -> None:
        cancel = decode(delivery.data, Cancel)
        self.cancels.append(cancel)
        self.cancelled.set()
        if words := self.last_words(cancel):
            self._keep(self.reply("g1", *words))

    async def _serve(self, request: Generate) -> None:
        scripted = self.script(request)
        if scripted is not None:
            if scripted:
                await self.reply(request.gateway, *scripted)
            return
        with contextlib.suppress(BusUnavailable):
            await self._generate(request)

    async def _generate(self, request: Generate) -> None:
        name, attempt = request.request_id, request.attempt
        await self.reply(request.gateway, Accepted(name, attempt, "w1", 16))
        if request.prompt_logprobs >= 0:
            prompt = unpack(request.tokens)
            for at in range(1, len(prompt), self.batch):
                await self.reply(request.gateway, Scored(name, attempt, at, likely(
                    prompt[at:at + self.batch], request.prompt_logprobs)))
        tokens = [*self.says, END][:request.max_tokens]
        for at in range(len(request.generated) // 4, len(tokens), self.batch):
            await asyncio.sleep(self.pause_s)
            if Cancel(name, attempt) in self.cancels:
                return
            records = likely(tokens[at:at + self.batch], request.logprobs) if request.logprobs >= 0 else b""
            replies: list[Reply] = [Tokens(name, attempt, at, pack(tokens[at:at + self.batch]), records)]
            if at + self.batch >= len(tokens):
                replies.append(self.finished(request, tokens))
            await self.reply(request.gateway, *replies)

    def finished(self, request: Generate, tokens: list[int]) -> Finished:
        reason = "stop" if tokens[-1] in request.stop_token_ids else "length"
        return Finished(request.request_id, request.attempt, reason, "w1", len(request.tokens) // 4, 16, len(tokens),
                        draft_tokens=8, accepted_draft_tokens=6, drafter="d1", queue_s=0.1)


def likely(tokens: list[int], most: int) -> bytes:
    """Records that say of token t the logarithm -t / 256; t + 1, t + 2, ... are the likeliest, with 0, -1, ..."""
    count = len(tokens)
    own = np.array(tokens, np.float32)
    top = np.tile(-np.arange(most, dtype=np.float32), (count, 1))
    ids = (np.array(tokens)[:, None] + 1 + np.arange(most)) % 258
    return pack_likely(-own / np.float32(256), np.array(tokens, np.int32) + 1, ids.astype(np.int32), top)


def refusal(request: Generate, code: str, retryable: bool = False, retry_after_s: float = 0.0) -> list[Reply]:
    return [Failed(request.request_id, request.attempt, code, f"refused: {code}", retryable, retry_after_s)]


@contextlib.asynccontextmanager
async def gateway_and_mesh(model: ServedModel | None = None, **settings: Any
                           ) -> AsyncIterator[tuple[httpx.AsyncClient, FakeMesh, Gateway]]:
    """A gateway behind its application, without a socket, and a mesh that answers it."""
    broker = MemoryBroker()
    mesh = FakeMesh(broker)
    told = GatewaySettings(**({"id": "g1", "model_name": MODEL, "accept_s": 0.4, "drain_s": 2.0} | settings))
    gateway = Gateway(MemoryBus(broker), told, LoopClock(), model or tiny_model())
    async with gateway.running():
        await mesh.start()
        beating = asyncio.create_task(mesh.beat())
        while gateway.not_ready():
            await asyncio.sleep(0)
        transport = httpx.ASGITransport(build_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client, mesh, gateway
        beating.cancel()
