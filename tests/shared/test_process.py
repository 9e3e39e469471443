"""A service as a process: what it says of itself before it serves."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("service", ["gateway", "router", "worker", "drafter"])
def test_help_names_every_flag_with_its_default(service: str) -> None:
    done = subprocess.run([sys.executable, "-m", service, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--nats" in done.stdout and "'nats://127.0.0.1:4222'" in done.stdout
    assert "--drain-s" in done.stdout and "30.0" in done.stdout


def test_a_wrong_flag_is_one_sentence_and_exit_code_1() -> None:
    done = subprocess.run([sys.executable, "-m", "router", "--polcy", "cost"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "polcy" in done.stderr and "Traceback" not in done.stderr
