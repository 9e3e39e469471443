"""The `tokenmill` command line: what it offers, and one clear sentence for what it cannot do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from deploy import cli
from kernels.native import build
from tests.deploy.command import HOME


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100", "TERM": "dumb"})


def _assert_refused(expected: str, *arguments: str) -> None:
    result = _run("up", *arguments)
    assert result.exit_code == 1
    assert result.stderr == f"{expected}\n"


def test_help_names_every_option_of_up() -> None:
    shown = _run("up", "--help").output
    options = ("port", "host", "workers", "drafters", "routers", "gateways", "model", "engine", "nats", "data",
               "drafter-kind", "drafter-model", "all-in-one", "quiet", "otlp", "metrics-port", "log-level", "drain-s",
               "tenants")
    assert [option for option in options if f"--{option} " not in shown] == []


def test_an_unknown_engine_is_answered_with_those_there_are() -> None:
    _assert_refused("--engine 'steam' is unknown: choose one of auto, cpu, cuda, mock, reference", "--engine", "steam")


def test_an_unknown_log_level_is_answered_with_those_there_are() -> None:
    _assert_refused("--log-level 'loud' is unknown: choose one of debug, info, warning, error", "--log-level", "loud")


def test_all_in_one_and_a_broker_exclude_each_other() -> None:
    _assert_refused("--all-in-one needs no NATS: leave out --nats", "--all-in-one", "--nats", "nats://127.0.0.1:4222")


def test_all_in_one_has_no_ports_for_figures() -> None:
    _assert_refused("--metrics-port is for services that are processes: leave out --all-in-one",
                    "--all-in-one", "--metrics-port", "9000")


def test_a_tenants_file_that_is_none_is_said_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    hint = f". `tokenmill keys create NAME --tenants {path}` makes a file, or adds to it"
    _assert_refused(f"cannot read the tenants file {path}: No such file or directory{hint}", "--tenants", str(path))
    path.write_text("[tenants.a]")
    result = _run("up", "--tenants", str(path))
    assert result.exit_code == 1 and "needs a secret" in result.stderr


def test_cuda_without_a_device_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _assert_refused("torch finds no CUDA device here: choose --engine auto or cpu", "--engine", "cuda")


def test_a_missing_model_is_said_with_what_a_model_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    _assert_refused(
        "no model at '/nowhere/model.gguf': give `default`, a GGUF file, a model folder or a Hugging Face id "
        "(owner/name)", "--engine", "mock", "--model", "/nowhere/model.gguf")


@pytest.mark.parametrize("arguments", [("--port", "0"), ("--port", "65536"), ("--workers", "0"), ("--drafters", "-1"),
                                       ("--workers", "3..1"), ("--workers", "2.."), ("--workers", "two"),
                                       ("--drain-s", "-1"), ("--port", "eight")])
def test_a_number_out_of_range_is_refused_by_name(arguments: tuple[str, str]) -> None:
    result = _run("up", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_a_compiler_that_fails_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Path:
        raise RuntimeError("the native step could not be compiled: no headers")

    monkeypatch.setattr(build, "available", lambda: None)
    monkeypatch.setattr(build, "build", fail)
    cli._compile()
    assert capsys.readouterr().err == (
        "no fast CPU step: the native step could not be compiled: no headers; the torch path serves, slowly\n")


def test_a_package_of_another_project_in_our_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "__init__.py").write_text("")
    code = (f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({str(HOME)!r}); "
            "from deploy.cli import main; main()")
    result = subprocess.run([sys.executable, "-P", "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith(f"the package 'router' resolves to {tmp_path}/router/__init__.py, not to tokenmill")
    assert "install tokenmill into an environment of its own" in result.stderr
