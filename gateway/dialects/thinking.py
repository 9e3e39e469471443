"""Thoughts between `<think>` and `</think>`, as Qwen 3, SmolLM 3 and the distillations of R1 write them.

A thought stands at the beginning of an answer, or the prompt has opened it already; the same marks further on are text.
White space around marks is nobody's.
Pure.
"""

from gateway.dialects.parts import Part, Reader, Said, Thought, could_begin

OPENING, CLOSING = "<think>", "</think>"
SPACE = " \t\r\n"


class PlainReader(Reader):
    """Nothing but text."""

    def push(self, text: str) -> list[Part]:
        return [Said(text)] if text else []

    def flush(self) -> list[Part]:
        return []


class ThinkingReader(Reader):
    """A thought, and what `inner` reads behind it."""

    def __init__(self, inner: Reader, opened: bool) -> None:
        """`opened`: the prompt ends with the opening mark."""
        self._inner = inner
        self._buffer = ""
        self._place = "opened" if opened else "before"  # before, opened, inside, closed, behind

    @property
    def thinking(self) -> bool:  # type: ignore[override]
        return self._place in ("opened", "inside")

    def push(self, text: str) -> list[Part]:
        if self._place == "behind":
            return self._inner.push(text)
        self._buffer += text
        parts: list[Part] = []
        while self._buffer and self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        left, self._buffer = self._buffer, ""
        if self.thinking:
            left = left.rstrip(SPACE)
            return [Thought(left)] if left else []
        parts = self._inner.push(left) if self._place == "before" else []
        return parts + self._inner.flush()

    def _step(self, parts: list[Part]) -> bool:
        """Get on by one piece. False when more has to come first."""
        match self._place:
            case "before":
                begins = self._buffer.lstrip(SPACE)
                if begins.startswith(OPENING):
                    self._buffer, self._place = begins[len(OPENING):], "opened"
                elif OPENING.startswith(begins):
                    return False
                else:
                    self._place = "behind"
            case "opened" | "closed":
                self._buffer = self._buffer.lstrip(SPACE)
                if self._buffer:
                    self._place = "inside" if self._place == "opened" else "behind"
            case "inside":
                return self._inside(parts)
            case _:
                parts += self._inner.push(self._buffer)
                self._buffer = ""
        return True

    def _inside(self, parts: list[Part]) -> bool:
        end = self._buffer.find(CLOSING)
        held = could_begin(self._buffer, (CLOSING,)) if end < 0 else 0
        thought = (self._buffer[:len(self._buffer) - held] if end < 0 else self._buffer[:end]).rstrip(SPACE)
        if thought:
            parts.append(Thought(thought))
        if end < 0:
            self._buffer = self._buffer[len(thought):]
            return False
        self._buffer, self._place = self._buffer[end + len(CLOSING):], "closed"
        return True
