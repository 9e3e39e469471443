"""`python -m worker.rank N MEETING_POINT --model ...`: one more rank of a worker, started by its rank 0.

Its standard input wakes it and ends it, its standard output says that it is here and ready: `worker.ranks`.
"""

import os
import signal
import sys

from kernels.ranks import RankLost
from shared import telemetry
from shared.settings import WorkerSettings, load
from worker.ranks import BEREFT, HERE, READY, follow, meet
from worker.runner import device_of, load_part


def main(argv: list[str]) -> None:
    rank, meeting_point = int(argv[0]), argv[1]
    # an interrupt from the keyboard reaches every process; rank 0 drains first, then closes the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # whatever a library prints must not be taken for a word
    words = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    settings = load(WorkerSettings, "worker", argv[2:], os.environ)
    telemetry.configure_logging("rank", f"{settings.id}-rank-{rank}", settings.log, settings.log_level)
    import torch.distributed  # noqa: F401 - takes seconds; the others wait for each other only behind it

    try:
        words.write(HERE)
        ranks = meet(settings, rank, meeting_point, device_of(settings))
        decoder = load_part(settings, ranks)
        words.write(READY)
        follow(decoder, ranks, sys.stdin.buffer)
    except (RankLost, BrokenPipeError) as error:
        # rank 0 knows more, and says it
        print(f"rank {rank}: {error}", file=sys.stderr)
        sys.exit(BEREFT)


if __name__ == "__main__":
    main(sys.argv[1:])
