// Reading a chapter: the switch Read / Code / All over its folds, the mark in
// the contents on the right, the keys to the chapters beside it, and the cues
// of boxes that scroll sideways. Without this script every fold still opens.
(() => {
"use strict";

// ---- The switch ------------------------------------------------------------

const VIEWS = { read: "Read", code: "Code", all: "All" };
const page = document.documentElement;
const { openFolds, arrivals } = window.llmnbFolds; // of first.js

function storeView(name) {
  try {
    localStorage.setItem("llmnb-view", name);
  } catch {
    // no storage: the choice holds for this page
  }
}

/** Do something that changes heights, and leave in place what is read. */
function keepPlace(change) {
  const seen = document.querySelectorAll("article :is(p, h2, h3, img)");
  const first = [...seen].find((x) => {
    const box = x.getBoundingClientRect();
    return box.bottom > 70 && box.height && !x.closest("details.fold");
  });
  const before = first?.getBoundingClientRect().top;
  change();
  const moved = first ? first.getBoundingClientRect().top - before : 0;
  scrollBy({ top: moved, behavior: "instant" });
}

function show(view) {
  page.dataset.view = view;
  storeView(view);
  keepPlace(openFolds);
}

/** Put the switch into the page's header, where there is something to fold. */
function addSwitch() {
  const place = document.querySelector(".article-header-buttons");
  if (!place || !document.querySelector("details.fold")) return;
  const box = document.createElement("fieldset");
  box.className = "view-switch";
  box.innerHTML = "<legend class='visually-hidden'>Show the code</legend>";
  for (const [view, name] of Object.entries(VIEWS)) {
    const label = document.createElement("label");
    label.innerHTML = `<input type="radio" name="view"> <span>${name}</span>`;
    const input = label.firstChild;
    input.value = view;
    input.checked = view === page.dataset.view;
    input.addEventListener("change", () => show(view));
    box.append(label);
  }
  place.prepend(box);
}

// ---- Folds that must open --------------------------------------------------

/** Open the folds around the place that the address names. */
function openTarget() {
  const name = decodeURIComponent(location.hash.slice(1));
  const target = name && document.getElementById(name);
  if (!target) return;
  const shut = [];
  for (let x = target; x; x = x.parentElement) {
    if (x.matches("details:not([open])")) shut.push(x);
  }
  for (const fold of shut) fold.open = true;
  if (shut.length) target.scrollIntoView();
}

// On paper solutions and tables are open; code stays as the switch says. Paper
// is white.
let opened = [];
let theme;
addEventListener("beforeprint", () => {
  theme = page.dataset.theme;
  page.dataset.theme = "light";
  const shut = "details:is(.exercise, .gained):not([open])";
  opened = [...document.querySelectorAll(shut)];
  for (const fold of opened) fold.open = true;
});
addEventListener("afterprint", () => {
  page.dataset.theme = theme;
  for (const fold of opened) fold.open = false;
});

// ---- Where the reader is ---------------------------------------------------

/** The last of some headings above the line where one reads. That line is a
 * fifth down the window, and sinks to its foot over the page's last screen,
 * so that short sections at the end have their turn. */
function currentHeading(headings) {
  const left = page.scrollHeight - innerHeight - scrollY;
  const sunk = Math.max(0, 1 - left / innerHeight);
  const line = innerHeight * (0.2 + 0.8 * sunk);
  const above = (x) => x.getBoundingClientRect().top <= line;
  return headings.findLast(above) ?? headings[0];
}

/** Mark in the contents on the right the section that is being read. */
function followContents() {
  const theirs = document.querySelector("#pst-page-toc-nav");
  if (!theirs) return () => {};
  // a copy: the theme goes on marking the original, and marks it wrongly
  const contents = theirs.cloneNode(true);
  theirs.replaceWith(contents);
  const links = new Map();
  for (const link of contents.querySelectorAll("a[href^='#']")) {
    const name = decodeURIComponent(link.hash.slice(1));
    const place = document.getElementById(name); // a section, or a name's dt
    const heading = place?.querySelector("h2, h3, h4") ?? place;
    if (heading) links.set(heading, link);
  }
  const headings = [...links.keys()];
  let asked = null; // the section asked for, until the reader scrolls on
  addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    asked = headings.find((x) => links.get(x).hash === link?.hash) ?? null;
  });
  for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"]) {
    addEventListener(kind, () => (asked = null), { passive: true });
  }
  return () => mark(links.get(asked ?? currentHeading(headings)), contents);
}

function mark(link, contents) {
  if (!link || link.ariaCurrent) return;
  for (const x of contents.querySelectorAll(".active, [aria-current]")) {
    x.classList.remove("active");
    x.removeAttribute("aria-current");
  }
  link.ariaCurrent = "true";
  link.classList.add("active");
  for (let x = link; x !== contents; x = x.parentElement) {
    if (x.matches(".toc-entry")) x.classList.add("active");
  }
  keepInSight(link, contents.closest(".bd-sidebar-secondary"));
}

/** Scroll long contents, and nothing else, to the marked line. */
function keepInSight(link, rail) {
  if (!rail) return;
  const [line, box] = [link, rail].map((x) => x.getBoundingClientRect());
  const out = line.top < box.top || line.bottom > box.bottom;
  if (out) rail.scrollTop += line.top - box.top - box.height / 2;
}

/** Scroll the list of chapters to this one: the theme keeps it where it was
 * on the page before, though a link may lead far away. */
function showChapter() {
  const rail = document.querySelector(".bd-sidebar-primary");
  const links = rail?.querySelectorAll("a.current, .current.active > a") ?? [];
  const link = [...links].at(-1);
  if (link?.getClientRects().length) keepInSight(link, rail);
}

/** Keep the mark and the bar of progress with the reader's place. */
function followReader() {
  const markContents = followContents();
  let waiting = false;
  const update = () => {
    waiting = false;
    const all = page.scrollHeight - innerHeight;
    page.style.setProperty("--llmnb-read", all > 0 ? scrollY / all : 1);
    markContents();
  };
  const soon = () => {
    if (!waiting) requestAnimationFrame(update);
    waiting = true;
  };
  for (const kind of ["scroll", "resize", "hashchange"]) {
    addEventListener(kind, soon, { passive: true });
  }
  addEventListener("toggle", soon, true);
  update();
}

// ---- Keys ------------------------------------------------------------------

/** Left and right lead to the chapters beside this one, unless something on
 * the page has the keys: a field, a slider, a box that scrolls. */
function turnPage(event) {
  const turn = { ArrowLeft: ".left-prev", ArrowRight: ".right-next" };
  const with_ = event.altKey || event.ctrlKey || event.metaKey;
  const holder = document.activeElement;
  const free = !holder || holder === document.body || holder.matches("a");
  if (!turn[event.key] || with_ || event.shiftKey) return;
  if (!free || event.defaultPrevented) return;
  if (document.querySelector("dialog[open]")) return;
  document.querySelector(`.prev-next-area ${turn[event.key]}`)?.click();
}

// ---- Boxes that scroll sideways --------------------------------------------

const SCROLLERS =
  "article :is(.highlight pre, div.math, span.math, .drawing-frame, "
  + ".pst-scrollable-table-container)";

/** Shade the edge beyond which a box goes on; let the keyboard into it. */
function cue(box) {
  const beyond = box.scrollWidth - box.clientWidth;
  box.classList.toggle("more-left", beyond > 1 && box.scrollLeft > 1);
  box.classList.toggle("more-right", box.scrollLeft < beyond - 1);
  if (beyond > 1) box.tabIndex = 0;
  else box.removeAttribute("tabindex");
}

function addCues() {
  const sizes = new ResizeObserver((all) => all.forEach((x) => cue(x.target)));
  for (const box of document.querySelectorAll(SCROLLERS)) {
    box.addEventListener("scroll", () => cue(box), { passive: true });
    sizes.observe(box);
  }
}

/** Set an equation that is a little too wide for its box a little smaller;
 * one that is much too wide scrolls. */
function fitEquation(box) {
  box.style.fontSize = "";
  const ratio = box.clientWidth / box.scrollWidth;
  if (ratio < 1 && ratio > 0.78) box.style.fontSize = `${ratio - 0.005}em`;
  cue(box);
}

/** An equation is text: no stop for the Tab key, unless its box scrolls. */
async function settleEquations() {
  await window.MathJax?.startup?.promise;
  for (const x of document.querySelectorAll("mjx-container[tabindex]")) {
    x.removeAttribute("tabindex");
  }
  const fit = () =>
    document.querySelectorAll("article div.math").forEach(fitEquation);
  fit();
  addEventListener("resize", fit);
}

addEventListener("DOMContentLoaded", () => {
  arrivals.disconnect();
  openFolds();
  openTarget();
  addSwitch();
  addCues();
});
addEventListener("hashchange", openTarget);
addEventListener("keydown", turnPage);
addEventListener("load", () => {
  followReader();
  showChapter();
  settleEquations();
});
})();
