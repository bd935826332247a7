"""The editions: the PDF, the ePub, plain notebooks and those to fill in.

The PDF and the ePub are made of two chapters and a reference page of the
built book; tests of them are skipped where no book is built, or where there
is no Chromium.
"""

import ast
import re
import shutil
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urldefrag
from xml.etree import ElementTree

import nbformat
import pytest
from test_book import HTML, why_not_built

from llmnb.book import epub, notebook, pages, pdf, practice
from llmnb.book.export import ROOT, chapter_label, read_chapter, sources

CHAPTERS = sources(ROOT / "notebooks")
LAYERNORM = ROOT / "notebooks/1_by_hand/06_layernorm.py"
SVG, XHTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"
FEW = ["1.5 Encoder", "1.6 LayerNorm", "Glossary"]


def few(built, part=""):
    """What stands for the book's contents here: two chapters, a page."""
    return [x for x in pages.read_contents(built) if x.title in FEW]


@pytest.fixture(scope="module")
def built():
    """The folder of the built book."""
    if why_not_built():
        pytest.skip(why_not_built())
    pytest.importorskip("playwright.sync_api")
    if not any(map(shutil.which, pages.CHROMIUM)):
        pytest.skip("no Chromium on this machine")
    missing = {*FEW} - {x.title for x in few(HTML)}
    if missing:
        pytest.skip(f"the built book has no {missing}")
    return HTML


# The PDF


@pytest.fixture(scope="module")
def printed(built, tmp_path_factory):
    """A PdfReader of two chapters and the glossary."""
    pypdf = pytest.importorskip("pypdf")
    path = tmp_path_factory.mktemp("pdf") / "llmnb.pdf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdf, "read_contents", few)
        pdf.make_pdf(built, path)
    return pypdf.PdfReader(path)


def words(page):
    return " ".join(page.extract_text().split())


def test_the_pdf_has_a_title_and_contents_with_the_right_pages(printed):
    labels = printed.page_labels
    contents = next(p for p in printed.pages if "Contents" in words(p))
    for title in FEW:
        number = re.search(rf"{title}\W*(\d+)", words(contents))[1]
        start = words(printed.pages[labels.index(number)])
        assert title.partition(" ")[2].split(" ")[0] in start or title in start
    assert printed.metadata.title == pages.TITLE
    assert labels[0] == "i"


def test_pages_are_numbered_and_name_their_chapter(printed):
    bodies = [*zip(printed.page_labels, printed.pages, strict=True)]
    start = printed.page_labels.index("1")
    for label, page in bodies[start:]:
        assert label in words(page).split(), label
    later = words(bodies[start + 1][1])
    assert "1.5 Encoder" in later


def test_the_outline_lists_parts_chapters_and_sections(printed):
    titles = []

    def collect(items, depth):
        for x in items:
            if isinstance(x, list):
                collect(x, depth + 1)
            else:
                titles.append((depth, x.title))

    collect(printed.outline, 0)
    assert (0, "Part 1: by hand") in titles
    assert (1, "1.6 LayerNorm") in titles
    assert (2, "Proof") in titles


def test_links_stay_inside_and_name_no_file(printed):
    inside, sheets = 0, {x.indirect_reference.idnum for x in printed.pages}
    places = printed.named_destinations
    for page in printed.pages:
        for link in page.get("/Annots", []):
            a = link.get_object()
            address = str(a.get("/A", {}).get("/URI", "http"))
            assert address.startswith("http"), address
            if "/Dest" in a:
                assert places[a["/Dest"]].page.idnum in sheets
                inside += 1
    assert inside > 20


def test_fonts_are_embedded_and_equations_are_set(printed):
    for page in printed.pages:
        fonts = page["/Resources"].get_object().get("/Font", {})
        for font in fonts.values():
            font = font.get_object()
            below = font.get("/DescendantFonts", [font])[0].get_object()
            drawn = font["/Subtype"] == "/Type3"
            about = below.get("/FontDescriptor", {})
            assert drawn or "/FontFile2" in about or "/FontFile3" in about
        assert not re.search(r"\\(frac|sum|tag|hat)\b", words(page))


# The ePub


@pytest.fixture(scope="module")
def packed(built, tmp_path_factory):
    """The files of an ePub of two chapters and the glossary, by name."""
    path = tmp_path_factory.mktemp("epub") / "llmnb.epub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epub, "read_contents", few)
        epub.make_epub(built, path)
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
        assert z.infolist()[0].filename == "mimetype"
        assert z.infolist()[0].compress_type == zipfile.ZIP_STORED
        return {name: z.read(name) for name in z.namelist()}


@pytest.fixture
def trees(packed):
    """The ePub's pages, parsed."""
    pages = [x for x in packed if x.endswith(".xhtml")]
    return {name: ElementTree.fromstring(packed[name]) for name in pages}


def test_the_epub_lists_every_file_once(packed):
    package = ElementTree.fromstring(packed["book/package.opf"])
    items = package.findall(".//{*}item")
    listed = [f"book/{x.get('href')}" for x in items]
    own = {"mimetype", "META-INF/container.xml", "book/package.opf"}
    assert sorted(listed) == sorted({*packed} - own)
    ids = [x.get("id") for x in items]
    assert len(ids) == len({*ids})
    order = [x.get("idref") for x in package.findall(".//{*}itemref")]
    assert len(order) == len(FEW) + 1
    assert {*order} <= {*ids}
    assert package.find(".//{*}title").text == pages.TITLE
    assert package.find(".//{*}language").text == "en"


def test_the_epubs_links_and_images_lead_somewhere(packed, trees):
    places = {
        name: {x.get("id") for x in tree.iter()}
        for name, tree in trees.items()
    }
    for name, tree in trees.items():
        for x in tree.iter():
            link = x.get("href") or x.get("src") or "https:"
            if link.startswith(("https:", "http:", "data:")):
                continue
            file, place = urldefrag(link)
            file = normpath(join(dirname(name), file)) if file else name
            assert file in packed, (name, link)
            assert not place or unquote(place) in places[file], (name, link)


def test_the_epubs_equations_are_drawn_and_nothing_runs(trees):
    tree = trees["book/p-1_by_hand-06_layernorm.xhtml"]
    drawn = list(tree.iter(f"{SVG}svg"))
    assert sum(x.get("aria-label") is not None for x in drawn) > 40
    for tree in trees.values():
        tags = {x.tag.rpartition("}")[2] for x in tree.iter()}
        assert not tags & {"script", "button", "canvas", "iframe"}
        for code in tree.iter(f"{XHTML}pre"):
            code.clear()
        seen = "".join(tree.itertext())
        assert not re.search(r"\\(frac|sum|tag|partial)\b|\$\$", seen)


# What SVG paints with, and what it may stand on: shapes, text, and groups of
# them. A picture inside a drawing, such as a heat map, is painted already.
PAINT = {"fill", "stroke", "stroke-width", "stroke-linejoin"}
PAINT |= {"stroke-dasharray", "fill-opacity", "stroke-opacity"}
PAINTED = {"svg", "g", "use", "path", "rect", "circle", "ellipse", "line"}
PAINTED |= {"polyline", "polygon", "text", "tspan"}


def test_the_epub_paints_nothing_but_shapes_and_letters(trees):
    kinds = set()
    for name, tree in trees.items():
        for x in tree.iter():
            kind = x.tag.removeprefix(SVG)
            kinds.add(kind)
            found = PAINT & {*x.attrib}
            assert not found or kind in PAINTED, (name, kind, found)
    assert {"path", "use", "image"} <= kinds


def test_an_epub_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "book.epub"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        epub.write_epub(path, {"a.css": 3}, [], datetime.now(UTC))
    assert [x.name for x in tmp_path.iterdir()] == ["book.epub"]
    assert path.read_bytes() == b"old"


# Plain notebooks, and notebooks to fill in

AWAY = re.compile(r"\]\((?!http)[^)]*\.md\b")


def code_cells(book):
    return [x for x in book.cells if x.cell_type == "code"]


@pytest.mark.parametrize("path", CHAPTERS, ids=map(chapter_label, CHAPTERS))
def test_a_chapter_loses_its_markup_and_its_bodies(path):
    chapter = read_chapter(path)
    plain = practice.plain(path)
    for cell in plain.cells:
        assert "tags" not in cell.metadata
        if cell.cell_type != "code":
            prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
            assert ":::" not in prose
            assert not AWAY.search(prose)
    for output in (x for cell in code_cells(plain) for x in cell.outputs):
        assert not AWAY.search(output.get("data", {}).get("text/markdown", ""))
    book = practice.plain(path, practice=True)
    full_cells = {x.id: x.source for x in notebook.from_source(path).cells}
    marked = [x for x in code_cells(book) if "# exported to" in x.source]
    assert len(marked) == len(chapter.cells)
    for cell in marked:
        for node in practice.functions(ast.parse(cell.source)):
            said = ast.get_docstring(node) is not None
            body = [ast.unparse(x) for x in node.body[said:]]
            full = practice.functions(ast.parse(full_cells[cell.id]))
            had = next(x for x in full if x.name == node.name)
            left = [ast.unparse(ast.parse(practice.TODO))]
            assert body == left * (len(had.body) > said), node.name
    assert not any(x.get("outputs") for x in code_cells(book))


def filled():
    """1.6, filled in with its own bodies."""
    book = practice.plain(LAYERNORM, practice=True)
    own = {x.id: x.source for x in notebook.from_source(LAYERNORM).cells}
    empty = [x for x in code_cells(book) if practice.TODO in x.source]
    assert len(empty) >= 3
    for cell in empty:
        mark = cell.source.partition("\n")[0] + "\n"
        marked = mark.startswith(practice.MARK)
        cell.source = mark * marked + own[cell.id]
    return book


def outputs(book):
    texts = [x.get("text", "") for c in code_cells(book) for x in c.outputs]
    return "".join(texts)


def test_the_readers_own_functions_pass_the_chapters_checks():
    book = filled()
    notebook.run(book, LAYERNORM.parent)
    stored = nbformat.read(LAYERNORM.with_suffix(".ipynb"), as_version=4)
    assert outputs(book) == outputs(stored)
    assert outputs(book).count(" ok\n") >= 10


WRONG = """\
1.5 | out[...] = wte[inp] + wpe[:T] | out = wte[inp] + wpe[:T]
1.5 | dwte[tokens] += np.add | dwte[tokens] = np.add
1.6 | out[...] = centred | out = centred
1.6 | - norm * dnorm_norm_mean | + norm * dnorm_norm_mean
1.7 | dbias is not None | dweight is not None and dbias is not None
1.8 | [...] = att @ v | .copy()[...] = att @ v
1.8 | scores.max(axis=-1, initial=-np.inf) | 0 * scores[..., 0]
1.8 | if not add: | if False:
1.8 | if not add: | if True:
1.9 | out[...] = 0.5 * inp | out = 0.5 * inp
1.9 | dinp + grad if add else grad | dinp + grad
1.9 | dinp + grad if add else grad | grad
1.9 | sigmoid(1.702 * x) | sigmoid(x)
1.10 | dinp1 += dout | dinp1[...] = dout
1.11 | alpha / len(z) | alpha
1.12 | peak * (step + 1) / warmup | peak * step / warmup
1.12 | math.isfinite(norm) and scale < 1 | scale < 1
1.12 | grads.astype(np.float64) | grads
1.13 | "add_dweight": add} | "add_dweight": False}
5.1 | r * (weight[i] + shift) | r * weight[i]
"""


@pytest.fixture
def package():
    """The modules of llmnb, as they were once the test is over."""
    kept = [vars(x) for n, x in sys.modules.items() if n[:6] == "llmnb."]
    kept = [(names, names.copy()) for names in kept]
    yield
    for names, before in kept:
        names.update(before)


@pytest.mark.parametrize("row", WRONG.splitlines())
def test_a_plausible_mistake_fails_its_chapters_checks(
    row, package, monkeypatch
):
    """Twice: memory that is not cleared may hold what the last run left."""
    label, right, wrong = row.split(" | ")
    path = next(x for x in CHAPTERS if chapter_label(x) == label)
    assert right in path.read_text("utf-8")
    monkeypatch.chdir(path.parent)
    own = {x.source: x.module for x in read_chapter(path).cells}
    names = {"__name__": "__main__"}
    with pytest.raises(AssertionError) as first:
        for cell in code_cells(notebook.from_source(path)):
            code = cell.source.replace(right, wrong)
            exec(code, names)
            module = own.get(cell.source)
            practice.put(
                f"{practice.MARK}{module}\n{code}" * bool(module), names
            )
    claim = str(first.value).partition(":")[0]
    with pytest.raises(AssertionError, match=claim):
        exec(code, names)


def test_an_answer_of_one_line_leaves_its_names():
    book = practice.plain(ROOT / "notebooks/2_cpu/03_loss.py", practice=True)
    assert f"answers = ...\n{practice.TODO}" in [x.source for x in book.cells]
    page = practice.plain(ROOT / "notebooks/1_by_hand/14_page.py", True)
    text = "\n".join(x.source for x in page.cells)
    assert "\nwhole = backward(" in text  # an answer of many lines stays
    # __main__ has no source: what reads the page must find it elsewhere
    assert "import __main__" not in text


def test_a_chapter_that_exports_nothing_loses_the_bodies_in_sight():
    book = practice.plain(ROOT / "notebooks/1_by_hand/01_learns.py", True)
    empty = [x.source for x in book.cells if practice.TODO in x.source]
    assert "def backward" in "".join(empty)
    assert "def column" not in "".join(empty)  # folded: it draws a figure


def test_a_chapters_way_to_its_files_may_be_taken_twice(tmp_path, monkeypatch):
    way = practice.GO.format("1_by_hand")
    there, here = tmp_path / "notebooks", tmp_path / "build" / "practice"
    for folder in (there, here):
        (folder / "1_by_hand").mkdir(parents=True)
    monkeypatch.chdir(here / "1_by_hand")
    for _ in range(2):
        exec(way, {})
        assert Path.cwd() == there / "1_by_hand"
