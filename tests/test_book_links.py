# ruff: noqa: F401, F811, I001 (fixtures of test_book.py)
"""Links with cards, search, names and weight of the rendered book.

The fixtures are those of test_book.py, and so is what is skipped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_book import BOOK, CHAPTERS, HTML, LAYERNORM, ROOT, Page, Visit
from test_book import browser, built, narrow, place, scheme, visit
from test_book import why_not_built, width

from llmnb.book.export import chapter_label

CARD = ".preview-card"
MOST_BYTES, MOST_REQUESTS = 1_200_000, 15


# The sources


def test_a_line_of_references_is_cut_at_each():
    links = pytest.importorskip("links")
    text = "By (1.6.1), figures 1.6.2 and 1.6.3 and chapters 1.5 to 1.7."
    targets = object.__new__(links.Targets)
    targets.address = lambda kind, number, page: f"{kind} {number}"
    found = [x for x in targets.split(text, "here") if x[1]]
    assert found == [
        ("(1.6.1)", "eq 1.6.1"),
        ("figures 1.6.2", "fig 1.6.2"),
        ("1.6.3", "fig 1.6.3"),
        ("chapters 1.5", "chapter 1.5"),
        ("1.7", "chapter 1.7"),
    ]
    assert "".join(x for x, _ in targets.split(text, "here")) == text


def test_a_reference_may_reach_over_the_end_of_a_line():
    links = pytest.importorskip("links")
    from docutils.core import publish_doctree
    from docutils.nodes import reference

    parser = pytest.importorskip("myst_parser.docutils_").Parser()
    text = "A tree (chapter\n4.13), in figure\n6.1.1;\nand a line."
    page = publish_doctree(text, parser=parser)
    targets = object.__new__(links.Targets)
    targets.address = lambda kind, number, page: f"{kind} {number}"
    links.link_text(page, "here", targets)
    found = {x.astext(): x["refuri"] for x in page.findall(reference)}
    assert found == {
        "chapter\n4.13": "chapter 4.13", "figure\n6.1.1": "fig 6.1.1",
    }  # fmt: skip
    assert page.astext() == text


def test_docstrings_become_lists():
    ext = pytest.importorskip("docstrings")
    text = "out, inp: (B, T, C). All of one dtype. Raises ValueError if not."
    assert [*ext.split(text)] == [
        ("``out``, ``inp``", "(B, T, C)."),
        (None, "All of one dtype."),
        ("Raises", "ValueError if not."),
    ]
    block = "out   (B, T)   float, written\nwte   (V, C)   the table"
    assert ext.columns(block) == [
        ("``out``", "(B, T), float, written"),
        ("``wte``", "(V, C), the table"),
    ]
    assert ext.columns("One line.\nAnother line.") is None
    # a name in backticks may reach over the end of a line
    lines = ext.block_lines("Computes `a +\nb` at once.")
    assert "``a + b``" in "\n".join(lines)


def test_styles_are_pruned_by_the_classes_in_use():
    weight = pytest.importorskip("weight")
    css = "@import 'x';a{b:c}.on,.off{b:c}.off a{b:c}"
    css += "@media print{.off{b:c}.on:not(.off){b:c}}.fa-x{b:c}"
    want = "a{b:c}.on{b:c}@media print{.on:not(.off){b:c}}"
    assert weight.prune(css, {"on", "fa-x"}) == want
    css = 'x{--pst-a:url("data:b;c");--pst-d:e;--pst-f:var(--pst-a)}'
    css += "y{c:var(--pst-d)}"
    want = "x{--pst-d:e;}y{c:var(--pst-d)}"
    assert weight.drop_variables(css, "") == want
    css = 'url("../a.woff2") url(data:x) url(/b) url(c.png)'
    want = 'url("a.woff2") url(data:x) url(/b) url(styles/c.png)'
    assert weight.move_addresses(css, "styles") == want


def test_no_line_ends_inside_a_short_tuple_of_a_table():
    weight = pytest.importorskip("weight")

    def kept(text):
        return weight.keep_tuples(re.match("(?s).*", text))

    whole = '<td><p><span class="whole">(L, B, T)</span>, twice</p></td>'
    assert kept("<td><p>(L, B, T), twice</p></td>") == whole
    for same in (
        "<td><p>(max_seq_len, channels)</p></td>",
        r'<td><span class="math">\((B, T)\)</span></td>',
        '<td><a title="(B, T)">a</a></td>',
    ):
        assert kept(same) == same


def test_the_card_for_messages_has_its_size():
    data = (BOOK / "_static" / "card.png").read_bytes()
    size = [int.from_bytes(data[i : i + 4]) for i in (16, 20)]
    assert size == [1200, 630]


# A small book with an address and a reference that leads nowhere


def copy_book(folder):
    """The book's files in a folder, with one chapter that can be changed."""
    skip = shutil.ignore_patterns("_build", "__pycache__", "*.pdf")
    shutil.copytree(BOOK, folder / "book", ignore=skip)
    (folder / "llmnb").symlink_to(ROOT / "llmnb")
    for path in [*CHAPTERS, CHAPTERS[0].with_suffix(".ipynb")]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder / CHAPTERS[0].with_suffix(".ipynb").relative_to(ROOT)


def test_an_address_adds_buttons_and_a_dead_reference_is_told(tmp_path):
    pytest.importorskip("jupyter_book")
    notebook = copy_book(tmp_path)
    text = notebook.read_text("utf-8")
    assert "(1.1.4)" in text
    notebook.write_text(text.replace("(1.1.4)", "(1.1.99)"), "utf-8")
    config = tmp_path / "book" / "_config.yml"
    text = config.read_text("utf-8")
    text = text.replace("\nhtml:\n", "\nhtml:\n  baseurl: https://x.test/b/\n")
    text += "\nrepository: {url: https://github.com/some/book, branch: main}\n"
    config.write_text(text, "utf-8")
    chapter = place(CHAPTERS[0])
    toc = f"format: jb-book\nroot: notebooks/{chapter}\n"
    (tmp_path / "toc.yml").write_text(toc)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", "."]
    command += ["--config", "book/_config.yml", "--toc", "toc.yml", "-q"]
    command += ["--path-output", "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    told = done.stdout + done.stderr
    assert "there is no equation 1.1.99" in told
    page = tmp_path / f"out/_build/html/notebooks/{chapter}.html"
    text = page.read_text("utf-8")
    place_ = f"main?urlpath=lab/tree/notebooks/{chapter}.ipynb"
    assert f"https://mybinder.org/v2/gh/some/book/{place_}" in text
    assert "https://colab.research.google.com/github/some/book" in text
    assert (
        f'rel="canonical" href="https://x.test/b/notebooks/{chapter}' in text
    )
    assert 'content="https://x.test/b/_static/card.png"' in text


# The built pages, as files


@pytest.fixture(scope="module")
def subjects():
    """Each chapter's page and its numbered name, from the contents."""
    text = (BOOK / "_toc.yml").read_text("utf-8")
    found = re.findall(r'file: (notebooks/.+)\n +title: "(.+)"', text)
    assert len(found) == len(CHAPTERS)
    return {f"{page}.html": name for page, name in found}


def plain(html):
    return " ".join(re.sub(r"<[^>]+>", "", html).split())


def test_no_two_chapters_have_one_name(subjects):
    names = sorted(x.split(" ", 1)[1] for x in subjects.values())
    assert names == sorted(set(names))


def test_a_chapter_has_one_name_everywhere(built, subjects):
    for page, name in subjects.items():
        if page not in built:
            pytest.skip("a book of some chapters only")
        text = (HTML / page).read_text("utf-8")
        article = text[text.index("<article") :]
        title, heading, current = (
            plain(re.search(rf"(?s){begin}(.+?){end}", where)[1])
            for begin, end, where in (
                ("<title>", "</title>", text),
                ("<h1>", "</h1>", article),
                ('class="current reference[^>]*>', "</a>", text),
            )
        )
        assert title.startswith(name)
        assert heading.startswith(f"Chapter {name.split()[0]} "), heading
        assert current == name
        for link in re.findall(r'class="prev-next-title">(.+?)</p>', text):
            assert not re.match(r".*: ", plain(link)), (page, link)


def test_the_first_page_leads_to_the_first_chapter(built, subjects):
    text = (HTML / "book" / "intro.html").read_text("utf-8")
    link = re.search(r'<a class="right-next"\s+href="([^"]+)"', text)[1]
    assert "notebooks/1_by_hand/01_" in link


def test_index_html_says_what_it_is(built):
    page = Page(HTML / "index.html")
    assert page.title
    assert len(page.description) > 60
    assert "book/intro.html" in page.links


def test_a_word_of_the_glossary_is_a_link_where_it_is_explained(built):
    """Unless its chapter says it in other words."""
    text = (HTML / "book" / "glossary.html").read_text("utf-8")
    entries = re.findall(r'(?s)<dt id="(term-.+?)">.+?<dd>(.+?)</dd>', text)
    linked = {}
    for name, entry in entries:
        home = re.search(r'href="\.\./([^"]+)"', entry)[1]
        if home in built:
            links = {x.rpartition("#")[2] for x in built[home].links}
            linked[name] = name in links
    assert sum(linked.values()) >= 0.8 * len(linked), linked
    assert linked["term-warp"]
    assert linked["term-key-value-cache-KV-cache"]


def test_equations_and_figures_have_ids_and_links(built):
    for path in CHAPTERS:
        name = f"notebooks/{place(path)}.html"
        if name not in built:
            continue
        text, label = path.read_text("utf-8"), chapter_label(path)
        for kind, pattern in (
            ("eq", rf"\\tag\{{({re.escape(label)}\.\d+)\}}"),
            ("fig", rf"^# \*?Figure ({re.escape(label)}\.\d+)\."),
        ):
            for number in re.findall(pattern, text, re.M):
                want = f"{kind}-{number.replace('.', '-')}"
                assert want in built[name].ids, (name, want)


def test_heads_tell_what_a_message_shows(built):
    text = (HTML / LAYERNORM).read_text("utf-8")
    for name in ("title", "description", "image"):
        assert f'property="og:{name}" content="' in text
    assert "canonical" not in text
    assert "mybinder" not in text


def test_every_icon_that_a_page_asks_for_is_drawn(built):
    drawn = (BOOK / "_static" / "icons.css").read_text("utf-8")
    for name, page in built.items():
        for classes in page.classes:
            if {"fas", "fa-solid"} & set(classes):
                icons = {x for x in classes if x.startswith("fa-")}
                for icon in icons - {"fa-solid", "fa-lg"}:
                    assert f".{icon} {{ --icon" in drawn, (name, icon)


def test_search_data_is_small(built):
    assert (HTML / "_static/search-data.js").stat().st_size < 1_500_000


# The built pages, in a browser, from the disk


@pytest.fixture(scope="module")
def address():
    if why_not_built():
        pytest.skip(why_not_built())
    return HTML.resolve().as_uri()


LEARNS, ATTENTION = (
    f"notebooks/1_by_hand/{x}.html" for x in ("01_learns", "08_attention")
)
# a page, a link on it, what its card says and shows
CARDS = (
    (LAYERNORM, 'a[href="#eq-1-6-10"]', "(1.6.10) · 1.6 LayerNorm",
     "mjx-container"),
    (LAYERNORM, 'a[href="#fig-1-6-4"]', "Figure 1.6.4. LayerNorm with three",
     "img, svg"),
    (LAYERNORM, 'article p a[href="05_encoder.html"]',
     "1.5 Encoder", "p"),
    (LEARNS, "article a[href*='#term-']", "", ".card-text"),
    (ATTENTION, "a.api-name[href*='attention']", None, ".card-code"),
)  # fmt: skip


def test_a_link_shows_a_card_of_its_target(visit):
    """That of a name shows the name."""
    for name, link, text, inside in CARDS:
        page = visit.open(name)
        link = page.locator(link).first
        link.hover()
        page.wait_for_selector(f"{CARD} :is({inside})")
        text = link.inner_text() if text is None else text
        assert text in page.locator(CARD).inner_text()
        box = page.locator(CARD).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
        page.keyboard.press("Escape")
        assert page.locator(CARD).count() == 0
    assert visit.trouble == []


@pytest.mark.parametrize("width, scheme", [(390, "dark")])
def test_a_card_opens_by_keyboard_and_is_named(visit):
    page = visit.open(LAYERNORM)
    page.keyboard.press("Tab")  # so that focus comes from the keyboard
    page.locator('a[href="#eq-1-6-10"]').first.focus()
    page.wait_for_selector(f"{CARD} mjx-container")
    link = page.locator("[aria-describedby=preview-card]")
    assert link.get_attribute("href") == "#eq-1-6-10"
    box = page.locator(CARD).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_comments_in_code_link_to_equations(visit):
    page = visit.open(LEARNS)
    links = page.locator(".highlight .c1 a[href='#eq-1-1-6']")
    assert links.count() >= 2
    if not (HTML / "notebooks/1_by_hand/07_matmul.html").exists():
        pytest.skip("a book of some chapters only")
    page = visit.open("_modules/llmnb/reference/matmul.html")
    links = page.locator(".highlight a[href*='#eq-1-7-']")
    assert links.count() >= 1


def test_a_tap_follows_the_link(browser, address):
    with Visit(browser, address, 390, has_touch=True) as visit:
        page = visit.open(LAYERNORM)
        page.locator("article p a[href='05_encoder.html']").first.tap()
        page.wait_for_url("**/05_encoder.html")
        assert page.locator(CARD).count() == 0


SEARCHES = {
    "how do I train": ["1.18 Training"],
    "attention": ["1.8 Attention"],
    "layernorm_backward": ["1.6 LayerNorm", "layernorm_backward"],
    "tokens": ["1.2 Tokens"],
    "attention backward": ["Backward, derived"],
    "fine-tune": ["4.18 Fine-tuning"],
    "tokenization": ["5.8 Other tokenizers"],
}


def test_search_as_you_type(visit):
    page = visit.open("book/notation.html")
    page.keyboard.press("/")
    box = page.locator("#pst-search-dialog input")
    for query, wanted in SEARCHES.items():
        box.fill(query)
        page.wait_for_selector("#found mark")
        page.wait_for_function(
            "q => document.querySelector('#found').dataset.query === q",
            arg=query,
        )
        titles = page.locator("#found .found-title").all_inner_texts()
        assert set(titles[:2]) & set(wanted), (query, titles)
        for text in page.locator("#found .found-text").all_inner_texts():
            assert not re.match(r"(… )?(import|from) [\w.]+ import", text)
    box.fill("xyzzyplugh")
    page.wait_for_function(
        "document.querySelector('.found-status').innerText"
        ".startsWith('Nothing found')"
    )
    box.fill("how do I train")
    page.wait_for_selector("#found mark")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/18_training.html*")
    page.wait_for_load_state("networkidle")
    assert visit.trouble == []


def test_the_marks_of_a_search_can_be_hidden(visit):
    key = "'sphinx_highlight_terms', 'attention'"
    visit.page.add_init_script(f"localStorage.setItem({key})")
    page = visit.open("book/api/index.html")
    link = page.locator(".highlight-link a")
    assert page.locator("span.highlighted").count() > 1
    icon = link.evaluate("x => getComputedStyle(x, '::before').content")
    assert icon in ("none", "normal")  # no letter of a font that is not here
    link.click()
    assert page.locator("span.highlighted").count() == 0


def test_pages_are_light(browser, address):
    """Those of the largest files too; all else is shared."""
    pages = [*HTML.glob("notebooks/*/*.html")]
    pages.sort(key=lambda x: x.stat().st_size)
    for path in pages[-3:]:
        asked = set()  # before you scroll
        with Visit(browser, address, 1280) as visit:
            visit.page.on("request", lambda x, to=asked: to.add(x.url))
            visit.open(path.relative_to(HTML).as_posix())
        files = [urlsplit(x) for x in asked]
        files = {Path(unquote(x.path)) for x in files if x.scheme == "file"}
        sizes = {x: x.stat().st_size for x in files}
        assert sum(sizes.values()) < MOST_BYTES, (path, sizes)
        assert len(sizes) <= MOST_REQUESTS, (path, sizes)


CUT = """() => [...document.querySelectorAll("article table")]
    .map(x => [x.closest(".pst-scrollable-table-container"), x])
    .filter(([box, x]) => box && x.scrollWidth > box.clientWidth + 1)
    .map(([box, x]) => x.innerText.slice(0, 60))"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_results_fit(visit):
    page = visit.open("book/results.html")
    assert page.evaluate(CUT) == []
    heads = page.locator("article h2").all_inner_texts()
    assert len(heads) == len(set(heads))
    text = page.locator("article").inner_text()
    assert not re.search(r"\b1 threads", text)
    assert text.count("no GPU: ") <= 1
