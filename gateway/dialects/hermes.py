"""Calls as Hermes, Qwen 2.5 and 3 and SmolLM write them.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

One object for each mark, or a list of them. The closing mark may be missing.
Pure.
"""

from gateway.dialects.call_object import CallObject
from gateway.dialects.marks import SPACE, CallReader

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class HermesReader(CallReader):
    mark = OPENING

    def _between(self) -> bool:
        self._skip(SPACE + "[,]")
        if not self._buffer:
            return True
        if self._buffer[0] == "{":
            return self._start(CallObject(self._offered))
        if not self._called:
            return self._no_call()
        if self._buffer.startswith(CLOSING):
            self._buffer = self._buffer[len(CLOSING):]
        elif CLOSING.startswith(self._buffer) and not self._ended:
            return False
        return self._leave()
