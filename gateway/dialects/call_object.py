"""One call as models write it in JSON: `{"name": "weather", "arguments": {"city": "Oslo"}}`.

Rule: it is a call once its name is that of a tool on offer and its arguments have begun as an object; from there on
they are passed on while they come. Whatever breaks before that was text. Arguments before the name wait for it.
Pure.
"""

import json
from collections.abc import Collection

from gateway.dialects.json_object import JsonObject
from gateway.dialects.parts import Argued, Called, CallEnded, Part

_ARGUMENTS = ("arguments", "parameters")


class Arguments:
    """The arguments of a call whose name is known, from their brace on."""

    def __init__(self, name: str) -> None:
        self.began = False
        self._name = name
        self._object = JsonObject()

    @property
    def done(self) -> bool:
        return self._object.done

    def feed(self, character: str) -> list[Part] | None:
        """The next piece of the call; None when it breaks off here, and the character belongs to what follows."""
        taken = self._object.feed(character)
        if taken is None:
            return None
        parts: list[Part] = [Argued(taken)] if self.began else [Called(self._name), Argued(taken)]
        self.began = True
        return [*parts, CallEnded()] if self._object.done else parts


class CallObject:
    """A call, character by character, from the brace on. `began`: it is one, and can become text no more."""

    def __init__(self, offered: Collection[str], bare: bool = False) -> None:
        """`bare`: nothing but its own form says that it is a call, so it has to have arguments."""
        self.began = False
        self.whole = False  # its arguments are complete
        self._offered = offered
        self._bare = bare
        self._object = JsonObject()
        self._name: str | None = None
        self._key = ""
        self._value: list[str] = []  # of a key or a value on the outermost level
        self._early = ""  # arguments that came before the name
        self._streaming = False

    @property
    def done(self) -> bool:
        """The object is closed."""
        return self._object.done

    def feed(self, character: str) -> list[Part] | None:
        """What is certain with this character; None when the object breaks off, without it."""
        level, place = self._object.level, self._object.place
        taken = self._object.feed(character)
        if taken is None:
            return None
        now = self._object
        if now.done:
            if level == 1 and place == "word" and not self._value_ended():
                return None
            return self._close()
        if level == 0:
            return []
        if level == 1 and place in ("key", "key_or_end"):
            self._value = [taken] if taken == '"' else []
            return []
        if level == 1 and place == "value" and not self._value_begins(taken, character):
            return []
        if self._streaming:
            return self._stream(taken)
        if level == 1 and place == "word" and now.place != "word":
            return [] if self._value_ended() else None
        self._value.append(taken)
        if level == 1 and now.place == "colon" and place == "string":
            self._key = json.loads("".join(self._value))
        elif now.level == 1 and now.place == "after" and (level == 2 or place == "string"):
            return [] if self._value_ended() else None
        return []

    def _value_begins(self, taken: str, character: str) -> bool:
        """False for what stands before it."""
        if character in " \t\r\n":
            return False
        self._value = []
        self._streaming = character == "{" and self._name is not None and self._key in _ARGUMENTS and not self.whole
        return True

    def _stream(self, taken: str) -> list[Part]:
        parts: list[Part] = [] if self.began else [Called(self._name or "")]
        self.began = True
        parts.append(Argued(taken))
        if self._object.level == 1:
            self._streaming = False
            self.whole = True
            parts.append(CallEnded())
        return parts

    def _value_ended(self) -> bool:
        """Keep a value of the outermost level. False when it makes this no call."""
        value = "".join(self._value)
        self._value = []
        if self._key == "name" and self._name is None:
            name = json.loads(value) if value.startswith('"') else None
            if name not in self._offered:
                return False
            self._name = name
        elif self._key in _ARGUMENTS and not self.whole:
            early = _object_text(value)
            if early is None:
                return False
            self._early = early
        return True

    def _close(self) -> list[Part] | None:
        if self.whole:
            return []
        if self._name is None or (self._bare and not self._early):
            return None
        self.began = self.whole = True
        return [Called(self._name), Argued(self._early or "{}"), CallEnded()]


def _object_text(value: str) -> str | None:
    """Arguments that are an object, text that holds one, or nothing at all."""
    if value == "null":
        return "{}"
    if value.startswith("{"):
        return value
    if value.startswith('"'):
        text: str = json.loads(value)
        try:
            if not isinstance(json.loads(text or "{}", parse_constant=_no_json), dict):
                return None
        except (ValueError, RecursionError):
            return None
        # half a surrogate pair, which has no UTF-8: in a string of JSON, and that it may stand in, as its escape
        return text.encode("utf-8", "backslashreplace").decode()
    return None


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # NaN and the infinities, which Python would take
