"""What a service shows NATS to be let in, read from files.

`nats_creds` names an NKey seed, a `.creds` file with a JWT, or a folder as `tokenmill nats-config` writes it, in which
a service finds its own. A seed is a secret: it stands in no log, no error and no `repr`.
"""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from shared import subjects
from shared.permissions import DEFAULT_ZONE, ZONED, Principal

SEED_ENDS = ".seed"
_JWT = "BEGIN NATS USER JWT"


@dataclass(frozen=True)
class Credentials:
    """How one connection says who it is. Without anything: openly, as on a broker that asks nobody."""

    seed: str = field(default="", repr=False)  # an NKey's
    creds: str = ""  # path of a file with a JWT and its seed
    ca: str = ""  # path of the authorities that the broker's certificate is checked against; empty: the system's
    inbox: str = "_INBOX"

    def tls(self) -> ssl.SSLContext | None:
        """How to check the broker's certificate; None: as the client does by itself for a tls:// URL."""
        return ssl.create_default_context(cafile=self.ca) if self.ca else None


OPEN = Credentials()


def credentials(role: str, zone: str, id: str, creds: str, ca: str) -> Credentials:
    """What the service `id` shows, from the settings `nats_creds` and `nats_ca`; both may be empty.

    Raises ValueError naming the file that is missing or is none of its kind.
    """
    if ca:
        try:
            ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"nats_ca names {ca}, which is no PEM file of certificates ({error})") from None
    if not creds:
        return Credentials(ca=ca)
    path = Path(creds)
    if path.is_dir():
        path = _own(path, role, zone.lower() if role in ZONED else "", id)
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the NATS credential {path} ({error}): nats_creds names a seed, a .creds file or "
                         "a folder of `tokenmill nats-config`") from None
    inbox = subjects.inbox(role, zone if role in ZONED else "")
    if _JWT in text:
        return Credentials(creds=str(path), ca=ca, inbox=inbox)
    if not (text.startswith("SU") and text.isalnum() and len(text) == 58):
        raise ValueError(f"{path} holds neither an NKey seed of a user nor a JWT: `tokenmill nats-config` makes seeds")
    return Credentials(text, ca=ca, inbox=inbox)


def _own(folder: Path, role: str, zone: str, id: str) -> Path:
    """The credential in `folder` that fits: of the id, of the zone."""
    wanted = (Principal(role, zone, id), Principal(role, zone))
    for who in wanted:
        if (path := folder / f"{who.name}{SEED_ENDS}").exists():
            return path
    where = f" of zone {zone}" if zone and zone != DEFAULT_ZONE else ""
    name = wanted[1].name
    raise ValueError(f"no credential for a {role}{where} in {folder}: `tokenmill nats-config --out {folder} "
                     f"--user {name}` makes {name}{SEED_ENDS}")
