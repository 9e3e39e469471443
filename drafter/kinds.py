"""Which kinds of drafters there are, and how each is made."""

from importlib import import_module

from drafter.drafting import Draftsman
from drafter.hybrid import HybridDraftsman
from drafter.suffix import SuffixDraftsman
from shared.settings import DrafterSettings

KINDS = ("suffix", "model", "hybrid")


def check(settings: DrafterSettings) -> None:
    """Raises ValueError for a kind that does not exist, or that needs a model and has none."""
    if settings.kind not in KINDS:
        raise ValueError(f"unknown kind of drafter {settings.kind!r}: use {', '.join(KINDS)}")
    if settings.kind != "suffix" and not settings.model:
        raise ValueError(f"a drafter of kind {settings.kind} needs --model, the path of the small model that drafts")


def draftsman_of(settings: DrafterSettings) -> Draftsman:
    """Whoever drafts as the settings say. Raises ValueError for a model that cannot be read or computed here."""
    check(settings)
    if settings.kind == "suffix":
        return SuffixDraftsman()
    try:
        # it needs torch, which no other kind should wait for
        small_model = import_module("drafter.small_model")
    except ModuleNotFoundError as error:
        raise ValueError(f"a drafter of kind {settings.kind} needs {error.name}, which is not installed here") from None
    model: Draftsman = small_model.load(settings)
    return model if settings.kind == "model" else HybridDraftsman(SuffixDraftsman(), model)
