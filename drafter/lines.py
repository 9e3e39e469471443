"""The streams of a small model: what of each lies in its KV cache, and what it guesses to come.

    tokens        what the stream said
    chain         guesses behind them, one behind the other
    branches      guesses behind another token than the one the chain has at some place

Rules:
- Positions 0..held-1 of `tokens` and then `chain` lie in the cache. A chain stays valid as long as the stream says what
  it guessed; the first other token ends it, and only what was computed behind that place is lost. If a branch began
  with that token, it takes the chain's place with what it has in the cache.
- A branch shares the blocks before its place and owns copies from there on.
- Blocks are handed out from a fixed number. Where none is free the stream that was asked for longest ago gives up its
  own, and is computed again if it is ever asked for. Streams of the present round are never robbed.
Pure.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from drafter.drafting import Key, Stream
from drafter.margins import Margins
from drafter.survival import Luck


class Guess(NamedTuple):
    """The winner of a race, and the others."""

    token: int
    margin: float  # by which it was ahead
    others: Sequence[int]  # who came next


class Branch:
    """What follows `token` at `position`, where the chain has another."""

    def __init__(self, position: int, token: int, blocks: list[int], likely: float) -> None:
        self.position = position
        self.token = token
        self.blocks = blocks  # from block position // block size on
        self.likely = likely
        self.held = position
        self.chain: deque[Guess] = deque()


class Line:
    """One stream."""

    def __init__(self, stream: Stream, draft_temperature: float) -> None:
        self.tokens = array("I", stream.tokens)
        self.highest = max(stream.tokens, default=0)  # id among them
        self.prompt_tokens = stream.prompt_tokens
        self.sampling = stream.sampling
        self.temperature = stream.sampling.temperature * draft_temperature
        self.blocks: list[int] = []
        self.held = 0
        self.chain: deque[Guess] = deque()
        self.branches: dict[tuple[int, int], Branch] = {}
        self.luck = Luck()

    @property
    def noisy(self) -> bool:
        return self.temperature >= 1e-5


class Lines:
    """All streams, and who holds which of `blocks` KV blocks."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.margins = Margins()
        self.computed_again = 0  # positions that were in the cache and had to go, for want of blocks
        self._block_size = block_size
        self._blocks = blocks
        self._free = list(range(blocks))
        self._lines: OrderedDict[Key, Line] = OrderedDict()  # asked for longest ago first

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, key: Key) -> Line:
        return self._lines[key]

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def open(self, key: Key, stream: Stream, draft_temperature: float) -> None:
        if key in self._lines:
            self.close(key)
        self._lines[key] = Line(stream, draft_temperature)

    def close(self, key: Key) -> None:
        self._give_up(self._lines.pop(key))

    def advance(self, key: Key, tokens: Iterable[int]) -> None:
        """The stream said these. Each guess up to the first wrong one is a lesson."""
        line = self._lines[key]
        for token in tokens:
            if line.chain:
                self._judge(line, token)
            if line.chain and line.chain[0].token == token:
                line.chain.popleft()
            elif (branch := line.branches.get((len(line.tokens), token))) is not None:
                self._take(line, branch)
            else:
                line.held = min(line.held, len(line.tokens))
                line.chain.clear()
                self._drop(line, list(line.branches))
            line.tokens.append(token)
            line.highest = max(line.highest, token)
            self._drop(line, [at for at in line.branches if at[0] < len(line.tokens)])

    def make_room(self, key: Key, length: int, asked: Sequence[Key]) -> bool:
        """See to it that this stream has blocks for `length` positions. False when there are too few."""
        line = self._lines[key]
        self._lines.move_to_end(key)
        needed = -(-length // self._block_size) - len(line.blocks)
        if needed <= 0:
            return True
        if not self._free_up(needed, asked):
            return False
        line.blocks += self._free[-needed:]
        del self._free[-needed:]
        return True

    def fork(self, key: Key, position: int, token: int, length: int, likely: float) -> Branch | None:
        """A branch with blocks for `length` positions in all; the caller copies the first. None when none are free."""
        line = self._lines[key]
        first = position // self._block_size
        needed = -(-length // self._block_size) - first
        if needed > len(self._free) or (position, token) in line.branches:
            return None
        branch = Branch(position, token, self._free[-needed:], likely)
        del self._free[-needed:]
        line.branches[position, token] = branch
        return branch

    def table(self, line: Line, branch: Branch | None = None) -> list[int]:
        """The blocks of a stream, or of it with a branch, in order."""
        return line.blocks if branch is None else line.blocks[:branch.position // self._block_size] + branch.blocks

    def audit(self) -> None:
        """Raises AssertionError unless each block is free or held once, and nobody claims more than its blocks hold."""
        held = [block for line in self._lines.values()
                for blocks in (line.blocks, *(branch.blocks for branch in line.branches.values())) for block in blocks]
        assert sorted(held + self._free) == list(range(self._blocks))
        for line in self._lines.values():
            assert 0 <= line.held <= min(len(line.tokens) + len(line.chain), len(line.blocks) * self._block_size)

    def _judge(self, line: Line, token: int) -> None:
        guess = line.chain[0]
        right = guess.token == token
        line.luck.learn(line.luck.of(self.margins.of(guess.margin, line.noisy)), right)
        self.margins.learn(guess.margin, line.noisy, right)
        if not right:
            self.margins.missed(next((rank for rank, other in enumerate(guess.others) if other == token), None))

    def _take(self, line: Line, branch: Branch) -> None:
        """The stream went the way of this branch."""
        first = branch.position // self._block_size
        del line.branches[branch.position, branch.token]
        self._free += line.blocks[first:]
        line.blocks[first:] = branch.blocks
        line.held, line.chain = branch.held, branch.chain
        self._drop(line, list(line.branches))

    def _drop(self, line: Line, branches: Iterable[tuple[int, int]]) -> None:
        for at in branches:
            self._free += line.branches.pop(at).blocks

    def _give_up(self, line: Line) -> None:
        self._drop(line, list(line.branches))
        self._free += line.blocks
        line.blocks, line.held = [], 0
        line.chain.clear()

    def _free_up(self, needed: int, asked: Sequence[Key]) -> bool:
        if needed > len(self._free):
            kept = set(asked)
            for key, line in self._lines.items():
                if key not in kept and line.blocks:
                    self.computed_again += line.held
                    self._give_up(line)
                    if needed <= len(self._free):
                        break
        return needed <= len(self._free)
