"""Write book/results.md and its figures from book/results/*.json.

    .venv/bin/python book/_ext/results_page.py

Each JSON file is what `llmnb bench --json FILE` wrote on some machine. The
page holds no number that does not stand in one of them, and a test compares
the page with the files.
"""

import hashlib
import io
import json
import re
import sys
from functools import partial
from pathlib import Path

import matplotlib

from llmnb.bench.report import bars_figure, layers_figure, summary, table
from llmnb.book.notebook import STYLE, slim
from llmnb.files import replacing

BOOK = Path(__file__).parents[1]
HEAD = """\
# Results

> How long a training step takes in llmnb, in PyTorch and in llm.c, and a
> token in llmnb and in transformers, measured in turns on the same machine.

Every number on this page comes from a file in `book/results/`, which
`llmnb bench` wrote; each section gives its command. All programs train the
same model on random tokens with AdamW, in the same number of threads, each
in a process of its own. They take turns and do not clip gradients; a turn is
one step, or as many as fill the time that a section names. Times are medians
over the rounds. A ratio is the median of the ratios within the rounds, with
the lowest and the highest beside it: below 1, llmnb takes less time. The load
is the number of threads that other programs wanted to run just before; when
it is not far below 1, distrust the numbers.
[Chapter A.8](../notebooks/appendix/08_racing.ipynb) says why we measure so.

*Of limit* compares the operations of a step, done in the time it took, with
the multiply-adds that this machine reached in a loop of nothing else
([chapter A.2](../notebooks/appendix/02_tile.ipynb)), in float32. *Memory*
is the most that the process held: the model, the libraries, and the compiler
where it ran. *Ratio* is our time over that of the column. Of the contestants,
`torch` is PyTorch, `torch-compile` PyTorch compiled, and `tf32` and `bf16`
say in what the products are computed.
"""

FIGURES = (
    (
        "",
        ("step", "seconds"),
        partial(bars_figure, kind="step"),
        "Bars: milliseconds a step of each program, by configuration",
        "Milliseconds of a step, median; the thin lines reach from the "
        "fastest round to the slowest.",
    ),
    (
        "-layers",
        ("step", "layers"),
        layers_figure,
        "Bars: milliseconds of a step that each layer of llmnb takes",
        "Where the time of llmnb goes, layer by layer.",
    ),
    (
        "-ladders",
        ("kernel", "seconds"),
        partial(bars_figure, kind="kernel"),
        "Bars: the share of its limit that each version reaches",
        "How near each version comes to the GPU's limit.",
    ),
)
NO_GPU = """\
**No time has been measured on a GPU yet.** The kernels have run in the
simulator of [chapter A.5](../notebooks/appendix/05_simulator.ipynb) and have
been compiled; no hardware has run them. What is known without a GPU stands
here; on a machine that has one, `make gpu` measures a training step and every
version of every layer, against PyTorch on the same GPU
([chapter A.17](../notebooks/appendix/17_gpu.ipynb)).
"""
KERNELS = """\
**Every version of every layer.** The simulator counts at a small size, which
stands above each table. *Moved* is the bytes of all sectors over the least
bytes that the layer must move: more than 1 where elements are read again, and
caches may help then; atomic additions are not counted, so a version that uses
them may seem to move less. *Requests* are the warps' accesses. The compiler
says how many *registers* a thread takes and how many bytes of *shared* memory
a block, how many instructions load and store 16 bytes at once (*vector loads*,
*vector stores*), and the bytes of registers that did not fit (*spilled*): for
compute capability 8.0 (an A100), and after a semicolon for 9.0 (an H100,
where the system takes 1,024 of the shared bytes) where that differs; a plus
stands between the kernels of a version that launches several. Each version
was compared with the reference in the simulator. *Time* is the median on the
GPU, with a cold L2. The limit is the GPU's own: its peak of multiply-adds, for
a layer in bfloat16 that of `mma`, or its bytes a second in a copy. What is
zero for every version is left out.
"""


def versions(result):
    """The versions of the libraries, each named once."""
    found = {}
    for contest in result["contests"]:
        for row in contest["contestants"]:
            found |= row.get("versions", {})
    return ", ".join(f"{k} {v}" for k, v in found.items()) or "llmnb"


def counts(result, kind, key):
    """Of each contest of a kind, how many of its rows have some number."""
    contests = [x for x in result["contests"] if x["kind"] == kind]
    return [sum(key in row for row in x["contestants"]) for x in contests]


def title(result, found=()):
    """The heading of a file: its machine, or its GPU.

    found: all results; where another has the same machine, the heading
    says which models this one trains, and when.
    """
    if result["backend"] == "cuda":
        timed = any("gpu" in x for x in found)
        words = "counted without one" if timed else "not measured yet"
        return f"## On a GPU: {result.get('gpu', {'name': words})['name']}"
    writing = "Writing: " * any(counts(result, "write", "token_seconds"))
    count = result["threads"]
    threads = f"{count} thread{'s' * (count != 1)}"
    text = f"## {writing}{result['machine']}, {threads}"
    if [title(x) for x in found].count(text) > 1:
        steps = [x for x in result["contests"] if x["kind"] == "step"]
        text += ": " + ", ".join(x["name"] for x in steps)
        text += f" ({result['date']})"
    return text


def turned(rows):
    """A Markdown table with a line a number and a column a contestant.

    rows: a dict a contestant, whose name comes first. So it fits a page, and
    a phone: there are more numbers than contestants. Left out are lines
    without numbers, and of zeros alone.
    """
    names, *numbers = zip(*(row.values() for row in rows), strict=True)
    names = ["", *(f"`{x}`" if "_" in x else x for x in names)]
    return table([
        dict(zip(names, [what.replace("_", " "), *cells], strict=True))
        for what, cells in zip([*rows[0]][1:], numbers, strict=True)
        if any(re.search("[1-9]", x) for x in cells)
    ])  # fmt: skip


def contest_lines(contest, said):
    """The lines about a contest; what they share with others is said once.

    said: the reasons for missing times that the section has given.
    """
    lines = [*summary(contest, turned)]
    there = any(x.startswith("|") for x in lines)
    for line in lines if there else []:
        missing = line.startswith("Not measured:")
        if not missing or (line not in said and "no GPU" not in line):
            yield line
            said.add(line)
        elif "no GPU" not in said and "no GPU" in line:
            said.add("no GPU")
            why = re.search(r"\((no GPU: .*)\)\.$", line)[1]
            yield f"Not measured: any time ({why})."


def section(stem, result, found=()):
    """The lines about one file."""
    found = found or [result]
    yield from (title(result, found), "")
    if result["backend"] == "cuda" and not any("gpu" in x for x in found):
        yield NO_GPU
    yield (
        f"Measured on {result['date']} at commit {result['commit']} with "
        f"{versions(result)}, the machine's load being "
        f"{result['load']:.2f} before, by"
    )
    yield from ("", f"    {result['command']}", "")
    explained, said = False, set()
    for contest in result["contests"]:
        if contest["kind"] == "kernel" and not explained:
            explained = True
            yield KERNELS
        yield from contest_lines(contest, said)
    for end, what, _, alt, caption in FIGURES:
        if draws(result, end, what):
            yield from (f"![{alt}](_static/results-{stem}{end}.svg)", "")
            yield from (f"*{caption}*", "")


def draws(result, end, what):
    """Whether a figure has something to compare: not one bar alone."""
    least = 1 if end == "-layers" else 2
    return any(x >= least for x in counts(result, *what))


def results(book=BOOK):
    """The results by the stem of their file, in the order of the files."""
    paths = sorted((book / "results").glob("*.json"))
    return {x.stem: json.loads(x.read_text("utf-8")) for x in paths}


def page(found):
    """The text of results.md."""
    lines = [HEAD]
    for stem, result in found.items():
        lines += section(stem, result, found.values())
    # one empty line where there are several
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def digest(result):
    """What a figure carries to say which numbers it was drawn from."""
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def figures(found):
    """Of each figure its file name, the function that draws it, its result."""
    for stem, result in found.items():
        for end, what, draw, *_ in FIGURES:
            if draws(result, end, what):
                yield f"results-{stem}{end}.svg", draw, result


def drawn(draw, result):
    """A figure as an SVG in the book's style, which says what it draws."""
    file = io.StringIO()
    with matplotlib.rc_context(fname=STYLE):
        draw(result).savefig(file, format="svg", bbox_inches="tight")
    return f"<!-- {digest(result)} -->\n{slim(file.getvalue())}\n"


def main(book=BOOK):
    found = results(book)
    if not found:
        sys.exit(f"there are no results in {book / 'results'}")
    for file_name, draw, result in figures(found):
        with replacing(book / "_static" / file_name) as file:
            file.write(drawn(draw, result).encode())
    with replacing(book / "results.md") as file:
        file.write(page(found).encode())


if __name__ == "__main__":
    main()
