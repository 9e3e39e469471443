"""The whole mesh as a user meets it: the official client, the shared prefix, one trace through all services."""

import asyncio

import openai
import pytest

from deploy import explain
from deploy.local_mesh import LocalMesh
from gateway.model_files import load_card
from tests.mesh.streams import chat, read
from tests.otlp_receiver import OtlpReceiver, Span

SERVICES = {"tokenmill-gateway", "tokenmill-router", "tokenmill-worker", "tokenmill-drafter"}
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_the_official_client_streams_a_sensible_answer_with_usage(mesh: LocalMesh) -> None:
    client = openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none")
    text, usage = "", None
    stream = await client.chat.completions.create(
        model=load_card(mesh.options.model).name,
        messages=[{"role": "user", "content": "What is the capital of Germany?"}],
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert "Berlin" in text
    assert usage is not None and usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    whole = await client.chat.completions.create(
        model=load_card(mesh.options.model).name,
        messages=[{"role": "user", "content": "What is the capital of Germany?"}],
        temperature=0,
        max_tokens=32,
    )
    assert whole.choices[0].message.content == text
    assert whole.usage is not None and whole.usage.completion_tokens == usage.completion_tokens
    await client.close()


async def test_a_shared_prefix_is_found_on_the_worker_that_has_it(mesh: LocalMesh) -> None:
    name = load_card(mesh.options.model).name
    prefix = " ".join(f"Rule {i}: the {i}th miller pays {i * 7} coins." for i in range(150))
    first = await read(mesh.url, chat(name, prefix + " Who pays most?", max_tokens=4))
    assert first.usage["prompt_tokens"] > 2000
    busy = [
        asyncio.create_task(read(mesh.url, chat(name, f"{i}: count to a hundred", max_tokens=64))) for i in range(4)
    ]
    second = await read(mesh.url, chat(name, prefix + " Who pays least?", max_tokens=4))
    assert second.usage["mill"]["worker"] == first.usage["mill"]["worker"]
    assert second.usage["prompt_tokens_details"]["cached_tokens"] >= 2000
    await asyncio.gather(*busy)


async def test_a_request_can_be_explained_afterwards(mesh: LocalMesh) -> None:
    name = load_card(mesh.options.model).name
    rules = " ".join(f"Law {i}: the {i}th baker pays {i * 3} loaves." for i in range(60))
    for question in ("Who pays most?", "Who pays least?"):
        asked = chat(name, f"{rules} {question}", max_tokens=4)
        told = await read(mesh.url, asked, headers={"x-request-id": question.replace(" ", "-")})
    receipt = await asyncio.to_thread(explain.fetch, [mesh.url], "Who-pays-least?")
    (choice,) = receipt["choices"]
    (attempt,) = choice["attempts"]
    assert attempt["considered"] == 2 and {row["worker"] for row in attempt["candidates"]} == {"worker-1", "worker-2"}
    assert attempt["router"] in ("router-1", "router-2")
    assert choice["worker"] == attempt["worker"] == told.usage["mill"]["worker"]
    assert choice["miss"] == "none"
    assert choice["actual_cached_tokens"] >= attempt["predicted_cached_tokens"] > 500
    assert attempt["worker"] in "\n".join(explain.page(receipt))


async def test_one_request_is_one_trace_through_all_four_services(mesh: LocalMesh, otlp: OtlpReceiver) -> None:
    name = load_card(mesh.options.model).name
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = "00f067aa0ba902b7"
    await read(
        mesh.url,
        chat(name, "Say yes ten times: yes yes yes yes yes yes yes yes yes yes. Again:", max_tokens=32),
        headers={"traceparent": f"00-{trace}-{parent}-01"},
    )

    def mine() -> list[Span]:
        return [span for span in otlp.spans if span.trace_id == trace]

    async with asyncio.timeout(30):
        while not SERVICES <= {span.service for span in mine()}:
            await asyncio.sleep(0.1)
    spans = {span.span_id: span for span in mine()}
    roots = [span for span in spans.values() if span.parent_id not in spans]
    assert [(root.service, root.parent_id) for root in roots] == [("tokenmill-gateway", parent)]
    names = {span.name for span in spans.values() if span.service == "tokenmill-worker"}
    assert {"queue", "prefill", "decode", "verify"} <= names
