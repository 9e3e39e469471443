"""`python -m drafter --nats nats://127.0.0.1:4222`: one drafter as a process of its own.

SIGTERM and SIGINT let it leave: a last status says `draining`, so that workers look for another.
"""

from drafter.service import checked, serve
from shared.process import run
from shared.settings import DrafterSettings

if __name__ == "__main__":
    run("drafter", DrafterSettings, serve, checked)
