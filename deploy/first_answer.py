"""One short answer, streamed through the whole mesh onto the terminal, with what it took."""

import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

QUESTION = "In one sentence: what does a mill do?"


class AnswerFailed(Exception):
    """Why no answer came, in a sentence."""


@dataclass
class Answer:
    """What came back. Times in seconds."""

    text: str = ""
    ttft_s: float = 0.0
    total_s: float = 0.0
    completion_tokens: int = 0
    mesh: dict[str, Any] = field(default_factory=dict)  # usage.mill: worker, drafter, draft counts

    @property
    def tokens_per_s(self) -> float:
        """Of the decode: the first token is not counted."""
        decode_s = self.total_s - self.ttft_s
        return (self.completion_tokens - 1) / decode_s if decode_s > 0 and self.completion_tokens > 1 else 0.0


async def ask(
    url: str, model: str, show: Callable[[str], None], question: str = QUESTION, max_tokens: int = 64, key: str = "",
    verify: ssl.SSLContext | bool = True,
) -> Answer:
    """Stream one greedy chat answer from `url`; `show` gets each piece of text. Raises AnswerFailed.

    `key`: of a tenant, where keys are needed. `verify`: how the gateway is known, as httpx takes it.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        return await _stream(f"{url}/v1/chat/completions", body, show, key, verify)
    except httpx.HTTPError as error:
        raise AnswerFailed(str(error) or type(error).__name__) from error


async def _stream(address: str, body: dict[str, Any], show: Callable[[str], None], key: str,
                  verify: ssl.SSLContext | bool) -> Answer:
    answer = Answer()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    start = time.perf_counter()
    async with (
        httpx.AsyncClient(timeout=120.0, trust_env=False, verify=verify) as client,
        client.stream("POST", address, json=body, headers=headers) as response,
    ):
        if response.status_code != 200:
            raise AnswerFailed(_message(await response.aread()) or f"HTTP status {response.status_code}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise AnswerFailed(event["error"]["message"])
            if event.get("usage"):
                answer.completion_tokens = event["usage"]["completion_tokens"]
                answer.mesh = event["usage"].get("mill", {})
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    answer.ttft_s = answer.ttft_s or time.perf_counter() - start
                    answer.text += piece
                    show(piece)
    answer.total_s = time.perf_counter() - start
    return answer


def _message(body: bytes) -> str:
    """The gateway's own words about an error, or nothing."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
