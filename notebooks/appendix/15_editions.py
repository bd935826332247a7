# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.pages: "The built book's pages in order, and a browser to read them."
#       book.pdf: "The book on paper: chapters printed by a browser, and merged."
# ---

# %% [markdown]
# # Editions: the book on paper and on a reading device
#
# > The built pages, printed by a browser into one PDF and packed into one ePub,
# > so that no second set of sources can drift from the first.
#
# *Reading time: 25 minutes. You need: [chapter A.10](10_book.ipynb).*

# %% [markdown]
# ## Where we are
#
# `make book` builds pages for a browser. Some read on paper, on a tablet on a train,
# or on a device whose screen is slow and grey. The tools that built the pages can
# write LaTeX and ePub too, but each from its own idea of a page: the equations stay
# TeX, the folds are lost. The browser has already solved all of that: it shows every
# equation and every figure. So we ask it. At the end of this chapter you can
#
# - print a set of pages into one PDF whose links and page numbers are right;
# - say what an ePub is made of, and make one that a checker accepts;
# - say why equations travel as drawings.

# %% [markdown]
# ## Setup

# %% setup
import tempfile

from llmnb.book.verify import verdict

# %% imports of the pages tags=["export"]
import html
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

# %% [markdown]
# ## The pages in order
#
# The contents of the book are in `book/_toc.yml`. Which of its pages go into an
# edition? All that are built, but the reference of the package: every docstring
# there stands in a chapter already. A part alone is chosen by the first letter of
# its chapters' numbers.

# %% the pages in order tags=["export"]
ROOT = Path(__file__).parents[2] if "__file__" in globals() else Path("../..")
BUILT = ROOT / "book" / "_build" / "html"
TITLE = "llmnb: GPT-2 from its equations"


class Entry(NamedTuple):
    """A page of the book: its part, its title, and its path in the build."""

    part: str
    title: str
    page: str


def heading(path):
    """The title of a built page, without the book's."""
    found = re.search(r"<title>(.*?)</title>", path.read_text("utf-8"), re.S)
    return html.unescape(found[1]).partition(" — ")[0].strip()


def read_contents(built, part=""):
    """The entries of the book's contents that are built, in order.

    built: the folder of `make book`. part: only chapters of that part, such as
    "1", or "A" for the appendix. The package's reference is left out.
    """
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text("utf-8"))
    listed = [("", {"file": contents["root"], "title": "About this book"})]
    for x in contents["parts"]:
        listed += [(x["caption"], chapter) for chapter in x["chapters"]]
    found = []
    for caption, x in listed:
        path = built / f"{x['file']}.html"
        if path.exists() and not x["file"].startswith("book/api/"):
            title = x.get("title") or heading(path)
            found.append(Entry(caption, title, f"{x['file']}.html"))
    return [x for x in found if not part or x.title.startswith(f"{part}.")]


# %% [markdown]
# Three pages, built by hand, and one that is in no contents:

# %% three pages
folder = tempfile.TemporaryDirectory()
built = Path(folder.name)
page = "<title>{} — llmnb</title><p>{}</p>"
for name, title in (
    ("book/intro", "llmnb"),
    ("book/notation", "Notation"),
    ("notebooks/1_by_hand/06_layernorm", "LayerNorm: normalise a row"),
    ("elsewhere", "Elsewhere"),
):
    path = built / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.format(title, "..."), "utf-8")
titles = [x.title for x in read_contents(built)]
print(titles)
in_order = titles == ["About this book", "1.6 LayerNorm", "Notation"]
verdict("the contents", in_order, "built pages, in order")
verdict("part 1", len(read_contents(built, "1")) == 1, "has one chapter here")

# %% [markdown]
# ## A browser that has finished
#
# A page is ready when its equations are set, its fonts are there, and its figures
# are decoded, those too that wait to be scrolled to. `playwright` steers Chromium;
# it is imported where it is used, so that who never prints needs none.

# %% a browser tags=["export"]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# a promise that is kept when the page is ready
READY = """async () => {
    await window.MathJax?.startup?.promise;
    for (const image of document.images) image.loading = "eager";
    const images = [...document.images].map(x => x.decode().catch(() => 0));
    await Promise.all([document.fonts.ready, ...images]);
}"""


@contextmanager
def open_browser():
    """A page of a headless Chromium: the machine's own, or playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, CHROMIUM)), None),
            args=["--no-sandbox"],
        )
        yield browser.new_page(color_scheme="light")
        browser.close()


def open_page(page, path):
    """Show a file in the browser's page; returns when all of it is there."""
    page.goto(path.resolve().as_uri())
    page.evaluate(READY)


# %% [markdown]
# ## One chapter on paper
#
# The rules for paper are in `book/_static/print.css`, for everyone who prints a page.
# A book needs three more: a size, a number at the foot of each page, and the chapter's
# name at the head of each page but its first. The numbers go on from where the last
# chapter ended, so chapters are printed in order.
#
# A PDF's link to a place in it needs a name for the place. Chromium writes one for
# each place that the page itself links to. Other chapters link here too: for those we
# add links that nobody sees, and take them away later.

# %% imports of the PDF tags=["export"] module="book.pdf"
import io
import json
import re
import sys
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag

from llmnb.book.pages import (
    BUILT,
    ROOT,
    TITLE,
    Entry,
    open_browser,
    open_page,
    read_contents,
)

# %% one chapter on paper tags=["export"] module="book.pdf"
PAPER = """
@page {
    size: 176mm 250mm;
    margin: 20mm 18mm;
    @top-left { content: %(head)s; font: 8pt sans-serif; color: #55616e; }
    @bottom-center {
        content: counter(page, %(style)s);
        font: 8pt sans-serif;
        color: #55616e;
    }
}
@page :first { @top-left { content: none; } }
article { width: 140mm; }
html { counter-reset: page %(before)d; }
.place { position: absolute; top: 0; font-size: 1px; color: transparent; }
"""
# makes equations and tables that are too wide as small as they must be
FIT = """() => {
    const wide = "article div.math mjx-container, article table";
    for (const x of document.querySelectorAll(wide)) {
        const room = x.parentElement.getBoundingClientRect().width;
        const share = room / x.getBoundingClientRect().width;
        if (share < 0.999) x.style.zoom = share;
    }
}"""
# links to these places, which nobody sees; returns the page's sections
PLACES = """ids => {
    for (const id of ids) {
        const link = document.createElement("a");
        link.href = "#" + id;
        link.className = "place";
        link.textContent = ".";
        document.body.append(link);
    }
    return [...document.querySelectorAll("article section > h2")].map(
        x => [x.parentElement.id, x.textContent.replace(/#$/, "").trim()]);
}"""


class Sheets(NamedTuple):
    """A printed page of the book.

    first: the number of its first sheet. places: dict from a place's name to
    its sheet, counted from 0, and its height on it. sections: pairs of a
    place's name and a title.
    """

    entry: Entry
    first: int
    pdf: Any
    places: dict
    sections: list


def print_page(page, entry, first, style="decimal"):
    """The bytes of a PDF of what the browser's page shows."""
    words = {"head": json.dumps(entry.title), "before": first - 1}
    page.emulate_media(media="print", color_scheme="light")
    page.add_style_tag(content=PAPER % (words | {"style": style}))
    page.evaluate(FIT)
    return page.pdf(prefer_css_page_size=True, print_background=True)


def print_entry(page, built, entry, first, ids):
    """Print an entry of the contents, numbered from `first`, as Sheets."""
    from pypdf import PdfReader

    open_page(page, built / entry.page)
    text = (built / entry.page).read_text("utf-8")
    own = re.findall(r'<section id="([^"]+)"', text)
    sections = page.evaluate(PLACES, sorted({*ids, *own}))
    pdf = PdfReader(io.BytesIO(print_page(page, entry, first)))
    places = {
        unquote(name.removeprefix("/")): (
            pdf.get_destination_page_number(x),
            float(x.get("/Top", 0)),
        )
        for name, x in pdf.named_destinations.items()
    }
    return Sheets(entry, first, pdf, places, sections)


# %% [markdown]
# Which places of a page do the others link to? Their text says so.

# %% places that others link to tags=["export"] module="book.pdf"
HREF = re.compile(r'href="([^"#:]+\.html)#([^"]+)"')


def linked_places(built, entries):
    """Dict from each entry's page to the places in it that others link to."""
    found = {x.page: set() for x in entries}
    top = built.resolve()
    for x in entries:
        path = top / x.page
        for link, place in HREF.findall(path.read_text("utf-8")):
            target = (path.parent / unquote(link)).resolve()
            if target.is_relative_to(top):
                page = target.relative_to(top).as_posix()
                found.get(page, set()).add(unquote(place))
    return found


# %% two pages that link
path = built / "notebooks/1_by_hand/06_layernorm.html"
path.write_text(
    page.format("LayerNorm", '<a href="../../book/notation.html#sizes">C</a>')
)
found = linked_places(built, read_contents(built))
verdict("a place", found["book/notation.html"] == {"sizes"}, "is linked to")

# %% [markdown]
# ## The first sheets
#
# A title page and the contents, whose page numbers are known when all else is
# printed. They are numbered in Roman numerals, so that the number of a chapter's page
# does not depend on them. Their text replaces the article of the book's first page,
# whose look they get in that way.

# %% the contents tags=["export"] module="book.pdf"
FRONT = """
<style>
.front-title { height: 200mm; padding-top: 60mm; break-after: page; }
.front-title h1 { font-size: 2.6rem !important; }
.front-row { display: flex; gap: 0.5em; margin: 0 0 0.15em; }
.front-row i { flex: 1; border-bottom: 1px dotted #8893a0; height: 1em; }
.front-row a { color: inherit; }
</style>
<div class="front-title"><h1>%s</h1>
<p>GPT-2, derived, proved and trained: one layer a chapter. %s</p></div>
<h2>Contents</h2>
"""


def front_matter(built, printed, part=""):
    """The HTML of the title page and the contents; printed: list of Sheets."""
    captions = [x.entry.part for x in printed if x.entry.part]
    text = FRONT % (escape(TITLE), escape(captions[0] if part else ""))
    for caption, rows in groupby(printed, key=lambda x: x.entry.part):
        text += f"<h3>{escape(caption)}</h3>\n" if caption else ""
        for x in rows:
            link = (built / x.entry.page).resolve().as_uri()
            words = f'<a href="{link}">{escape(x.entry.title)}</a>'
            row = f"{words}<i></i><span>{x.first}</span>"
            text += f'<div class="front-row">{row}</div>\n'
    return text


# %% [markdown]
# ## All in one
#
# `pypdf` copies the sheets into one file. There every link is made anew: a chapter's
# link to itself is by name, and each chapter has a place named *setup*; a link to
# another chapter is the path of a file on the machine that printed it. Both become a
# sheet and a height. A link to a page that is not in the edition is no link on paper.

# %% where a link leads tags=["export"] module="book.pdf"
def place_of(link, built, own, printed):
    """The sheet and height that a link's annotation leads to.

    own: the Sheets that it stands on. printed: dict from a page's path to its
    Sheets. Returns "away" for a link into the web, None for one that leads
    nowhere in this edition.
    """
    address = link.get("/A", {}).get("/URI")
    place = str(link.get("/Dest", "")).removeprefix("/")
    if address is not None:
        address, place = urldefrag(str(address))
        top = built.resolve().as_uri() + "/"
        if not address.startswith("file:"):
            return "away"
        own = printed.get(unquote(address.removeprefix(top)))
    if own is None or link["/Rect"][3] - link["/Rect"][1] < 2:
        return None
    sheet, height = own.places.get(unquote(place), (0, None))
    return own.first - 1 + sheet, height


def lead(writer, links, before, built, own, printed):
    """The annotations of a sheet, each led to its place in the whole."""
    from pypdf.generic import ArrayObject, FloatObject, NameObject, NullObject

    kept = ArrayObject()
    for link in links:
        a = link.get_object()
        place = place_of(a, built, own, printed)
        if place not in ("away", None):
            sheet, height = place
            top = NullObject() if height is None else FloatObject(height)
            page = writer.pages[before + sheet].indirect_reference
            how = [NameObject("/XYZ"), NullObject(), top, NullObject()]
            a[NameObject("/Dest")] = ArrayObject([page, *how])
            a.pop("/A", None)
        if place is not None:
            kept.append(link)
    return kept


# %% [markdown]
# The outline, which a viewer shows beside the pages, has the parts, their chapters and
# the chapters' sections.

# %% the outline tags=["export"] module="book.pdf"
def add_outline(writer, before, printed):
    """Parts, chapters and sections as the outline of a PDF."""
    from pypdf.generic import Fit

    for caption, chapters in groupby(printed, key=lambda x: x.entry.part):
        parent = None
        for x in chapters:
            start = before + x.first - 1
            if caption and parent is None:
                parent = writer.add_outline_item(caption, start)
            chapter = writer.add_outline_item(
                x.entry.title, start, parent=parent
            )
            for name, title in x.sections:
                sheet, height = x.places.get(name, (0, None))
                fit = Fit.xyz(top=height)
                writer.add_outline_item(
                    title, start + sheet, parent=chapter, fit=fit
                )


def merge(front, printed, built):
    """One PDF of the front matter, a PdfReader, and a list of Sheets."""
    from pypdf import PdfWriter
    from pypdf.generic import NameObject, TextStringObject

    writer, before = PdfWriter(), len(front.pages)
    first = Sheets(printed[0].entry, 1 - before, front, {}, [])
    for x in [first, *printed]:
        for sheet in x.pdf.pages:
            writer.add_page(sheet)
    pages = {x.entry.page: x for x in printed}
    for x in [first, *printed]:
        start = before + x.first - 1
        for sheet in writer.pages[start : start + len(x.pdf.pages)]:
            links = sheet.get("/Annots", [])
            kept = lead(writer, links, before, built, x, pages)
            sheet[NameObject("/Annots")] = kept
    add_outline(writer, before, printed)
    writer.add_metadata({"/Title": TITLE})
    writer.root_object[NameObject("/Lang")] = TextStringObject("en")
    writer.page_mode = "/UseOutlines"
    writer.set_page_label(0, before - 1, style="/r")
    writer.set_page_label(before, len(writer.pages) - 1, style="/D")
    writer.compress_identical_objects()
    return writer


# %% the command tags=["export"] module="book.pdf"
def make_pdf(built, path, part=""):
    """Print the built book, or a part of it, into one PDF.

    built: the folder of `make book`. part: such as "1", or "A"; all else.
    """
    from pypdf import PdfReader

    entries = read_contents(built, part)
    if not entries:
        sys.exit(f"no page of part {part!r} in {built}: run `make book`")
    ids, printed, first = linked_places(built, entries), [], 1
    with open_browser() as page:
        for entry in entries:
            x = print_entry(page, built, entry, first, ids[entry.page])
            print(f"{first:5}  {entry.title}", flush=True)
            printed.append(x)
            first += len(x.pdf.pages)
        open_page(page, built / entries[0].page)
        fill = "x => document.querySelector('article').innerHTML = x"
        page.evaluate(fill, front_matter(built, printed, part))
        cover = Entry("", "Contents", "")
        front = print_page(page, cover, 1, "lower-roman")
    merge(PdfReader(io.BytesIO(front)), printed, built).write(path)


def main(argv=None):
    """Print the built book into build/llmnb.pdf, or one part of it."""
    part = "".join(sys.argv[1:] if argv is None else argv)
    name = f"llmnb-part-{part}.pdf" if part else "llmnb.pdf"
    (ROOT / "build").mkdir(exist_ok=True)
    make_pdf(BUILT, ROOT / "build" / name, part)
    print(ROOT / "build" / name)
