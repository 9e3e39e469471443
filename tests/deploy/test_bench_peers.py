"""Peers of the engine benchmark: how they are named, run, watched and compared."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from deploy.bench import engine, fidelity, machine, peer


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a driver out of lines of Python that find the job in `job`."""

    def make(*lines: str) -> peer.Peer:
        path = tmp_path / "driver.py"
        path.write_text("\n".join(["import json, os, sys, time", "job = json.load(open(sys.argv[1]))", *lines]))
        monkeypatch.setitem(peer.DRIVERS, "stand-in", str(path))
        return peer.Peer("stand-in", Path(sys.executable))

    return make


def test_every_driver_lies_in_the_tree() -> None:
    folder = Path(peer.__file__).parent / "peers"
    assert {path.name for path in folder.glob("*.py")} == set(peer.DRIVERS.values())


def test_a_peer_that_is_not_known_or_has_no_interpreter_is_refused_with_a_hint() -> None:
    for given in ("mystery=/bin/python", "llama.cpp", "llama.cpp="):
        with pytest.raises(SystemExit, match=r"NAME=PYTHON, where NAME is one of llama\.cpp"):
            peer.parse([given])


def test_the_interpreter_of_an_environment_is_not_replaced_by_what_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    assert peer.parse([f"vllm={tmp_path / 'python'}"]) == [peer.Peer("vllm", tmp_path / "python")]


def test_the_answer_is_the_last_line_whatever_was_said_before(driver) -> None:
    stand_in = driver("print('loading'); print(json.dumps({'version': job['task']}))")
    assert stand_in.ask({"task": "prepare"}) == {"version": "prepare"}


def test_a_driver_is_told_of_none_of_our_modules(driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = str(tmp_path / "ours")
    monkeypatch.setenv("PYTHONPATH", ours)
    found = driver("print(json.dumps({'path': sys.path, 'in': os.getcwd()}))").ask({})
    assert ours not in found["path"] and found["in"] != str(Path(peer.__file__).parents[2])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sys.exit('no such model')", "no such model"),
        ("os._exit(3)", "ended with 3"),
        ("print('done')", "no JSON: done"),
        ("os.kill(os.getpid(), 4)", "ended with -4"),
    ],
)
def test_a_peer_that_fails_says_why(driver, line: str, words: str) -> None:
    with pytest.raises(peer.PeerFailed, match=words):
        driver(line).ask({})


def test_a_missing_interpreter_is_a_failed_peer_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises(peer.PeerFailed, match="cannot be run: No such file"):
        peer.Peer("vllm", tmp_path / "python").ask({})


def test_what_a_peer_started_ends_with_it(driver, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    stand_in = driver(
        "import subprocess",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))",
        "time.sleep(600)",
    )
    with stand_in.start({}) as running:
        while not (pid_file.exists() and pid_file.read_text()):
            assert running.process.poll() is None
            time.sleep(0.01)
    assert running.process.poll() is not None
    assert _gone(int(pid_file.read_text()))


def _gone(pid: int) -> bool:
    """Dead, or dead and waiting for someone to notice."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_figures_are_the_same_arithmetic_for_every_side() -> None:
    found = engine.figures([0.5, 1.0], 3.0, [10, 10], 200)
    assert found == {"decode_tok_s": 18 / 2.5, "output_tok_s": 20 / 3, "prefill_tok_s": 200.0, "ttft_ms": 750.0}
    assert engine.figures([0.5], 0.5, [1], 100)["decode_tok_s"] is None


def test_sides_alternate_and_every_other_run_has_one_of_ours_before_it() -> None:
    turns: list[str] = []

    def side(name: str, rate: float) -> engine.Side:
        def run() -> engine.Figures:
            turns.append(name)
            return {"prefill_tok_s": rate * (1 + turns.count(name)), "rss_mib": None}

        return run

    report: dict = {"rows": [], "ratios": []}
    engine._measure("W4", {"ours": side("ours", 10), "a": side("a", 5), "b": side("b", 1)}, 2, report)
    assert turns == ["ours", "a", "ours", "b"] * 2
    rows = {row["side"]: row for row in report["rows"]}
    assert rows["ours"]["runs"] == 4 and rows["a"]["runs"] == 2
    assert rows["a"]["prefill_tok_s"] == 12.5  # the median of 10 and 15
    first = report["ratios"][0]
    assert (first["side"], first["figure"], first["pairs"]) == ("a", "prefill_tok_s", 2)
    assert first["ratio"] == pytest.approx((20 / 10 + 40 / 15) / 2, abs=1e-3)
    assert (first["low"], first["high"]) == (2.0, 2.667)
    assert not [line for line in report["ratios"] if line["figure"] == "rss_mib"]  # nobody had it


def test_a_peer_that_fails_has_its_error_for_a_row_and_the_run_goes_on() -> None:
    asked = []

    def broken() -> engine.Figures:
        asked.append(1)
        raise peer.PeerFailed("no such instruction")

    def fine() -> engine.Figures:
        return {"prefill_tok_s": 2.0}

    report: dict = {"rows": [], "ratios": []}
    engine._measure("W4", {"ours": fine, "broken": broken, "other": fine}, 3, report)
    assert report["rows"][1] == {"workload": "W4", "side": "broken", "error": "no such instruction"}
    assert [row.get("runs") for row in report["rows"]] == [4, None, 3]
    assert len(asked) == 1
    assert [line["side"] for line in report["ratios"]] == ["other"]


def test_no_path_of_the_machine_gets_into_a_report() -> None:
    url = "--url=http://127.0.0.1:80/v1"
    words = ["--peer", "llama.cpp=/somewhere/bin/python", "--json", "/else/out.json", url, "a b"]
    assert machine.command("deploy.bench.engine", words) == (
        f"python -m deploy.bench.engine --peer llama.cpp=python --json out.json {url} 'a b'"
    )


def test_fidelity_reads_sentences_and_leaves_out_what_is_none() -> None:
    sentence = "This is a paragraph of plain English that goes on for long enough to be worth reading as one sentence."
    document = f"Title\n\n{sentence}\n\n    >>> print(1)\n\n| a | table |\n\n{sentence.rstrip('.')} and stops\n"
    assert list(fidelity.prose(document)) == [sentence]


def test_fidelity_cuts_whole_windows_and_says_how_many_there_are() -> None:
    ids = list(range(3 * fidelity.WINDOW + 5))
    assert fidelity.cut(ids, fidelity.WINDOW) == [ids[:512], ids[512:1024]]
    with pytest.raises(SystemExit, match="text for 1 to 1533"):
        fidelity.cut(ids, 5000)


def test_fidelitys_text_is_long_and_the_same_every_time() -> None:
    found = fidelity.text()
    assert found == fidelity.text()
    assert len(found) > 150_000


def test_a_job_reaches_the_driver_whole(driver) -> None:
    job = {"task": "generate", "prompts": [[1, 2], [3]], "name": "ü"}
    assert driver("print(json.dumps(job))").ask(job) == json.loads(json.dumps(job))


STAYS = (
    "for line in sys.stdin:",
    "    print('a line of a log')",
    "    run = json.loads(line)",
    "    if run.get('end'): sys.exit('out of memory')",
    "    print(json.dumps({'pid': os.getpid(), 'task': job['task'], 'got': run['prompts']}), flush=True)",
)


def test_one_process_answers_many_workloads(driver) -> None:
    with driver(*STAYS).stay({"task": "generate"}) as ask:
        first, second = ask({"prompts": [[1]]}), ask({"prompts": [[2], [3]]})
    assert (first["got"], second["got"]) == ([[1]], [[2], [3]])
    assert first["pid"] == second["pid"] and first["task"] == "stay"
    assert _gone(first["pid"])


def test_one_that_stays_and_ends_says_why_to_that_workload_and_to_the_next(driver) -> None:
    with driver(*STAYS).stay({}) as ask:
        ask({"prompts": [[1]]})
        for run in ({"end": True}, {"prompts": [[1]]}):
            with pytest.raises(peer.PeerFailed, match="out of memory"):
                ask(run)
