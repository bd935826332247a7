# Written by `make export` from notebooks/appendix/15_editions.py: edit that file.

"""The book on paper: chapters printed by a browser, and merged."""

__all__ = ["main", "make_pdf"]


# imports of the PDF
import io
import json
import re
import sys
from html import escape
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import unquote

from llmnb.book.pages import (
    BUILT, ROOT, TITLE, Entry, open_browser, open_page, read_contents,
)
from llmnb.files import replacing


# one chapter on paper
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


# places that others link to
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


# the contents
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


# where a link leads
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


# the outline
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


# the command
def make_pdf(built, path, part=""):
    """Print the built book, or a part of it, into one PDF.

    built: the folder of `make book`. part: such as "1", or "A"; all else.

    Derived in chapter A.15.
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
    """Print the built book into build/llmnb.pdf, or one part of it.

    Derived in chapter A.15.
    """
    part = "".join(sys.argv[1:] if argv is None else argv)
    name = f"llmnb-part-{part}.pdf" if part else "llmnb.pdf"
    (ROOT / "build").mkdir(exist_ok=True)
    make_pdf(BUILT, ROOT / "build" / name, part)
    print(ROOT / "build" / name)


if __name__ == "__main__":
    main()
