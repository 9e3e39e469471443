"""The threads of a step: when the caller goes on without the others."""

import subprocess
from pathlib import Path

import pytest

from kernels.native import build as building

pytestmark = pytest.mark.skipif(building.available() is not None, reason=str(building.available()))


def test_a_team_is_given_up_only_for_threads_that_have_no_core(tmp_path: Path) -> None:
    compiler = building._compiler()
    assert compiler is not None
    source, program = Path(__file__).with_name("crowding_check.cpp"), tmp_path / "check"
    flags = ["-std=c++20", "-D_GLIBCXX_DEBUG", "-pthread"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
