"""A drafter that lies, as a process: `python -m tests.laws.lying_drafter SEED VOCABULARY` and its usual flags."""

import sys

from drafter.service import checked, serve
from shared.process import run
from shared.settings import DrafterSettings
from tests.laws.liars import lying

if __name__ == "__main__":
    seed, vocabulary = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    with lying(seed, vocabulary):
        run("drafter", DrafterSettings, serve, checked)
