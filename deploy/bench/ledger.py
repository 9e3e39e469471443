"""What the ledger's database takes: requests settled a second by size of transaction, a lease, a check.

    python -m deploy.bench.ledger [--database URL] [--json FILE]

Rows: `settle` writes transactions of 1, 20 and 500 requests; `grant` enlarges one lease again and again; `check` reads
what the others have written. Medians of single transactions. Without a URL: SQLite in a folder that is gone afterwards.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from deploy.bench import machine
from gateway.ledger import Record
from gateway.state.books import Books
from gateway.state.budget import Budget
from gateway.state.database import Database, open_database
from shared.pricing import nanos

DAY, AT = "2026-11-27", 1_764_200_000_000
SIZES = ((1, 100), (20, 50), (500, 20))  # requests of a transaction, transactions
GRANTS = 100


def main(argv: list[str]) -> int:
    """Exit code 1 when the ledger does not add up in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mill-ledger-") as folder:
        database = open_database(options.database or f"sqlite:///{folder}/mill.db")
        rows, problems = measure(database)
        kind = "sqlite" if database.is_sqlite else "postgresql"
        database.close()
    # without the URL, which is nobody else's
    words = [] if options.json is None else ["--json", str(options.json)]
    report = {"machine": machine.describe(), "command": machine.command("deploy.bench.ledger", words), "database": kind,
              "rows": rows}
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print("\n".join(problems) or "it adds up")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if problems else 0


def measure(database: Database) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a report, and what does not add up."""
    books, rows = Books(database), []
    number = 0
    for size, transactions in SIZES:
        batches = [[_record(number + at * size + one) for one in range(size)] for at in range(transactions)]
        number += size * transactions
        taken_s = [_seconds(lambda batch=batch: books.settle("bench", batch, AT)) for batch in batches]  # type: ignore[misc]
        rows.append({"what": "settle", "requests": size, "ms": round(1000 * median(taken_s), 3),
                     "requests_per_s": round(size / median(taken_s))})
    lease = books.grant("bench", "acme", DAY, 1, 1, Budget(10**15), AT).lease
    taken_s = [_seconds(lambda: books.grant("bench", "acme", DAY, 10**6, 1, Budget(10**15), AT, lease))
               for _ in range(GRANTS)]
    rows.append({"what": "grant", "ms": round(1000 * median(taken_s), 3)})
    began_s = time.perf_counter()
    sums, problems = books.check()
    seconds = time.perf_counter() - began_s
    rows.append({"what": "check", "entries": sums.entries, "ms": round(1000 * seconds, 1),
                 "entries_per_s": round(sums.entries / seconds)})
    return rows, problems


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _record(number: int) -> Record:
    return Record(request=f"{number:024x}", tenant="acme", day=DAY, at=AT, key="tm-12345678", model="smollm2-135m",
                  tier="default", region="*", input=nanos("0.10"), cached_input=nanos("0.05"), output=nanos("0.40"),
                  prompt_tokens=1000, cached_tokens=500, generated_tokens=100, outcome="stop", worker_us=100_000,
                  cost=nanos("0.000005"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
