# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.pages: "The built book's pages in order, and a browser to read them."
#       book.epub: "The book for a reading device: an ePub without a script."
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
from pathlib import Path

from llmnb.book.verify import verdict

# %% imports of the pages tags=["export"]
import html
import re
import shutil
from contextlib import contextmanager
from typing import NamedTuple

import yaml

from llmnb.book.export import ROOT

# %% [markdown]
# ## The pages in order
#
# The contents of the book are in `book/_toc.yml`. Which of its pages go into an
# edition? All that are built, but the reference of the package: every docstring
# there stands in a chapter already. A part alone is chosen by the first letter of
# its chapters' numbers.

# %% the pages in order tags=["export"]
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

    own = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        launch = playwright.chromium.launch
        browser = launch(executable_path=own, args=["--no-sandbox"])
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
# add links that nobody sees, and take them away later. And every chapter has a place
# named *setup*; so before it is printed, a place gets its page's path before its name.

# %% imports of the PDF tags=["export"] module="book.pdf"
import io
import json
import re
import sys
from html import escape
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import unquote

from llmnb.book.pages import (
    BUILT,
    ROOT,
    TITLE,
    Entry,
    open_browser,
    open_page,
    read_contents,
)
from llmnb.files import replacing

# %% one chapter on paper tags=["exporti"] module="book.pdf"
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
# marks the places that the page links to, and these others, by names that
# begin with the page's path; links to the others, unseen; returns the sections
PLACES = """([page, ids]) => {
    const article = document.querySelector("article");
    const named = id => id ? page + "#" + id : page;
    const own = [...article.querySelectorAll("a[href^='#']")];
    const links = own.map(x => [x, decodeURIComponent(x.hash.slice(1))]);
    for (const id of new Set([...links.map(x => x[1]), ...ids, ""])) {
        const mark = document.createElement("span");
        mark.id = named(id);
        mark.style.position = "absolute";
        (id ? document.getElementById(id) : article)?.prepend(mark);
    }
    for (const [link, id] of links) link.href = "#" + named(id);
    for (const id of ["", ...ids]) {
        const link = document.createElement("a");
        link.href = "#" + named(id);
        link.className = "place";
        link.textContent = ".";
        document.body.append(link);
    }
    return [...article.querySelectorAll("section > h2")].map(x =>
        [named(x.parentElement.id), x.textContent.replace(/#$/, "").trim()]);
}"""


class Sheets(NamedTuple):
    """A printed page of the book.

    first: the number of its first sheet. pdf: a PdfReader. sections: pairs
    of a place's name and a title.
    """

    entry: Entry
    first: int
    pdf: Any
    sections: list


def print_page(page, title, first, style="decimal"):
    """The bytes of a PDF of what the browser's page shows."""
    words = {"head": json.dumps(title), "before": first - 1, "style": style}
    page.emulate_media(media="print", color_scheme="light")
    page.add_style_tag(content=PAPER % words)
    page.evaluate(FIT)
    return page.pdf(prefer_css_page_size=True, print_background=True)


def print_entry(page, built, entry, first, ids):
    """Print an entry of the contents, numbered from `first`, as Sheets."""
    from pypdf import PdfReader

    open_page(page, built / entry.page)
    text = (built / entry.page).read_text("utf-8")
    own = re.findall(r'<section id="([^"]+)"', text)
    sections = page.evaluate(PLACES, [entry.page, sorted({*ids, *own})])
    pdf = PdfReader(io.BytesIO(print_page(page, entry.title, first)))
    return Sheets(entry, first, pdf, sections)


# %% [markdown]
# Which places of a page do the others link to? Their text says so.

# %% places that others link to tags=["exporti"] module="book.pdf"
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

# %% the contents tags=["exporti"] module="book.pdf"
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
# `pypdf` appends one file to another, with the names of its places. A chapter's links
# to itself stay what they are. A link to another chapter is the path of a file on the
# machine that printed it: the path below the book's folder is the name that the place
# was given. A link to a page that is not in the edition is no link on paper.


# %% where a link leads tags=["exporti"] module="book.pdf"
def lead(link, top, places):
    """Lead a link's annotation to its place; whether it stays a link.

    top: the address of the built book's folder. places: names in the edition.
    """
    from pypdf.generic import NameObject, TextStringObject

    address = str(link.get("/A", {}).get("/URI", ""))
    if address.startswith("file:"):
        name = unquote(address.removeprefix(top))
        if name not in places:
            return False
        link[NameObject("/Dest")] = TextStringObject(name)
        del link["/A"]
    return link["/Rect"][3] - link["/Rect"][1] > 2  # else one of PLACES


# %% [markdown]
# The outline, which a viewer shows beside the pages, has the parts, their chapters and
# the chapters' sections.


# %% the outline tags=["exporti"] module="book.pdf"
def add_outline(writer, before, printed):
    """Parts, chapters and sections as the outline of a PDF."""
    from pypdf.generic import Fit

    add = writer.add_outline_item
    for caption, chapters in groupby(printed, key=lambda x: x.entry.part):
        parent = None
        for x in chapters:
            start, places = before + x.first - 1, x.pdf.named_destinations
            if caption and parent is None:
                parent = add(title=caption, page_number=start)
            what = {"title": x.entry.title, "parent": parent}
            chapter = add(page_number=start, **what)
            for name, title in x.sections:
                place = places[f"/{name}"]
                sheet = start + x.pdf.get_destination_page_number(place)
                how = {"parent": chapter, "fit": Fit.xyz(top=place.top)}
                add(title=title, page_number=sheet, **how)


def merge(front, printed, built):
    """One PDF of the front matter, a PdfReader, and a list of Sheets."""
    from pypdf import PdfWriter
    from pypdf.generic import ArrayObject, NameObject, TextStringObject

    writer, before = PdfWriter(), len(front.pages)
    for pdf in [front, *(x.pdf for x in printed)]:
        writer.append(pdf, import_outline=False)
    top, places = built.resolve().as_uri(), {*writer.named_destinations}
    for sheet in writer.pages:
        links = sheet.get("/Annots", [])
        kept = [x for x in links if lead(x.get_object(), top, places)]
        sheet[NameObject("/Annots")] = ArrayObject(kept)
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
        front = print_page(page, "Contents", 1, "lower-roman")
    whole = merge(PdfReader(io.BytesIO(front)), printed, built)
    with replacing(path) as file:
        whole.write(file)


def main(argv=None):
    """Print the built book into build/llmnb.pdf, or one part of it."""
    part = "".join(sys.argv[1:] if argv is None else argv)
    name = f"llmnb-part-{part}.pdf" if part else "llmnb.pdf"
    (ROOT / "build").mkdir(exist_ok=True)
    make_pdf(BUILT, ROOT / "build" / name, part)
    print(ROOT / "build" / name)


# %% [markdown]
# ## An ePub
#
# An ePub is a zip file of web pages, strict ones: XHTML, no script, every file listed
# in a manifest, every page in the order of reading. A browser writes strict XHTML of
# whatever it shows. So each page is shown once more, its article is cleared of what
# needs a script or a pointer, and taken out.
#
# How should an equation travel? MathML is the ePub's own way, and a page that is drawn
# from it follows the reader's font. But many devices cannot draw it, and show the
# letters one after the other; that is worse than nothing. A drawing is shown by all
# of them. So MathJax is asked for drawings, SVG, and each keeps its TeX as the text
# that a screen reader says.

# %% imports of the ePub tags=["export"] module="book.epub"
import posixpath
import re
import sys
import zipfile
from datetime import UTC, datetime
from functools import partial
from html import escape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname
from uuid import NAMESPACE_URL, uuid5

from llmnb.book.pages import (
    BUILT,
    ROOT,
    TITLE,
    open_browser,
    open_page,
    read_contents,
)
from llmnb.files import replacing

# %% one page, cleared tags=["exporti"] module="book.epub"
# names: a dict from a page's address to its file in the ePub; returns the
# article as XHTML and the addresses of its images
TAKE = """names => {
    const article = document.querySelector("article.bd-article");
    const all = selector => [...article.querySelectorAll(selector)];
    const made = (tag, text) => Object.assign(
        document.createElement(tag), {textContent: text});
    // a figure keeps the colours and letters that the style sheets give it
    const shapes = ["fill", "fill-opacity", "stroke", "stroke-width",
        "stroke-opacity", "stroke-dasharray", "stroke-linejoin", "opacity"];
    const letters = ["font-family", "font-size", "font-weight",
        "font-style", "text-anchor", "dominant-baseline"];
    const painted = "g, use, path, rect, circle, ellipse, line, polyline, "
        + "polygon, text, tspan";
    const drawn = all("svg :is(" + painted + ")").filter(
        x => !x.closest("mjx-container, defs")).map(x => {
        const style = getComputedStyle(x);
        const written = ["text", "tspan"].includes(x.tagName);
        const looks = [...shapes, ...(written ? letters : [])];
        const seen = looks.map(look => [look, style.getPropertyValue(look)]);
        return [x, seen, style.display == "none"];
    });
    for (const [x, looks, hidden] of drawn) {
        if (hidden) x.remove();
        x.removeAttribute("style");
        for (const look of looks) x.setAttribute(...look);
    }
    // a fold needs no script; its title is plain text
    for (const x of all("details > summary"))
        x.replaceWith(made("summary", x.textContent.trim().split("\\n")[0]));
    for (const x of all(".admonition.dropdown")) {
        const title = x.querySelector(".admonition-title");
        const fold = document.createElement("details");
        const text = title.childNodes[0].textContent;
        title.remove();
        fold.append(made("summary", text), ...x.childNodes);
        x.replaceWith(fold);
    }
    for (const x of all(".math")) {
        const box = x.querySelector("mjx-container"), tex = x.dataset.tex;
        if (!tex) continue;
        // a number that is drawn keeps the drawing from shrinking
        const tags = tex.match(/\\\\tag\\{[^}]*\\}/g) || [];
        const display = box.getAttribute("display") == "true";
        const shown = tags.length != 1 ? box
            : MathJax.tex2svg(tex.replace(tags[0], ""), {display});
        const svg = shown.querySelector("svg");
        const whole = made("span", "");
        if (display) whole.className = "display";
        svg.setAttribute("aria-label", tex);
        whole.append(svg);
        if (tags.length == 1)
            whole.append("\\u2003(" + tags[0].slice(5, -1) + ")");
        x.replaceChildren(whole);
    }
    // a device may know no variables: a figure takes its colours along
    const colours = getComputedStyle(document.documentElement);
    const value = (_, name) => colours.getPropertyValue(name).trim();
    for (const x of all("svg.drawing"))
        x.style.removeProperty("--least");
    for (const x of all("svg.drawing [style]"))
        x.setAttribute("style", x.getAttribute("style")
            .replace(/var\\((--[a-z]+-[a-z]+)\\)/g, value));
    all("script, style, link, button, canvas, input, select, textarea, form, "
        + "iframe, audio, video, object, template, noscript, dialog, label, "
        + ".headerlink, .visually-hidden, .noprint, [hidden], "
        + ".live > :not(.live-print)")
        .forEach(x => x.remove());
    for (const x of all("a")) {
        const url = x.href.split("#")[0], place = x.hash;
        if (url in names)
            x.setAttribute("href", names[url] + place);
        else if (!/^https?:/.test(x.href)) x.replaceWith(...x.childNodes);
    }
    const images = all("img").map(x => {
        const url = x.src;
        for (const a of [...x.attributes])
            if (!["src", "alt"].includes(a.name)) x.removeAttribute(a.name);
        if (!url.startsWith("data:"))
            x.setAttribute("src", "images/" + url.split("/").pop());
        return url;
    });
    const away = new RegExp(
        "^(on|data-|tabindex|translate|border|align|valign|role$|focus)");
    for (const x of [article, ...all("*")])
        for (const a of [...x.attributes])
            if (away.test(a.name) || a.name == "style" && !x.closest("svg"))
                x.removeAttribute(a.name);
    all("svg[aria-label]").forEach(x => x.setAttribute("role", "img"));
    // a space has an outline of nothing, which has to be said
    all("path:not([d])").forEach(x => x.setAttribute("d", "M0 0"));
    return [new XMLSerializer().serializeToString(article), images];
}"""
# MathJax's own TeX of each equation, kept where TAKE finds it
KEEP_TEX = """() => {
    for (const item of MathJax.startup.document.math)
        item.typesetRoot.closest(".math").dataset.tex = item.math.trim();
}"""
# characters that a program may print, and that no XML may hold
FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml"
 xmlns:epub="http://www.idpf.org/2007/ops" lang="en" xml:lang="en">
<head><title>{title}</title>
<link rel="stylesheet" type="text/css" href="style.css"/></head>
<body>{body}</body></html>
"""
SHEET = """
body { line-height: 1.45; }
h1, h2, h3 { line-height: 1.2; text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8em; }
code, pre { font-family: monospace; }
div.highlight { border-left: 0.2em solid #ccd3da; padding-left: 0.6em; }
.tag_export div.cell_input, .tag_exporti div.cell_input {
    border-left: 0.3em solid #d95f02; padding-left: 0.4em; }
.export-label, .figure-caption, summary { font-size: 0.85em; }
.chapter-number { display: block; font-size: 0.5em; }
img, svg { max-width: 100%; }
svg.glyphs { display: block; width: 0; height: 0; }
span.display svg { height: auto; }
span.display { display: block; text-align: center; margin: 0.8em 0; }
table { border-collapse: collapse; font-size: 0.85em; }
th, td { border-bottom: 1px solid #ccd3da; padding: 0.2em 0.6em 0.2em 0; }
"""


def file_of(entry):
    """The name of an entry's file in the ePub."""
    stem = entry.page.removesuffix(".html")
    stem = stem.removeprefix("notebooks/").removeprefix("book/")
    return "p-" + re.sub(r"\W+", "-", stem) + ".xhtml"


def take_page(page, built, entry, names):
    """An entry's article as XHTML, and the paths of its images."""
    open_page(page, built / entry.page)
    if page.evaluate("!!window.MathJax?.startup?.document"):
        page.evaluate(KEEP_TEX)
    body, images = page.evaluate(TAKE, names)
    body = FORBIDDEN.sub("\ufffd", body)
    paths = [
        url2pathname(urlsplit(x).path) for x in images if x[:5] == "file:"
    ]
    text = PAGE.format(title=escape(entry.title), body=body)
    return text, [Path(x) for x in paths]


# %% [markdown]
# A link may lead to a place that was cleared away with a button. Those links lose
# their end: they lead to the page.


# %% links that lead somewhere tags=["exporti"] module="book.epub"
def mend_links(pages):
    """Take off the ends of links to places that no page has.

    pages: dict from a file's name to its text. Returns such a dict.
    """
    places = {
        name: set(re.findall(r'\bid="([^"]+)"', text))
        for name, text in pages.items()
    }

    def mended(name, link):
        file, _, place = link[1].partition("#")
        there = unquote(place) in places.get(file or name, ())
        return link[0] if there else f'href="{file or name}"'

    link = re.compile(r'href="((?:p-[^"#]*)?#[^"]*)"')
    return {
        name: link.sub(partial(mended, name), text)
        for name, text in pages.items()
    }


# %% two small pages
small = {
    "p-a.xhtml": '<a href="p-b.xhtml#here">b</a> <a href="#gone">a</a>',
    "p-b.xhtml": '<p id="here">b</p>',
}
mended = mend_links(small)["p-a.xhtml"]
print(mended)
verdict("a link", "p-b.xhtml#here" in mended, "keeps an end that is there")
verdict("another", "gone" not in mended, "loses one that is not")

# %% [markdown]
# ## The package
#
# One file lists all others, with their kinds, and then the pages in order. Another is
# the table of contents. The identifier stays the same from edition to edition, since
# a device keeps your place by it.

# %% contents and manifest tags=["exporti"] module="book.epub"
KINDS = {
    ".xhtml": "application/xhtml+xml",
    ".css": "text/css",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
PACKAGE = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0"
 unique-identifier="id" xml:lang="en">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">urn:uuid:{id}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:language>en</dc:language>
<dc:rights>MIT licence</dc:rights>
<meta property="dcterms:modified">{when}</meta>
<meta property="schema:accessMode">textual</meta>
<meta property="schema:accessMode">visual</meta>
<meta property="schema:accessModeSufficient">textual</meta>
<meta property="schema:accessibilityFeature">tableOfContents</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
<meta property="schema:accessibilityHazard">none</meta>
<meta property="schema:accessibilitySummary">Equations are drawings that carry
their TeX as alternative text; figures carry their captions.</meta>
</metadata>
<manifest>
{items}
</manifest>
<spine>
<itemref idref="nav.xhtml"/>
{order}
</spine>
</package>
"""
CONTAINER = """<?xml version="1.0" encoding="utf-8"?>
<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"
 version="1.0"><rootfiles><rootfile full-path="book/package.opf"
 media-type="application/oebps-package+xml"/></rootfiles></container>
"""


def navigation(entries):
    """The contents page: a list of the parts and their chapters."""
    rows = []
    for part, inside in groupby(entries, key=lambda x: x.part):
        rows += [f"<li><span>{escape(part)}</span><ol>"] if part else []
        for x in inside:
            link = f'<a href="{file_of(x)}">{escape(x.title)}</a>'
            rows += [f"<li>{link}</li>"]
        rows += ["</ol></li>"] if part else []
    body = f"<h1>{TITLE}</h1>" + '<nav epub:type="toc"><h2>Contents</h2><ol>'
    body += "\n".join(rows) + "</ol></nav>"
    return PAGE.format(title="Contents", body=body)


def manifest(files):
    """The lines of the manifest for a dict from names to contents."""
    for name, text in files.items():
        drawn = name.endswith(".xhtml") and "<svg" in text
        more = ' properties="svg"' if drawn else ""
        more = ' properties="nav"' if name == "nav.xhtml" else more
        what = f'id="{name.replace("/", "-")}"{more}'
        kind = KINDS[posixpath.splitext(name)[1]]
        yield f'<item {what} href="{name}" media-type="{kind}"/>'


# %% the file tags=["exporti"] module="book.epub"
def write_epub(path, files, entries, when):
    """Write an ePub of files, a dict from names to texts or bytes.

    entries: those whose pages are among the files, in order. when: the time
    of the edition, a datetime in UTC.
    """
    files = {"nav.xhtml": navigation(entries), "style.css": SHEET, **files}
    package = PACKAGE.format(
        id=uuid5(NAMESPACE_URL, "https://llmnb"),
        title=escape(TITLE),
        when=when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        items="\n".join(manifest(files)),
        order="\n".join(f'<itemref idref="{file_of(x)}"/>' for x in entries),
    )
    whole = {"META-INF/container.xml": CONTAINER, "book/package.opf": package}
    whole |= {f"book/{name}": data for name, data in files.items()}
    how = "w", zipfile.ZIP_DEFLATED
    with replacing(path) as file, zipfile.ZipFile(file, *how) as z:
        # the first file says what the zip is, and is not packed
        z.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        for name, data in whole.items():
            z.writestr(name, data)


# %% an ePub of one page
here = [x for x in read_contents(built) if x.title == "Notation"]
name, body = file_of(here[0]), "<h1>Notation</h1>"
text = PAGE.format(title="Notation", body=body)
write_epub(built / "a.epub", {name: text}, here, datetime(2026, 1, 1))
with zipfile.ZipFile(built / "a.epub") as z:
    print(*z.namelist())
    first = z.read(z.namelist()[0])
verdict("the first file", first == b"application/epub+zip", "says what it is")

# %% [markdown]
# ## All pages, packed
#
# MathJax comes in several builds that differ in what they write. The pages ask for
# the one that sets fonts; here the browser is given the one that draws.


# %% the command tags=["export"] module="book.epub"
def make_epub(built, path):
    """Pack the built book, a folder of `make book`, into one ePub."""
    entries = read_contents(built)
    if not entries:
        sys.exit(f"no page in {built}: run `make book`")
    names = {(built / x.page).resolve().as_uri(): file_of(x) for x in entries}
    pages, images = {}, {}
    with open_browser() as page:
        mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent
        draws = mathjax / "static" / "mathjax" / "tex-svg.js"
        page.route("**/mathjax/*.js*", lambda x: x.fulfill(path=draws))
        for x in entries:
            print(x.title, flush=True)
            pages[file_of(x)], paths = take_page(page, built, x, names)
            images |= {f"images/{p.name}": p.read_bytes() for p in paths}
    newest = max((built / x.page).stat().st_mtime for x in entries)
    when = datetime.fromtimestamp(int(newest), UTC)
    write_epub(path, mend_links(pages) | images, entries, when)


def main(argv=None):
    """Pack the built book into build/llmnb.epub."""
    (ROOT / "build").mkdir(exist_ok=True)
    make_epub(BUILT, ROOT / "build" / "llmnb.epub")
    print(ROOT / "build" / "llmnb.epub")


# %% [markdown]
# ## Take away
#
# - A browser that shows a page right can print it right, and can write it as XHTML.
# - Links and page numbers are made last, when every page's place is known.
# - Give every device what it can surely show: drawings, folds that fall open, text.
#
# ## Exercises
#
# **1** (★★). `mend_links` is given pages whose names all begin with `p-`. What does
# it do to a link into the web that ends in `#part`, and why?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The pattern wants `p-` or nothing before the `#`, so an address does not match.
# :::

# %% exercise 1, checked
web = {"p-a.xhtml": '<a href="https://example.org/x#part">x</a>'}
verdict("the web", mend_links(web) == web, "is left alone")
folder.cleanup()

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.15")
