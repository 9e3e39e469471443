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


class StepCost:
    """`observe` each step; read `base_s`, `row_s`, `token_s`, and `rows_s` where a line is not good enough."""

    def __init__(self) -> None:
        self.table = RowCost()
        self.steps = 0
        self.prefill_tokens = 0
        self.base_s = 0.0
        self.row_s = 0.0
        self.token_s = 0.0
        self._shortest_s = float("inf")
        self._matrix = [[0.0] * 3 for _ in range(3)]
        self._vector = [0.0] * 3
        self._row_share = FIRST_ROW_SHARE
        self._token_share = 0.1 * FIRST_ROW_SHARE

    def observe(self, rows: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from one step."""
        if self.steps >= WARM_STEPS:
            seconds = min(seconds, OUTLIER * self.expected_s(rows, prefill_tokens))
        if not prefill_tokens:
            self.table.observe(rows, seconds)
        self._shortest_s = min(SHORTEST_GROWTH * self._shortest_s, seconds)
        self.steps += 1
        self.prefill_tokens += prefill_tokens
        features = (1.0, float(rows), float(prefill_tokens))
        for i in range(3):
            for j in range(3):
                self._matrix[i][j] = FORGETTING * self._matrix[i][j] + features[i] * features[j]
            self._vector[i] = FORGETTING * self._vector[i] + features[i] * seconds
        self._solve()

    def expected_s(self, rows: int, prefill_tokens: int = 0) -> float:
        return self.base_s + rows * self.row_s + prefill_tokens * self.token_s

    def rows_s(self, rows: int) -> float:
        """What a step of so many rows and no prompt takes: by the table if there is one."""
        return self.table.seconds(rows) if self.table.known else self.expected_s(rows)

    def prefill_tok_s(self, step_tokens: int) -> float:
        """Prompt tokens a second when steps are full of them; 0 while no prompt was seen."""
        seconds = self.expected_s(0, step_tokens)
        return step_tokens / seconds if self.prefill_tokens and seconds > 0 else 0.0

    def _solve(self) -> None:
        # the prior: the known proportions, at the level of what a step costs now on average
        weight = self._matrix[0][0]
        mean_rows, mean_tokens = self._matrix[0][1] / weight, self._matrix[0][2] / weight
        empty_s = self._vector[0] / weight / (1.0 + self._row_share * mean_rows + self._token_share * mean_tokens)
        prior = (empty_s, self._row_share * empty_s, self._token_share * empty_s)
        matrix = [row[:] for row in self._matrix]
        vector = self._vector[:]
        for i in range(3):
            matrix[i][i] += PRIOR_WEIGHT
            vector[i] += PRIOR_WEIGHT * prior[i]
        base, row, token = solve(matrix, vector)
        if base > self._shortest_s:
            base = self._shortest_s
            row, token = solve([line[1:] for line in matrix[1:]],
                               [sum_ - base * line[0] for sum_, line in zip(vector[1:], matrix[1:], strict=True)])
        self.row_s = max(row, 0.0)
        self.token_s = max(token, 0.0)
        self.base_s = max(base, 0.0)
        if self.base_s > 0.0:
            if self._differ(1, mean_rows):
                self._row_share = self.row_s / self.base_s
            if self._differ(2, mean_tokens):
                self._token_share = self.token_s / self.base_s

    def _differ(self, feature: int, mean: float) -> bool:
        variance = self._matrix[feature][feature] / self._matrix[0][0] - mean * mean
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
