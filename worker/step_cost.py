"""What a step costs, learned from the steps themselves.

    seconds = base + rows * row + prefill tokens * token

`rows` are the rows whose next token is wanted (decode and verification), prefill tokens are all others.
Rule: least squares with forgetting. While steps are all alike nothing can tell the three apart: then proportions hold
that were found when steps last differed (`worker.calibrate` makes them differ at the start). No cost is ever negative,
and the base, which decides whether drafts pay, never more than the shortest step took: else the pauses of a disturbed
machine would be taken for it.
Pure.
"""

from worker.row_cost import RowCost

FORGETTING = 0.98
# a prior row weighs as much as this many observations: enough to survive a stream that always has one row
PRIOR_WEIGHT = 0.5
# until measured, a row is taken to cost this share of an empty step, a prefill token a tenth of that
FIRST_ROW_SHARE = 0.1
# steps differ enough to learn proportions when rows, or prefill tokens, spread by this share of their mean
SPREAD = 0.3
# a step that took longer than this many times what was expected is a pause of the machine, not a cost
OUTLIER = 4.0
WARM_STEPS = 8
# the shortest step counts for this many times as long with each step since, so that a device may become slower
SHORTEST_GROWTH = 1.0005
# solving takes as long as planning a step of one row (15 us): done when somebody asks, and behind so many steps
SOLVE_AFTER = 16


class StepCost:
    """`observe` each step; read `base_s`, `row_s`, `token_s`, and `rows_s` where a line is not good enough."""

    def __init__(self) -> None:
        self.table = RowCost()
        self.steps = 0
        self.prefill_tokens = 0
        self._base_s = 0.0
        self._row_s = 0.0
        self._token_s = 0.0
        self._unsolved = 0  # steps that are not in these yet
        self._shortest_s = float("inf")
        self._weight = 0.0
        # sums over the steps: of rows, prefill tokens and seconds, of products of two of them
        self._r = self._p = self._s = 0.0
        self._rr = self._rp = self._pp = self._rs = self._ps = 0.0
        self._row_share = FIRST_ROW_SHARE
        self._token_share = 0.1 * FIRST_ROW_SHARE

    @property
    def base_s(self) -> float:
        self._solve()
        return self._base_s

    @property
    def row_s(self) -> float:
        self._solve()
        return self._row_s

    @property
    def token_s(self) -> float:
        self._solve()
        return self._token_s

    def observe(self, rows: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from one step."""
        if self.steps < WARM_STEPS or self._unsolved >= SOLVE_AFTER:
            self._solve()
        if self.steps >= WARM_STEPS:
            seconds = min(seconds, OUTLIER * self._expected_s(rows, prefill_tokens))
        if not prefill_tokens:
            self.table.observe(rows, seconds)
        self._shortest_s = min(SHORTEST_GROWTH * self._shortest_s, seconds)
        self.steps += 1
        self.prefill_tokens += prefill_tokens
        self._weight = FORGETTING * self._weight + 1.0
        self._r = FORGETTING * self._r + rows
        self._p = FORGETTING * self._p + prefill_tokens
        self._s = FORGETTING * self._s + seconds
        self._rr = FORGETTING * self._rr + rows * rows
        self._rp = FORGETTING * self._rp + rows * prefill_tokens
        self._pp = FORGETTING * self._pp + prefill_tokens * prefill_tokens
        self._rs = FORGETTING * self._rs + rows * seconds
        self._ps = FORGETTING * self._ps + prefill_tokens * seconds
        self._unsolved += 1

    def expected_s(self, rows: int, prefill_tokens: int = 0) -> float:
        self._solve()
        return self._expected_s(rows, prefill_tokens)

    def rows_s(self, rows: int) -> float:
        """What a step of so many rows and no prompt takes: by the table if there is one."""
        return self.table.seconds(rows) if self.table.known else self.expected_s(rows)

    def _expected_s(self, rows: int, prefill_tokens: int) -> float:
        return self._base_s + rows * self._row_s + prefill_tokens * self._token_s

    def prefill_tok_s(self, step_tokens: int) -> float:
        """Prompt tokens a second when steps are full of them; 0 while no prompt was seen."""
        seconds = self.expected_s(0, step_tokens)
        return step_tokens / seconds if self.prefill_tokens and seconds > 0 else 0.0

    def _solve(self) -> None:
        if not self._unsolved:
            return
        self._unsolved = 0
        # the prior: the known proportions, at the level of what a step costs now on average
        weight = self._weight
        mean_rows, mean_tokens = self._r / weight, self._p / weight
        empty_s = self._s / weight / (1.0 + self._row_share * mean_rows + self._token_share * mean_tokens)
        prior = (empty_s, self._row_share * empty_s, self._token_share * empty_s)
        matrix = [[weight, self._r, self._p], [self._r, self._rr, self._rp], [self._p, self._rp, self._pp]]
        vector = [self._s, self._rs, self._ps]
        for i in range(3):
            matrix[i][i] += PRIOR_WEIGHT
            vector[i] += PRIOR_WEIGHT * prior[i]
        base, row, token = solve(matrix, vector)
        if base > self._shortest_s:
            base = self._shortest_s
            row, token = solve([line[1:] for line in matrix[1:]],
                               [sum_ - base * line[0] for sum_, line in zip(vector[1:], matrix[1:], strict=True)])
        self._row_s = max(row, 0.0)
        self._token_s = max(token, 0.0)
        self._base_s = max(base, 0.0)
        if self._base_s > 0.0:
            if self._differ(self._rr, mean_rows):
                self._row_share = self._row_s / self._base_s
            if self._differ(self._pp, mean_tokens):
                self._token_share = self._token_s / self._base_s

    def _differ(self, squares: float, mean: float) -> bool:
        variance = squares / self._weight - mean * mean
        return mean > 0.0 and variance > (SPREAD * mean) ** 2


def solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """x with matrix x = vector, for a small symmetric positive definite matrix."""
    size = len(vector)
    rows = [[*matrix[i], vector[i]] for i in range(size)]
    for i in range(size):
        for j in range(i + 1, size):
            share = rows[j][i] / rows[i][i]
            for k in range(i, size + 1):
                rows[j][k] -= share * rows[i][k]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][k] * found[k] for k in range(i + 1, size))
        found[i] = (rows[i][size] - rest) / rows[i][i]
    return found
