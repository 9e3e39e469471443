"""Calls as Llama 3.1 to 3.3 write them: the whole answer is one, or several with `;` between them.

    {"name": "weather", "parameters": {"city": "Oslo"}}        <|python_tag|>{"name": ...}; {"name": ...}

Without the mark a call stands at the very beginning.
Pure.
"""

from collections.abc import Collection

from gateway.dialects.call_object import CallObject
from gateway.dialects.marks import SPACE, CallReader

MARK = "<|python_tag|>"


class LlamaReader(CallReader):
    mark = MARK

    def __init__(self, offered: Collection[str]) -> None:
        super().__init__(offered)
        self._beginning = True

    def _text(self) -> bool:
        if self._beginning:
            stripped = self._buffer.lstrip(SPACE)
            if not stripped and not self._ended:
                return False
            self._beginning = False
            if stripped.startswith("{"):
                self._begin(len(self._buffer) - len(stripped))
                self._opening += 1  # an object that is no call is not looked into
                return True
        return super()._text()

    def _between(self) -> bool:
        self._skip(SPACE + ";," if self._called else SPACE)
        if not self._buffer:
            return True
        if self._buffer[0] == "{":
            return self._start(CallObject(self._offered, bare=True))
        return self._leave() if self._called else self._no_call()
