"""What outsiders feed us, bent: `python -m tests.laws.fuzz TARGET --seeds 1000 --from 0`. Exit 1 on a complaint.

A seed is one case, and the same case every time. It may be taken or refused with the reader's own error, never more:
another error, a case that takes longer than `--seconds`, or more than `MEMORY_BYTES` of new memory is a complaint.
"""

import argparse
import contextlib
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import structlog

MEMORY_BYTES = 1 << 30
SHOWN = 400  # characters of an error
CASE_S = 10.0  # of a machine that others use too

Play = Callable[[int], None]
# a target gives, once set up, what plays a case and raises where it should not
TARGETS: Mapping[str, str] = {
    "gguf": "tests.laws.fuzz_models", "safetensors": "tests.laws.fuzz_models", "config": "tests.laws.fuzz_models",
    "wire": "tests.laws.fuzz_wire", "bodies": "tests.laws.fuzz_bodies", "dialects": "tests.laws.fuzz_text",
    "template": "tests.laws.fuzz_text",
}


class TooSlow(BaseException):
    """No `Exception`: a reader that takes any error takes none of this."""


def target(name: str) -> Callable[[], contextlib.AbstractContextManager[Play]]:
    """What opens this target."""
    opened: Callable[[], contextlib.AbstractContextManager[Play]] = getattr(import_module(TARGETS[name]), name)
    return opened


def complaints(name: str, seeds: Sequence[int], case_s: float = CASE_S) -> Iterator[str]:
    """One line for each seed that is not taken well. Bounds memory of the whole process meanwhile; main thread only."""
    with target(name)() as play, bounded_memory():
        for seed in seeds:
            began = time.monotonic()
            try:
                with bounded_time(case_s):
                    play(seed)
            except (Exception, TooSlow) as error:
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                last = traceback.extract_tb(error.__traceback__)[-1]
                yield (f"{name} {seed}: {type(error).__name__} in {Path(last.filename).name}:{last.lineno} after "
                       f"{time.monotonic() - began:.1f} s: {str(error)[:SHOWN]}")


@contextlib.contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """Raises TooSlow in what takes longer, or after it where it does not let itself be stopped."""
    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory(more_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Whoever asks for more gets a MemoryError."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.laws.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--seconds", type=float, default=CASE_S, help="that a case may take")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # every refusal has a line
    found = 0
    for name in TARGETS if options.target == "all" else [options.target]:
        began, own = time.monotonic(), 0
        for complaint in complaints(name, range(options.first, options.first + options.seeds), options.seconds):
            print(complaint, flush=True)
            own += 1
        print(f"{name}: {options.seeds} cases, {own} complaints, {time.monotonic() - began:.0f} s", flush=True)
        found += own
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
