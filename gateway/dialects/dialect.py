"""Which way of writing calls and thoughts a model has.

Rule: it is read from the model's own template and vocabulary, or told by a setting; the reason is kept, logged at the
start and shown with the model. Where neither says anything there are no calls, and a request with tools is refused.
A template that knows nothing of tools leaves the form open: there the gateway shows them itself, as `showing.py` says.
Pure.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from gateway.dialects import harmony, hermes, llama, mistral, thinking
from gateway.dialects.parts import Reader
from gateway.dialects.thinking import PlainReader, ThinkingReader

Calls = Literal["hermes", "llama3", "mistral", "harmony", "none"]
Thoughts = Literal["think", "harmony", "none"]
CALLS: tuple[Calls, ...] = ("hermes", "llama3", "mistral", "harmony", "none")
THOUGHTS: tuple[Thoughts, ...] = ("think", "harmony", "none")

# all that readers look for, in text or as tokens that are not to be hidden from them
MARKS: Mapping[str, tuple[str, ...]] = {
    "hermes": (hermes.OPENING, hermes.CLOSING),
    "llama3": (llama.MARK,),
    "mistral": (mistral.MARK, mistral.ID, mistral.ARGUMENTS),
    "harmony": (harmony.CHANNEL, harmony.MESSAGE, harmony.START, harmony.END, harmony.CONSTRAIN),
    "think": (thinking.OPENING, thinking.CLOSING),
}
_READERS: Mapping[str, Callable[[Collection[str]], Reader]] = {
    "hermes": hermes.HermesReader, "llama3": llama.LlamaReader, "mistral": mistral.MistralReader,
}
_ID_OF_MISTRAL = 9  # letters and digits: its template refuses any other


class Dialect(Struct, frozen=True):
    """`shows`: the gateway shows tools and calls, since the template shows none."""

    calls: Calls = "none"
    thoughts: Thoughts = "none"
    shows: bool = False
    why: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """What readers look for."""
        return MARKS.get(self.calls, ()) + (MARKS.get(self.thoughts, ()) if self.thoughts != self.calls else ())

    @property
    def opening(self) -> str:
        """The mark behind which calls stand; empty where there is none, or one for each channel."""
        return MARKS[self.calls][0] if self.calls in ("hermes", "mistral") else ""

    @property
    def id_length(self) -> int | None:
        """Characters of a call's id, where the template counts them."""
        return _ID_OF_MISTRAL if self.calls == "mistral" else None

    def reader(self, callable: Collection[str], opened: bool) -> Reader | None:
        """Of one stream; None where there is nothing to be read but text.

        `callable`: names of the tools that may be called. `opened`: the prompt has opened a thought.
        """
        if "harmony" in (self.calls, self.thoughts):
            return harmony.HarmonyReader(callable if self.calls == "harmony" else ())
        calls = _READERS[self.calls](callable) if callable and self.calls in _READERS else None
        if self.thoughts == "think":
            return ThinkingReader(calls or PlainReader(), opened)
        return calls


class Reading(Struct, frozen=True):
    """How one answer is to be read. `opened`: its prompt has opened a thought."""

    callable: frozenset[str] = frozenset()
    one_call: bool = False
    opened: bool = False
    shows_thoughts: bool = True


def told(dialect: Dialect, calls: str | None, thoughts: str | None) -> Dialect:
    """`dialect` with what a setting says of it. Raises ValueError for what no model speaks."""
    for said, known, flag in ((calls, CALLS, "--tool-formats"), (thoughts, THOUGHTS, "--reasoning-formats")):
        if said is not None and said not in known:
            raise ValueError(f"{flag} knows {', '.join(known)}, not {said!r}")
    if calls is not None:
        dialect = replace(dialect, calls=calls, why="--tool-formats says so")
    return dialect if thoughts is None else replace(dialect, thoughts=thoughts)


def dialect_of(template: str, special: Collection[str]) -> Dialect:
    """The dialect that a chat template and the special tokens of a vocabulary show."""
    if harmony.CHANNEL in special and harmony.CHANNEL in template:
        return Dialect("harmony", "harmony", why="the template writes harmony channels")
    thoughts: Thoughts = "think" if thinking.CLOSING in template else "none"
    calls, why = _calls(template, special)
    return Dialect(calls, thoughts, "tools" not in template, why)


def _calls(template: str, special: Collection[str]) -> tuple[Calls, str]:
    if not template:
        return "none", "there is no chat template"
    if "<function=" in template:
        return "none", "the template writes calls as <function=...>, which is not read yet"
    if hermes.OPENING in template:
        return "hermes", f"the template writes {hermes.OPENING}"
    if mistral.MARK in template:
        return "mistral", f"the template writes {mistral.MARK}"
    if "tools" in template and (llama.MARK in special or llama.MARK in template) and '"parameters"' in template:
        return "llama3", f"the vocabulary has {llama.MARK} and the template asks for JSON with parameters"
    if "tool" not in template:
        return "hermes", f"the template knows no tools: the gateway shows them, and asks for {hermes.OPENING}"
    return "none", "the template knows tools, but no form of calls that is known here"
