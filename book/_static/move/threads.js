// Threads that step through kernels: a film of the simulator, played.
// A step is [moment, block, thread, kind, function, line, array, first,
// values, rival]; data.shared: the names of a kernel's shared arrays;
// data.wrap: how many elements of an array without rows go into one.
"use strict";

Move.kind("threads", (stage, data) => {
  const { make } = Move;
  const READ = 0, WAIT = 3;
  const DOES = ["reads", "writes", "adds to", "waits at the barrier"];
  const orders = { together: "side by side", alone: "one after the other" };
  let walk, steps, moments, view;
  let order = "together", player = null;

  // A block's colour, or where there is one block only, the thread's.
  const colour = (block, thread) => {
    const many = steps.some((step) => step[1] > 0);
    return `move-c${(many ? block : Math.floor(thread / walk.group))
      % 4}`;
  };
  // The simulator calls shared arrays "shared", "shared 2" and so on
  const shared = (array) => array.startsWith("shared");
  const title = (array) => (shared(array)
    ? data.shared[(array.split(" ")[1] ?? 1) - 1] : array);
  const number = (x) => (x === null ? "?" : String(x));

  // Arrays in the order in which they are touched first; a board has as many
  // elements as are touched, and nobody has written to it yet.
  function shapes() {
    const found = {};
    for (const [, , , kind, , , array, first, values] of steps) {
      if (kind === WAIT) continue;
      const known = walk.arrays[array];
      found[array] ??= known
        ? { shape: known.slice(0, -1), values: known.at(-1) }
        : { shape: [0], values: [] };
      const end = first + values.length;
      if (!known && end > found[array].shape[0]) {
        found[array].shape = [end];
        found[array].values = Array(end).fill(null);
      }
    }
    return found;
  }

  function drawArray(name, { shape, values }) {
    const table = shape.length > 1 && shape[0] > 1;
    const columns = table ? shape.at(-1)
      : Math.min(values.length, data.wrap ?? Infinity);
    const cells = values.map(() => make("div", { class: "move-cell" },
      make("b"), make("small")));
    const grid = make("div", { class: "move-grid",
      style: `--columns: ${columns}` }, ...cells);
    view.cells[name] = cells;
    const tight = table || values.length > 12 ? " move-tight" : "";
    return make("div", { class: `move-array${tight}` },
      make("p", { class: "move-name" },
        title(name) + (shared(name) ? " (shared memory)" : "")), grid);
  }

  // A box for each function that makes a step, all as high as the longest
  function drawCode() {
    for (const [name, code] of Object.entries(walk.code)) {
      view.lines[name] = code.trimEnd().split("\n")
        .map((line) => make("code", {}, line));
    }
    const lines = Object.values(view.lines);
    const height = 1.6 * Math.max(...lines.map((x) => x.length)) + 2;
    for (const name of Object.keys(walk.code)) {
      view.codes[name] = make("pre", { style: `height: ${height}em` },
        ...view.lines[name]);
    }
    return make("div", {}, ...Object.values(view.codes));
  }

  function drawBlock(b) {
    const chips = Array.from({ length: walk.block }, (_, t) =>
      view.threads[[b, t]] = make("span",
        { class: `move-chip ${colour(b, t)}` }, String(t)));
    return make("div", { class: "move-block" },
      make("span", {}, `block ${b}`), ...chips);
  }

  // Draw code, threads and arrays anew: another kernel, or another order.
  function begin() {
    steps = walk.steps[order];
    moments = 1 + steps.at(-1)[0];
    view = { cells: {}, codes: {}, lines: {}, threads: {}, start: shapes() };
    const blocks = 1 + Math.max(...steps.map((step) => step[1]));
    stage.picture.replaceChildren(make("div", { class: "move-threads" },
      drawCode(), make("div", {}, make("p", { class: "move-name" }, "threads"),
        ...Array.from({ length: blocks }, (_, b) => drawBlock(b)),
        ...Object.entries(view.start).map(([name, array]) =>
          drawArray(name, array)))));
  }

  // What every element holds, and who touched it, after so many moments
  function state(moment) {
    const held = {};
    for (const [name, { values }] of Object.entries(view.start)) {
      held[name] = values.map((value) => ({ value }));
    }
    for (const [when, b, t, kind, , , array, first, values] of steps) {
      if (when >= moment) break;
      if (kind === WAIT) continue;
      values.forEach((value, i) => {
        const cell = held[array][first + i];
        cell.value = value;
        if (kind !== READ) cell.owner = [b, t];
      });
    }
    return held;
  }

  function show(moment) {
    const held = state(moment);
    const now = steps.filter((step) => step[0] === moment - 1);
    for (const [name, cells] of Object.entries(view.cells)) {
      cells.forEach((cell, i) => {
        const { value, owner } = held[name][i];
        cell.className = "move-cell" + (owner ? ` ${colour(...owner)}` : "");
        cell.firstChild.textContent = number(value);
        cell.lastChild.textContent = owner ? `t${owner[1]}` : "";
      });
    }
    const where = now.length ? now[0][4] : walk.main;
    for (const [name, code] of Object.entries(view.codes)) {
      code.hidden = name !== where;
      for (const line of view.lines[name]) line.className = "";
    }
    for (const chip of Object.values(view.threads)) {
      chip.classList.remove("move-now", "move-wait", "move-race");
    }
    for (const step of now) mark(step);
    stage.say(words(moment, now));
  }

  function mark([, b, t, kind, name, line, array, first, values, rival]) {
    const chip = view.threads[[b, t]];
    chip.classList.add("move-now");
    chip.classList.toggle("move-wait", kind === WAIT);
    const code = view.lines[name][line], box = view.codes[name];
    code.classList.add("move-now");
    box.scrollTop = code.offsetTop - box.offsetTop - box.clientHeight / 2;
    values.forEach((_, i) => {
      const cell = view.cells[array][first + i];
      cell.classList.add(kind === READ ? "move-read" : "move-write");
      const small = cell.lastChild;
      const others = cell.classList.contains("move-busy");
      small.textContent = others ? `${small.textContent},${t}` : `t${t}`;
      cell.classList.add("move-busy");
      if (rival) cell.classList.add("move-race");
    });
    if (rival) chip.classList.add("move-race");
  }

  const element = (step) => `${title(step[6])}[${place(step[6], step[7])}]`
    + (step[8].length > 1 ? ` and the next ${step[8].length - 1}` : "");

  // An element's place, with a number for each of its array's directions
  function place(array, first) {
    const { shape } = view.start[array];
    return shape.length < 2 ? first
      : `${Math.floor(first / shape[1])}, ${first % shape[1]}`;
  }

  const some = (step) => (step[8].length === 1 ? "an element"
    : `${step[8].length} elements`);

  // What happens at a moment, in a sentence; a race takes precedence.
  function words(moment, now) {
    const race = now.find((step) => step[9]);
    stage.words.classList.toggle("move-alarm", !!race);
    if (!now.length) return `${walk.name}: before the first step.`;
    if (race) {
      const [block, thread] = race[9];
      const far = block === race[1] ? "" : ` of block ${block}`;
      return `Race: thread ${race[2]} ${DOES[race[3]]} ${element(race)}, and `
        + `nothing orders that after the access by thread ${thread}${far}.`;
    }
    if (now.length === 1) {
      const [step] = now;
      return `Thread ${step[2]} of block ${step[1]} ${DOES[step[3]]}`
        + (step[3] === WAIT ? "." : ` ${element(step)}.`);
    }
    const said = [...new Set(now.map((step) => (step[3] === WAIT
      ? DOES[WAIT] : `${DOES[step[3]]} ${some(step)} of ${title(step[6])}`)))];
    return `Block ${now[0][1]}: ${now.length} threads, each `
      + `${said.join(" or ")}.`;
  }

  function restart() {
    begin();
    if (player) player.start(moments + 1);
    else player = stage.play(moments + 1, show);
  }

  [walk] = data.walks;
  if (data.walks.length > 1) {
    stage.choose("kernel", data.walks.map((w) => w.name), (i) => {
      walk = data.walks[i];
      restart();
    });
  }
  if (walk.steps.alone) {
    stage.choose("order", Object.values(orders), (i) => {
      order = Object.keys(orders)[i];
      restart();
    });
  }
  restart();
});
