// The live model of the first page: what you see and touch. The model itself
// is gpt2.js, which runs in a worker, so that typing never waits for it.
(() => {
  const gpt2 = llmnbGpt2();
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const LONGEST = 400; // tokens written at one press of the button
  const LAST = 40; // tokens in the small maps of the heads
  const TOPS = [1, 2, 5, 10, 20, 40, 100, null]; // null is all
  const TEXTS = {
    test: "class TestStack(unittest.TestCase):\n    def test_",
    loop: "def count(words):\n    result = {}\n    for word in ",
    manual: ".. function:: open(path, mode)\n\n   Return a file object. ",
  };

  // ---- In the worker ---------------------------------------------------------

  function serve(gpt2, LAST) {
    let model, words, ids = [], first = 0, cost = [];
    let turn = 0; // the newest request; what an older one began is dropped
    let version = 0; // the number of the text that was read last
    let settings = {};
    const pause = ms => new Promise(go => setTimeout(go, ms));

    function start(packed) {
      words = gpt2.tokenizer(packed);
      model = gpt2.model(gpt2.unpack(packed), packed.config);
    }

    // The small maps: the weights of every head over the last tokens.
    function maps(length) {
      const { L, NH } = model.config, from = Math.max(0, length - LAST);
      const out = new Uint8ClampedArray(L * NH * LAST * LAST);
      for (let k = 0; k < L * NH; k++)
        for (let t = from; t < length; t++) {
          const row = model.row(Math.floor(k / NH), k % NH, t);
          for (let s = from; s <= t; s++)
            out[(k * LAST + t - from) * LAST + s - from]
              = 255 * Math.sqrt(row[s]);
        }
      return out;
    }

    // Read all tokens that the window holds; false if a newer request came.
    async function read(all, mine, number) {
      const start = gpt2.windowStart(all.length, model.config.T);
      const seen = all.slice(start);
      for (let t = model.keep(seen); t < seen.length; t++) {
        model.readOne(seen, t);
        cost[t] = t ? gpt2.surprise(model.logitsAt(t - 1), seen[t]) : NaN;
        if (t % 8 === 7) await pause(0);
        if (mine !== turn) return false;
      }
      [ids, first, cost] = [all, start, cost.slice(0, seen.length)];
      version = number ?? version;
      postMessage({ kind: "text", ids, first, cost, maps: maps(seen.length) });
      return true;
    }

    const tokens = text => [words.eot, ...words.encode(text)];

    async function write({ text, number, count, seed }) {
      const mine = ++turn, random = gpt2.randomState(seed);
      if (!await read(tokens(text), mine, number)) return;
      for (let n = 0; n < count; n++) {
        const z = model.logitsAt(ids.length - first - 1);
        const { temperature, topK } = settings;
        const id = gpt2.draw(gpt2.distribution(z, temperature, topK), random());
        if (id === words.eot || !await read([...ids, id], mine)) break;
        await pause(settings.wait);
        if (mine !== turn) return;
      }
      if (mine === turn) postMessage({ kind: "done" });
    }

    // What the token at a place makes of the text before it.
    function look(at) {
      const t = Math.min(at, ids.length - 1) - first;
      if (!(t >= 0) || at >= ids.length) return;
      const { L, NH } = model.config;
      const weights = [];
      for (let k = 0; k < L * NH; k++)
        weights.push(model.row(Math.floor(k / NH), k % NH, t).slice());
      const logits = model.logitsAt(t).slice();
      postMessage({ kind: "look", at, version, weights, logits });
    }

    const answers = {
      start: ({ packed }) => start(packed),
      settings: message => (settings = message),
      read: ({ text, number }) => read(tokens(text), ++turn, number),
      write,
      stop: () => turn++,
      look: ({ at }) => look(at),
    };
    onmessage = ({ data }) => answers[data.kind](data);
  }

  function makeWorker() {
    const source = `const LAST=${LAST};(${serve})((${llmnbGpt2})(),LAST)`;
    const blob = new Blob([source], { type: "text/javascript" });
    return new Worker(URL.createObjectURL(blob));
  }

  // ---- On the page ------------------------------------------------------------

  function open(root) {
    const $ = name => root.querySelector(name);
    const area = $("textarea"), tokens = $(".live-tokens"), tip = $(".live-tip");
    const rows = [...root.querySelectorAll(".live-next button")];
    const heads = [...root.querySelectorAll(".live-heads input")];
    const firstText = area.value;
    let worker, words, config;
    // what the worker read last: tokens, their text, surprise, and the first
    // one that is still in the window
    let shown = { ids: [], pieces: [], ends: [], cost: [], first: 0 };
    let seen = null; // the answer to the last look
    let asked = 0; // how many texts the worker was asked to read
    let writing = false, before = firstText;

    const ask = (kind, more) => worker?.postMessage({ kind, ...more });

    // ---- Words for what is seen

    function visible(id) {
      if (id === words.eot) return "∅";
      const text = words.decode([id]);
      if (text === "\ufffd" || /[\0-\x08\x0b-\x1f\x7f]/.test(text))
        return `byte ${id}`;
      return text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
    }
    const percent = p => (p >= 0.0995 ? (100 * p).toFixed(0)
      : p >= 0.001 ? (100 * p).toFixed(1) : p > 0 ? "<0.1" : "0") + "\u202f%";

    // ---- Settings

    const control = name => $(`[name=${name}]`);
    const temperature = () => Number(control("temperature").value);
    const topK = () => TOPS[control("top").value] ?? config.V;
    const seed = () => Math.min(Math.max(0, control("seed").value), 2 ** 32 - 1);
    const head = () => heads.findIndex(input => input.checked);
    const colour = () => $("[name=live-colour]:checked").value;

    function settings() {
      const top = TOPS[control("top").value] ?? "all";
      $("[data-of=temperature]").textContent = temperature().toFixed(2);
      $("[data-of=top]").textContent = top;
      control("top").setAttribute("aria-valuetext", `${top} tokens`);
      ask("settings", { temperature: temperature(), topK: topK(), wait: 30 });
      showNext();
    }

    // ---- The text and its tokens

    // The token that ends at or behind the caret, the last one of the text
    // when the caret is at the end.
    function atCaret() {
      const caret = area.selectionStart;
      const found = shown.ends.findIndex(end => end >= caret && end > 0);
      if (caret === 0) return 0;
      return found < 0 ? shown.ids.length - 1 : found;
    }

    // The tokens under the text. What was typed since the model last
    // answered stands at the end without a colour.
    function paint() {
      const text = area.value, old = shown.pieces, spans = [];
      let at = 0;
      for (let i = 0; i < old.length; i++) {
        if (!text.startsWith(old[i], at)) break;
        if (old[i]) spans.push(span(i, old[i]));
        at += old[i].length;
      }
      tokens.replaceChildren(...spans, text.slice(at) + "\n");
      mark();
    }

    function span(i, piece) {
      const out = document.createElement("span");
      out.textContent = piece;
      out.dataset.i = i;
      if (i < shown.first) out.className = "out";
      return out;
    }

    // Colour the tokens: by surprise, or by the weights of the chosen head.
    function mark() {
      root.dataset.colour = colour();
      const focus = atCaret(), looking = colour() === "attention";
      const weights = looking && seen?.weights[head()];
      for (const x of tokens.children) {
        const t = x.dataset.i - shown.first;
        const depth = !looking ? Math.min(1, shown.cost[t] / 8)
          : weights ? Math.sqrt(weights[t] ?? 0) : 0;
        x.style.setProperty("--depth", (depth || 0).toFixed(3));
        x.classList.toggle("focus", Number(x.dataset.i) === focus);
      }
      drawLines(weights);
    }

    // Lines from the token at the caret to those it reads most.
    function drawLines(weights) {
      const svg = $(".live-lines"), box = svg.getBoundingClientRect();
      const from = tokens.querySelector(".focus");
      const middle = x => {
        const r = [...x.getClientRects()].at(-1);
        return [r.left + r.width / 2 - box.left, r.top + r.height / 2 - box.top];
      };
      const paths = [];
      for (const x of weights && from ? tokens.children : []) {
        const weight = weights[x.dataset.i - shown.first] ?? 0;
        if (weight < 0.04 || x === from) continue;
        const [a, b] = middle(from), [c, d] = middle(x);
        const up = Math.max(14, Math.abs(a - c) / 5);
        const line = b === d ? `Q${(a + c) / 2} ${b - up}` : `Q${a} ${d}`;
        paths.push(`<path d="M${a} ${b} ${line} ${c} ${d}" opacity="${
          Math.min(1, 0.25 + weight)}" stroke-width="${1 + 3 * weight}"/>`);
      }
      svg.innerHTML = paths.join("");
    }

    function showText({ ids, first, cost, maps }) {
      const pieces = words.pieces(ids), text = pieces.join("");
      if (!writing && text !== area.value) return; // typed on meanwhile
      let end = 0;
      const ends = pieces.map(piece => (end += piece.length));
      shown = { ids, first, cost, pieces, ends };
      if (writing && area.value !== text) follow(text);
      paint();
      drawMaps(maps);
      ask("look", { at: atCaret() });
      if (!writing) say();
    }

    function follow(text) {
      area.value = text;
      area.setSelectionRange(text.length, text.length);
      tokens.textContent = text + "\n"; // its height, before it is scrolled
      const box = $(".live-text");
      box.scrollTop = box.scrollHeight;
    }

    function say() {
      const { T, L, NH } = config, n = shown.ids.length - 1;
      const size = (window.llmnbModel.parameters / 1e6).toFixed(1);
      $(".live-status").textContent = shown.first
        ? `${n} tokens. The model holds ${T}: it reads the last ${
          shown.ids.length - shown.first}, the pale ones are out of its sight.`
        : `${n} of ${T - 1} tokens, read by ${size} million weights in ${
          L} blocks of ${NH} heads.`;
    }

    // ---- What the model expects

    function showNext() {
      if (!seen) return;
      const own = gpt2.distribution(seen.logits, 1, null);
      const now = gpt2.distribution(seen.logits, temperature(), topK());
      const best = gpt2.order(seen.logits).slice(0, rows.length);
      const full = Math.max(0.3, now[best[0]], own[best[0]]);
      const came = shown.ids[seen.at + 1];
      rows.forEach((row, i) => {
        const id = best[i], [name, bar, number] = row.children;
        name.textContent = visible(id);
        bar.style.setProperty("--now", now[id] / full);
        bar.style.setProperty("--own", own[id] / full);
        number.textContent = percent(now[id]);
        row.classList.toggle("came", id === came);
        row.disabled = /^(∅|byte)/.test(visible(id));
        row.dataset.id = id;
        row.title = `token ${id}; the model's own: ${percent(own[id])}`;
      });
      const end = seen.at === shown.ids.length - 1;
      $(".live-title").textContent = end ? "What comes next?"
        : `What was expected after ${visible(shown.ids[seen.at])}`;
    }

    function append(row) {
      const end = shown.ends[seen.at];
      const text = words.decode([Number(row.dataset.id)]);
      area.setRangeText(text, end, end, "end");
      typed();
    }

    function tellToken() {
      const i = seen.at, t = i - shown.first, id = shown.ids[i];
      const cost = shown.cost[t];
      const name = document.createElement("code");
      name.textContent = i === 0 ? "start" : visible(id);
      const told = [` token ${id}`];
      if (cost >= 0)
        told.push(`the model gave it ${percent(Math.exp(-cost))
          }: a surprise of ${cost.toFixed(2)} nats`);
      if (colour() === "attention") told.push(mostRead(t));
      $(".live-token").replaceChildren(name, told.join("; "));
    }

    function mostRead(t) {
      const NH = config.NH, k = head(), w = seen.weights[k];
      const s = w.indexOf(Math.max(...w));
      const what = s === t ? "itself"
        : s + shown.first === 0 ? "the start" : visible(shown.ids[s + shown.first]);
      return `block ${Math.floor(k / NH)}, head ${k % NH} looks most at ${
        what} (${percent(w[s])})`;
    }

    function showLook(look) {
      if (look.version !== asked || look.at !== atCaret()) return;
      seen = look;
      showNext();
      mark();
      if (!writing) tellToken();
    }

    // ---- The small maps

    let drawn = null;
    new MutationObserver(() => drawn && drawMaps(drawn)).observe(
      document.documentElement, { attributeFilter: ["data-theme"] });

    function drawMaps(maps) {
      const size = LAST * LAST;
      drawn = maps;
      const blue = getComputedStyle(root).getPropertyValue("--live-cool");
      const rgb = blue.match(/[\da-f]{2}/gi).map(x => parseInt(x, 16));
      root.querySelectorAll(".live-heads canvas").forEach((canvas, k) => {
        const image = new ImageData(LAST, LAST);
        for (let i = 0; i < size; i++) {
          image.data.set(rgb, 4 * i);
          image.data[4 * i + 3] = maps[k * size + i];
        }
        canvas.getContext("2d").putImageData(image, 0, 0);
      });
    }

    // ---- What you do

    function typed() {
      if (writing) stop();
      paint();
      ask("read", { text: area.value, number: ++asked });
    }

    function moved() {
      if (writing) return;
      ask("look", { at: atCaret() });
    }

    function setText(text) {
      if (writing) stop();
      area.value = text;
      area.setSelectionRange(text.length, text.length);
      $(".live-text").scrollTop = 0;
      typed();
    }

    function write() {
      if (writing) return stop();
      writing = true;
      before = area.value;
      $(".live-write").textContent = "Stop";
      $(".live-status").textContent = $(".live-news").textContent = "Writing …";
      $(".live-token").textContent = "";
      area.setSelectionRange(before.length, before.length);
      ask("write", {
        text: before, number: ++asked, count: LONGEST, seed: seed(),
      });
    }

    function stop() {
      ask("stop");
      done();
    }

    function done() {
      writing = false;
      $(".live-write").textContent = "Write";
      $(".live-news").textContent = `It wrote: ${area.value.slice(before.length)}`;
      say();
      ask("look", { at: atCaret() });
    }

    // Back to what you had before it wrote; from there, to the first text.
    function again() {
      setText(area.value === before ? firstText : before);
    }

    function chooseHead(k) {
      heads[k].checked = true;
      recolour("attention");
    }

    function recolour(value) {
      root.querySelector(`[name=live-colour][value=${value}]`).checked = true;
      mark();
      if (seen) tellToken();
    }

    function hover(event) {
      const under = document.elementsFromPoint(event.clientX, event.clientY)
        .find(x => x.parentElement === tokens);
      tip.hidden = !under;
      if (!under) return;
      const i = Number(under.dataset.i), cost = shown.cost[i - shown.first];
      const weight = seen?.weights[head()]?.[i - shown.first];
      tip.textContent = `${visible(shown.ids[i])}  token ${shown.ids[i]}`
        + (cost >= 0 ? `, ${cost.toFixed(2)} nats` : "")
        + (colour() === "attention" && weight !== undefined
          ? `, looked at with ${percent(weight)}` : "");
      tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 250)}px`;
      tip.style.top = `${event.clientY + 18}px`;
    }

    function pressed(event) {
      const go = event.key === "Enter" && (event.ctrlKey || event.metaKey);
      if (go ? !writing : event.key === "Escape" && writing) write();
    }

    function listen() {
      area.addEventListener("input", typed);
      area.addEventListener("keydown", pressed);
      document.addEventListener("selectionchange", () =>
        document.activeElement === area && moved());
      area.addEventListener("mousemove", hover);
      area.addEventListener("mouseleave", () => (tip.hidden = true));
      for (const row of rows) row.addEventListener("click", () => append(row));
      for (const name of ["temperature", "top"])
        control(name).addEventListener("input", settings);
      $(".live-write").addEventListener("click", write);
      $(".live-again").addEventListener("click", again);
      for (const x of root.querySelectorAll("[name=live-colour]"))
        x.addEventListener("change", () => recolour(x.value));
      heads.forEach((x, k) =>
        x.addEventListener("change", () => chooseHead(k)));
      for (const x of root.querySelectorAll("[data-head]"))
        x.addEventListener("click", () => {
          const [l, h] = x.dataset.head.split(" ").map(Number);
          chooseHead(l * config.NH + h);
        });
      for (const x of root.querySelectorAll("[data-text]"))
        x.addEventListener("click", () =>
          setText(TEXTS[x.dataset.text] ?? firstText));
      new ResizeObserver(() => seen && mark()).observe(tokens);
    }

    // ---- The beginning

    function begin() {
      const packed = window.llmnbModel;
      config = packed.config;
      words = gpt2.tokenizer(packed);
      worker = makeWorker();
      const answers = { text: showText, look: showLook, done };
      worker.onerror = ({ message }) =>
        ($(".live-status").textContent = `The model has stopped: ${message}`);
      worker.onmessage = ({ data }) => answers[data.kind](data);
      ask("start", { packed });
      listen();
      settings();
      area.setSelectionRange(area.value.length, area.value.length);
      typed();
      for (const x of root.querySelectorAll(":disabled")) x.disabled = false;
      $(".live-news").textContent = "The model is loaded.";
    }

    return begin;
  }

  // Paint the page first, then load the model.
  function load(begin, status) {
    const script = document.createElement("script");
    script.src = `${here}live-model.js`;
    script.onload = begin;
    script.onerror = () => (status.textContent = "The model did not load.");
    document.head.append(script);
  }

  window.llmnbLive = gpt2; // for tests
  addEventListener("DOMContentLoaded", () => {
    const root = document.querySelector(".live");
    if (!root) return; // the script is part of every page
    const begin = open(root);
    requestAnimationFrame(() => setTimeout(() =>
      load(begin, root.querySelector(".live-status"))));
  });
})();
