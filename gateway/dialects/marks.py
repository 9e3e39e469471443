"""Reading between marks: what the readers of most dialects share.

Rules: text goes out as soon as it cannot be the beginning of a mark; what follows a mark is held until it is a call.
Where it is none, it was text, and reading goes on behind its mark, for another may stand in it. White space around
calls is nobody's.

    text --mark--> between --brace--> a call --> between ... --> text
Pure.
"""

from abc import abstractmethod
from collections.abc import Collection

from gateway.dialects.call_object import Arguments, CallObject
from gateway.dialects.parts import Part, Reader, Said, could_begin

SPACE = " \t\r\n"


class CallReader(Reader):
    """Text in which calls stand behind a mark."""

    mark = ""

    def __init__(self, offered: Collection[str]) -> None:
        """`offered`: names of the tools that may be called."""
        self._offered = offered
        self._buffer = ""
        self._ended = False
        self._inside = False  # behind a mark
        self._call: CallObject | Arguments | None = None
        self._called = False  # behind this mark there was a call already
        self._behind_call = False  # white space that comes next stands behind a call
        self._taken = ""  # what is text if no call comes of it
        self._opening = 0  # so many characters of that are its mark, and what stands before it
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def flush(self) -> list[Part]:
        self._ended = True
        return self.push("")

    def _step(self) -> bool:
        """Get on by one piece. False when more has to come first."""
        if not self._buffer:
            return self._ended and bool(self._taken) and self._no_call()
        if self._call is not None:
            return self._go_on(self._call)
        return self._between() if self._inside else self._text()

    def _text(self) -> bool:
        if self._behind_call:
            self._buffer = self._buffer.lstrip(SPACE)
            if not self._buffer:
                return False
            self._behind_call = False
        place = self._buffer.find(self.mark)
        if place < 0:
            held = 0 if self._ended else could_begin(self._buffer, (self.mark,))
            text = self._buffer[:len(self._buffer) - held]
            return self._say(text if self._ended else text.rstrip(SPACE))
        self._say(self._buffer[:place].rstrip(SPACE))
        self._begin(self._buffer.find(self.mark) + len(self.mark))
        return True

    def _say(self, text: str) -> bool:
        """Give out what the buffer begins with. False for nothing."""
        if not text:
            return False
        self._parts.append(Said(text))
        self._buffer = self._buffer[len(text):]
        return True

    def _begin(self, length: int) -> None:
        """So many characters may begin a call."""
        self._taken, self._buffer = self._buffer[:length], self._buffer[length:]
        self._opening = length
        self._inside, self._called = True, False

    @abstractmethod
    def _between(self) -> bool:
        """Get on behind a mark, outside of an object."""

    def _skip(self, characters: str) -> None:
        """Take what the buffer begins with and says nothing."""
        left = self._buffer.lstrip(characters)
        if not self._called:
            self._taken += self._buffer[:len(self._buffer) - len(left)]
        self._buffer = left

    def _start(self, call: CallObject | Arguments) -> bool:
        """The buffer begins with the brace of what may be a call."""
        self._call = call
        if self._called:
            self._taken, self._opening = "", 1
        return True

    def _go_on(self, call: CallObject | Arguments) -> bool:
        for place, character in enumerate(self._buffer):
            parts = call.feed(character)
            if parts is None:
                self._buffer = self._buffer[place:]
                self._call = None
                return True if call.began else self._no_call()
            self._parts += parts
            if call.began:
                self._called, self._taken = True, ""
            else:
                self._taken += character
            if call.done:
                self._buffer = self._buffer[place + 1:]
                self._call = None
                return True
        self._buffer = ""
        return True

    def _no_call(self) -> bool:
        """What was taken is text after all, its mark at least."""
        self._call, self._inside = None, False
        self._parts.append(Said(self._taken[:self._opening]))
        self._buffer = self._taken[self._opening:] + self._buffer
        self._taken = ""
        return True

    def _leave(self) -> bool:
        """What follows is text again."""
        self._inside, self._taken = False, ""
        self._behind_call = self._called
        return True
