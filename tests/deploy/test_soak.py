"""The soak's report: what it makes of samples, also where a process has died."""

import os
import subprocess
import sys

from deploy.bench import soak
from deploy.bench.soak import AT_REST, NEVER, SHOWN, Record, Sample, Usage

ZERO = {name: 0.0 for name in (*AT_REST["worker"], *NEVER["worker"], *SHOWN)}
QUIET = {"worker": ZERO, "gateway": {name: 0.0 for name in (*AT_REST["gateway"], *NEVER["gateway"])}}


def sample(at_s: float, rest: bool = False, without: str = "") -> Sample:
    held = {name: Usage(100.0, 4, 20) for name in ("gateway-1", "worker-1") if name != without}
    return Sample(at_s, held, {name: figures for name, figures in QUIET.items() if not without.startswith(name)}, rest)


def report(*samples: Sample) -> list[str]:
    complaints: list[str] = soak.summary(Record(list(samples)), 60.0)["complaints"]
    return complaints


def test_a_mesh_that_grows_nowhere_has_no_complaints() -> None:
    assert report(*(sample(at, rest=at % 20 == 0) for at in range(0, 61, 5))) == []


def test_a_process_that_died_is_a_complaint_and_the_report_is_written_all_the_same() -> None:
    whole = [sample(at, rest=at % 20 == 0) for at in range(0, 61, 5)]
    for lost in range(len(whole)):
        some = [*whole[:lost], sample(5.0 * lost, whole[lost].rest, "worker-1"), *whole[lost + 1:]]
        complaints = report(*some)
        assert "worker-1: not there in 1 of 13 samples" in complaints
        assert ("the worker did not answer at the end" in complaints) == (lost == len(whole) - 1)
        assert soak.thinned(some)
    assert "worker-1: not there in 12 of 13 samples" in report(sample(0.0), *(
        sample(at, True, "worker-1") for at in range(5, 61, 5)))


def test_a_service_that_does_not_answer_is_not_idle() -> None:
    assert not soak.busy(QUIET)
    assert set(soak.busy({"gateway": QUIET["gateway"]})) == set(AT_REST["worker"])


def test_a_process_that_has_ended_holds_nothing_whether_or_not_anybody_waited_for_it() -> None:
    assert soak.usage(os.getpid()) is not None
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert soak.usage(ended.pid) is None
    ended.wait()
    assert soak.usage(ended.pid) is None
