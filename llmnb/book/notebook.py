# Written by `make export` from notebooks/appendix/10_book.py: edit that file.

"""Run the notebooks and keep what they print."""

__all__ = [
    "build", "cell_defects", "defects", "from_source", "hundredths", "main",
    "one_picture", "run", "slim", "with_table",
]


# imports of the builder
import argparse
import os
import re
import sys
from base64 import b64decode, b64encode
from functools import partial
from io import BytesIO

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from llmnb.book.export import ROOT, chapter_label, sources, write_text


# the notebook a source stands for
def from_source(path):
    """The notebook of a percent source, not run, with stable cell ids.

    Derived in chapter A.10.
    """
    book = jupytext.read(path, fmt="py:percent")
    book.metadata = {
        key: book.metadata[key]
        for key in ("kernelspec", "llmnb")
        if key in book.metadata
    }
    book.nbformat, book.nbformat_minor = 4, 5
    for number, cell in enumerate(book.cells):
        cell.id = f"{path.stem}-{number}"
    return book


def run(book, folder):
    """Run a notebook in `folder`, its cells in order; outputs in place.

    It imports the package beside the notebooks, whichever is installed.
    Raises nbclient's CellExecutionError at the first cell that fails.

    Derived in chapter A.10.
    """
    NotebookClient(
        book,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR", FORMATS],
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=os.environ | SETTINGS)
    book.metadata["language_info"] = {"name": "python"}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("execution", None)
            one_picture(output)


# lines or dots
FORMATS = "--InlineBackend.figure_formats={'svg', 'retina'}"
STYLE = ROOT / "notebooks" / "matplotlibrc"
SETTINGS = {"MATPLOTLIBRC": str(STYLE), "PYTHONPATH": str(ROOT)}
HEAVY = 150_000  # characters: an SVG above this is kept as dots
LINES, DOTS = "image/svg+xml", "image/png"


# one picture
def one_picture(output):
    """Keep one of an output's two pictures: lines where they are light.

    Derived in chapter A.10.
    """
    data = output.get("data", {})
    if LINES not in data:
        return
    data[LINES] = slim(data[LINES])
    drop = DOTS if len(data[LINES]) <= HEAVY else LINES
    data.pop(drop, None)
    output.metadata.pop(drop, None)


def slim(svg):
    """An SVG without date, comments, and what else nobody sees.

    Derived in chapter A.10.
    """
    svg = svg[svg.index("<svg") :]
    unseen = r"(?s)\s*<metadata>.*?</metadata>|<!--.*?-->"
    svg = re.sub(unseen, "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    places = r'(?<= [dxy]=")[^"]*|(?<=translate\()[^)]*'
    number = r"-?\d+\.\d+(?:e-\d+)?"
    svg = re.sub(places, lambda x: re.sub(number, hundredths, x[0]), svg)
    inside = r"(?s)(?<=data:image/png;base64,)[^\"]+"
    svg = re.sub(inside, lambda x: with_table(x[0]), svg)
    blanks = partial(re.sub, r"\s*([A-Zz])\s*", r"\1")
    return re.sub(r'(?<= d=")[^"]*', lambda x: blanks(x[0]), svg)


def hundredths(number):
    """The text of a number, a match, with two decimals at most.

    Derived in chapter A.10.
    """
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def with_table(text):
    """The base64 of a PNG, smaller if it has few colours; the same dots.

    Derived in chapter A.10.
    """
    picture, file = Image.open(BytesIO(b64decode(text))), BytesIO()
    table = picture.convert("RGB").quantize(256)
    if table.convert(picture.mode).tobytes() != picture.tobytes():
        return text
    table.save(file, "png", optimize=True)
    return min(text, b64encode(file.getvalue()).decode(), key=len)


# write one notebook
def build(path):
    """Write the .ipynb of a source, run from top to bottom.

    Derived in chapter A.10.
    """
    book = from_source(path)
    run(book, path.parent)
    write_text(path.with_suffix(".ipynb"), nbformat.writes(book) + "\n")


def defects(path):
    """Sentences that say where a .ipynb does not match its source.

    Derived in chapter A.10.
    """
    built = path.with_suffix(".ipynb")
    if not built.exists():
        return [f"{built.name} is missing"]
    want, got = from_source(path), nbformat.read(built, as_version=4)
    if len(want.cells) != len(got.cells):
        return [f"{built.name}: not the cells of {path.name}"]
    found = []
    for a, b in zip(want.cells, got.cells, strict=True):
        same = (a.cell_type, a.source, a.metadata, a.id)
        if same != (b.cell_type, b.source, b.metadata, b.id):
            found.append(f"{built.name}: cell {b.id} differs from {path.name}")
        elif a.cell_type == "code" and a.source.strip():
            found += cell_defects(built.name, b)
    return found


def cell_defects(name, cell):
    """Sentences that say what is wrong with a cell's outputs.

    Derived in chapter A.10.
    """
    if cell.execution_count is None:
        return [f"{name}: cell {cell.id} was never run: nbval would skip it"]
    if any(x.output_type == "error" for x in cell.outputs):
        return [f"{name}: cell {cell.id} ended in an error"]
    return []


# the command
def main(argv=None):
    """Write and run the notebooks, or with --check say what differs.

    Derived in chapter A.10.
    """
    parser = argparse.ArgumentParser("python -m llmnb.book.notebook")
    parser.add_argument("--check", action="store_true", help="run nothing")
    parser.add_argument("chapters", nargs="*", help="such as 1.6; default all")
    args = parser.parse_args(argv)
    every = {chapter_label(path): path for path in sources(ROOT / "notebooks")}
    for label in {*args.chapters} - {*every}:
        sys.exit(f"there is no chapter {label}: {', '.join(every)}")
    paths = [every[label] for label in args.chapters or every]
    if args.check:
        found = [line for p in paths for line in defects(p)]
        sys.exit("\n".join([*found, "run `make notebooks`"]) if found else 0)
    for path in paths:
        print(chapter_label(path), path.stem, flush=True)
        build(path)


if __name__ == "__main__":
    main()
