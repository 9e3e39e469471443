"""A mesh of real processes on this machine: what `tokenmill up`, the benchmarks and the process tests share.

async with LocalMesh(options) as mesh:      # starts nats-server and every service
    await mesh.until_ready()
    ... mesh.url, mesh.child("worker-1").pid ...
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from deploy import broker
from deploy.supervisor import Child, Say, Supervisor, last_lines, service_command
from gateway.model_files import load_card
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, Settings, WorkerSettings, to_flags

READY_WITHIN_S = 180.0  # a first start may load for long; children that die again and again end the wait at once
KEEP_TRYING = 3


class UpFailed(Exception):
    """One clear sentence on why the mesh did not come up."""


@dataclass(frozen=True)
class Options:
    """Which mesh to start."""

    model: Path  # a pulled model
    data: Path  # logs and the broker's store
    host: str = "127.0.0.1"
    port: int = 8000
    gateways: int = 1
    routers: int = 1
    workers: int = 1
    drafters: int = 1
    engine: str = "auto"
    nats: str = ""  # empty: embedded
    otlp: str = ""
    log_level: str = "info"
    drain_s: float = 30.0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # module -> more settings for its processes

    @property
    def url(self) -> str:
        """Of the first gateway."""
        return f"http://{self.host}:{self.port}"


def plan(options: Options, nats: str) -> dict[str, list[Settings]]:
    """The settings of every service: module name -> one entry per process, in starting order."""
    name = load_card(options.model).name
    threads = max(1, (os.cpu_count() or 1) // max(1, options.workers))
    common: dict[str, Any] = {
        "nats": nats,
        "otlp": options.otlp,
        "log_level": options.log_level,
        "drain_s": options.drain_s,
    }
    model: dict[str, Any] = {"model": str(options.model), "model_name": name}
    kinds: dict[str, tuple[type[Settings], int, dict[str, Any]]] = {
        "router": (RouterSettings, options.routers, {}),
        "drafter": (DrafterSettings, options.drafters, {}),
        "worker": (
            WorkerSettings,
            options.workers,
            model | {"engine": options.engine, "threads": threads, "speculation": options.drafters > 0},
        ),
        "gateway": (GatewaySettings, options.gateways, model | {"host": options.host}),
    }
    services: dict[str, list[Settings]] = {}
    for module, (kind, count, own) in kinds.items():
        own = common | own | dict(options.settings.get(module, {}))
        ports = ({"port": options.port + i} if module == "gateway" else {} for i in range(count))
        services[module] = [kind(id=f"{module}-{i + 1}", **(own | port)) for i, port in enumerate(ports)]
    return services


class LocalMesh:
    """The processes of one mesh, supervised."""

    def __init__(self, options: Options, say: Say = lambda line: None) -> None:
        self.options = options
        self.nats = options.nats
        self._supervisor = Supervisor(say)

    @property
    def children(self) -> Sequence[Child]:
        return self._supervisor.children

    @property
    def url(self) -> str:
        return self.options.url

    def child(self, name: str) -> Child:
        """The process called `name`, e.g. `worker-1` or `nats-server`."""
        return next(child for child in self.children if child.name == name)

    async def __aenter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Start the broker (unless one was named) and every service. Raises UpFailed."""
        options = self.options
        check_ports(options)
        logs = options.data / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            if not self.nats:
                self._start_broker(logs)
            for module, group in plan(options, self.nats).items():
                for settings in group:
                    self._start_service(module, settings, logs)
        except OSError as error:
            raise UpFailed(
                f"cannot write to {options.data}: {error.strerror}; choose another folder with --data"
            ) from None

    async def until_ready(self, stop: asyncio.Event | None = None) -> None:
        """Until the first gateway's /ready says 200, or `stop`. Raises UpFailed."""
        await until_ready(self.children, self.url, stop)

    async def stop(self) -> None:
        """Drain and end everything: gateways first, so that nothing new comes in; the broker last."""
        drain_s = self.options.drain_s
        await self._stop("gateway", drain_s=drain_s)
        await self._stop("worker", "router", "drafter", drain_s=min(drain_s, 5.0))
        await self._stop("nats", drain_s=5.0)

    def kill(self) -> None:
        """End everything at once."""
        for child in self.children:
            child.wanted = False
            if child.process and child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()

    async def _stop(self, *modules: str, drain_s: float) -> None:
        await self._supervisor.stop([child for child in self.children if child.name.startswith(modules)], drain_s)

    def _start_broker(self, logs: Path) -> None:
        try:
            port = broker.free_port()
            command = broker.command(port, self.options.data)
        except broker.BrokerMissing as error:
            raise UpFailed(str(error)) from None
        self.nats = f"nats://127.0.0.1:{port}"
        self._supervisor.start(Child("nats-server", command, logs / "nats-server.log", drain_s=5.0))

    def _start_service(self, module: str, settings: Settings, logs: Path) -> None:
        child = Child(
            settings.id,
            service_command(module, to_flags(settings)),
            logs / f"{settings.id}.log",
            drain_s=settings.drain_s,
        )
        child.log.write_bytes(b"")
        self._supervisor.start(child)


def check_ports(options: Options) -> None:
    """Raises UpFailed when a gateway's port is taken."""
    for port in range(options.port, options.port + options.gateways):
        if not broker.port_is_free(options.host, port):
            raise UpFailed(
                f"port {port} on {options.host} is in use: stop what listens there, or choose another with --port"
            )


async def until_ready(children: Sequence[Child], url: str, stop: asyncio.Event | None = None) -> None:
    """Until GET url/ready says 200, or `stop`. Raises UpFailed when a child keeps dying or time is up."""
    deadline = time.monotonic() + READY_WITHIN_S
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        while stop is None or not stop.is_set():
            for child in children:
                if child.restarts >= KEEP_TRYING:
                    raise UpFailed(f"{child.name} does not start; the end of {child.log}:\n{last_lines(child.log)}")
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/ready")).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise UpFailed(
                    f"the mesh was not ready within {READY_WITHIN_S:.0f} s: GET {url}/ready says what is "
                    "missing, the logs of each service say why"
                )
            await asyncio.sleep(0.05)
