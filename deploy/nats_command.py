"""`tokenmill nats-config`: write the configuration of a NATS that knows its clients, and everyone's credential."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

USERS = ("gateway", "router", "worker", "drafter", "observer")  # one of each, in zone local


def nats_config(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of nats.conf and the seeds")] = Path("nats"),
    user: Annotated[list[str] | None, typer.Option(metavar="ROLE[.ID][@ZONE]", help="who may connect, such as gateway, "
                                                   "worker@eu-north1 or worker.w7@eu; may be given several times; "
                                                   "those written before stay. Default: one of each role")] = None,
    rotate: Annotated[list[str] | None, typer.Option(metavar="ROLE[.ID][@ZONE]", help="make another seed for it; the "
                                                     "one before opens until its .old.seed is removed")] = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="where the server listens (127.0.0.1). This and "
                                             "the next four write nats.conf anew, from what is given of them alone; "
                                             "without any of them it stays as it is")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, metavar="PORT", help="4222")] = None,
    monitor: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="where it serves its own figures")] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="certificate of the server, PEM")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="its key, PEM")] = None,
) -> None:
    """Write a NATS configuration with a user per role and zone, each with the least subjects."""
    from deploy import nats_config as making
    from shared.credentials import SEED_ENDS

    console = Console(stderr=True)
    listening = None
    if any(given is not None for given in (host, port, monitor, tls_cert, tls_key)):
        listening = making.Listening(host or "127.0.0.1", port or 4222, monitor=monitor or "",
                                     certificate=tls_cert and tls_cert.absolute(), key=tls_key and tls_key.absolute())
    known = list(out.glob(f"*{SEED_ENDS}"))
    try:
        written = making.write(out, user or ([] if known else USERS), listening, rotate or [])
    except making.NatsConfigFailed as error:
        console.print(Text(str(error), "red"), soft_wrap=True)
        raise SystemExit(1) from None
    new = {making.public_key(out / f"{name}{SEED_ENDS}") for name in written.made}
    for name, key in written.users:
        console.print(Text(f"  {name:<24} {key}{'  (new)' if key in new else ''}"), soft_wrap=True)
    if not written.anew:
        console.print(Text(f"kept {written.config} as it was"), soft_wrap=True)
    console.print(Text(f"start it:     nats-server -c {written.config}\n"
                       f"after a change: nats-server --signal reload=PID\n"
                       f"services:     TOKENMILL_NATS_CREDS={out}, or a service's own .seed"), soft_wrap=True)
    typer.echo(str(written.config))
