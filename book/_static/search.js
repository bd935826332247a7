// Search as you type, in the theme's search window (Ctrl-K, or /). The text
// of the book comes from search-data.js, which loads at the first letter.
// Enter without a chosen line still leads to the search page.

(() => {
const root = document.documentElement.dataset.content_root || "./";
const FEW = "a an and are as at be by can could do does for from get have how "
  + "i if in into is it its me my not of on or so that the there this to "
  + "use was we what when where which who why will with you your";
const STOP = new Set(FEW.split(" "));
const dialog = document.querySelector("#pst-search-dialog");
const input = dialog?.querySelector("input");
let book = null;
let chosen = -1;

// The pages, as search-data.js has them; a promise.
function load() {
  book ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = `${root}_static/search-data.js`;
    script.onload = () => done(window.llmnbSearch);
    script.onerror = failed;
    document.head.append(script);
  });
  return book;
}

// train, trains, trained, training and trainer share their beginning.
function stem(word) {
  if (!/^[a-z]{4,}$/.test(word)) return word;
  const short = word.replace(/(ings?|ers?|ed|es|e|(?<!s)s)$/, "");
  return short.length < 3 ? word : short;
}

// A query's words as patterns for the beginning of a word.
function patterns(query) {
  const words = query.toLowerCase().match(/[\p{L}\p{N}_.+-]+/gu) ?? [];
  const telling = words.filter((x) => !STOP.has(x));
  return (telling.length ? telling : words).map((word) => {
    const text = stem(word).replace(/[.+\-]/g, "\\$&");
    return new RegExp(`(?<![\\p{L}\\p{N}])${text}[\\p{L}\\p{N}]*`, "giu");
  });
}

function count(text, pattern) {
  return text.match(pattern)?.length ?? 0;
}

// How much of a title the words cover: 1 for "Training" and "train".
function cover(title, wanted) {
  const words = title.match(/\p{L}[\p{L}\p{N}_]*/gu) ?? [];
  const hits = words.filter((x) => wanted.some((p) => count(x, p)));
  return words.length ? hits.length / words.length : 0;
}

// Titles weigh more than prose; every word must occur.
function score(section, wanted) {
  const { names, text } = section;
  let sum = 0;
  for (const pattern of wanted) {
    const inTitle = count(names, pattern);
    const inText = count(text, pattern);
    if (!inTitle && !inText) return 0;
    sum += 10 * Math.min(inTitle, 1) + Math.min(inText, 6) / 2;
  }
  const chapter = section.from ? 0 : 6 * (sum >= 10);
  const api = section.link.includes("book/api/") ? 0.6 : 1;
  return (sum + chapter + 12 * cover(section.title, wanted)) * api;
}

// A page's first section goes by the page's name, the others by their title.
function* sectionsOf(pages) {
  for (const [page, name, sections] of pages)
    for (const [i, [anchor, title, text]] of sections.entries())
      yield {
        link: `${root}${page}${i ? `#${anchor}` : ""}`,
        title: i ? title : name,
        from: i ? name : "",
        names: i ? title : `${name} ${title}`,
        text,
      };
}

function find(pages, query, most = 12) {
  const wanted = patterns(query);
  const found = [];
  if (!wanted.length) return found;
  for (const section of sectionsOf(pages)) {
    section.score = score(section, wanted);
    if (section.score) found.push(section);
  }
  found.sort((a, b) => b.score - a.score);
  return found.slice(0, most).map((x) => ({ ...x, wanted }));
}

// Append a text with the words marked.
function mark(box, text, wanted) {
  const all = new RegExp(wanted.map((x) => x.source).join("|"), "giu");
  let end = 0;
  for (const match of text.matchAll(all)) {
    const word = document.createElement("mark");
    word.textContent = match[0];
    box.append(text.slice(end, match.index), word);
    end = match.index + match[0].length;
  }
  box.append(text.slice(end));
}

// Some words around the first hit.
function snippet(text, wanted) {
  const places = wanted.map((x) => text.search(x)).filter((x) => x >= 0);
  const at = Math.max(0, Math.min(...places, text.length) - 60);
  const start = at ? text.indexOf(" ", at) + 1 : 0;
  const rest = text.slice(start);
  const cut = rest.slice(0, 200).replace(/\s\S*$/, " …");
  return (start ? "… " : "") + (rest.length > 200 ? cut : rest);
}

function line(result, i) {
  const link = document.createElement("a");
  link.href = result.link;
  link.id = `found-${i}`;
  link.role = "option";
  const parts = [
    ["found-title", result.title],
    ["found-from", result.from],
    ["found-text", snippet(result.text, result.wanted)],
  ];
  for (const [name, text] of parts) {
    if (!text) continue;
    const part = document.createElement("span");
    part.className = name;
    mark(part, text, name === "found-from" ? [/(?!)/] : result.wanted);
    link.append(part, " ");
  }
  return link;
}

const list = document.createElement("div");
const status = document.createElement("p");

function choose(i) {
  const lines = [...list.children];
  chosen = lines.length ? (i + lines.length) % lines.length : -1;
  lines.forEach((x, k) => x.setAttribute("aria-selected", k === chosen));
  if (chosen < 0) return input.removeAttribute("aria-activedescendant");
  input.setAttribute("aria-activedescendant", lines[chosen].id);
  lines[chosen].scrollIntoView({ block: "nearest" });
}

async function search() {
  const pages = await load();
  const query = input.value; // of now, not of before the load
  const found = find(pages, query);
  list.replaceChildren(...found.map(line));
  list.hidden = !found.length;
  list.dataset.query = query;
  input.setAttribute("aria-expanded", found.length > 0);
  input.removeAttribute("aria-activedescendant");
  chosen = -1;
  const many = found.length === 1 ? "1 result" : `${found.length} results`;
  status.textContent = !query.trim() ? "" : found.length ? many
    : "Nothing found: try fewer or shorter words";
}

function onKey(event) {
  if (event.key === "ArrowDown") choose(chosen + 1);
  else if (event.key === "ArrowUp") choose(chosen < 0 ? -1 : chosen - 1);
  else if (event.key === "Enter" && chosen >= 0) list.children[chosen].click();
  else return;
  event.preventDefault();
}

function setUp() {
  list.id = "found";
  list.role = "listbox";
  list.ariaLabel = "Search results";
  list.hidden = true;
  status.role = "status";
  status.className = "found-status";
  input.role = "combobox";
  input.setAttribute("aria-controls", list.id);
  input.setAttribute("aria-expanded", "false");
  input.setAttribute("aria-autocomplete", "list");
  dialog.append(status, list);
  input.addEventListener("input", search);
  input.addEventListener("keydown", onKey);
  // a hit on the page that you read closes the window
  list.addEventListener("click", () => dialog.close());
}

// "/" opens the search, except where you write.
function onSlash(event) {
  const writing = event.target.closest?.("input, textarea, [contenteditable]");
  if (event.key !== "/" || writing || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  dialog.showModal();
}

if (dialog) {
  setUp();
  addEventListener("keydown", onSlash);
}
window.llmnbFind = find;
})();
