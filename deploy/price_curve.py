"""The curve of a price sheet as a picture: output tokens a second in all, against those that each user gets. SVG.

Rules: every row is drawn; one that another outdoes, or that misses an objective, is hollow. Lines join the rows of one
side and workload by how many streams there were at once, which stands beside each point. Colours of a palette that
colour-blind people can tell apart, on white: it is read in light and in dark.
Pure.
"""

from collections.abc import Iterable
from xml.sax.saxutils import escape

from deploy.price_page import letters_of
from deploy.price_sheet import Row

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 460, 76, 34, 24, 58
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def svg(rows: Iterable[Row], title: str) -> str:
    """The picture; its axes begin at 0. Rows without a rate for users are left out: one token has none."""
    drawn = [one for one in rows if one.user_tok_s]
    across = _scale([one.user_tok_s or 0.0 for one in drawn])
    up = _scale([one.output_tok_s for one in drawn])
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(one: Row) -> tuple[float, float]:
        return LEFT + wide * (one.user_tok_s or 0.0) / across[-1], TOP + high * (1 - one.output_tok_s / up[-1])

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="12" fill="#222"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
             f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>']
    for value in across:
        x = LEFT + wide * value / across[-1]
        parts.append(f'<path d="M{x:.1f} {TOP}V{TOP + high}" stroke="#ddd"/>'
                     f'<text x="{x:.1f}" y="{TOP + high + 18}" text-anchor="middle">{value:,g}</text>')
    for value in up:
        y = TOP + high * (1 - value / up[-1])
        parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + wide}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,g}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 14}" text-anchor="middle">tokens a second for the median '
                 'user</text>')
    parts.append(f'<text x="18" y="{TOP + high / 2}" text-anchor="middle" transform="rotate(-90 18 {TOP + high / 2})">'
                 'output tokens a second in all</text>')
    for number, (side, workload) in enumerate(letters_of(drawn)):
        colour = COLOURS[number % len(COLOURS)]
        mine = sorted((one for one in drawn if (one.side, one.workload) == (side, workload)),
                      key=lambda one: one.concurrency)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="'
                     + " ".join("{:.1f},{:.1f}".format(*at(one)) for one in mine) + '"/>')
        for one in mine:
            x, y = at(one)
            fill = "#fff" if one.outdone or one.missed else colour
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" '
                         f'stroke-width="1.5"/><text x="{x + 8:.1f}" y="{y - 6:.1f}">{one.concurrency}</text>')
        parts.append(f'<text x="{LEFT + wide}" y="{TOP + 16 + 16 * number}" text-anchor="end" fill="{colour}">'
                     f"{escape(f'{side}, {workload}')}</text>")
    return "\n".join([*parts, "</svg>", ""])


def _scale(values: list[float]) -> list[float]:
    """Marks of an axis from 0 to what covers all values, four to eight of them."""
    most = max([*values, 1e-9])
    size = 10.0 ** len(str(int(most))) / 10 if most >= 1 else 0.1
    step = next(step for step in (size / 5, size / 2, size, 2 * size) if 8 * step >= most)
    return [step * number for number in range(-int(-most // step) + 1)]
