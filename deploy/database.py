"""The database of a mesh as commands find it: `--database`, else TOKENMILL_DATABASE; opened for one command."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from gateway.state.database import Database

Url = Annotated[str, typer.Option(
    "--database", metavar="URL", envvar="TOKENMILL_DATABASE", show_envvar=False,
    help="sqlite:///FILE or postgresql://USER@HOST/NAME, as gateways take it")]


@contextlib.contextmanager
def opened(url: str) -> Iterator["Database"]:
    """The database while the block runs. Ends the command with one sentence where something is wrong with it."""
    from gateway.state.database import DatabaseFailed, open_database
    from gateway.state.directory import Refused

    if not url:
        leave("say which database: --database URL, or TOKENMILL_DATABASE")
    try:
        database = open_database(url)
        with contextlib.closing(database):
            yield database
    except (DatabaseFailed, Refused) as error:
        leave(str(error))


def leave(reason: str) -> NoReturn:
    """End the command with this sentence."""
    typer.echo(reason, err=True)
    raise SystemExit(1)


def print_json(document: object) -> None:
    """One document, as people read it too."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(document)).decode())


def table(cells: list[list[str]], numbers: int = 0) -> str:
    """Lines of cells under each other; of each line the last `numbers` stand to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first = len(widths) - numbers

    def line(row: list[str]) -> str:
        placed = [cell.rjust(width) if at >= first else cell.ljust(width)
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(placed).rstrip()

    return "\n".join(map(line, cells))
