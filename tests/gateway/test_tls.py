"""A gateway with a certificate: streams under TLS, and a certificate that is renewed while it serves."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

import gateway.service
from gateway.service import serve
from gateway.tls import Certificate
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.settings import GatewaySettings
from tests.gateway.fake_mesh import MODEL, FakeMesh, tiny_model
from tests.nats_server import certificate, free_port

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@asynccontextmanager
async def served(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[int]:
    """The port of a gateway with a mesh that answers."""
    monkeypatch.setattr(gateway.service.ServedModel, "load", lambda folder, name: tiny_model())
    told = GatewaySettings(id="g1", port=free_port(), model="tiny", model_name=MODEL, **settings)
    broker, ready = MemoryBroker(), asyncio.Event()
    mesh = FakeMesh(broker)
    await mesh.start()
    beating = asyncio.create_task(mesh.beat())
    serving = asyncio.create_task(serve(MemoryBus(broker), told, LoopClock(), ready))
    try:
        await asyncio.wait_for(ready.wait(), 10)
        yield told.port
    finally:
        beating.cancel()
        serving.cancel()
        await asyncio.gather(beating, serving, return_exceptions=True)


def trusting(*certificates: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in certificates:
        context.load_verify_locations(path)
    return context


async def shown(port: int, cert: Path) -> bytes | None:
    """The certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(cert))
    try:
        found: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return found
    finally:
        writer.close()


def der(cert: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(cert.read_text())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_streams_come_under_tls_and_a_plain_client_gets_nothing(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    async with served(monkeypatch, tls_cert=str(cert), tls_key=str(key)) as port:
        async with httpx.AsyncClient(verify=trusting(cert), trust_env=False) as client:
            whole = await client.post(f"https://127.0.0.1:{port}/v1/chat/completions", json=BODY)
            assert whole.status_code == 200 and whole.text.endswith("data: [DONE]\n\n")
            assert "Hell" in whole.text
        async with httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://127.0.0.1:{port}/health")
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                await client.get(f"https://127.0.0.1:{port}/health")
        old = trusting(cert)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection("127.0.0.1", port, ssl=old)


async def test_a_renewed_certificate_holds_for_new_connections_and_half_a_pair_changes_nothing(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateway.service, "FOLLOW_S", 0.02)
    (tmp_path / "next").mkdir()
    cert, key = certificate(tmp_path)
    newer, its_key = certificate(tmp_path / "next")
    first = der(cert)
    with structlog.testing.capture_logs() as logs:
        async with served(monkeypatch, tls_cert=str(cert), tls_key=str(key)) as port, httpx.AsyncClient(
                verify=trusting(cert), trust_env=False) as client:
            assert await shown(port, cert) == first
            assert (await client.get(f"https://127.0.0.1:{port}/health")).status_code == 200
            before = tmp_path / "before.pem"
            shutil.copy(cert, before)
            shutil.copy(newer, cert)
            await until(lambda: "certificate_refused" in [line["event"] for line in logs])
            assert await shown(port, before) == first
            shutil.copy(its_key, key)
            await until(lambda: "certificate_read" in [line["event"] for line in logs])
            assert await shown(port, newer) == der(newer) != first
            # its connection goes on: a new one would not trust the new certificate
            assert (await client.get(f"https://127.0.0.1:{port}/health")).status_code == 200
    assert [line["event"] for line in logs if line["event"].startswith("certificate")] == [
        "certificate_refused", "certificate_read"]
    assert "password" in next(line["reason"] for line in logs if line["event"] == "certificate_refused")


async def until(true: Any) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.01)


def test_half_of_a_pair_or_none_of_its_kind_is_one_clear_sentence(tmp_path: Path) -> None:
    assert Certificate.of("", "") is None
    cert, key = certificate(tmp_path)
    with pytest.raises(ValueError, match="belong together"):
        Certificate.of(str(cert), "")
    for wrong in ((cert, cert), (key, key), (tmp_path / "missing", key)):
        with pytest.raises(ValueError, match="are no certificate and its key"):
            Certificate(*wrong)


def test_a_key_under_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    locked = tmp_path / "locked.pem"
    subprocess.run(["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked], check=True,
                   capture_output=True)
    with pytest.raises(ValueError, match="without a password"):
        Certificate(cert, locked)
