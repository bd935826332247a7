# ruff: noqa: F401, F811, I001 (fixtures of test_book.py)
"""Reading a chapter: the switch, folds, type, the rail and the keys.

The fixtures are those of test_book.py, and so is what is skipped.
"""

import json
import re

import pytest
from test_book import CHAPTERS, EXPORTED, HTML, LAYERNORM, ROOT, Visit, address
from test_book import browser, built, contrast, narrow, place, scheme, visit
from test_book import width

ATTENTION = "notebooks/1_by_hand/08_attention.html"
PARTS = "1_by_hand", "5_modern", "6_machines"
MEASURED = [p for p in CHAPTERS if p.parent.name in PARTS]
PROSE = 35  # per cent of an article's height that is prose, at least


# The rules, on cells


OK = "dinp             max|diff| < 1e-08            ok"
LONG_LOOP = "\n".join(["for i in range(3):"] + ["    print(i)"] * 14)


@pytest.mark.parametrize(
    ("source", "text", "exported", "kind"),
    [
        ("import numpy as np", "", True, "imports"),
        ("import numpy as np\n\nEPS = 1e-5", "", False, "imports"),
        ("fig, ax = plt.subplots()\nplt.show()", "", False, "drawing"),
        ("compare('dinp', a, b)", OK, False, "check"),
        ("compare('dinp', a, b)", OK + "\n" + OK, False, "check"),
        ("compare('dinp', a, b)", "x = 3\n" + OK, False, None),
        ("rng = np.random.default_rng(4)", "", False, "setup"),
        ("def f(x):\n    return x", "", False, "helper"),
        ("def f(x):\n    return x", "", True, None),
        ("def f(x):\n" + "    x += 1\n" * 12, "", True, "exported"),
        ("print(1)", "1", False, None),
        ("gained('1.6')", "", False, "gained"),
        (LONG_LOOP, "0", False, "long"),
    ],
)
def test_what_a_cell_is(source, text, exported, kind):
    folds, shown = pytest.importorskip("folds"), bool(text)
    assert folds.kind_of(source, text, shown, exported) == kind


def test_an_outline_has_the_signatures_and_the_first_lines():
    source = '@jit\ndef f(a,\n      b):\n    """One.\n\n    Two.\n    """\n'
    source += "    return a\n\n\nclass C:\n    def g(self):\n        pass\n"
    outline = '@jit\ndef f(a,\n      b):\n    """One."""'
    outline += "\n\nclass C:\n\n    def g(self):"
    assert pytest.importorskip("folds").outline(source) == outline


# The pages, as files


def cells(path):
    book = json.loads(path.with_suffix(".ipynb").read_text("utf-8"))
    return [c for c in book["cells"] if c["cell_type"] == "code"]


def test_what_an_author_hides_is_in_a_fold(built):
    """Also where the cell is exported as well and has its label first."""
    for path in CHAPTERS:
        tags = [set(c["metadata"].get("tags", [])) for c in cells(path)]
        hidden = [t for t in tags if t & {"hide-input", "hide-cell"}]
        text = (HTML / f"notebooks/{place(path)}.html").read_text("utf-8")
        kinds = re.findall(r'<details class="([^"]*) fold"', text)
        authors = sum("authors" in k.split() for k in kinds)
        inside = sum("hide-cell" in t for t in tags)  # in an exercise's fold
        assert len(hidden) - inside <= authors <= len(hidden), path.stem
        both = [t for t in hidden if t & EXPORTED]
        pattern = r'class="[^"]*tag_exporti?[^"]*tag_hide-input[^"]*">'
        for start in re.finditer(pattern, text):
            cell = text[start.end() :].split('<div class="cell ')[0]
            assert ' fold">' in cell, path.stem
        assert len(re.findall(pattern, text)) == len(both)


def test_no_fold_repeats_its_heading(built):
    text = (HTML / "notebooks/1_by_hand/05_encoder.html").read_text("utf-8")
    names = re.findall(r"<summary>(.+?) <span", text)
    assert names.count("the code") == 2
    assert not {"where we are", "setup"} & set(names)


def test_what_the_text_has_told_is_one_line(built):
    """A long function of the package as well: no outline stands for it."""
    found = 0
    for path in CHAPTERS:
        text = (HTML / f"notebooks/{place(path)}.html").read_text("utf-8")
        for start in re.finditer(r'class="[^"]*tag_fold-input[^"]*">', text):
            cell = text[start.end() :].split('<div class="cell ')[0]
            assert ' fold">' in cell, path.stem
            assert "brief" not in cell, path.stem
            found += "tag_export" in start[0]
    assert found >= 10


def test_the_fonts_are_small_and_have_their_licences(built):
    folder = HTML / "_static" / "fonts"
    fonts = list(folder.glob("*.woff2"))
    assert len(fonts) == 3
    assert sum(f.stat().st_size for f in fonts) < 300_000
    for name in ("serif", "code"):
        text = (folder / f"LICENSE-{name}.txt").read_text("utf-8")
        assert "SIL OPEN FONT LICENSE" in text.upper()


def look(visit, name=LAYERNORM):
    """Open a page without waiting for its equations."""
    visit.page.goto(f"{visit.home}/{name}")
    return visit.page


# The switch

STATE = """() => ({
    view: document.documentElement.dataset.view,
    open: [...document.querySelectorAll("details.fold")]
        .filter(x => x.open).map(x => x.className),
    count: document.querySelectorAll("details.fold").length,
})"""


def press(page, name):
    page.locator(".view-switch label", has_text=name).click()
    return page.evaluate(STATE)


def test_the_switch_opens_what_it_says(visit):
    page = look(visit)
    state = page.evaluate(STATE)
    assert state["view"] == "read"
    assert state["open"] == []
    state = press(page, "Code")
    kinds = " ".join(state["open"]).split()
    assert {"imports", "check", "setup"} <= set(kinds)
    assert not {"authors", "exercise", "gained"} & set(kinds)
    state = press(page, "All")
    assert len(state["open"]) == state["count"] > 15
    assert press(page, "Read")["open"] == []
    assert visit.trouble == []


def test_the_switch_works_by_keyboard_and_keeps_the_place(visit):
    page = look(visit)
    page.evaluate("document.querySelector('#proof').scrollIntoView()")
    top = "document.querySelector('#proof h2').getBoundingClientRect().top"
    before = page.evaluate(top)
    page.locator(".view-switch input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(STATE)["view"] == "code"
    assert page.url.endswith("06_layernorm.html")  # no page is turned
    assert abs(page.evaluate(top) - before) < 60


# What the page looked like each time that it was painted
FRAMES = """() => {
    window.frames_ = [];
    const look = () => {
        const all = [...document.querySelectorAll("details.fold")];
        window.frames_.push(all.filter(x => !x.open).length);
        requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
}"""


def test_the_choice_is_remembered_and_nothing_flashes(visit):
    page = look(visit)
    press(page, "All")
    page.add_init_script(f"({FRAMES})()")
    page = look(visit, ATTENTION)
    state = page.evaluate(STATE)
    assert state["view"] == "all"
    assert len(state["open"]) == state["count"] > 10
    assert set(page.evaluate("window.frames_")) == {0}
    assert page.locator("input[value=all]").is_checked()


def test_the_switch_works_without_storage(visit):
    page = visit.page
    page.add_init_script(
        "const kept = Storage.prototype;"
        "for (const name of ['getItem', 'setItem']) {"
        "const plain = kept[name];"
        "kept[name] = function (key, ...rest) {"
        "if (key === 'llmnb-view') throw new DOMException('no');"
        "return plain.call(this, key, ...rest); }; }"
    )
    page = look(visit)
    assert page.evaluate(STATE)["view"] == "read"
    assert len(press(page, "All")["open"]) > 15
    assert visit.trouble == []


def test_a_long_function_shows_its_outline_until_it_is_opened(visit):
    page = look(visit, "notebooks/3_gpu/04_layernorm.html")
    cell = page.locator(".cell:has(> .brief)").first
    brief = cell.locator("> .brief")
    assert "def " in brief.inner_text()
    assert not cell.locator("details pre").is_visible()
    cell.locator("summary").click()
    assert cell.locator("details pre").is_visible()
    assert not brief.is_visible()


def test_without_scripts_folds_open_and_nothing_is_lost(browser, address):
    with Visit(browser, address, 1280, java_script_enabled=False) as visit:
        page = look(visit)
        fold = page.locator("details.fold").first
        assert not fold.locator("pre").is_visible()
        fold.locator("summary").click()
        assert fold.locator("pre").is_visible()
        assert page.locator(".view-switch").count() == 0
        assert not page.locator(".bd-header-article .btn:visible").count()
        link = page.locator("article p a").first
        colour = link.evaluate("x => getComputedStyle(x).color")
        assert colour == "rgb(10, 95, 158)"


def test_an_address_inside_a_fold_opens_it(visit):
    page = look(visit, f"{LAYERNORM}#solution-exercise-2")
    page.wait_for_selector("#solution-exercise-2[open]")
    assert page.locator("details.fold[open]").count() == 1
    page.evaluate("location.hash = '#solution-exercise-1'")
    page.wait_for_selector("#solution-exercise-1[open]")


# Exercises


def test_an_exercise_is_one_fold_with_its_check_inside(visit):
    page = look(visit)
    section = page.locator("#exercises")
    folds = section.locator("details.exercise")
    assert folds.count() == 3
    assert section.locator("details").count() == 3
    # before it is opened: questions and nothing else
    assert section.locator("pre:visible").count() == 0
    assert "max|diff|" not in section.inner_text()
    second = folds.nth(1)
    second.locator("summary").click()
    text = second.inner_text()
    assert "mean’s road is gone" in " ".join(text.split())
    assert "def rmsnorm_backward" in text
    assert re.search(r"rmsnorm dinp +max\|diff\| < 1e-08 +ok", text)


def test_no_solution_stands_outside_its_fold(built):
    for path in CHAPTERS:
        text = (HTML / f"notebooks/{place(path)}.html").read_text("utf-8")
        assert "dropdown admonition" not in text, path.stem
        source = path.read_text("utf-8")
        want = len(re.findall(r"^# :::\{admonition\} Solution", source, re.M))
        exercise = r'<details class="exercise fold"'
        assert len(re.findall(exercise, text)) == want, path.stem


# The share of prose
#
# The article's height is that of its box at 1280 px, in Read. Prose is the
# sum of the heights of its paragraphs, lists, headings, quotations and
# displayed equations; the white between blocks belongs to nobody. Not prose:
# cells and what they put out, folds (an exercise's closed solution too),
# labels of exported code, tables, figures and their captions.

SHARE = """() => {
    const article = document.querySelector("article.bd-article");
    const height = x => x.getBoundingClientRect().height;
    const prose = "p, ul, ol, dl, h1, h2, h3, h4, blockquote, div.math";
    const other = ".cell, details, .export-label, .figure-caption, table,"
        + " figure, .pst-scrollable-table-container";
    const count = x => [...x.children].reduce((sum, child) => sum + (
        child.matches(other) ? 0
        : child.matches(prose) ? height(child) : count(child)), 0);
    return [count(article), height(article)];
}"""


def test_a_chapter_is_mostly_read(visit):
    shares = {}
    page = visit.page
    for path in MEASURED:
        page.goto(f"{visit.home}/notebooks/{place(path)}.html")
        if page.evaluate("!!document.querySelector('.math')"):
            page.wait_for_function("window.MathJax?.startup?.promise")
            page.evaluate("MathJax.startup.promise")
        prose, height = page.evaluate(SHARE)
        shares[path.stem] = 100 * prose / height
        print(f"{path.stem:16} {shares[path.stem]:4.1f} % of {height:.0f}")
    assert min(shares.values()) >= PROSE


# The characters of each line of the paragraphs without an equation, but for
# the last line of each.
LINES = """() => {
    const counts = [];
    for (const p of document.querySelectorAll("section > p")) {
        if (p.querySelector(".math") || p.matches(".figure-caption")) continue;
        const walk = document.createTreeWalker(p, NodeFilter.SHOW_TEXT);
        const lines = [], range = document.createRange();
        let right = Infinity;
        for (let text; (text = walk.nextNode());)
            for (let i = 0; i < text.length; i++) {
                range.setStart(text, i);
                range.setEnd(text, i + 1);
                const box = range.getBoundingClientRect();
                if (!box.width) continue;
                if (box.right < right - 100 || !lines.length) lines.push(0);
                right = box.right;
                lines[lines.length - 1]++;
            }
        counts.push(...lines.slice(0, -1));
    }
    return counts;
}"""


def test_a_line_of_text_has_65_to_75_characters(visit):
    page = visit.open("notebooks/1_by_hand/05_encoder.html")
    lines = page.evaluate(LINES)
    font = page.evaluate("document.fonts.check('16px \"Llmnb Serif\"')")
    assert font
    assert len(lines) > 20
    assert 65 <= sum(lines) / len(lines) <= 75


def test_headings_weigh_what_their_rank_says(visit):
    page = look(visit)
    page.evaluate(
        """() => document.querySelector("article section")
        .insertAdjacentHTML("beforeend", "<h2>a</h2><h3>b</h3>")"""
    )
    style = page.evaluate(
        """() => ["h1", "h2", "h3"].map(x => {
        const s = getComputedStyle(document.querySelector("article " + x));
        return [+s.fontWeight, parseFloat(s.fontSize)]; })"""
    )
    assert sorted(style, reverse=True) == style


# The rail on the right and the keys

# Until what scrolling or a fold changes has been painted
FRAME = "new Promise(x => requestAnimationFrame(() => setTimeout(x, 40)))"

MARKED = """() => {
    const at = document.querySelectorAll(".page-toc a[aria-current=true]");
    const name = decodeURIComponent(at[0].hash.slice(1));
    const all = [...document.querySelectorAll("article section[id]")]
        .map(x => [x.id, x.querySelector("h2, h3").getBoundingClientRect()])
        .filter(([id]) => document.querySelector(
            `.page-toc a[href="#${CSS.escape(id)}"]`));
    const begun = all.filter(([, box]) => box.top <= 0.2 * innerHeight);
    const read = begun.length ? begun.at(-1)[0] : all[0][0];
    const left = document.scrollingElement.scrollHeight - innerHeight
        - scrollY;
    const seen = all.find(([id]) => id === name)[1];
    return {marks: at.length, name, read, last: all.at(-1)[0],
            nearEnd: left < innerHeight, top: seen.top, left};
}"""


def test_the_rail_marks_the_right_section_at_ten_stops(visit):
    page = visit.open(ATTENTION)
    names = set()
    for stop in range(10):
        page.evaluate(
            """stop => scrollTo({behavior: "instant", top: stop / 9
            * (document.scrollingElement.scrollHeight - innerHeight)})""",
            stop,
        )
        page.evaluate(FRAME)
        seen = page.evaluate(MARKED)
        assert seen["marks"] == 1
        if seen["nearEnd"]:
            assert seen["top"] < 844
        else:
            assert seen["name"] == seen["read"]
        names.add(seen["name"])
    assert seen["name"] == seen["last"]
    assert len(names) >= 6
    bar = page.evaluate(
        "getComputedStyle(document.documentElement)"
        ".getPropertyValue('--llmnb-read')"
    )
    assert float(bar) > 0.99


def test_keys_turn_the_page_but_not_from_a_field(visit):
    page = look(visit)
    link = page.locator(".right-next")
    following = link.evaluate("x => x.href")
    page.evaluate(
        """() => document.querySelector("article").insertAdjacentHTML(
        "afterbegin", "<input id=field><input id=slider type=range>")"""
    )
    for name in ("#field", "#slider", ".view-switch input:checked"):
        page.focus(name)
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(60)
        assert page.url.endswith("06_layernorm.html"), name
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Alt+ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(following)
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/06_layernorm.html")


# The bar at the top, and the menus

# Of each button its name, its left and right edge, and whether it shows that
# it has the focus
BAR = """() => [...document.querySelectorAll(".bd-header-article .btn")]
    .filter(x => x.checkVisibility() && x.clientWidth).map(x => {
        const {left, right} = x.getBoundingClientRect();
        x.focus();
        const {outlineStyle, outlineWidth} = getComputedStyle(x);
        return [x.className, left, right,
                outlineStyle === "none" ? 0 : parseFloat(outlineWidth)];
    }).filter(x => !x[0].includes("dropdown-item"))"""


@pytest.mark.parametrize("width", [320, 360, 390, 1280])
def test_the_bar_fits_and_its_buttons_show_the_focus(visit, width):
    page = look(visit)
    page.keyboard.press("Tab")  # as one who uses the keyboard
    bar = page.evaluate(BAR)
    names = " ".join(name for name, *_ in bar)
    assert "theme-switch" in names
    assert width > 768 or {"search-button", "secondary-toggle"} <= {
        *names.split()
    }
    for name, left, right, outline in bar:
        assert 0 <= left < right <= width, name
        assert outline >= 2, name


@narrow
def test_a_menu_opens_where_one_is_and_gives_the_focus_back(visit):
    page = look(visit, "notebooks/5_modern/10_lora.html")
    for which, text in ("primary", "5.10 LoRA"), ("secondary", "Where we are"):
        page.locator(f".{which}-toggle").focus()
        page.keyboard.press("Enter")
        here = page.locator("dialog[open] a:focus", has_text=text)
        here.wait_for()
        assert 0 < here.bounding_box()["y"] < 800
        page.keyboard.press("Escape")
        page.locator(f".{which}-toggle:focus").wait_for()


# Boxes that scroll, and equations

CUES = """() => {
    const boxes = [...document.querySelectorAll("article .highlight pre, "
        + "article div.math")].filter(x => x.checkVisibility(
            {contentVisibilityAuto: true}) && x.clientWidth);
    const wide = boxes.filter(x => x.scrollWidth > x.clientWidth + 1);
    const cued = x => x.classList.contains("more-right");
    return {wide: wide.length, missing: wide.filter(x => !cued(x)).length,
            extra: boxes.filter(x => cued(x) && !wide.includes(x)).length};
}"""


@narrow
def test_a_box_that_goes_on_says_so(visit):
    page = visit.open(LAYERNORM)
    press(page, "All")
    page.evaluate(FRAME)
    cues = page.evaluate(CUES)
    assert cues["wide"] > 10
    assert cues["missing"] == cues["extra"] == 0
    box = page.locator("pre.more-right").first
    assert "gradient" in box.evaluate("x => getComputedStyle(x).maskImage")
    box.evaluate("x => { window.box_ = x; x.scrollLeft = 10000; }")
    page.wait_for_function(
        "!window.box_.classList.contains('more-right')"
        " && window.box_.classList.contains('more-left')"
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_an_equation_is_a_tab_stop_only_where_it_scrolls(visit):
    page = visit.open(ATTENTION)
    page.evaluate(FRAME)
    stops = page.evaluate(
        """() => [...document.querySelectorAll(".math, .math *")]
        .filter(x => x.tabIndex >= 0 && !x.matches("a[href]"))
        .map(x => x.scrollWidth > x.clientWidth + 1)"""
    )
    equations = page.locator("mjx-container").count()
    assert equations > 100
    assert all(stops)
    assert len(stops) < 20


# Of every token of the code: its kind, its colour, and what lies under it
TOKENS = """() => {
    const under = x => {
        for (; x; x = x.parentElement) {
            const c = getComputedStyle(x).backgroundColor;
            if (Number(c.match(/[\\d.]+/g)[3] ?? 1) > 0.99) return c;
        }
        return "rgb(255, 255, 255)";
    };
    const spans = document.querySelectorAll("article .highlight span");
    return [...spans].filter(x => x.textContent.trim()).map(
        x => [x.className || "plain", getComputedStyle(x).color, under(x)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@narrow
def test_code_can_be_read_by_its_colours(visit):
    page = look(visit)
    press(page, "All")
    found = {*map(tuple, page.evaluate(TOKENS))}
    assert len({kind for kind, *_ in found}) > 8
    assert [x for x in found if contrast(*x[1:]) < 4.5] == []


# Paper


@pytest.mark.parametrize("scheme", ["dark"])
def test_on_paper_solutions_are_open_and_code_follows_the_switch(
    visit, tmp_path
):
    """And all is as from a light screen."""
    page = visit.open(LAYERNORM)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    kinds = page.evaluate(STATE)["open"]
    assert kinds == ["exercise fold"] * 3 + ["gained fold"]
    assert all(contrast(*x) >= 4.5 for _, *x in page.evaluate(TOKENS))
    assert page.locator(".chapter-number").is_visible()
    assert not page.locator("#jb-print-docs-body").is_visible()
    heading = page.locator("article h1").bounding_box()
    assert heading["y"] < 300
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(STATE)["open"] == []
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    pdf = page.pdf(path=tmp_path / "page.pdf")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 3


def test_the_scripts_name_no_word_twice():
    """They become one file, where a name of two scripts would stop both."""
    text = (ROOT / "book/_static/reading.js").read_text("utf-8")
    body = re.sub(r"^//.*\n", "", text, flags=re.M).strip()
    assert body.startswith("(() => {")
    assert body.endswith("})();")
