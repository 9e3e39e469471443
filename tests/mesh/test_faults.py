"""Laws 1, 2, 5 and 6 on real processes: whatever dies, the client's text is that of the undisturbed run."""

import asyncio
import os
import signal

import pytest

from deploy.local_mesh import LocalMesh
from gateway.model_files import load_card
from tests.mesh.streams import Stream, chat, read, serving, until_there

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

QUESTION = "Write a short story about a miller, her cat and a stolen wheel. Then tell it again, shorter."
BODY = chat("", QUESTION, max_tokens=160, temperature=0.7, seed=11, ignore_eos=True)


async def _undisturbed(mesh: LocalMesh) -> Stream:
    seen = await read(mesh.url, _body(mesh))
    assert seen.finish_reason == "length"
    assert seen.usage["completion_tokens"] == 160
    return seen


def _body(mesh: LocalMesh) -> dict[str, object]:
    return BODY | {"model": load_card(mesh.options.model).name}


def _kill(mesh: LocalMesh, name: str) -> None:
    pid = mesh.child(name).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def _settled(mesh: LocalMesh) -> None:
    """Everyone is back."""
    await until_there(mesh, workers=2, routers=2)


async def test_a_worker_killed_in_mid_stream_changes_nothing(mesh: LocalMesh) -> None:
    await _settled(mesh)
    calm = await _undisturbed(mesh)

    async def kill() -> None:
        _kill(mesh, await serving(mesh))

    seen = await read(mesh.url, _body(mesh), at_chunk=20, hook=kill)
    assert seen.text == calm.text
    assert seen.usage["completion_tokens"] == calm.usage["completion_tokens"]


async def test_a_drafter_killed_in_mid_stream_changes_nothing(mesh: LocalMesh) -> None:
    await _settled(mesh)
    calm = await _undisturbed(mesh)

    async def kill() -> None:
        _kill(mesh, "drafter-1")

    seen = await read(mesh.url, _body(mesh), at_chunk=20, hook=kill)
    assert (seen.text, seen.finish_reason) == (calm.text, calm.finish_reason)


async def test_a_router_killed_under_load_changes_nothing(mesh: LocalMesh) -> None:
    await _settled(mesh)
    calm = await _undisturbed(mesh)

    async def kill() -> None:
        _kill(mesh, "router-1")

    first, *others = await asyncio.gather(
        read(mesh.url, _body(mesh), at_chunk=5, hook=kill),
        *(read(mesh.url, _body(mesh)) for _ in range(3)),
    )
    late = await read(mesh.url, _body(mesh))  # placed by whoever is left
    assert {seen.text for seen in (first, *others, late)} == {calm.text}


async def test_a_broker_restart_is_a_pause_and_nothing_else(mesh: LocalMesh) -> None:
    await _settled(mesh)
    calm = await _undisturbed(mesh)

    async def kill() -> None:
        _kill(mesh, "nats-server")

    seen = await read(mesh.url, _body(mesh), at_chunk=20, hook=kill)
    assert seen.text == calm.text
    await _settled(mesh)


async def test_speculation_on_or_off_is_the_same_text_and_drafts_are_accepted(mesh: LocalMesh) -> None:
    await _settled(mesh)
    body = _body(mesh) | {
        "temperature": 0,
        "messages": [{"role": "user", "content": "Repeat exactly: one two three four five six seven. " * 6}],
    }
    seen = await read(mesh.url, body)
    again = await read(mesh.url, body)
    assert seen.text == again.text
    assert again.usage["mill"]["accepted_draft_tokens"] > 0
