# Written by `make export` from notebooks/4_practice/26_bench.py: edit that file.

"""What was measured, in words and drawn."""

__all__ = [
    "bars_figure", "layers_figure", "report", "shares", "summary", "table",
]


# imports of the report
import re
from statistics import median


# the columns of tables
# of each kind of contest: title, key in a row, what it is multiplied by, form
_COLUMNS = {
    "step": [
        ("ms a step", "step_seconds", 1e3, ",.1f"),
        ("tokens/s", "tokens_per_second", 1, ",.0f"),
        ("GFLOP/s", "flops_per_second", 1e-9, ",.1f"),
        ("memory, MB", "memory_bytes", 1e-6, ",.0f"),
    ],
    "start": [("cold, s", "cold", 1, ".2f"), ("warm, s", "warm", 1, ".2f")],
    "losses": [("losses at most away", "worst", 1, ".1e")],
    "gradients": [
        ("loss away", "loss_apart", 1, ".1e"),
        ("worst gradient away", "worst", 1, ".1e"),
        ("steps of 4 with the same bits", "same_steps", 1, "d"),
    ],
    "write": [
        ("first token, ms", "first_seconds", 1e3, ",.1f"),
        ("later token, ms", "token_seconds", 1e3, ",.2f"),
        ("later tokens/s", "tokens_per_second", 1, ",.1f"),
    ],
    "group": [
        ("ms a step", "step_seconds", 1e3, ",.1f"),
        ("tokens/s", "tokens_per_second", 1, ",.0f"),
        ("efficiency", "efficiency", 1, ".2f"),
        ("in calls, ms", "waiting_seconds", 1e3, ",.1f"),
        ("sent, MB", "sent", 1e-6, ",.1f"),
        ("memory, MB", "memory_bytes", 1e-6, ",.0f"),
    ],
    "kernel": [
        ("launches", "launches", 1, ",d"),
        ("moved", "moved", 1, ".2f"),
        ("requests", "requests", 1, ",d"),
        ("time, µs", "seconds", 1e6, ",.1f"),
        ("away from float64", "worst", 1, ".1e"),
    ],
}
_COMPILED = "registers", "shared", "vector_loads", "vector_stores", "spilled"


def _cell(row, key, scale, form):
    """A number of a row, the median of several; empty where it has none."""
    number = row.get(key)
    if isinstance(number, list):
        number = median(number)
    return "" if number is None else format(scale * number, form)


def _per_kernel(row, fact):
    """A fact of each kernel of a version, on an A100 and an H100."""
    each = [
        " + ".join(f"{x[cc][fact]:,}" for x in row.get("compiled", []))
        for cc in ("sm_80", "sm_90")
    ]
    return "; ".join(dict.fromkeys(each))


# shares of the limit
def shares(contest, row):
    """What share of the limit a contestant reaches, round by round.

    That is the contest's work, operations or bytes, done in its seconds,
    over what the machine can do in a second. An empty list where the work,
    the limit or the times are unknown.

    Derived in chapter 4.26.
    """
    most, seconds = contest.get("limit"), row.get("seconds", [])
    return [contest["work"] / s / most for s in seconds] if most else []


def _cells(contest, row):
    """The name of a row, its numbers, and our times as shares of its own."""
    cells = {"": row["name"]}
    for title, *how in _COLUMNS[contest["kind"]]:
        cells[title] = _cell(row, *how)
    if contest["kind"] == "kernel":
        cells |= {x: _per_kernel(row, x) for x in _COMPILED}
    if "work" in contest:
        each = shares(contest, row)
        cells["of limit"] = f"{median(each):.0%}" if each else ""
    for x in contest.get("ratios", ()):
        title = f"{x.get('of', x['ours'])}: ratio"
        cells.setdefault(title, "")
        if x["peer"] == row["name"]:
            reach = f"({x['low']:.2f} to {x['high']:.2f})"
            cells[title] = f"{x['ratio']:.2f} {reach}"
    return cells


# a contest in words
def table(rows):
    """Lines of a Markdown table from dicts; the first column is words.

    Derived in chapter 4.26.
    """
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1])]
        cells += [x.rjust(width) for x, width in others]
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "|---|" + "---:|" * len(others)


def summary(contest, drawn=table):
    """Lines about a contest: what was done, the times, and what has none.

    drawn: makes lines of the dicts of a table.

    Derived in chapter 4.26.
    """
    rows, missing = contest["contestants"], {}
    known = [x for x in rows if "unmeasured" not in x or "sectors" in x]
    yield from (f"**{contest['name']}**: {contest['about']}.", "")
    if known:
        yield from (*drawn([_cells(contest, x) for x in known]), "")
    for row in rows:
        if "unmeasured" in row:
            missing.setdefault(row["unmeasured"], []).append(row["name"])
    for why, names in missing.items():
        yield from (f"Not measured: {'; '.join(names)} ({why}).", "")


# a report in words
def report(result):
    """A result, as `llmnb bench --json` writes it, as a text to print.

    Derived in chapter 4.26.
    """
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    if "gpu" in result:
        lines += [f"GPU      {result['gpu']['name']}"]
    for contest in result["contests"]:
        lines += ["", *summary(contest)]
        for row in contest["contestants"]:
            if "layers" in row:
                lines += [f"{row['name']}, where the time goes:", ""]
                lines += [*_layers_table(row), ""]
    return "\n".join(lines).strip()


def _layers_table(row):
    parts = [{"name": k, "seconds": s} for k, s in row["parts"].items()]
    return table([
        {
            "": x["name"],
            "calls": f"{x.get('calls', '')}",
            "ms": f"{x['seconds'] * 1e3:.2f}",
            "share": f"{x['seconds'] / row['step_seconds']:.1%}",
        }
        for x in parts + row["layers"]
    ])  # fmt: skip


# the bars
def bars_figure(result, kind="kernel"):
    """A matplotlib figure: a panel a contest, a bar a contestant.

    kind: "step", of which milliseconds are drawn, or "kernel", of which
    `shares` are. A bar is the median, and a thin line reaches from the
    lowest round to the highest. Raises ValueError where there are none.

    Derived in chapter 4.26.
    """
    panels = []
    for contest in [x for x in result["contests"] if x["kind"] == kind]:
        rows = [x for x in contest["contestants"] if "seconds" in x]
        rows = [(x, _drawn(kind, contest, x)) for x in rows]
        panels += [(contest["name"], rows)] if rows else []
    labels = {"step": "milliseconds a step"}
    labels["kernel"] = "per cent of the GPU's peak, or of a copy"
    return _figure(panels, _draw_rows, labels[kind])


def _drawn(kind, contest, row):
    """The number of each round that a bar stands for."""
    if kind == "step":
        return [1e3 * x for x in row["seconds"]]
    return [100 * x for x in shares(contest, row)]


def _draw_rows(ax, rows, palette):
    for x, each in rows:
        middle = median(each)
        reach = [[middle - min(each)], [max(each) - middle]]
        ours = x["name"].startswith("llmnb") or "sectors" in x
        colour = palette["blue" if ours else "grey"]
        ink = {"ecolor": palette["ink"], "error_kw": {"lw": 1}}
        ax.barh(x["name"], middle, xerr=reach, color=colour, **ink)


def _figure(panels, draw, label):
    """A figure of panels: each a title, and rows that draw puts on axes."""
    from matplotlib.figure import Figure

    from llmnb.book.diagram import PALETTE

    if not panels:
        raise ValueError("there is nothing to draw: nothing was measured")
    counts = [2 + len(rows) for _, rows in panels]
    fig = Figure(figsize=(8, 0.4 * sum(counts)), dpi=100)
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=counts)
    for ax, (title, rows) in zip(axes[:, 0], panels, strict=True):
        draw(ax, rows, PALETTE)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", size=11, parse_math=False)
        ax.set_xlabel(label)
    fig.tight_layout()
    return fig


# where the time goes, drawn
def layers_figure(result):
    """Where the time goes: a matplotlib figure, a panel for each llmnb row.

    result: of `bench`. Raises ValueError when it has no such row.

    Derived in chapter 4.26.
    """
    panels = [
        (f"{contest['name']}, {row['name']}", _layer_bars(row))
        for contest in result["contests"]
        for row in contest["contestants"]
        if "layers" in row
    ]
    return _figure(panels, _draw_layers, "milliseconds of a step")


def _layer_bars(row):
    """Milliseconds by layer, and by way: forward, backward, or neither."""
    found = {}
    for x in row["layers"]:
        name, way = re.fullmatch(
            r"(.*?)(?:_(forward|backward))?", x["name"]
        ).groups()
        found.setdefault(name, {})[way or "neither"] = 1e3 * x["seconds"]
    return found


def _draw_layers(ax, found, palette):
    """Bars of milliseconds: a layer's forward and backward in one bar."""
    colours = {"forward": "blue", "backward": "orange", "neither": "grey"}
    left = [0.0] * len(found)
    for way, colour in colours.items():
        width = [x.get(way, 0.0) for x in found.values()]
        ax.barh([*found], width, left=left, label=way, color=palette[colour])
        left = [a + b for a, b in zip(left, width, strict=True)]
    ax.legend(loc="lower right")
