"""Every .ipynb is its .py, run to the end, with outputs nbval can compare."""

import json
import re

import numpy as np
import pytest

from llmnb.book import notebook
from llmnb.book.export import ROOT
from llmnb.book.verify import compare

SOURCES = sorted((ROOT / "notebooks").glob("*/[0-9]*.py"))
SOURCE = """# %% [markdown]
# # Title
#
# > Summary.

# %%
print(6 * 7)
"""


ERROR = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A notebook built from a source of two cells."""
    path = tmp_path_factory.mktemp("notebooks") / "01_a.py"
    path.write_text(SOURCE)
    notebook.build(path)
    return path


def test_a_notebook_is_built_and_run(built):
    cells = json.loads(built.with_suffix(".ipynb").read_text())["cells"]
    assert [c["id"] for c in cells] == ["01_a-0", "01_a-1"]
    assert cells[1]["outputs"][0]["text"] == ["42\n"]
    assert notebook.defects(built) == []


def test_a_notebook_imports_the_package_beside_it(tmp_path, monkeypatch):
    """Which need not be the one that is installed."""
    assert notebook.SETTINGS["PYTHONPATH"] == str(ROOT)
    other = tmp_path / "other"
    (other / "llmnb").mkdir(parents=True)
    (other / "llmnb" / "__init__.py").write_text("HERE = 'the other'\n")
    monkeypatch.setitem(notebook.SETTINGS, "PYTHONPATH", str(other))
    path = tmp_path / "01_a.py"
    path.write_text(SOURCE.replace("print(6 * 7)", "import llmnb\nllmnb.HERE"))
    notebook.build(path)
    cells = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    assert cells[1]["outputs"][0]["data"]["text/plain"] == ["'the other'"]


def test_building_again_changes_nothing(built):
    before = built.with_suffix(".ipynb").read_bytes()
    notebook.build(built)
    assert built.with_suffix(".ipynb").read_bytes() == before


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_a_chapter_that_is_not_there_is_no_success(check, monkeypatch):
    monkeypatch.setattr(notebook, "build", lambda path: None)
    with pytest.raises(SystemExit, match="no chapter 1.99: 1.1, 1.2,"):
        notebook.main(["1.6", "1.99", *check])


def test_a_proof_is_not_passed_by_integers_that_wrap():
    compare("equal", np.int8([-128, 0]), np.int8([-128, 0]))
    compare("one", 3, 3)
    for got, want in ((-128, 0), (127, -1)):
        with pytest.raises(AssertionError):
            compare("far", np.int8([got]), np.int8([want]))
    with pytest.raises(AssertionError):
        compare("truths", np.array([True]), np.array([False]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c[1].update(execution_count=None), "was never run"),
        (lambda c: c[1].update(outputs=[ERROR]), "ended in an error"),
        (lambda c: c[1].update(source="print(43)"), "differs from"),
        (lambda c: c[0].update(source="# Other"), "differs from"),
        (lambda c: c[1]["metadata"].update(tags=["x"]), "differs from"),
        (lambda c: c.pop(), "not the cells of"),
    ],
)
def test_a_defect_is_found(built, change, says):
    path = built.with_suffix(".ipynb")
    kept = path.read_bytes()
    book = json.loads(kept)
    change(book["cells"])
    path.write_text(json.dumps(book))
    found = notebook.defects(built)
    path.write_bytes(kept)
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_chapters_notebook_is_its_source(path):
    assert notebook.defects(path) == [], "run `make notebooks`"


def test_every_notebook_has_a_source():
    """A notebook that was run aside would be verified as a chapter."""
    built = {x.stem for x in (ROOT / "notebooks").glob("*/*.ipynb")}
    assert built == {x.stem for x in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_output_names_a_place_on_the_machine_it_was_made_on(path):
    cells = json.loads(path.with_suffix(".ipynb").read_text("utf-8"))["cells"]
    outputs = json.dumps([cell.get("outputs") for cell in cells])
    for place in (
        "site-packages",
        "bin/python",
        "/home/",
        "/root/",
        "/Users/",
    ):
        assert place not in outputs, place


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_what_differs_between_machines_is_not_compared(path):
    """A cell that prints the machine's name is tagged for nbval."""
    book = notebook.from_source(path)
    for cell in book.cells:
        shows = re.search(r"^print\(machine\(", cell.source, re.M)
        if cell.cell_type == "code" and shows:
            assert "nbval-ignore-output" in cell.metadata.tags, cell.id


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_line_within_a_formula_begins_a_list(path):
    """Of $L (W - and 1) + 1$ in two lines Markdown makes a list."""
    begins = re.compile(r"\n *(?:[-+*>]|1[.)]) ")
    for cell in notebook.from_source(path).cells:
        if cell.cell_type != "markdown":
            continue
        for paragraph in re.split(r"\n *\n", cell.source):
            for line in begins.finditer(paragraph):
                before = paragraph[: line.start()].replace("$$", "")
                assert before.count("$") % 2 == 0, paragraph
