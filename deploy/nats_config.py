"""A NATS that knows its clients: a user (an NKey) per role and zone, each with the least subjects, and TLS if wanted.

    written = write(Path("nats"), ["gateway", "router", "worker@eu"], Listening())

makes `nats/nats.conf` for nats-server, `nats/users.conf` that it includes, and `nats/<name>.seed` for each user,
readable by their owner alone.

Rules: written again it keeps the seeds there are, so that a user more is a reload and not a change of everyone's
credential; and it keeps `nats.conf` unless it is told where to listen, so that who rotates a key need not know how the
server was set up. What is written is made beside its place and moved there: whatever stops it, each user has a seed
that opens, and the next call finds nothing in its way.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nkeys

from shared.credentials import SEED_ENDS
from shared.permissions import Permissions, permissions, principal

_OLD = ".old"
OLD_ENDS = f"{_OLD}{SEED_ENDS}"  # a seed that was rotated out and still opens, until its file is removed
CONFIG, USERS = "nats.conf", "users.conf"
_INCLUDE = f'include "{USERS}"'


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
    anew: bool  # the server's configuration too


def write(folder: Path, users: Iterable[str], listening: Listening | None = None,
          rotate: Iterable[str] = ()) -> Written:
    """Write who may connect, and the seeds that are missing. `users` and `rotate` are written as `permissions` has it.

    `listening` None: as the server's configuration has it that lies there, or as by default. Users whose seeds lie in
    `folder` stay. `rotate`: they get another seed, and the one before opens until its `.old.seed` is removed and
    this is called again. Raises NatsConfigFailed; then everything is as it was.
    """
    config = folder / CONFIG
    server = _server(config, listening)
    wanted, rotated = {_named(text) for text in users}, {_named(text) for text in rotate}
    kept = {path: _named_by(path) for path in sorted(folder.glob(f"*{SEED_ENDS}"))}
    keys = {path: public_key(path) for path in kept}
    for name in sorted(rotated):
        _check_rotation(folder, name, keys)
    made = sorted(rotated | (wanted - {name for path, name in kept.items() if path == _seed(folder, name)}))
    seeds = {name: new_seed() for name in made}
    # both files of a rotation that was stopped have the same
    listed = sorted({*((name, keys[path]) for path, name in kept.items()),
                     *((name, key_of(seed)) for name, seed in seeds.items())})
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _move_in([*((folder / f"{name}{OLD_ENDS}", _seed(folder, name).read_text()) for name in sorted(rotated)),
                  (folder / USERS, users_text(listed)), *([] if server is None else [(config, server)]),
                  *((_seed(folder, name), f"{seed}\n") for name, seed in seeds.items())])
    except OSError as error:
        raise NatsConfigFailed(f"cannot write to {folder} ({error.strerror}): choose another with --out") from None
    return Written(config, listed, made, server is not None)


def server_text(listening: Listening, folder: Path) -> str:
    """The server's configuration, for nats-server 2.10 and newer. Who may connect stands in a file beside it."""
    lines = [
        "# written by `tokenmill nats-config`, and yours from then on: it is written anew only when asked to",
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
    return "\n".join([*lines, _INCLUDE, ""])


def users_text(users: Iterable[tuple[str, str]]) -> str:
    """Who may connect, and say and hear what. Whoever shows no key of `users` is not let in."""
    lines = ["# written by `tokenmill nats-config`; who may say and hear what: shared/permissions.py",
             "authorization {", "  users: ["]
    for name, key in users:
        lines += _user(name, key, permissions(principal(name)))
    return "\n".join([*lines, "  ]", "}", ""])


def new_seed() -> str:
    """The secret half of an NKey of a user."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def key_of(seed: str) -> str:
    """The public half of a seed. Raises whatever the package does for what is none."""
    key: bytes = nkeys.from_seed(bytearray(seed.encode())).public_key
    return key.decode()


def public_key(path: Path) -> str:
    """The public half of the seed in the file. Raises NatsConfigFailed when there is none in it."""
    try:
        return key_of(path.read_text().strip())
    except Exception as error:  # the package raises whatever its decoders do
        raise NatsConfigFailed(f"{path} holds no seed of an NKey: remove it, or put back what was there") from error


# --- what is checked -------------------------------------------------------------------------------------------------


def _server(config: Path, listening: Listening | None) -> str | None:
    """The server's configuration; None where the one that lies there is to stay."""
    try:
        found = config.read_text() if config.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise NatsConfigFailed(f"cannot read {config} ({error}): mend it, or remove it") from None
    if listening is None:
        if found is None:
            return server_text(Listening(), config.parent)
        if not re.search(rf"^\s*include\s+[\"']?(\./)?{re.escape(USERS)}", found, re.MULTILINE):
            raise NatsConfigFailed(f"{config} does not include {USERS}, so a user more would change nothing: write "
                                   f"`{_INCLUDE}` in the place of its authorization, or say anew where to listen "
                                   "(--host, --port, --monitor, --tls-cert, --tls-key)")
        return None
    if (listening.certificate is None) != (listening.key is None):
        raise NatsConfigFailed("TLS needs a certificate and its key: give both, or neither")
    for path in (listening.certificate, listening.key):
        if path is not None and not path.is_file():
            raise NatsConfigFailed(f"there is no file {path}")
    if listening.certificate is None and found is not None and re.search(r"^\s*tls\b", found, re.MULTILINE):
        raise NatsConfigFailed(f"{config} has TLS, and written anew it would have none: give --tls-cert and --tls-key "
                               "too, or remove it first")
    return server_text(listening, config.parent)


def _named(text: str) -> str:
    """The name of a user who is written as `permissions` has it."""
    try:
        name = principal(text).name
    except ValueError as error:
        raise NatsConfigFailed(str(error)) from None
    if name.endswith(_OLD):
        raise NatsConfigFailed(f"{text!r}: what ends in {_OLD} is a seed that was rotated out, choose another id")
    return name


def _named_by(path: Path) -> str:
    """Whose seed a file is, by its name."""
    try:
        return _named(path.name.removesuffix(OLD_ENDS).removesuffix(SEED_ENDS))
    except NatsConfigFailed as error:
        raise NatsConfigFailed(f"{path} is named after nobody ({error}): move it elsewhere") from None


def _check_rotation(folder: Path, name: str, keys: Mapping[Path, str]) -> None:
    now, before = _seed(folder, name), folder / f"{name}{OLD_ENDS}"
    if now not in keys:
        raise NatsConfigFailed(f"{name} has no seed in {folder}: nothing to rotate")
    # the same in both is what a rotation leaves that was stopped before the new one was in place
    if before in keys and keys[before] != keys[now]:
        raise NatsConfigFailed(f"{before} still opens since the last rotation: give {name} the seed that came after, "
                               "remove that file, and rotate again")


def _seed(folder: Path, name: str) -> Path:
    return folder / f"{name}{SEED_ENDS}"


# --- what is written -------------------------------------------------------------------------------------------------


def _move_in(files: Sequence[tuple[Path, str]]) -> None:
    """Put texts in their places, one after the other, each whole or not at all.

    Raises OSError; then none is in its place, unless the disk broke between two renames.
    """
    beside = [path.with_name(f"{path.name}.new") for path, _ in files]
    try:
        for new, (path, text) in zip(beside, files, strict=True):
            new.unlink(missing_ok=True)
            mode = 0o600 if path.name.endswith(SEED_ENDS) else 0o644
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for new, (path, _) in zip(beside, files, strict=True):
            new.replace(path)
    except OSError:
        for new in beside:
            new.unlink(missing_ok=True)
        raise


def _user(name: str, key: str, allowed: Permissions) -> list[str]:
    return [f"    # {name}", "    {", f"      nkey: {key}", "      permissions: {",
            f"        publish: {{ allow: [{', '.join(map(_quoted, allowed.publish))}] }}",
            f"        subscribe: {{ allow: [{', '.join(map(_quoted, allowed.subscribe))}] }}", "      }", "    }"]


def _quoted(word: str) -> str:
    """A string that nats-server reads as it is. Its strings know the escapes of JSON that stand in paths."""
    return json.dumps(re.sub(r"[\x00-\x1f]", "", word), ensure_ascii=False)
