"""A drafter is of a kind that exists, with all that it needs, or it does not start."""

import sys
from types import SimpleNamespace

import pytest

from drafter.hybrid import HybridDraftsman
from drafter.kinds import check, draftsman_of
from drafter.suffix import SuffixDraftsman
from shared.settings import DrafterSettings
from tests.drafter.test_hybrid import Says


def test_what_is_not_said_is_suffix() -> None:
    assert isinstance(draftsman_of(DrafterSettings()), SuffixDraftsman)


def test_a_kind_that_does_not_exist_is_named_beside_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"oracle.*suffix, model, hybrid"):
        check(DrafterSettings(kind="oracle"))


@pytest.mark.parametrize("kind", ["model", "hybrid"])
def test_a_kind_with_a_model_says_so_when_there_is_none(kind: str) -> None:
    with pytest.raises(ValueError, match="needs --model"):
        check(DrafterSettings(kind=kind))
    check(DrafterSettings(kind=kind, model="somewhere"))


def test_a_hybrid_takes_the_model_beside_what_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Says("model")
    model.vocabulary, model.threaded = "abcd", True
    monkeypatch.setitem(sys.modules, "drafter.small_model", SimpleNamespace(load=lambda settings: model))  # type: ignore[arg-type]
    assert draftsman_of(DrafterSettings(kind="model", model="m")) is model
    hybrid = draftsman_of(DrafterSettings(kind="hybrid", model="m"))
    assert isinstance(hybrid, HybridDraftsman)
    assert (hybrid.kind, hybrid.vocabulary, hybrid.threaded) == ("hybrid", "abcd", True)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "drafter.small_model", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hybrid needs drafter\.small_model"):
        draftsman_of(DrafterSettings(kind="hybrid", model="m"))
