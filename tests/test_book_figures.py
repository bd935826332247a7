"""The figures: SVG in the notebooks, and in the pages that follow the theme.

The pages are those that tests/test_book.py looks at.
"""

# ruff: noqa: F401, F811, I001 (fixtures)
import functools
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode
from collections import Counter
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
from PIL import Image
from test_book import HTML, LAYERNORM, address, browser, built_pages, contrast
from test_book import narrow, scheme, visit, why_not_built, width

from llmnb.book import notebook
from llmnb.book.diagram import LAYERS, PALETTE
from llmnb.book.wiring import wiring_figure

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*/[0-9]*.ipynb"))
LINES, DOTS = "image/svg+xml", "image/png"

FIGURE = """
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot(range(COUNT), "o", color="#0b6fb8")
plt.show()
"""


@functools.cache
def pictures(path, kind):
    """The pictures of a kind in a stored notebook, by the cell's id."""
    book = json.loads(path.read_text("utf-8"))
    return [
        (cell["id"], "".join(output["data"][kind]))
        for cell in book["cells"]
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def drawn(count):
    """A notebook of one figure with so many points, run; its output."""
    source = FIGURE.replace("COUNT", str(count))
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source, id="figure")]
    notebook.run(book, ROOT)
    return book, book.cells[0].outputs[0]


# The stored notebooks


def test_a_figure_is_the_same_bytes_every_time():
    once, again = drawn(20)[1].data, drawn(20)[1].data
    assert once == again
    assert once[LINES].startswith("<svg")
    assert "date" not in once[LINES]
    assert DOTS not in once


def test_a_heavy_figure_is_kept_as_dots_two_to_a_pixel():
    output = drawn(9000)[1]
    assert LINES not in output.data
    assert output.metadata[DOTS].keys() == {"width", "height"}


def test_slim_keeps_what_is_seen():
    svg = "<?xml?>\n<svg>\n <metadata>a\nb</metadata><!-- c -->\n"
    svg += ' <path d="M 1.23456 2.000001&#10;L 3 4.5" scale="0.015625"/>\n'
    svg += '<use x="7.98765" transform="translate(0.12345 8)"/></svg>'
    want = '<svg>\n<path d="M1.23 2&#10;L3 4.5" scale="0.015625"/>\n'
    want += '<use x="7.99" transform="translate(0.12 8)"/></svg>'
    assert notebook.slim(svg).replace("\n\n", "\n") == want


def png(dots):
    file = BytesIO()
    Image.fromarray(dots).save(file, "png")
    return b64encode(file.getvalue()).decode()


def test_a_picture_of_few_colours_has_a_table_of_them():
    draw = np.random.default_rng(0)
    few = draw.integers(0, 256, (12, 4), np.uint8)
    few[:, 3] = 255
    before = few[draw.integers(0, 12, (64, 64))]
    after = Image.open(BytesIO(b64decode(notebook.with_table(png(before)))))
    assert after.mode == "P"
    assert (np.array(after.convert("RGBA")) == before).all()
    many = png(draw.integers(0, 256, (64, 64, 4), np.uint8))
    assert notebook.with_table(many) == many
    clear = before.copy()
    clear[0, 0, 3] = 7
    assert notebook.with_table(png(clear)) == png(clear)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_figures_are_light_lines_in_colours_of_the_palette(path):
    """Any other colour would be the same on a light page and a dark one."""
    known = {*PALETTE.values(), "#000000", "#ffffff", "#808080"}
    assert not pictures(path, DOTS)
    for name, svg in pictures(path, LINES):
        assert len(svg) <= notebook.HEAVY, name
        assert "<metadata" not in svg, name
        ElementTree.fromstring(svg)
        used = set(re.findall(r"(?:fill|stroke): (#\w{6})", svg))
        assert used <= known, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_figure_is_stored_as_its_name_alone(path):
    """A Figure is shown only where pyplot has chosen how."""
    named = [x for _, x in pictures(path, "text/plain") if "<Figure" in x]
    assert len(named) <= len(pictures(path, LINES))


def test_nbval_takes_dots_for_lines_and_lines_for_dots(tmp_path):
    """A reader's kernel makes PNG; the stored figure may be either."""
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    book, output = drawn(20)
    for name, kind in (("lines", LINES), ("dots", DOTS)):
        output.data = {kind: "", "text/plain": output.data["text/plain"]}
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    run = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
    run += ["-p", "no:cacheprovider", "-o", "addopts="]
    found = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in found.stdout, found.stdout


# The built pages, as files


def chapters():
    """The built chapters with figures: (page, its notebook)."""
    for path in NOTEBOOKS:
        name = path.relative_to(ROOT).with_suffix(".html").as_posix()
        if name in built_pages() and pictures(path, LINES):
            yield name, path


@pytest.fixture(scope="module")
def drawings():
    """Of each such page: its notebook, its text."""
    if why_not_built():
        pytest.skip(why_not_built())
    return {
        name: (path, (HTML / name).read_text("utf-8"))
        for name, path in chapters()
    }


def test_figures_stand_in_their_page_with_a_name(drawings):
    for name, (path, text) in drawings.items():
        tags = re.findall(r'<svg[^>]*class="drawing[ "][^>]*>', text)
        assert len(tags) == len(pictures(path, LINES)), name
        for tag in tags:
            assert 'role="img"' in tag, name
            assert re.search(r'aria-label="Figure [\dA]\.\d+\.\d+\. ', tag)
        assert not re.search(r"<img[^>]*\.svg", text.split("<article")[1])


def test_no_two_elements_of_a_page_share_an_id(drawings):
    for name, (_, text) in drawings.items():
        svg = "".join(re.findall(r"(?s)<svg.*?</svg>", text))
        count = Counter(re.findall(r' id="([^"]*)"', svg))
        assert [x for x, n in count.items() if n > 1] == [], name
        used = set(re.findall(r'(?:url\(| href=")#([^")]*)', svg))
        assert used <= set(count), name


def test_every_variable_of_a_figure_has_a_colour_in_both_themes(drawings):
    style = (ROOT / "book" / "_static" / "figures.css").read_text("utf-8")
    light, dark = style.split("@media", 1)
    for name, (_, text) in drawings.items():
        for used in set(re.findall(r"var\((--(?:text|line|fill)-\w+)", text)):
            assert f"{used}:" in light, (name, used)
            assert f"{used}:" in dark, (name, used)


def test_the_card_of_a_figure_shows_it_in_both_themes(drawings):
    text = (HTML / "_static" / "previews.js").read_text("utf-8")
    cards = json.loads(text.split("= ", 1)[1].rstrip().rstrip(";"))
    names = [
        x["image"] for x in cards.values() if ".svg" in x.get("image", "")
    ]
    assert len(names) >= len(drawings)
    for name in names:
        file = (HTML / name).read_text("utf-8")
        ElementTree.fromstring(file)
        assert 'id="dark"' in file
        assert "svg:target" in file


# The built pages, in a browser

# Of what a figure paints: the variable, the colour, the page's background.
PAINTED = """() => {
    const page = getComputedStyle(document.body).backgroundColor;
    const found = {};
    for (const x of document.querySelectorAll("svg.drawing [style]"))
        for (const what of ["fill", "stroke"]) {
            const name = x.style[what].match(/--[a-z]+-[a-z]+/);
            if (name) found[name[0]] = getComputedStyle(x)[what];
        }
    return [page, found];
}"""

# The size in pixels of each text in the first figure, which is the roadmap.
SIZES = """() => [...document.querySelector("svg.drawing")
    .querySelectorAll("g[transform*=scale]")]
    .map(x => 100 * Math.abs(x.getScreenCTM().d))"""


def test_colours_change_with_the_theme_and_keep_their_contrast(visit):
    found = {}
    for theme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=theme)
        page, found[theme] = visit.open(LAYERNORM).evaluate(PAINTED)
        for variable, colour in found[theme].items():
            least = {"--text": 4.5, "--line": 3}.get(variable[:6], 0)
            quiet = variable.endswith(("paper", "pale"))
            assert quiet or contrast(colour, page) >= least, variable
    same = {x for x, c in found["light"].items() if found["dark"].get(x) == c}
    assert same <= {"--fill-green"}
    assert {"--text-ink", "--line-ink", "--fill-paper"} <= set(found["dark"])


@narrow
def test_the_roadmap_can_be_read_on_a_phone(visit):
    sizes = visit.open(LAYERNORM).evaluate(SIZES)
    assert len(sizes) >= 20
    assert min(sizes) >= 9


# Of each figure: what it asks to scroll, its letters' least size in pixels
ON_A_PHONE = """() => [...document.querySelectorAll("svg.drawing")].map(x => {
    const sizes = [...x.querySelectorAll("g[transform*=scale]")]
        .map(g => 100 * Math.hypot(g.getScreenCTM().c, g.getScreenCTM().d));
    const box = x.parentElement;
    return [box.scrollWidth - box.clientWidth, Math.min(...sizes),
            box.classList.contains("more-right")];
})"""


@narrow
def test_a_phone_shows_a_figure_whole_or_says_that_it_goes_on(visit):
    found = []
    for name in ("1_by_hand/07_matmul", "2_cpu/04_matmul"):
        if f"notebooks/{name}.html" not in built_pages():
            pytest.skip(f"{name} is not built")
        page = visit.open(f"notebooks/{name}.html")
        found += page.evaluate(ON_A_PHONE)
    assert len(found) > 5
    for beyond, letters, cue in found:
        assert letters >= 5.7 or beyond > 1
        assert letters >= 4.5
        assert (beyond > 1) == cue
    assert sum(beyond <= 1 for beyond, *_ in found) > len(found) / 2


def test_the_roadmaps_names_are_all_used():
    """No part of the picture is there for nobody."""
    text = "".join(p.read_text("utf-8") for p in ROOT.glob("notebooks/*/*.py"))
    used = set(re.findall(r'gpt2_diagram\(lit="(\w+)"\)', text))
    assert set(LAYERS) - used <= {"loss"}


def test_a_part_that_there_is_not_is_not_drawn():
    with pytest.raises(ValueError, match="no part is called 'x'"):
        wiring_figure("x")
