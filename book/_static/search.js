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

// train, trains, trained, training and trainer share their beginning, and so do
// tokenizer and tokenization.
function stem(word) {
  if (!/^[a-z-]{4,}$/.test(word)) return word;
  const ends = /((?<=i[sz])ations?|ings?|ers?|ed|es|e|(?<!s)s)$/;
  const short = word.replace(ends, "");
  return short.length < 3 ? word : short;
}

// A query's words as patterns for the beginning of a word; a hyphen may be a
// space or nothing, and -ize is -ise.
function patterns(query) {
  const form = /[\p{L}\p{N}]([\p{L}\p{N}_.+-]*[\p{L}\p{N}+])?/gu;
  const words = query.toLowerCase().match(form) ?? [];
  const telling = words.filter((x) => !STOP.has(x));
  return (telling.length ? telling : words).map((word) => {
    const text = stem(word).replace(/[.+]/g, "\\$&")
      .replaceAll("-", "[- ]?").replace(/i[sz](?=a|e|$)/, "i[sz]");
    return new RegExp(`(?<![\\p{L}\\p{N}])${text}[\\p{L}\\p{N}]*`, "giu");
  });
}

function count(text, pattern) {
  return text.match(pattern)?.length ?? 0;
}

// How much of a title the words cover: 1 for "Training" and "train".
function cover(title, wanted) {
  const letters = (x) => count(x, /\p{L}/gu);
  const hits = wanted.flatMap((p) => title.match(p) ?? []);
  return Math.min(1, letters(hits.join("")) / (letters(title) || 1));
}

// Titles weigh more than summaries, and these more than prose. Every word must
// occur, there or in the name of the page, and one of them in the section
// itself. Part 1 derives what the other parts make fast.
function score(section, wanted) {
  const { names, summary, text, from, link } = section;
  let sum = 0;
  let own = 0;
  for (const pattern of wanted) {
    const inText = count(text, pattern);
    const weight = count(names, pattern) ? 10 : count(summary, pattern) ? 8
      : count(from, pattern) ? 5 : 0;
    if (!weight && !inText) return 0;
    own += weight > 5 || inText;
    sum += weight + Math.min(inText, 3) / 2;
  }
  const chapter = from || sum < 10 * wanted.length ? 0 : 6;
  const first = link.includes("/1_by_hand/") ? 3 : 0;
  const api = link.includes("book/api/") ? 0.6 : 1;
  const title = 12 * cover(`${section.title} ${from}`, wanted);
  return own && (sum + chapter + first + title) * api;
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
        summary: text.match(/^.*(?=Reading time)/)?.[0] ?? "",
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
