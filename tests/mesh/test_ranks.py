"""Law 1 with ranks: two processes say what one says, and when one of them dies the stream goes on elsewhere."""

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from deploy import broker
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card
from tests.mesh.streams import chat, read, serving, until_there
from tests.models import default_folder

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow, pytest.mark.timeout(300)]

QUESTION = "Write a short story about a miller, her cat and a stolen wheel."


async def test_a_rank_killed_in_mid_stream_changes_nothing_for_the_client(tmp_path: Path) -> None:
    folder = default_folder()
    body = chat(load_card(folder).name, QUESTION, max_tokens=32, temperature=0.7, seed=11, ignore_eos=True)

    def options(name: str, ranks: int, workers: int) -> Options:
        return Options(model=folder, data=tmp_path / name, port=broker.free_port(), workers=workers, drafters=0,
                       tensor_parallel=ranks, drain_s=5.0, settings={"worker": {"kv_mib": 64}})

    async with LocalMesh(options("one", ranks=1, workers=1)) as mesh:
        await mesh.until_ready()
        alone = await read(mesh.url, body)
    assert alone.usage["completion_tokens"] == 32

    async with LocalMesh(options("two", ranks=2, workers=2)) as mesh:
        await mesh.until_ready()
        await until_there(mesh, workers=2, routers=1)
        assert (await read(mesh.url, body)).text == alone.text
        killed: list[str] = []

        async def kill() -> None:
            name = await serving(mesh)
            (found,) = re.findall(r"ranks_ready .*processes=\[(\d+)\]", mesh.child(name).log.read_text())
            os.kill(int(found), signal.SIGKILL)
            killed.append(name)

        seen = await read(mesh.url, body, at_chunk=6, hook=kill)
        assert (seen.text, seen.finish_reason) == (alone.text, "length")
        assert seen.usage["completion_tokens"] == 32
        (name,) = killed
        async with asyncio.timeout(60):  # the supervisor starts it again, with its ranks
            while mesh.child(name).restarts < 1:
                await asyncio.sleep(0.1)
        assert "worker: rank 1 (process" in mesh.child(name).log.read_text()
        await until_there(mesh, workers=2, routers=1)
        assert (await read(mesh.url, body)).text == alone.text
