"""Which subscriptions match a subject.

A trie over the tokens of the patterns; what a subject matched is remembered until the subscriptions change, so that a
publish costs one dictionary look-up. Pure.
"""

from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

REMEMBERED_SUBJECTS = 4096


class Route(NamedTuple, Generic[T]):
    """Who gets a message: each of `all`, and one of each group."""

    all: tuple[T, ...]
    groups: tuple[tuple[T, ...], ...]


class _Node(Generic[T]):
    __slots__ = ("children", "here", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.here: list[tuple[int, str | None, T]] = []  # (order of arrival, queue, member) of patterns ending here
        self.rest: list[tuple[int, str | None, T]] = []  # the same for patterns ending here with `>`


class SubjectIndex(Generic[T]):
    """Patterns and their members. `*` stands for one token, a last `>` for one or more."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()
        self._routes: dict[str, Route[T]] = {}
        self._arrivals = 0

    def add(self, pattern: str, member: T, queue: str | None = None) -> None:
        """Raises ValueError when `pattern` is no subject pattern."""
        check_pattern(pattern)
        self._arrivals += 1
        self._bucket(pattern).append((self._arrivals, queue, member))
        self._routes.clear()

    def remove(self, pattern: str, member: T) -> None:
        """Forget `member` under `pattern`; nothing happens if it is not there."""
        bucket = self._bucket(pattern)
        bucket[:] = [entry for entry in bucket if entry[2] is not member]
        self._prune(pattern)
        self._routes.clear()

    def route(self, subject: str) -> Route[T]:
        """Members in the order they came, groups in the order of their first member.

        Raises ValueError when `subject` cannot be published to.
        """
        route = self._routes.get(subject)
        if route is None:
            check_subject(subject)
            if len(self._routes) >= REMEMBERED_SUBJECTS:
                self._routes.clear()
            route = self._routes[subject] = self._find(subject)
        return route

    def _find(self, subject: str) -> Route[T]:
        found: list[tuple[int, str | None, T]] = []
        nodes = [self._root]
        for token in subject.split("."):
            deeper = []
            for node in nodes:
                found += node.rest
                for key in (token, "*"):
                    if (child := node.children.get(key)) is not None:
                        deeper.append(child)
            nodes = deeper
        for node in nodes:
            found += node.here
        found.sort(key=lambda entry: entry[0])
        everyone: list[T] = []
        groups: dict[str, list[T]] = {}
        for _, queue, member in found:
            (everyone if queue is None else groups.setdefault(queue, [])).append(member)
        return Route(tuple(everyone), tuple(tuple(group) for group in groups.values()))

    def _bucket(self, pattern: str) -> list[tuple[int, str | None, T]]:
        node = self._root
        *parents, last = pattern.split(".")
        for token in parents:
            node = node.children.setdefault(token, _Node())
        if last == ">":
            return node.rest
        return node.children.setdefault(last, _Node()).here

    def _prune(self, pattern: str) -> None:
        """Drop the nodes along `pattern` that hold nothing any more."""
        path = [self._root]
        tokens = [token for token in pattern.split(".") if token != ">"]
        for token in tokens:
            path.append(path[-1].children[token])
        for parent, token, node in zip(reversed(path[:-1]), reversed(tokens), reversed(path[1:]), strict=True):
            if node.children or node.here or node.rest:
                break
            del parent.children[token]


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to `pattern` hears `subject`."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[:len(wanted)]
    return len(wanted) == len(tokens) and all(w in ("*", t) for w, t in zip(wanted, tokens, strict=True))


@lru_cache(REMEMBERED_SUBJECTS)
def check_subject(subject: str) -> None:
    """Raises ValueError when nothing can be published to `subject`."""
    check_pattern(subject)
    if "*" in subject.split(".") or subject.endswith(".>") or subject == ">":
        raise ValueError(f"cannot publish to {subject!r}: `*` and `>` are for subscriptions")


def check_pattern(pattern: str) -> None:
    """Raises ValueError when nothing can be subscribed under `pattern`."""
    tokens = pattern.split(".")
    if not all(tokens) or any(character.isspace() or ord(character) < 32 for character in pattern):
        raise ValueError(f"{pattern!r} is no subject: tokens split by dots, none empty, no spaces")
    if ">" in tokens[:-1]:
        raise ValueError(f"{pattern!r} is no subject: `>` can only stand last")
