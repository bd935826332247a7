// Cards: point at a link to an equation, a figure, a chapter, a glossary
// entry or a function, or reach it with Tab, and see what it leads to. The
// contents come from previews.js, which loads when the first card is asked
// for. Esc closes a card; a tap follows the link as usual.

(() => {
const root = document.documentElement.dataset.content_root || "./";
let previews = null;
let card = null;
let opener = null;
let timer = 0;

// Load a script once; a promise that it has run.
const scripts = {};
function loadScript(path) {
  scripts[path] ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = root + path;
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
  return scripts[path];
}

// What a link leads to, as previews.js names it: an anchor or a page.
function nameOf(link) {
  if (link.hash) return decodeURIComponent(link.hash.slice(1));
  const home = new URL(root, location.href).pathname;
  return decodeURIComponent(link.pathname.replace(home, ""));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// The parts of a card, in their order.
function fill(box, data) {
  const head = [data.head, data.from].filter(Boolean).join(" · ");
  if (head) box.append(element("p", "card-head", head));
  if (data.code) box.append(element("code", "card-code", data.code));
  if (data.tex) box.append(element("div", "card-math", data.tex));
  if (data.image) {
    const image = element("img", "card-image", "");
    const dark = document.documentElement.dataset.theme === "dark";
    image.src = root + data.image + (dark ? "#dark" : "");
    image.alt = "";
    image.addEventListener("load", place);
    box.append(image);
  }
  if (data.text) box.append(element("p", "card-text", data.text));
}

// Below the link, or above it where there is no room; inside the window.
function place() {
  if (!card) return;
  const at = opener.getBoundingClientRect();
  const box = card.getBoundingClientRect();
  const below = at.bottom + 8;
  const fits = below + box.height < innerHeight || at.top < box.height;
  const left = Math.min(at.left, innerWidth - box.width - 12);
  card.style.left = `${Math.max(12, left)}px`;
  card.style.top = `${fits ? below : at.top - box.height - 8}px`;
}

async function typeset(box) {
  if (!/\\\(|\\\[|\\begin/.test(box.textContent)) return;
  if (!window.MathJax?.startup?.promise)
    await loadScript("_static/mathjax/book.js");
  await MathJax.startup.promise;
  await MathJax.typesetPromise([box]);
}

function close() {
  clearTimeout(timer);
  if (!card) return;
  opener.removeAttribute("aria-describedby");
  window.MathJax?.typesetClear?.([card]);
  card.remove();
  card = opener = null;
}

async function open(link) {
  await loadScript("_static/previews.js");
  previews ??= window.llmnbPreviews;
  const data = previews[nameOf(link)];
  if (!data || !link.matches(":hover, :focus")) return;
  close();
  const box = element("div", "preview-card mathjax_process", "");
  box.id = "preview-card";
  box.setAttribute("role", "tooltip");
  fill(box, data);
  [card, opener] = [box, link];
  link.setAttribute("aria-describedby", box.id);
  box.addEventListener("mouseenter", () => clearTimeout(timer));
  box.addEventListener("mouseleave", closeSoon);
  document.body.append(box);
  place();
  await typeset(box);
  place();
}

function closeSoon() {
  clearTimeout(timer);
  timer = setTimeout(close, 200);
}

function openSoon(link, wait) {
  clearTimeout(timer);
  if (link !== opener) timer = setTimeout(open, wait, link);
}

// A link may lead to something that has a card.
function isCandidate(link) {
  if (link.closest(".headerlink, .toctree-l1, .prev-next-area")) return false;
  return /#(eq|fig|term)-|#(module-)?llmnb|notebooks\/[^#]*\.html$/.test(link.href);
}

for (const link of document.querySelectorAll("article a[href]")) {
  if (!isCandidate(link)) continue;
  link.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "mouse") openSoon(link, 150);
  });
  link.addEventListener("pointerleave", closeSoon);
  link.addEventListener("focus", () => {
    if (link.matches(":focus-visible")) openSoon(link, 0);
  });
  link.addEventListener("blur", closeSoon);
}
addEventListener("keydown", (event) => event.key === "Escape" && close());
})();
