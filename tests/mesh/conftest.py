"""One mesh of real processes for all tests of this folder: two of everything but the gateway, on the real model."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deploy import broker
from deploy.local_mesh import LocalMesh, Options
from tests.models import default_folder
from tests.otlp_receiver import OtlpReceiver


@pytest.fixture(scope="session")
def otlp() -> "AsyncIterator[OtlpReceiver]":
    receiver = OtlpReceiver()
    receiver.start()
    yield receiver
    receiver.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory, otlp: OtlpReceiver) -> AsyncIterator[LocalMesh]:
    data: Path = tmp_path_factory.mktemp("mesh")
    options = Options(
        model=default_folder(),
        data=data,
        port=broker.free_port(),
        workers=2,
        routers=2,
        drafters=1,
        otlp=otlp.endpoint,
        log_level="info",
        drain_s=5.0,
        settings={"worker": {"kv_mib": 128}},
    )
    async with LocalMesh(options) as running:
        await running.until_ready()
        yield running
