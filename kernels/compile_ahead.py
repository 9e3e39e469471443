"""Compiling kernels in as many processes as there are processors, before they are launched and measured.

A kernel takes half a second to compile, one after the other where it is launched first. Here a source of calls, named
as `module:function`, is run on the meta device by several processes, each compiles its share of what the calls would
launch, and Triton's cache on disk hands it to the process that launches.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

MOST_PROCESSES = 16


def compile_ahead(source: str) -> None:
    """Compile all that the calls of `source` launch. What does not compile is named, and is left to its launch."""
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1))
    # Without a GPU in sight: a process of its own holds memory on it, and nothing here runs there.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "kernels.compile_ahead", source]
    workers = [subprocess.Popen([*command, str(share), str(count)], env=environment) for share in range(count)]
    for worker in workers:
        worker.wait()


def compile_share(calls: Iterator[Callable[[], Any]], share: int, count: int) -> int:
    """Compile every `count`th of the distinct launches of `calls`; how many those are."""
    import triton

    from kernels.launch import recording
    from kernels.lowering import HOPPER, source_of

    seen: set[str] = set()
    for call in calls:
        for recorded in recording(call):
            source = source_of(recorded)
            name = f"{source.hash()} {recorded.options}"
            if name in seen:
                continue
            seen.add(name)
            if len(seen) % count == share:
                try:
                    triton.compile(source, target=HOPPER, options=dict(recorded.options))
                except Exception as refusal:
                    print(f"{recorded.kernel.__name__} does not compile: {refusal}", file=sys.stderr)
    return len(seen)


def main(source: str, share: str, count: str) -> None:
    module, function = source.split(":")
    compile_share(getattr(importlib.import_module(module), function)(), int(share), int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
