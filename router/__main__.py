"""`python -m router --nats nats://127.0.0.1:4222 --policy cost`: one router as a process of its own.

SIGTERM and SIGINT let it leave: no new requests, what is decided goes out, a last status says `draining`.
"""

from router.service import checked, serve
from shared.process import run
from shared.settings import RouterSettings

if __name__ == "__main__":
    run("router", RouterSettings, serve, checked)
