"""A price sheet as people read it: a page of Markdown, the same as lines of text, and the curve drawn with letters.

Rule: no figure without what it depends on beside it; what was not measured is said, never left out.
Pure.
"""

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from deploy.price_sheet import Document, Row, Side, Times
from shared.pricing import shown

COLUMNS, LINES = 68, 16
UNKNOWN = "-"


def markdown(document: Document, picture: str = "") -> str:
    """The whole page; `picture` is the path of the curve, as seen from the page."""
    parts = [f"# Price sheet of {' and '.join(dict.fromkeys(side.model for side in document.sides))}", "",
             f"Made by `{document.command}` on {document.date}, commit {document.commit}. How to read it: "
             "docs/price-sheet.md of the sources.", ""]
    parts += [f"> {note}" if number == 0 else f">\n> {note}" for number, note in enumerate(document.notes)]
    parts += ["", "## What was measured", "", *_markdown_table(_sides(document.sides)), ""]
    parts += [f"- {name.replace('_', ' ')}: {value}" for name, value in document.machine.items()
              if isinstance(value, str | int | float)]
    parts += ["", "## At what price", "", *(f"- {line}" for line in _terms(document)), "",
              "Cores in the tables: of the mesh's own processes / of everything on the machine, the load's client too."]
    for title, explained, cells in _tables(document.rows):
        parts += ["", f"## {title}", "", explained, "", *_markdown_table(cells)]
    parts += ["", "## Throughput against interactivity", ""]
    if picture:
        parts += [f"![tokens a second in all, against tokens a second for each user]({picture})", ""]
    parts += ["```", *curve(document.rows), "```", ""]
    return "\n".join(parts)


def text(document: Document) -> list[str]:
    """The figures and the curve as lines for a terminal."""
    lines = [*document.notes, *_terms(document), "cores: of the mesh's processes / of everything on the machine"]
    for title, explained, cells in _tables(document.rows):
        lines += ["", f"{title}. {explained}", *_text_table(cells)]
    return [*lines, "", *curve(document.rows)]


def curve(rows: Iterable[Row]) -> list[str]:
    """Lines of text: tokens a second for the median user (right) against output tokens a second in all (up).

    Each side and workload has a letter; it is a small one where another row outdoes it or an objective was missed, `*`
    where points meet.
    """
    points = [(one, one.user_tok_s, one.output_tok_s) for one in rows if one.user_tok_s]
    if not points:
        return ["no row has more than one token an answer: there is no curve"]
    letters = letters_of(one for one, _, _ in points)
    right, top = max(x for _, x, _ in points), max(y for _, _, y in points)
    grid = [[" "] * (COLUMNS + 1) for _ in range(LINES + 1)]
    for one, x, y in points:
        letter = letters[one.side, one.workload]
        letter = letter.lower() if one.outdone or one.missed else letter
        line, column = LINES - round(LINES * y / top), round(COLUMNS * x / right)
        grid[line][column] = letter if grid[line][column] in (" ", letter) else "*"
    lines = []
    for number, drawn in enumerate(grid):
        at = f"{top * (LINES - number) / LINES:,.0f}" if number % 4 == 0 else ""
        lines.append(f"{at:>9} |{''.join(drawn).rstrip()}")
    lines.append(" " * 10 + "+" + "-" * (COLUMNS + 1))
    lines.append(" " * 11 + "0" + f"{right:,.0f}".rjust(COLUMNS))
    lines.append("output tok/s in all (up), tok/s for the median user (right)")
    return lines + [f"  {letter}  {side}, {workload}" for (side, workload), letter in letters.items()]


def letters_of(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """A capital letter for each side and workload, in order."""
    names = dict.fromkeys((one.side, one.workload) for one in rows)
    return {name: chr(ord("A") + number % 26) for number, name in enumerate(names)}


# --- tables ----------------------------------------------------------------------------------------------------------


def _sides(sides: Iterable[Side]) -> list[list[str]]:
    cells = [["side", "model", "revision", "precision", "engine", "workers", "drafters", "hardware", "$ an hour"]]
    for side in sides:
        hardware = " + ".join(f"{each.machines} {each.sku} at ${shown(each.hour, 2)} ({each.source or 'no source'})"
                              for each in side.hardware)
        cells.append([side.name, side.model, side.revision or "not said", side.precision or "not said",
                      side.engine or "not said", _count(side.workers), _count(side.drafters), hardware,
                      shown(side.hour, 2)])
    return cells


def _terms(document: Document) -> list[str]:
    terms, price = document.terms, document.terms.price
    lines = [
        f"sold at ${shown(price.input, 2)} a million input tokens (cached ${shown(price.cached_input, 2)}), "
        f"${shown(price.output, 2)} a million output tokens",
        f"loaded like its row for {Decimal(100) * terms.utilisation:f} % of each hour; wanted margin "
        f"{Decimal(100) * terms.margin:f} %",
    ]
    if document.objectives:
        lines.append("promised: " + ", ".join(map(str, document.objectives)))
    return lines


def _tables(rows: Sequence[Row]) -> list[tuple[str, str, list[list[str]]]]:
    """Title, explanation and cells, the head first. Every table begins with the operating point; its cores are those of
    the mesh's own processes, and of everything on the machine."""
    point = ["side", "workload", "on", "at once", "in / out tokens", "cached", "cores"]

    def told(one: Row) -> list[str]:
        cores = [UNKNOWN if value is None else f"{value:.2f}" for value in (one.mesh_cores, one.busy_cores)]
        return [one.side, one.workload, one.hardware, str(one.concurrency),
                f"{one.prompt_tokens:.0f} / {one.output_tokens:.0f}", _percent(one.cached_share),
                "not measured" if one.busy_cores is None else " / ".join(cores)]

    def table(head: Sequence[str], cells: Callable[[Row], list[str]]) -> list[list[str]]:
        return [[*point, *head], *([*told(one), *cells(one)] for one in rows)]

    return [
        ("Throughput", "Tokens a second over all runs, the slowest and the fastest run in brackets; for each user: of "
         "the median stream, and of that which nine of ten exceed.",
         table(["output tok/s", "input tok/s", "total tok/s", "per user", "slow user", "drafts right",
                "drafts of output"], _rates)),
        ("Latency", "Milliseconds: p50 / p90 / p99, as the client sees them.",
         table(["TTFT", "TPOT", "between chunks", "last token", "tokens a chunk"], _latency)),
        ("Cost and margin", "Dollars. A million tokens: the whole hour on input alone, on output alone, on both; tok/s "
         "per $: output tokens a second for a dollar an hour; earns from: the share of an hour loaded like this that "
         "pays for it.",
         table(["$/M input", "$/M output", "$/M total", "tok/s per $", "earns $/h", "margin", "$/h at wanted margin",
                "earns from"], _economics)),
        ("How it was taken", "Steal: cores that neighbours of the virtual machine took. J: of an output token, the "
         "whole machine's. Outdone: another row's slowest run made more for a dollar than this one's fastest, and its "
         "median user got as much.",
         table(["runs", "requests", "failed", "wrong length", "steal", "J", "verdict"],
               _state)),
    ]


def _rates(one: Row) -> list[str]:
    return [f"{one.output_tok_s:,.1f} ({one.output_tok_s_low:,.1f} to {one.output_tok_s_high:,.1f})",
            f"{one.input_tok_s:,.1f}", f"{one.total_tok_s:,.1f}", _number(one.user_tok_s),
            _number(one.user_tok_s_slow), _percent(one.accepted_share), _percent(one.accepted_of_output)]


def _latency(one: Row) -> list[str]:
    return [*map(_times, (one.ttft_ms, one.tpot_ms, one.itl_ms, one.e2e_ms)), _number(one.tokens_per_chunk, 2)]


def _economics(one: Row) -> list[str]:
    return [_money(one.usd_per_million_input), _money(one.usd_per_million_output), _money(one.usd_per_million_total),
            _number(one.output_tok_s_per_usd, 0), _money(one.revenue_usd_per_hour),
            UNKNOWN if one.margin is None else f"{100 * one.margin:.1f} %", _money(one.hour_usd_for_margin),
            _percent(one.break_even_share)]


def _state(one: Row) -> list[str]:
    verdict = "; ".join([*one.missed, *(["outdone"] if one.outdone else [])])
    return [str(one.runs), str(one.requests), str(one.failures), str(one.wrong_lengths),
            _number(one.steal_cores, 3),
            "not measured" if one.output_joules is None else f"{one.output_joules:.3g}", verdict or "good"]


def _markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]


def _text_table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) if at < 2 else cell.rjust(width)
                      for at, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in cells]


def _times(times: Times) -> str:
    values = [times.p50, times.p90, times.p99]
    return " / ".join(UNKNOWN if value is None else f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
                      for value in values)


def _money(usd: Decimal | None) -> str:
    """To four digits, and hundreds to the cent."""
    return UNKNOWN if usd is None else f"{usd:,.2f}" if usd >= 100 else f"{float(usd):.4g}"


def _number(value: float | None, places: int = 1) -> str:
    return UNKNOWN if value is None else f"{value:,.{places}f}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def _count(value: int | None) -> str:
    return "not said" if value is None else str(value)
