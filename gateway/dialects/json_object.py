"""A JSON object while it is being written: where it ends, and where it can no longer be one.

Rule: strict as RFC 8259, but for one thing that models do: a raw control character in a string counts as its escape.
Pure. Constant work per character.
"""

import re

_SPACE = frozenset(" \t\r\n")
_ESCAPED = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD_CHARACTERS = frozenset("+-.0123456789Eaeflnrstu")
_LONGEST_WORD = 400


class JsonObject:
    """One object, character by character, from its brace on.

    `place`: what may come next: key, key_or_end, colon, value, value_or_end, after (a value), string, escape, word.
    """

    __slots__ = ("_hex", "_is_key", "_word", "done", "place", "stack")

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.place = "value"
        self.done = False
        self._is_key = False
        self._word = ""
        self._hex = 0

    @property
    def level(self) -> int:
        """How many objects and arrays are open."""
        return len(self.stack)

    def feed(self, character: str) -> str | None:
        """Take one. What stands for it in valid JSON; None when it cannot stand here, and nothing may follow then."""
        if self.done:
            return None
        place = self.place
        if place == "string":
            return self._in_string(character)
        if place == "escape":
            return self._in_escape(character)
        if place == "word":
            if character in _WORD_CHARACTERS and len(self._word) < _LONGEST_WORD:
                self._word += character
                return character
            if not _WORD.fullmatch(self._word):
                return None
            self.place = place = "after"
        if character in _SPACE:
            return character
        return character if self._between(place, character) else None

    def _in_string(self, character: str) -> str:
        if character == '"':
            self.place = "colon" if self._is_key else "after"
        elif character == "\\":
            self.place = "escape"
        elif character < " ":
            return f"\\u{ord(character):04x}" if character not in "\n\r\t" else repr(character)[1:-1]
        return character

    def _in_escape(self, character: str) -> str | None:
        if self._hex:
            if character not in _HEX:
                return None
            self._hex -= 1
            if not self._hex:
                self.place = "string"
        elif character == "u":
            self._hex = 4
        elif character in _ESCAPED:
            self.place = "string"
        else:
            return None
        return character

    def _between(self, place: str, character: str) -> bool:
        """Take what is neither space nor part of a string or a word. False when it cannot stand here."""
        if not self.stack:
            if character != "{":
                return False
            self._open(character)
        elif place == "colon":
            if character != ":":
                return False
            self.place = "value"
        elif place in ("key", "key_or_end"):
            if character == '"':
                self.place, self._is_key = "string", True
            elif not (place == "key_or_end" and character == "}"):
                return False
            else:
                self._close()
        elif place == "after":
            if character == ",":
                self.place = "key" if self.stack[-1] == "{" else "value"
            elif character == ("}" if self.stack[-1] == "{" else "]"):
                self._close()
            else:
                return False
        elif character == '"':
            self.place, self._is_key = "string", False
        elif character in "{[":
            self._open(character)
        elif place == "value_or_end" and character == "]":
            self._close()
        elif character in _WORD_CHARACTERS:
            self.place, self._word = "word", character
        else:
            return False
        return True

    def _open(self, character: str) -> None:
        self.stack.append(character)
        self.place = "key_or_end" if character == "{" else "value_or_end"

    def _close(self) -> None:
        self.stack.pop()
        self.place = "after"
        self.done = not self.stack
