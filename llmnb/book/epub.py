# Written by `make export` from notebooks/appendix/15_editions.py: edit that file.

"""The book for a reading device: an ePub without a script."""

__all__ = ["main", "make_epub"]


# imports of the ePub
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
    BUILT, ROOT, TITLE, open_browser, open_page, read_contents,
)
from llmnb.files import replacing


# one page, cleared
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


# links that lead somewhere
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


# contents and manifest
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


# the file
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


# the command
def make_epub(built, path):
    """Pack the built book, a folder of `make book`, into one ePub.

    Derived in chapter A.15.
    """
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
    """Pack the built book into build/llmnb.epub.

    Derived in chapter A.15.
    """
    (ROOT / "build").mkdir(exist_ok=True)
    make_epub(BUILT, ROOT / "build" / "llmnb.epub")
    print(ROOT / "build" / "llmnb.epub")


if __name__ == "__main__":
    main()
