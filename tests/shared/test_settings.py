"""Flag over environment over file over default, and errors that name the culprit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.settings import (
    DrafterSettings,
    GatewaySettings,
    RouterSettings,
    Settings,
    WorkerSettings,
    check_price,
    load,
    to_flags,
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mill.toml"
    path.write_text('[router]\npolicy = "prefix"\nheartbeat_s = 1.5\nzone = "file"\n[worker]\nthreads = 2\n')
    return str(path)


def test_without_a_word_there_are_defaults():
    assert load(RouterSettings, "router", [], {}) == RouterSettings()


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(config):
    environ = {"TOKENMILL_CONFIG": config, "TOKENMILL_ZONE": "environment", "TOKENMILL_HEARTBEAT_S": "2.5"}
    settings = load(RouterSettings, "router", ["--heartbeat-s", "3.5"], environ)
    assert settings == RouterSettings(policy="prefix", zone="environment", heartbeat_s=3.5)
    assert load(RouterSettings, "router", [f"--config={config}"], {}).zone == "file"
    assert load(WorkerSettings, "worker", [f"--config={config}"], {}) == WorkerSettings(threads=2)


def test_the_environment_of_other_services_is_no_concern():
    assert load(RouterSettings, "router", [], {"TOKENMILL_THREADS": "many", "PATH": "/bin"}) == RouterSettings()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False),
                                             ("False", False)])
def test_switches_are_read(text, value):
    assert load(WorkerSettings, "worker", [f"--speculation={text}"], {}).speculation is value


def error(argv, environ=None, kind: type[Settings] = RouterSettings):
    with pytest.raises(ValueError) as caught:
        load(kind, "router", argv, environ or {})
    return str(caught.value)


def test_a_wrong_value_is_traced_to_its_flag_variable_or_key(tmp_path):
    assert "router: --heartbeat-s = 'soon': Expected `float`" in error(["--heartbeat-s=soon"])
    assert "TOKENMILL_METRICS_PORT" in error([], {"TOKENMILL_METRICS_PORT": "x"})
    path = tmp_path / "mill.toml"
    path.write_text("[router]\nmax_queue_s = [1]\n")
    assert f"max_queue_s in [router] of {path}" in error([f"--config={path}"])


def test_unknown_settings_are_named(tmp_path):
    assert "--polcy" in error(["--polcy", "prefix"])
    path = tmp_path / "mill.toml"
    path.write_text("[router]\npolcy = 1\n")
    assert f"polcy in [router] of {path}" in error(["--config", str(path)])


def test_malformed_flags_are_named():
    assert "'policy'" in error(["policy", "prefix"])
    assert "--policy needs a value" in error(["--policy"])


def test_a_file_that_is_missing_or_broken_is_named(tmp_path):
    path = tmp_path / "mill.toml"
    assert f"{path}: No such file" in error([], {"TOKENMILL_CONFIG": str(path)})
    path.write_text("[router\n")
    assert f"{path} is no TOML" in error([f"--config={path}"])
    path.write_text("router = 1\n")
    assert f"router in {path} must be a table" in error([f"--config={path}"])


@pytest.mark.parametrize("kind", [GatewaySettings, RouterSettings, WorkerSettings, DrafterSettings])
def test_flags_of_defaults_are_none(kind):
    assert to_flags(kind()) == []


@given(st.booleans(), st.text(), st.floats(0, 1e9), st.integers(0, 10**6))
def test_flags_turn_back_into_the_same_settings(speculation, zone, price, blocks):
    settings = WorkerSettings(speculation=speculation, zone=zone, price_usd_per_hour=price, kv_blocks=blocks)
    assert load(WorkerSettings, "worker", to_flags(settings), {}) == settings


@pytest.mark.parametrize("usd", ["-0.1", "nan", "inf"])
def test_a_price_that_is_negative_or_no_number_is_refused(usd):
    settings = load(DrafterSettings, "drafter", [f"--price-usd-per-hour={usd}"], {})
    with pytest.raises(ValueError, match=r"price_usd_per_hour is .*say 0 or more"):
        check_price(settings.price_usd_per_hour)
    check_price(0.0)
