"""Calls as Mistral writes them: a list of objects, or in later models a name for each mark.

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "a1B2c3D4e"}]
    [TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[ARGS]{}

The ids are not kept: what answers a call names the one that the client was given.
Pure.
"""

import re

from gateway.dialects.call_object import Arguments, CallObject
from gateway.dialects.marks import SPACE, CallReader

MARK, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,128})(?:\[CALL_ID\][A-Za-z0-9]{1,64})?\s*(?:\[ARGS\])?\s*(?=\{)")
_LONGEST_HEAD = 256


class MistralReader(CallReader):
    mark = MARK

    def _between(self) -> bool:
        self._skip(SPACE + ",]" if self._called else SPACE)
        if not self._buffer:
            return True
        if self._buffer[0] == "{":
            return self._start(CallObject(self._offered))
        if self._called:
            return False if self._mark_may_come() else self._leave()
        if self._buffer[0] == "[":
            self._taken, self._buffer = self._taken + "[", self._buffer[1:]
            return True
        return self._head()

    def _mark_may_come(self) -> bool:
        return not self._ended and self._buffer != MARK and MARK.startswith(self._buffer)

    def _head(self) -> bool:
        """A name, an id perhaps, and the brace of the arguments."""
        head = self._buffer[:_LONGEST_HEAD]
        found = _NAMED.match(head)
        if found is None:
            waits = not self._ended and len(head) < _LONGEST_HEAD and "{" not in head
            return False if waits else self._no_call()
        if found[1] not in self._offered:
            return self._no_call()
        self._taken += found[0]
        self._buffer = self._buffer[found.end():]
        return self._start(Arguments(found[1]))
