"""Stop strings in a stream of text.

Law: what is sent is the text up to the leftmost stop string in it, however the text was cut into pieces; of two that
begin at the same place the shorter counts. Text that could still turn out to be part of a stop string is held back,
and so is text behind a match while an earlier one may yet complete ("bc" in "abc" waits while "abcd" is possible).
Pure. Knuth-Morris-Pratt per stop string: constant work per character, at most a stop string's length is held.
"""

from collections.abc import Iterable

from shared.errors import BadRequest


class StopMatcher:
    """One stream. `include`: the stop string itself is sent too."""

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._searches = [_Search(stop) for stop in self._stops]
        self._include = include
        self._held = ""
        self._sent = 0  # characters given out; `_held` begins there
        self._match: tuple[int, int] | None = None  # where the leftmost match so far begins, its length
        self.stopped: str | None = None  # the stop string that ended the stream

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be sent now, and whether the stream has ended with it."""
        if self.stopped is not None:
            return "", True
        self._held += text
        open_from = self._sent + len(self._held)  # where the earliest unfinished match begins
        for search in self._searches:
            search.feed(text)
            if search.found is not None:
                found = (search.found, len(search.stop))
                self._match = min(self._match or found, found)
            else:
                open_from = min(open_from, search.open_from)
        if self._match is None:
            return self._send_until(open_from), False
        if open_from >= self._match[0]:
            return self._end(*self._match), True
        return self._send_until(open_from), False

    def flush(self) -> str:
        """What was held back, now that no text follows. Ends at a match that was waiting; `stopped` then says so."""
        if self.stopped is None and self._match is not None:
            return self._end(*self._match)
        return self._send_until(self._sent + len(self._held))

    @property
    def begun(self) -> bool:
        """Text has come."""
        return bool(self._sent or self._held)

    def again(self) -> "StopMatcher":
        """One that looks for the same in another text."""
        return StopMatcher(self._stops, self._include)

    def _end(self, start: int, length: int) -> str:
        begin = start - self._sent
        self.stopped = self._held[begin : begin + length]
        text = self._send_until(start + length if self._include else start)
        self._held = ""
        return text

    def _send_until(self, position: int) -> str:
        count = position - self._sent
        text, self._held = self._held[:count], self._held[count:]
        self._sent = position
        return text


class _Search:
    """The first occurrence of one string. Positions count characters from the start of the stream."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise BadRequest("a stop string must not be empty: leave it out", param="stop")
        self.stop = stop
        self.found: int | None = None  # where it begins
        self._borders = _borders(stop)
        self._read = 0
        self._matched = 0  # so much of `stop` is what was read last

    @property
    def open_from(self) -> int:
        """Where an occurrence that is not yet complete would begin; the end of what was read if none has begun."""
        return self._read - self._matched

    def feed(self, text: str) -> None:
        if self.found is not None:
            return
        stop, borders, matched, i = self.stop, self._borders, self._matched, 0
        while i < len(text):
            if not matched:  # nothing begun: let the library find the next place where it might
                i = text.find(stop[0], i)
                if i < 0:
                    break
            character = text[i]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            i += 1
            if matched == len(stop):
                self.found = self._read + i - matched
                return
        self._matched = matched
        self._read += len(text)


def _borders(word: str) -> list[int]:
    """For each prefix of `word`, the length of the longest shorter prefix that also ends it."""
    borders = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = borders[length - 1]
        length += word[i] == word[length]
        borders[i] = length
    return borders
