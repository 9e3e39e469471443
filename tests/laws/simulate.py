"""Play many schedules: `python -m tests.laws.simulate --seeds 1000 --from 0`. Exit 1 when a law is broken."""

import argparse
import contextlib
import sys

from tests.laws.liars import lying
from tests.laws.simulation import Schedule, run, violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--lies", action="store_true", help="each with a drafter that lies")
    parser.add_argument("--vectors", action="store_true", help="half of the requests want vectors")
    options = parser.parse_args()
    faults = broken = refused = 0
    for seed in range(options.first, options.first + options.seeds):
        try:
            with lying(seed) if options.lies else contextlib.nullcontext():
                history = run(Schedule.draw(seed, drafters=1 if options.lies else None, vectors=options.vectors))
            found = violations(history)
            faults, refused = faults + history.faults, refused + history.refused
        except Exception as error:  # a schedule that cannot be played to its end breaks a law too
            found = [f"seed {seed}: {error!r}"]
        broken += len(found)
        for violation in found:
            print(violation, flush=True)
        if sys.stderr.isatty():
            print(f"\r{seed - options.first + 1}/{options.seeds}", end="", file=sys.stderr)
    print(f"{refused} streams refused before they began, while nobody could serve them")
    print(f"{options.seeds} schedules, {faults} faults, {broken} violations")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
