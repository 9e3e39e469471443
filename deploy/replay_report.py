"""What a replay says: figures of each policy, a table, and how waiting times lie, drawn with letters.

Pure.
"""

from collections.abc import Mapping, Sequence

import msgspec

from deploy.replay_fleet import Outcome

PLOT_COLUMNS, PLOT_ROWS = 72, 16


class Figures(msgspec.Struct, frozen=True):
    """One policy. Times in milliseconds; shares from 0 to 1."""

    requests: int
    refused: int
    token_reuse: float  # prompt tokens found in a worker's cache, of all
    share_of_infinite: float  # of what one cache without bounds would find
    predicted_reuse: float  # as `token_reuse`, by what the router expected when it chose
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    e2e_mean_ms: float
    e2e_p50_ms: float
    e2e_p90_ms: float
    e2e_p99_ms: float
    balance: float  # device time of the busiest worker by that of the mean one
    span_s: float  # from the first request to the last token
    cpu_s: float  # what the replay itself took


class Report(msgspec.Struct, frozen=True):
    """All policies on one trace and one fleet."""

    trace: str
    requests: int
    workers: int
    blocks_per_worker: int
    block_size_tokens: int
    speed: float
    device: dict[str, float]
    infinite_reuse: float
    policies: dict[str, Figures]


def figures(outcome: Outcome, infinite_reuse: float, cpu_s: float) -> Figures:
    """Sum up one run."""
    served = outcome.served
    prompt_tokens = max(1, sum(one.prompt_tokens for one in served))
    reuse = sum(one.cached_tokens for one in served) / prompt_tokens
    ttft_ms = sorted(1e3 * one.ttft_s for one in served)
    e2e_ms = sorted(1e3 * one.e2e_s for one in served)
    mean_busy_s = sum(outcome.busy_s) / len(outcome.busy_s)
    return Figures(
        requests=len(served), refused=outcome.refused, token_reuse=round(reuse, 4),
        share_of_infinite=round(reuse / infinite_reuse, 3) if infinite_reuse else 0.0,
        predicted_reuse=round(sum(one.predicted_tokens for one in served) / prompt_tokens, 4),
        ttft_mean_ms=_mean(ttft_ms), ttft_p50_ms=percentile(ttft_ms, 50), ttft_p90_ms=percentile(ttft_ms, 90),
        ttft_p99_ms=percentile(ttft_ms, 99), e2e_mean_ms=_mean(e2e_ms), e2e_p50_ms=percentile(e2e_ms, 50),
        e2e_p90_ms=percentile(e2e_ms, 90), e2e_p99_ms=percentile(e2e_ms, 99),
        balance=round(max(outcome.busy_s) / mean_busy_s, 3) if mean_busy_s else 1.0,
        span_s=round(outcome.ends_s, 3), cpu_s=round(cpu_s, 1))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least value that so many percent do not exceed; 0 of nothing."""
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, max(0, -int(-percent * len(ordered) // 100) - 1))], 2)


def table(report: Report) -> list[str]:
    """Lines of text, one a policy, the best reuse first."""
    lines = [
        f"{report.requests:,} requests, {report.workers} workers of {report.blocks_per_worker:,} blocks of "
        f"{report.block_size_tokens} tokens",
        f"a cache without bounds would reuse {report.infinite_reuse:.4f} of the prompt tokens",
        "",
        "              ---- reuse -----   -- first token, ms ---------   last token    load",
        "policy        tokens    of inf    mean    p50    p90     p99   mean    p99  max/mean",
    ]
    for name, one in sorted(report.policies.items(), key=lambda item: -item[1].token_reuse):
        lines.append(
            f"{name:13} {one.token_reuse:.4f} {one.share_of_infinite:9.1%} {one.ttft_mean_ms:7.0f} "
            f"{one.ttft_p50_ms:6.0f} {one.ttft_p90_ms:6.0f} {one.ttft_p99_ms:7.0f} {one.e2e_mean_ms:6.0f} "
            f"{one.e2e_p99_ms:6.0f} {one.balance:9.2f}" + (f"  ({one.refused} refused)" if one.refused else ""))
    return lines


def drawing(ttft_ms: Mapping[str, Sequence[float]]) -> list[str]:
    """Lines of text: for each policy, the share of requests (up) that had a first token within a time (right, log).

    A policy is drawn with the first letter of its name that no one before it has; `*` where curves meet.
    """
    curves = {name: sorted(values) for name, values in ttft_ms.items() if values}
    if not curves:
        return []
    low = max(0.1, min(curve[0] for curve in curves.values()))
    high = max(low * 1.01, max(percentile(curve, 99.5) for curve in curves.values()))
    grid = [[" "] * PLOT_COLUMNS for _ in range(PLOT_ROWS)]
    letters: dict[str, str] = {}
    for name, curve in curves.items():
        free = [letter for letter in f"{name}abcdefghijklmnopqrstuvwxyz" if letter not in letters.values()]
        letters[name] = free[0]
        within = 0
        for column in range(PLOT_COLUMNS):
            limit = low * (high / low) ** ((column + 1) / PLOT_COLUMNS)
            while within < len(curve) and curve[within] <= limit:
                within += 1
            row = PLOT_ROWS - 1 - min(PLOT_ROWS - 1, int(PLOT_ROWS * within / len(curve)))
            grid[row][column] = letters[name] if grid[row][column] in (" ", letters[name]) else "*"
    lines = [f"{100 - 100 * number // PLOT_ROWS:4d} % |{''.join(row).rstrip()}" for number, row in enumerate(grid)]
    left, right = f"{low:,.0f} ms", f"{high:,.0f} ms"
    middle = "time to first token (log)".center(PLOT_COLUMNS - len(left) - len(right))
    lines.append("       +" + "-" * PLOT_COLUMNS)
    lines.append(f"        {left}{middle}{right}")
    lines.append("        " + "   ".join(f"{letter} {name}" for name, letter in letters.items()) + "   * several")
    return lines


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0
