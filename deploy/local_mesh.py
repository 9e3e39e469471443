"""A mesh of real processes on this machine: what `tokenmill up`, the benchmarks and the process tests share.

async with LocalMesh(options) as mesh:      # starts nats-server and every service
    await mesh.until_ready()
    ... mesh.url, mesh.child("worker-1").pid ...
"""

import asyncio
import contextlib
import errno
import itertools
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx
from msgspec.structs import replace

from deploy import broker
from deploy.paths import FolderInUse, claim
from deploy.supervisor import Child, Say, Supervisor, foreign_command, last_lines, service_command
from drafter.kinds import KINDS
from gateway.model_files import load_card
from shared.bus import Bus, BusUnavailable
from shared.credentials import credentials
from shared.ids import new_id
from shared.nats_bus import NatsBus
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, Settings, WorkerSettings, to_flags

READY_WITHIN_S = 180.0  # a first start may load for long; children that die again and again end the wait at once
KEEP_TRYING = 3
CONNECT_WITHIN_S = 3.0
METRICS_HOST = "127.0.0.1"

Waiting = Callable[[str], None]


class UpFailed(Exception):
    """One clear sentence on why the mesh did not come up."""


@dataclass(frozen=True)
class Options:
    """Which mesh to start."""

    model: Path  # a pulled model
    data: Path  # logs and the broker's store
    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None  # of gateways, with `tls_key`; None: plain HTTP
    tls_key: Path | None = None
    gateways: int = 1
    routers: int = 1
    workers: int = 1  # of each model
    most_workers: int = 0  # of each model: started and drained as the load needs; 0: as many as `workers`, always
    tensor_parallel: int = 1  # processes that share a worker's model
    drafters: int = 1
    drafter_kind: str = "suffix"
    drafter_model: Path | None = None  # a pulled model of the same vocabulary, for the kinds that need one
    engine: str = "auto"
    nats: str = ""  # empty: embedded
    nats_creds: Path | None = None  # folder with everyone's credential for it
    nats_ca: Path | None = None
    zone: str = "local"  # of every service
    otlp: str = ""
    metrics_port: int = 0  # of the first router; drafters and workers follow. 0: none. A gateway's are at its /metrics
    log_level: str = "info"
    drain_s: float = 30.0
    tenants: Path | None = None  # the file of who may use it; None: the database says, or everybody, without a key
    prices: Path | None = None  # price sheet; None: nothing costs anything
    database: str = ""  # URL of the ledger, and of tenants where there is no file of them
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # module -> more settings for its processes
    more_models: Sequence[Path] = ()  # pulled ones beside `model`, each with workers of its own
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names that models answer to

    @property
    def models(self) -> dict[str, Path]:
        """Every model by its name in the mesh, the first one first. Raises UpFailed when two have one name."""
        found: dict[str, Path] = {}
        for folder in (self.model, *self.more_models):
            name = load_card(folder).name
            if name in found:
                raise UpFailed(f"{folder} and {found[name]} are both called {name!r}: leave one out, or rename its "
                               "folder and pull it again")
            found[name] = folder
        return found

    @property
    def keyed(self) -> str:
        """Where the keys are that a request needs, to be shown; empty: it needs none."""
        if self.tenants is not None or not self.database:
            return str(self.tenants or "")
        from gateway.state.database import without_password

        return without_password(self.database)

    @property
    def url(self) -> str:
        """Of the first gateway, as a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{'https' if self.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """How a client on this machine knows these gateways: by the certificate itself, whatever name is in it."""
        if self.tls_cert is None:
            return True
        context = ssl.create_default_context(cafile=str(self.tls_cert))
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


def plan(options: Options, nats: str) -> dict[str, list[Settings]]:
    """The settings of every service: module name -> one entry per process, in starting order.

    On a broker that others may use the ids get random letters, so that two meshes never share one.
    """
    models = options.models
    threads = max(1, _cores() // max(1, max(options.workers, options.most_workers) * len(models)))
    common: dict[str, Any] = {
        "nats": nats,
        "nats_creds": str(options.nats_creds.absolute()) if options.nats_creds is not None else "",
        "nats_ca": str(options.nats_ca.absolute()) if options.nats_ca is not None else "",
        "zone": options.zone,
        "otlp": options.otlp,
        "log_level": options.log_level,
        "drain_s": options.drain_s,
    }
    (first, folder), *others = models.items()
    served = {
        "model": str(folder), "model_name": first,
        "models": ",".join(f"{name}={folder}" for name, folder in others),
        "aliases": ",".join(f"{alias}={name}" for alias, name in options.aliases.items()),
    }
    decoding = {"engine": options.engine, "threads": threads, "tensor_parallel": options.tensor_parallel,
                "speculation": options.drafters > 0}
    charging = {
        "tenants": str(options.tenants.absolute()) if options.tenants is not None else "",
        "prices": str(options.prices.absolute()) if options.prices is not None else "", "database": options.database,
    }
    shown = {"tls_cert": str(options.tls_cert.absolute()) if options.tls_cert is not None else "",
             "tls_key": str(options.tls_key.absolute()) if options.tls_key is not None else ""}
    drafting = {"kind": options.drafter_kind, "model": str(options.drafter_model or "")}
    # a module's processes, each with what is its own
    kinds: dict[str, tuple[type[Settings], list[dict[str, Any]]]] = {
        "router": (RouterSettings, [{}] * options.routers),
        "drafter": (DrafterSettings, [drafting] * options.drafters),
        "worker": (WorkerSettings, [decoding | {"model": str(folder), "model_name": name}
                                    for name, folder in models.items() for _ in range(options.workers)]),
        "gateway": (GatewaySettings, [served | charging | shown | {"host": options.host, "journal": journal}
                                      for journal in _journals(options)]),
    }
    services: dict[str, list[Settings]] = {}
    metrics_ports = itertools.count(options.metrics_port)
    for module, (kind, processes) in kinds.items():
        services[module] = []
        for number, own in enumerate(processes, 1):
            name = f"{module}-{number}"
            port: dict[str, Any] = {}
            if module == "gateway":
                port = {"port": options.port + number - 1}
            elif options.metrics_port:
                port = {"metrics_port": next(metrics_ports)}
            services[module].append(kind(id=new_id(name) if options.nats else name,
                                         **(common | own | dict(options.settings.get(module, {})) | port)))
    return services


def check_drafter(options: Options) -> None:
    """Raises UpFailed when drafters of the wanted kind could not draft for this model."""
    kind, model = options.drafter_kind, options.drafter_model
    if kind not in KINDS:
        raise UpFailed(f"--drafter-kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if kind == "suffix":
        if model is not None:
            raise UpFailed("a drafter of kind suffix has no model: add --drafter-kind hybrid or model, or leave out "
                           "--drafter-model")
        return
    if model is None:
        raise UpFailed(f"--drafter-kind {kind} needs --drafter-model: a small model of the same vocabulary, such as "
                       "one that `tokenmill distil` makes of the model that is served")
    if not options.drafters:
        raise UpFailed(f"--drafter-kind {kind} needs a drafter: leave out --drafters 0")
    if options.engine == "mock":
        raise UpFailed(f"the mock engine speaks no model's ids: leave out --drafter-kind {kind}")
    served = list(options.models.values())
    if load_card(model).vocabulary not in {load_card(folder).vocabulary for folder in served}:
        raise UpFailed(f"the drafter's model {model} speaks other token ids than {' and '.join(map(str, served))}, so "
                       "every draft would be wrong: give --drafter-model one of the same tokenizer, such as "
                       "`tokenmill distil` makes")


def check_aliases(options: Options) -> None:
    """Raises UpFailed for another name that is taken, or stands for no model of this mesh."""
    for alias, name in options.aliases.items():
        if alias in options.models:
            raise UpFailed(f"--alias {alias}={name}: {alias!r} is the name of a model, choose another")
        if name not in options.models:
            raise UpFailed(f"--alias {alias}={name}: no such model here, the names are {', '.join(options.models)}")


def _own_ports(settings: Settings) -> list[str]:
    """Flags for what is each process's own, said even where it is a default: they share one environment."""
    names = [name for name in ("port", "metrics_port") if name in settings.__struct_fields__]
    return [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in names]


def _without_secrets(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """What may stand on a command line, which everybody reads, and the variables that say the rest."""
    if isinstance(settings, GatewaySettings) and settings.database:
        return replace(settings, database=""), {"TOKENMILL_DATABASE": settings.database}
    return settings, {}


def _journals(options: Options) -> list[str]:
    """A folder for each gateway, the same at the next start."""
    return [str(options.data.absolute() / "journal" / f"gateway-{number + 1}") if options.database else ""
            for number in range(options.gateways)]


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalMesh:
    """The processes of one mesh, supervised."""

    def __init__(self, options: Options, say: Say = lambda line: None) -> None:
        self.options = options
        self.nats = options.nats
        self._supervisor = Supervisor(say)
        self._claim: IO[str] | None = None
        self.services: dict[str, list[Settings]] = {}  # what was started: module -> one entry per process

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
        check_drafter(options)
        check_aliases(options)
        check_ports(options)
        with folder_problems(options.data):
            self._claim = claim(options.data)
            logs = options.data / "logs"
            if not self.nats:
                self._start_broker(logs)
            self.services = plan(options, self.nats)
            for module, group in self.services.items():
                for settings in group:
                    self.add(module, settings)

    def add(self, module: str, settings: Settings) -> Child:
        """Start one service, and keep it running."""
        shown, hidden = _without_secrets(settings)
        command = service_command(module, [*to_flags(shown), *_own_ports(settings)])
        child = Child(settings.id, command, self.options.data / "logs" / f"{settings.id}.log", environment=hidden,
                      drain_s=settings.drain_s)
        self._start(child)
        return child

    async def again(self, name: str) -> Child:
        """Drain the process called `name` and start it anew."""
        return await self._supervisor.again(self.child(name))

    async def drop(self, name: str) -> None:
        """Drain the process called `name`, for good."""
        await self._supervisor.drop(self.child(name))

    async def connect(self) -> Bus:
        """A bus of its own on the mesh's broker. Raises UpFailed when the broker is out of reach."""
        try:
            shown = credentials("observer", "", "", str(self.options.nats_creds or ""), str(self.options.nats_ca or ""))
            return await NatsBus.connect(self.nats, name="tokenmill-up", timeout_s=CONNECT_WITHIN_S, credentials=shown)
        except (BusUnavailable, ValueError) as error:
            raise UpFailed(str(error)) from None

    async def until_ready(self, stop: asyncio.Event | None = None, waiting: Waiting = lambda reason: None) -> None:
        """Until the first gateway's /ready says 200, or `stop`; `waiting` hears what is missing. Raises UpFailed."""
        await until_ready(self.children, self.url, stop, waiting, self.options.verify)

    async def stop(self) -> None:
        """Drain and end everything: gateways first, so that nothing new comes in; the broker last."""
        drain_s = self.options.drain_s
        await self._stop("gateway", drain_s=drain_s)
        await self._stop("worker", "router", "drafter", drain_s=min(drain_s, 5.0))
        await self._stop("nats", drain_s=5.0)
        if self._claim is not None:
            self._claim.close()

    def kill(self) -> None:
        """End everything at once; `stop` then returns soon."""
        self._supervisor.kill()

    async def _stop(self, *modules: str, drain_s: float) -> None:
        await self._supervisor.stop([child for child in self.children if child.name.startswith(modules)], drain_s)

    def _start_broker(self, logs: Path) -> None:
        try:
            port = broker.free_port()
            command = broker.command(port, self.options.data)
        except broker.BrokerMissing as error:
            raise UpFailed(str(error)) from None
        self.nats = f"nats://127.0.0.1:{port}"
        self._start(Child("nats-server", foreign_command(command), logs / "nats-server.log",
                          environment=broker.environment(_cores()), drain_s=5.0))

    def _start(self, child: Child) -> None:
        child.log.write_bytes(b"")
        self._supervisor.start(child)


@contextlib.contextmanager
def folder_problems(data: Path) -> Iterator[None]:
    """Turns what can be wrong with the data folder into UpFailed."""
    try:
        yield
    except FolderInUse as error:
        raise UpFailed(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UpFailed(
                f"the disk of {data} is full: free some space, or choose a folder elsewhere with --data"
            ) from None
        raise UpFailed(f"cannot write to {data} ({error.strerror}): choose another folder with --data") from None


def check_ports(options: Options) -> None:
    """Raises UpFailed when a gateway, or who serves figures, could not listen on its port."""
    gateways = range(options.port, options.port + options.gateways)
    workers = options.workers * (1 + len(options.more_models))
    others = options.routers + options.drafters + workers if options.metrics_port else 0
    metrics = range(options.metrics_port, options.metrics_port + others)
    if set(gateways) & set(metrics):
        raise UpFailed(f"the ports of gateways ({_span(gateways)}) and of --metrics-port ({_span(metrics)}) overlap: "
                       "choose another --metrics-port")
    for ports, host, flag in ((gateways, options.host, "--port"), (metrics, METRICS_HOST, "--metrics-port")):
        for port in ports:
            if port > 65535:
                raise UpFailed(f"there is no port {port}: choose a lower one with {flag}")
            if problem := broker.port_problem(host, port, flag):
                raise UpFailed(problem)


def _span(ports: range) -> str:
    return f"{ports[0]} to {ports[-1]}" if len(ports) > 1 else str(ports[0])


async def until_ready(
    children: Sequence[Child],
    url: str,
    stop: asyncio.Event | None = None,
    waiting: Waiting = lambda reason: None,
    verify: ssl.SSLContext | bool = True,
) -> None:
    """Until GET url/ready says 200, or `stop`. Raises UpFailed when a child keeps dying or time is up."""
    deadline = time.monotonic() + READY_WITHIN_S
    missing = "the gateway does not answer yet"
    async with httpx.AsyncClient(timeout=2.0, trust_env=False, verify=verify) as client:
        while stop is None or not stop.is_set():
            for child in children:
                if child.restarts >= KEEP_TRYING:
                    raise UpFailed(f"{child.name} does not start; the end of {child.log}:\n{last_lines(child.log)}")
            with contextlib.suppress(httpx.HTTPError):
                response = await client.get(f"{url}/ready")
                if response.status_code == 200:
                    return
                missing = "; ".join(response.json().get("reasons", [])) or missing
            waiting(missing)
            if time.monotonic() > deadline:
                raise UpFailed(f"the mesh was not ready within {READY_WITHIN_S:.0f} s: {missing}; the logs say why")
            await asyncio.sleep(0.05)
