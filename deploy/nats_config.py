"""A NATS that knows its clients: a user (an NKey) per role and zone, each with the least subjects, and TLS if wanted.

    written = write(Path("nats"), ["gateway", "router", "worker@eu"], Listening())

makes `nats/nats.conf` for nats-server and `nats/<name>.seed` for each user, readable by their owner alone. Written
again it keeps the seeds there are, so that a user more is a reload and not a change of everyone's credential.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nkeys

from shared.credentials import SEED_ENDS
from shared.permissions import Permissions, permissions, principal

OLD_ENDS = f".old{SEED_ENDS}"  # a seed that was rotated out and still opens, until its file is removed
CONFIG = "nats.conf"


class NatsConfigFailed(Exception):
    """One clear sentence on why nothing was written."""


@dataclass(frozen=True)
class Listening:
    """Where the server listens and what it shows its clients."""

    host: str = "127.0.0.1"
    port: int = 4222
    name: str = "tokenmill"
    monitor: str = ""  # host:port of its HTTP figures; empty: none
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class Written:
    """What was written. `users` has each one's name and public key, those still valid from before a rotation too."""

    config: Path
    users: Sequence[tuple[str, str]]
    made: Sequence[str]  # names whose seed is new


def write(folder: Path, users: Iterable[str], listening: Listening, rotate: Iterable[str] = ()) -> Written:
    """Write the configuration and the seeds that are missing. `users` and `rotate` are written as `permissions` has it.

    Users whose seeds lie in `folder` stay. `rotate`: they get another seed, and the one before opens until
    its `.old.seed` is removed and this is called again. Raises NatsConfigFailed; then nothing was written.
    """
    if (listening.certificate is None) != (listening.key is None):
        raise NatsConfigFailed("TLS needs a certificate and its key: give both, or neither")
    for path in (listening.certificate, listening.key):
        if path is not None and not path.is_file():
            raise NatsConfigFailed(f"there is no file {path}")
    try:
        wanted = {principal(text).name for text in users}
        rotated = {principal(text).name for text in rotate}
    except ValueError as error:
        raise NatsConfigFailed(str(error)) from None
    if missing := sorted(name for name in rotated if not (folder / f"{name}{SEED_ENDS}").exists()):
        raise NatsConfigFailed(f"{', '.join(missing)} has no seed in {folder}: nothing to rotate")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in rotated:
            (folder / f"{name}{SEED_ENDS}").replace(folder / f"{name}{OLD_ENDS}")
        known = {path.name.removesuffix(SEED_ENDS) for path in folder.glob(f"*{SEED_ENDS}")
                 if not path.name.endswith(OLD_ENDS)}
        made = sorted((wanted | rotated) - known)
        for name in made:
            _write_secret(folder / f"{name}{SEED_ENDS}", new_seed())
        listed = []
        for path in sorted(folder.glob(f"*{SEED_ENDS}")):
            name = path.name.removesuffix(OLD_ENDS).removesuffix(SEED_ENDS)
            listed.append((name, public_key(path)))
        config = folder / CONFIG
        config.write_text(text(listed, listening, folder))
    except OSError as error:
        raise NatsConfigFailed(f"cannot write to {folder} ({error.strerror}): choose another with --out") from None
    return Written(config, listed, made)


def text(users: Iterable[tuple[str, str]], listening: Listening, folder: Path) -> str:
    """The configuration, for nats-server 2.10 and newer. Whoever shows no key of `users` is not let in."""
    lines = [
        "# written by `tokenmill nats-config`; who may say and hear what: shared/permissions.py",
        f"listen: {_quoted(f'{listening.host}:{listening.port}')}",
        f"server_name: {_quoted(listening.name)}",
        "max_payload: 8MB", 'write_deadline: "5s"', 'ping_interval: "20s"',
        "jetstream {", f"  store_dir: {_quoted(str((folder / 'jetstream').resolve()))}", "}",
    ]
    if listening.monitor:
        lines.append(f"http: {_quoted(listening.monitor)}")
    if listening.certificate is not None:
        lines += ["tls {", f"  cert_file: {_quoted(str(listening.certificate))}",
                  f"  key_file: {_quoted(str(listening.key))}", '  min_version: "1.2"', "}"]
    lines += ["authorization {", "  users: ["]
    for name, key in users:
        lines += _user(name, key, permissions(principal(name)))
    return "\n".join([*lines, "  ]", "}", ""])


def new_seed() -> str:
    """The secret half of an NKey of a user."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def public_key(path: Path) -> str:
    """The public half of the seed in the file. Raises NatsConfigFailed when there is none in it."""
    try:
        key: bytes = nkeys.from_seed(bytearray(path.read_text().strip().encode())).public_key
    except Exception as error:  # the package raises whatever its decoders do
        raise NatsConfigFailed(f"{path} holds no seed of an NKey: remove it, or put back what was there") from error
    return key.decode()


def _write_secret(path: Path, seed: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{seed}\n")


def _user(name: str, key: str, allowed: Permissions) -> list[str]:
    return [f"    # {name}", "    {", f"      nkey: {key}", "      permissions: {",
            f"        publish: {{ allow: [{', '.join(map(_quoted, allowed.publish))}] }}",
            f"        subscribe: {{ allow: [{', '.join(map(_quoted, allowed.subscribe))}] }}", "      }", "    }"]


def _quoted(word: str) -> str:
    """A string that nats-server reads as it is. Its strings know the escapes of JSON that stand in paths."""
    return json.dumps(re.sub(r"[\x00-\x1f]", "", word), ensure_ascii=False)
