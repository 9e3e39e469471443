"""Start a program as a child that does not outlive its supervisor.

    python -P deploy/child.py router --id=router-1 ...      one of our services
    python -P deploy/child.py --exec nats-server -c ...     anything else

On Linux the kernel is asked to end this process when its parent dies, however the parent dies.
Run by its path, so that a folder called `worker` where the user stands is never taken for ours.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            sys.exit(0)
    if sys.argv[1] == "--exec":
        os.execv(sys.argv[2], sys.argv[2:])
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    module = sys.argv[1]
    sys.argv = [module, *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
