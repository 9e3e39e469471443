"""Vectors through the whole mesh of real processes: the official client, and the decoder's own numbers to the bit."""

import asyncio
import os
import signal

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from deploy.local_mesh import LocalMesh
from gateway.model_files import load_card
from gateway.prompt import ServedModel
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from tests.mesh.streams import chat, read, until_there
from tests.worker.test_embedding import normalised, rows_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

TEXTS = ["The miller grinds wheat into flour.", "Flour is made of wheat at the mill.",
         "The stock market fell by three percent.", "Shares lost value on the exchange today.",
         "Long words about nothing in particular. " * 40]


async def vectors(client: openai.AsyncOpenAI, model: str, texts: list[str], **more: str) -> NDArray[np.float32]:
    answer = await client.embeddings.create(model=model, input=texts, extra_body=more)
    assert [item.index for item in answer.data] == list(range(len(texts)))
    return np.array([item.embedding for item in answer.data], np.float32)


@pytest.mark.skipif(available() is not None, reason=str(available()))
async def test_the_official_client_gets_the_decoder_s_own_numbers_whatever_else_the_mesh_does(mesh: LocalMesh) -> None:
    name = load_card(mesh.options.model).name
    model = ServedModel.load(mesh.options.model, name)
    decoder = NativeDecoder.load(mesh.options.model, blocks=64)
    expected = []
    for text in TEXTS:
        rows = rows_of(model.text(text), decoder).astype(np.float64)
        total = np.zeros(rows.shape[1])
        for row in rows:
            total += row
        expected.append([np.frombuffer(normalised(of), np.float32) for of in (total, rows[-1])])
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        busy = [asyncio.create_task(read(mesh.url, chat(name, f"{number}: count to a hundred", max_tokens=60)))
                for number in range(4)]
        for place, pooling in enumerate(("mean", "last")):
            rounds = await asyncio.gather(*(vectors(client, name, TEXTS, pooling=pooling) for _ in range(4)))
            for found in rounds:
                assert (found == np.array([both[place] for both in expected])).all()
        await asyncio.gather(*busy)
        answer = await client.embeddings.create(model=name, input=TEXTS)
        assert answer.usage.prompt_tokens == sum(len(model.text(text)) for text in TEXTS)


async def test_a_worker_killed_under_a_batch_of_texts_changes_no_vector(mesh: LocalMesh) -> None:
    name = load_card(mesh.options.model).name
    texts = [f"{number}. {text}" for number in range(20) for text in TEXTS]
    await until_there(mesh, workers=2, routers=2)
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        calm = await vectors(client, name, texts)
        asked = asyncio.create_task(vectors(client, name, texts))
        await asyncio.sleep(0.5)
        pid = mesh.child("worker-1").pid
        assert pid is not None and not asked.done()
        os.kill(pid, signal.SIGKILL)
        assert (await asked == calm).all()
    await until_there(mesh, workers=2, routers=2)


async def test_texts_about_the_same_lie_closer_than_texts_about_something_else(mesh: LocalMesh) -> None:
    name = load_card(mesh.options.model).name
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        found = (await vectors(client, name, TEXTS[:4])).astype(np.float64)
    near = found @ found.T
    assert near[0, 1] > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3]) < near[2, 3], near
