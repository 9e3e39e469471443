"""Workers of two ranks as real processes on a real nats-server: same tokens, and an end that others can go on from."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kernels.checkpoint import open_checkpoint
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from shared import subjects
from shared.messages import Failed, Finished, Sampling, StepReplies, Tokens, WorkerStatus, decode, encode
from shared.nats_bus import NatsBus
from shared.tokens import unpack
from tests.kernels.steps import generate, lay_out
from tests.kernels.tiny import write_tiny_gguf
from tests.nats_server import NatsServer
from tests.worker.builders import FAR, request

ROOT = Path(__file__).resolve().parents[2]
PROMPT = list(range(40, 90))
TOKENS = 600
SAMPLING = Sampling(temperature=0.8, seed=5)
pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))


class Mesh:
    """A broker, and a test that hears what a gateway and a router would."""

    def __init__(self, bus: NatsBus, url: str, model: Path, logs: Path) -> None:
        self.bus = bus
        self.replies: asyncio.Queue[object] = asyncio.Queue()
        self.statuses: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._url, self._model, self._logs = url, model, logs

    async def listen(self) -> None:
        await self.bus.subscribe(subjects.status("worker", "*"), self._on_status)
        await self.bus.subscribe(subjects.replies("g1"), self._on_replies)

    async def worker(self, name: str, ranks: int) -> None:
        """Start one, and wait until it is ready."""
        with self.log(name).open("wb") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "worker", f"--id={name}", f"--nats={self._url}", f"--model={self._model}",
                "--model-name=m", "--engine=cpu", "--threads=1", "--kv-blocks=64", f"--tensor-parallel={ranks}",
                "--rank-timeout-s=20", cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=log)
        await self.until(name, "ready")

    async def until(self, name: str, state: str) -> None:
        async with asyncio.timeout(60):
            while await self.statuses.get() != (name, state):
                pass

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def ask(self, worker: str, attempt: int, generated: list[int]) -> None:
        asked = request(prompt=PROMPT, attempt=attempt, generated=generated, max_tokens=TOKENS, sampling=SAMPLING,
                        deadline=FAR * 10)
        await self.bus.publish(subjects.worker_generate(worker), encode(asked))

    async def reply(self) -> object:
        return await asyncio.wait_for(self.replies.get(), 40)

    def _on_status(self, delivery) -> None:
        status = decode(delivery.data, WorkerStatus)
        self.statuses.put_nowait((status.id, status.state))

    def _on_replies(self, delivery) -> None:
        for reply in decode(delivery.data, StepReplies).replies:
            self.replies.put_nowait(reply)


@contextlib.asynccontextmanager
async def mesh_on(folder: Path) -> AsyncIterator[Mesh]:
    server = NatsServer(folder).start()
    bus = await NatsBus.connect(server.url, "test")
    mesh = Mesh(bus, server.url, write_tiny_gguf(folder / "model.gguf"), folder)
    try:
        await mesh.listen()
        yield mesh
    finally:
        for process in mesh.processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await asyncio.wait_for(process.wait(), 40)
        await bus.close()
        server.stop()


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def expected(model: Path) -> list[int]:
    """What the engine of one rank makes of it, without a worker around it."""
    decoder = NativeDecoder(open_checkpoint(model), blocks=64, threads=1)
    (part,) = lay_out([PROMPT], TOKENS, decoder)
    part.temperature, part.seed = SAMPLING.temperature, SAMPLING.seed or 0
    generate(decoder, [part], TOKENS)
    return part.chosen


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="children are found in /proc")
async def test_a_stream_whose_worker_loses_a_rank_goes_on_elsewhere_token_by_token(tmp_path: Path) -> None:
    async with mesh_on(tmp_path) as mesh:
        await mesh.worker("two", ranks=2)
        await mesh.worker("one", ranks=1)
        two = mesh.processes["two"]
        (rank,) = children_of(two.pid)

        await mesh.ask("two", 1, [])
        tokens: list[int] = []
        killed = False
        while not isinstance(last := await mesh.reply(), Failed):
            assert not isinstance(last, Finished)
            if isinstance(last, Tokens):
                assert last.index == len(tokens)
                tokens += unpack(last.tokens)
                if len(tokens) >= 20 and not killed:
                    os.kill(rank, signal.SIGKILL)
                    killed = True
        assert last.retryable
        assert 20 <= len(tokens) < TOKENS
        await mesh.until("two", "draining")
        assert await asyncio.wait_for(two.wait(), 30) == 1
        assert f"worker: rank 1 (process {rank}) was ended by signal 9" in mesh.log("two").read_text()

        await mesh.ask("one", 2, tokens)
        while not isinstance(last := await mesh.reply(), Finished):
            assert not isinstance(last, Failed)
            if isinstance(last, Tokens):
                assert last.index == len(tokens)
                tokens += unpack(last.tokens)
    assert tokens == expected(tmp_path / "model.gguf")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="children are found in /proc")
async def test_ranks_end_with_their_worker_however_it_ends(tmp_path: Path) -> None:
    async with mesh_on(tmp_path) as mesh:
        for name, ending, code in (("drained", signal.SIGTERM, 0), ("killed", signal.SIGKILL, -signal.SIGKILL)):
            await mesh.worker(name, ranks=2)
            process = mesh.processes[name]
            (rank,) = children_of(process.pid)
            process.send_signal(ending)
            assert await asyncio.wait_for(process.wait(), 30) == code
            async with asyncio.timeout(15):
                while Path(f"/proc/{rank}").exists():
                    await asyncio.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="children are found in /proc")
async def test_an_idle_worker_whose_rank_dies_does_not_wait_for_a_request_to_notice(tmp_path: Path) -> None:
    async with mesh_on(tmp_path) as mesh:
        await mesh.worker("two", ranks=2)
        (rank,) = children_of(mesh.processes["two"].pid)
        os.kill(rank, signal.SIGKILL)
        await mesh.until("two", "draining")
        assert await asyncio.wait_for(mesh.processes["two"].wait(), 30) == 1
