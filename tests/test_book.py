"""The rendered book: its sources first, then the built pages in a browser.

The built pages are those of `make book`; LLMNB_BOOK names another folder.
Tests of the pages are skipped, with a reason, where there are none, where
they are older than their sources, or where there is no Chromium.
"""

import functools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from processes import served

from llmnb.book.export import chapter_label
from llmnb.book.pages import CHROMIUM, READY

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
HTML = Path(os.environ.get("LLMNB_BOOK", BOOK / "_build" / "html"))
CHAPTERS = sorted((ROOT / "notebooks").glob("*/[0-9]*.py"))
LAYERNORM = "notebooks/1_by_hand/06_layernorm.html"
EXPORTED = {"export", "exporti"}
FLAGS = ["--headless", "--no-sandbox", "--no-first-run"]
FLAGS += [f"--disable-{x}" for x in ("gpu", "quic", "component-update",
          "background-networking", "sync")]  # fmt: skip
# no name is found, so that nothing can leave the machine
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]


def place(path):
    """Where a chapter is among the notebooks, such as "2_cpu/02_rows"."""
    return path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()


# The sources


def said(term, text):
    """Whether a text uses all words of a term, or of one of its forms."""
    forms = term.lower().split(", ")
    return any(all(w in text for w in form.split()) for form in forms)


def test_the_glossary_is_sorted_and_each_term_names_its_chapter():
    text = (BOOK / "glossary.md").read_text("utf-8")
    body = text[text.index("```{glossary}") :].split("\n", 1)[1]
    terms = re.findall(r"^(?![` ])(.+)\n((?:  .+\n)+)", body, re.M)
    names = [name.lower() for name, _ in terms]
    assert len(names) >= 60
    assert names == sorted(set(names))
    for name, text in terms:
        links = re.findall(r"\[Chapter\s+([\dA.]+)\]\(\.\./([^)]*)\)", text)
        assert links, name
        for number, link in links:
            path = (ROOT / link).with_suffix(".py")
            assert path.exists(), link
            assert chapter_label(path) == number, name
        home = (ROOT / links[0][1]).with_suffix(".py").read_text("utf-8")
        assert said(name, home.lower()), f"{name}: not in {links[0][1]}"


def test_every_work_in_the_bibliography_is_introduced_once():
    keys = re.findall(
        r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(), re.M
    )
    text = (BOOK / "bibliography.md").read_text("utf-8")
    cited = re.findall(r"\{cite:t\}`(\w+)`", text)
    assert sorted(cited) == sorted(keys)


# The built pages, as files


def why_not_built():
    """Why the pages cannot be tested, or None."""
    if not (HTML / "book" / "intro.html").exists():
        return f"no built book in {HTML}: run `make book`"
    sources = [*BOOK.glob("*.*"), *BOOK.glob("[!_]*/*"), *BOOK.glob("_s*/*")]
    sources += [*BOOK.glob("_e*/*.py"), *ROOT.glob("notebooks/*/*.ipynb")]
    newest = max(p.stat().st_mtime for p in sources)
    if newest > (HTML / "searchindex.js").stat().st_mtime:
        return "the built book is older than its sources: run `make book`"
    return None


class Page(HTMLParser):
    """The anchors, links, resources and images of one page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.resources = set(), [], []
        self.images, self.classes = [], []
        self.title = self.description = ""
        self.inside = None
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.inside = tag
        self.classes.append((a.get("class") or "").split())
        if a.get("id"):
            self.ids.add(a["id"])
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img":
            self.images.append(a)
        if tag == "meta" and a.get("name") == "description":
            self.description = a.get("content", "")
        for name in ("src", "poster", "data"):
            if a.get(name):
                self.resources.append(a[name])
        if tag == "link" and a.get("href"):
            self.resources.append(a["href"])

    def handle_data(self, data):
        if self.inside == "title" and not self.title:
            self.title = data.strip()

    def handle_endtag(self, tag):
        self.inside = None


def built_pages():
    """The paths of the built book's pages in it; none if there is no book."""
    paths = [p.relative_to(HTML) for p in HTML.rglob("*.html")]
    names = [p.as_posix() for p in paths if p.parts[0] != "_static"]
    return [] if why_not_built() else sorted({*names} - {"index.html"})


@functools.cache
def parsed(name):
    return Page(HTML / name)


@pytest.fixture(scope="module")
def built():
    if why_not_built():
        pytest.skip(why_not_built())
    return {name: parsed(name) for name in built_pages()}


def target(page, link):
    """The file and the anchor that a link on a page leads to."""
    parts = urlsplit(link)
    path = HTML / page
    if parts.path:
        path = path.parent / unquote(parts.path)
    return path.resolve(), unquote(parts.fragment)


def test_no_link_is_dead(built):
    dead = []
    for name, page in built.items():
        for link in page.links:
            if urlsplit(link).scheme in ("http", "https", "mailto"):
                continue
            path, anchor = target(name, link)
            there = path.is_file()
            if there and anchor and path.suffix == ".html":
                other = path.relative_to(HTML.resolve()).as_posix()
                there = anchor in parsed(other).ids
            dead += [] if there else [f"{name}: {link}"]
    assert not dead


def test_pages_load_nothing_from_elsewhere(built):
    outside = []
    for name, page in built.items():
        for link in page.resources:
            parts = urlsplit(link)
            away = parts.scheme or parts.netloc
            if parts.path and not away:
                away = not target(name, link)[0].is_file()
            if away and parts.scheme != "data":
                outside.append(f"{name}: {link}")
    for path in [*HTML.rglob("*.html"), *HTML.glob("_static/*.css")]:
        names = r"unpkg\.com|jsdelivr|cdnjs|fonts\.googleapis"
        for word in re.findall(names, path.read_text("utf-8")):
            outside.append(f"{path}: names {word}")
    assert not outside


def test_pages_and_images_say_what_they_show(built):
    for name, page in built.items():
        assert page.title, name
        if name.startswith(("notebooks/", "book/")):
            assert len(page.description) > 30, name
        for image in page.images:
            alt = image.get("alt") or ""
            assert len(alt.split()) > 1, (name, image["src"])
            assert not alt.startswith((".", "/", "_")), (name, image["src"])
    assert built["book/intro.html"].title.count("GPT-2") == 1


def test_chapters_show_their_exported_cells_and_their_number(built):
    index = json.loads((ROOT / "llmnb" / "index.json").read_text("utf-8"))
    for path in CHAPTERS:
        page = parsed(f"notebooks/{place(path)}.html")
        notebook = json.loads(path.with_suffix(".ipynb").read_text("utf-8"))
        tags = [c["metadata"].get("tags", []) for c in notebook["cells"]]
        want = sum(bool(EXPORTED & set(t)) for t in tags)
        marks = {"tag_export", "tag_exporti"}
        assert (want > 0) == (chapter_label(path) in index), path.name
        assert sum(bool(marks & set(c)) for c in page.classes) == want
        assert sum("export-label" in c for c in page.classes) == want
        assert sum("chapter-number" in c for c in page.classes) == 1
        html = (HTML / f"notebooks/{place(path)}.html").read_text("utf-8")
        assert "# fmt: " not in html, path.name


# The built pages, in a browser


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The built book behind a web server on this machine."""
    with served(functools.partial(QuietHandler, directory=HTML)) as home:
        yield home


@pytest.fixture(scope="module")
def browser():
    if why_not_built():
        pytest.skip(why_not_built())
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    sync = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


# Until what has been loaded is painted
FRAMES = (
    "new Promise(x => requestAnimationFrame(() => requestAnimationFrame(x)))"
)


class Visit:
    """A page in a window of its own, and what went wrong in loading it.

    how: what else is special about the browser, such as has_touch=True.
    """

    def __init__(self, browser, home, width, scheme="light", **how):
        self.home, self.trouble = home, []
        how["viewport"] = {"width": width, "height": 844}
        self.context = browser.new_context(color_scheme=scheme, **how)
        self.page = self.context.new_page()
        inside = home, "data:", "blob:"
        for event, bad, words in (
            ("pageerror", lambda x: True, "{}"),
            ("requestfailed", lambda x: True, "failed: {.url}"),
            ("request", lambda x: not x.url.startswith(inside),
             "leaves the machine: {.url}"),
            ("console", lambda x: x.type in ("error", "warning"),
             "console: {.text}"),
            ("response", lambda x: x.status >= 400, "{0.status}: {0.url}"),
        ):  # fmt: skip
            self.page.on(event, functools.partial(self.note, bad, words))

    def note(self, bad, words, event):
        if bad(event):
            self.trouble.append(words.format(event))

    def open(self, name):
        """Show a page; returns when all that it loads is there."""
        self.page.goto(f"{self.home}/{name}")
        if self.page.evaluate("!!document.querySelector('.math')"):
            self.page.wait_for_function("window.MathJax?.startup?.promise")
        self.page.evaluate(READY)
        self.page.evaluate(FRAMES)
        return self.page

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()


@pytest.fixture
def width():
    """Of a window on a desk; `narrow` is one on a phone."""
    return 1280


narrow = pytest.mark.parametrize("width", [390])


@pytest.fixture
def scheme():
    return "light"


@pytest.fixture
def visit(browser, address, width, scheme):
    """A window for one test."""
    with Visit(browser, address, width, scheme) as visit:
        yield visit


# MathJax shows an unknown command as red text, not as an error.
UNRENDERED = """() => [...document.querySelectorAll(".math")]
    .filter(x => !x.querySelector("mjx-container") || x.querySelector(
        "mjx-merror, [data-mjx-error], [mathcolor=red]"))
    .map(x => "equation not rendered: " + x.textContent.slice(0, 80))"""

# Text that says TeX where TeX should have become an equation.
RAW_TEX = r"""() => [...document.querySelectorAll("article p, article li")]
    .filter(x => /\$\$|\\(frac|sum|tag|partial|mathcal)\b/.test(x.innerText))
    .map(x => "TeX as text: " + x.innerText.slice(0, 80))"""

# An element may be wider than the window only inside a box that scrolls, and
# what scrolls must begin at the box's left edge, or its start is out of reach.
# An equation scrolls nowhere: it is broken into lines that a phone holds.
TOO_WIDE = """() => {
    const bad = [], width = document.documentElement.clientWidth;
    if (document.scrollingElement.scrollWidth > innerWidth)
        bad.push("the page is " + document.scrollingElement.scrollWidth
                 + " wide in a window of " + innerWidth);
    const scrolls = x => ["auto", "scroll"].includes(
        getComputedStyle(x).overflowX);
    for (const x of document.querySelectorAll("article *")) {
        const box = x.getBoundingClientRect();
        if (!box.width || !box.height) continue;
        let up = x.parentElement;
        while (up.tagName != "ARTICLE" && !scrolls(up))
            up = up.parentElement;
        const name = x.tagName.toLowerCase() + "." + x.className + ": "
            + x.textContent.trim().slice(0, 40);
        if (up.tagName == "ARTICLE" && box.right > width + 1
            && !x.closest("mjx-assistive-mml, .visually-hidden"))
            bad.push("sticks out at the right: " + name);
        if (x.tagName == "MJX-MATH"
            && box.left < x.closest(".math").getBoundingClientRect().left - 1)
            bad.push("begins left of its box: " + name);
        if (x.matches("div.math") && x.scrollWidth > x.clientWidth + 1)
            bad.push("an equation of " + x.scrollWidth + " px: " + name);
    }
    return bad.slice(0, 10);
}"""

UNLOADED = """() => [...document.images]
    .filter(x => x.complete && !x.naturalWidth)
    .map(x => "image not shown: " + x.src)"""


def pages_to_visit():
    """All pages, but of those that show a module's source only the longest."""
    names = built_pages()
    sources = [n for n in names if n.startswith("_modules/")]
    sources.sort(key=lambda n: (HTML / n).stat().st_size)
    return [n for n in names if n not in sources[:-1]] or ["book/intro.html"]


@pytest.mark.parametrize("name", pages_to_visit())
@narrow
def test_page_renders(visit, name):
    page = visit.open(name)
    found = page.evaluate(UNRENDERED) + page.evaluate(UNLOADED)
    found += page.evaluate(RAW_TEX)
    found += [f"at 390 px: {x}" for x in page.evaluate(TOO_WIDE)]
    page.set_viewport_size({"width": 1280, "height": 844})
    found += [f"at 1280 px: {x}" for x in page.evaluate(TOO_WIDE)]
    page.set_viewport_size({"width": 320, "height": 844})
    wide = page.evaluate("document.scrollingElement.scrollWidth")
    assert visit.trouble + found == []
    assert wide <= 320


def luminance(colour):
    """Of a colour such as rgb(1, 2, 3)."""
    parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
    parts = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        for x in parts
    ]
    weights = 0.2126, 0.7152, 0.0722
    return sum(w * x for w, x in zip(weights, parts, strict=True))


def contrast(a, b):
    """The contrast of WCAG 2 between two colours."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# The mark of an exported cell, and its colours with what they stand on.
EXPORT_MARK = """() => {
    const page = getComputedStyle(document.body).backgroundColor;
    const label = document.querySelector(".export-label:not(.beside)");
    const input = label.parentElement.querySelector(".cell_input");
    const plain = [...document.querySelectorAll("div.cell > .cell_input")]
        .find(x => !x.parentElement.querySelector(".export-label"));
    const style = getComputedStyle(input), text = getComputedStyle(label);
    return {
        label: label.innerText,
        edge: parseFloat(style.borderLeftWidth),
        differs: style.borderLeftColor
            != getComputedStyle(plain).borderLeftColor,
        edgeColours: [style.borderLeftColor, page],
        textColours: [text.color, text.backgroundColor],
    };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_exported_cells_are_marked(visit):
    page = visit.open(LAYERNORM)
    mark = page.evaluate(EXPORT_MARK)
    assert mark["label"].startswith("exported to llmnb.")
    assert mark["edge"] >= 3
    assert mark["differs"]
    assert contrast(*mark["edgeColours"]) >= 3
    assert contrast(*mark["textColours"]) >= 4.5


@pytest.fixture(scope="module")
def searching(browser, address):
    """The page that searches, with its index, for many questions."""
    with Visit(browser, address, 1280) as visit:
        visit.page.goto(f"{address}/search.html?q=attention")
        visit.page.wait_for_selector("#search-results li a")
        yield visit.page


# The first three pages that the page's own search finds; it shows the last of
# its list first, a few milliseconds each.
FOUND = """query => Search._performSearch(...Search._parseQuery(query))
    .slice(-3).map(x => x[0])"""


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_search_finds_a_chapter_by_its_subject(searching, path):
    contents = (BOOK / "_toc.yml").read_text("utf-8")
    line = rf'{place(path)}\n +title: "[\dA]\.\d+ (.+)"'
    subject = re.search(line, contents)[1]
    assert f"notebooks/{place(path)}" in searching.evaluate(FOUND, subject)


@pytest.mark.parametrize("unpacks", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_equations_from_disk_and_where_a_browser_cannot_unpack(
    browser, address, disk, unpacks
):
    """It is given MathJax plain."""
    home = HTML.resolve().as_uri() if disk else address
    with Visit(browser, home, 1280) as visit:
        if not unpacks:
            visit.page.add_init_script("delete window.DecompressionStream")
        asked = []
        visit.page.on("request", lambda request: asked.append(request.url))
        page = visit.open(LAYERNORM)
        assert (f"{home}/_static/mathjax/plain.js" in asked) is not unpacks
        assert page.evaluate(UNRENDERED) == []
        assert page.locator("mjx-container").count() > 20
        assert visit.trouble == []
        # from disk Chromium forbids the extracts, not the list
        page.goto(f"{home}/search.html?q=attention")
        page.wait_for_selector("#search-results li a")


# Accessibility, as axe sees it

AXE_PAGES = """search book/intro book/glossary book/results
book/api/llmnb.cpu.attention notebooks/1_by_hand/09_gelu
notebooks/1_by_hand/14_page
notebooks/1_by_hand/18_training notebooks/2_cpu/08_time
notebooks/3_gpu/01_threads notebooks/4_practice/23_commands
notebooks/5_modern/03_gated notebooks/6_machines/03_cost"""


@pytest.mark.parametrize("name", AXE_PAGES.split())
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_to_mend(visit, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    found = axe().run(visit.open(f"{name}.html")).response["violations"]
    assert [(x["id"], x["nodes"][0]["html"]) for x in found] == []


# outputs whose lines are no longer than a verdict's
NARROW = """[...document.querySelectorAll(".cell_output .highlight pre")]
    .filter(x => x.offsetParent && x.textContent.split("\\n")
        .every(line => line.length <= 48))
    .map(x => [parseFloat(getComputedStyle(x).fontSize),
        x.scrollWidth - x.clientWidth])"""


@narrow
def test_a_verdict_can_be_read_on_a_phone(visit):
    found = visit.open(LAYERNORM).evaluate(NARROW)
    assert len(found) > 3
    assert min(size for size, _ in found) >= 12
    assert max(over for _, over in found) <= 0
