"""The page of a replay as a picture: how long requests waited under each policy, and what each found in the caches."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from deploy.replay_report import Report

MISSING = "a PNG needs matplotlib, which is not installed: pip install 'tokenmill[plots]', or leave out --plot"


def possible() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw(path: Path, report: Report, ttft_ms: Mapping[str, Sequence[float]]) -> None:
    """Write a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(page)
    waits, reuse = page.subplots(1, 2, width_ratios=(3, 2))
    colours = {name: f"C{number}" for number, name in enumerate(report.policies)}
    for name, values in ttft_ms.items():
        ordered = sorted(values)
        shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
        waits.step(ordered, shares, where="post", label=name, color=colours[name])
    waits.set(xscale="log", xlabel="time to first token, ms", ylabel="share of requests", ylim=(0, 1))
    waits.grid(alpha=0.3)
    waits.legend()
    names = list(report.policies)
    found = [report.policies[name].token_reuse for name in names]
    bars = reuse.barh(names, found, color=[colours[name] for name in names])
    reuse.bar_label(bars, labels=[f"{value:.3f}" for value in found], padding=3)
    reuse.axvline(report.infinite_reuse, color="black", linestyle="--",
                  label=f"cache without bounds: {report.infinite_reuse:.3f}")
    reuse.legend(loc="lower right")
    reuse.set(xlabel="share of prompt tokens found in a cache",
              xlim=(0, max(report.infinite_reuse, *found) * 1.15 or 1.0))
    reuse.invert_yaxis()
    page.suptitle(f"{report.trace}: {report.requests:,} requests, {report.workers} workers of "
                  f"{report.blocks_per_worker:,} blocks of {report.block_size_tokens} tokens")
    page.savefig(path, dpi=120, format="png")
