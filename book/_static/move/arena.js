// The map of the arena, with sliders for its sizes: chapter 1.16. data.groups:
// [name, bytes of a number, lies over the one before, tensors], a tensor
// being [name, letters of its shape]; data.start: the sizes to begin with.
"use strict";

Move.kind("arena", (stage, data) => {
  const { make } = Move;
  const COLOURS = { acts: 2, dacts: 1, logits: 3, block: 1 };
  const SIZES = {
    B: [1, 2, 4, 8, 16, 32, 64],
    T: [16, 32, 64, 128, 256, 512, 1024],
    L: [1, 2, 4, 6, 8, 12, 24, 36, 48],
    C: [64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1600],
  };
  const VOCABULARY = { "50,257": 50304, "1,024": 1024 };
  const now = { ...data.start };
  const grouped = (n) => n.toString().replace(/\B(?=(\d{3})+$)/g, ",");
  const short = (n) => (n < 1e9 ? `${(n / 1e6).toFixed(1)} MB`
    : `${(n / 1e9).toFixed(2)} GB`);

  // The numbers that letters such as "3C" stand for, at the sizes of now
  function size(letters) {
    const [, times, letter] = letters.match(/^(\d*)(.*)$/);
    return (times === "" ? 1 : +times) * (letter === "" ? 1 : now[letter]);
  }

  // Where every tensor begins in its group and how long it is, as (1.16.1);
  // a group that lies over another takes only what it is longer.
  function layout() {
    now.NH = now.C / 64;
    let total = 0, before = 0;
    const groups = data.groups.map(([name, item, over, tensors]) => {
      let at = 0;
      const parts = tensors.map(([tensor, letters]) => {
        const count = letters.map(size).reduce((a, b) => a * b, 1);
        const part = { group: name, tensor, letters, count, at,
          bytes: count * item };
        at += part.bytes;
        return part;
      });
      const takes = over ? Math.max(0, at - before) : at;
      total += takes;
      before = at;
      return { name, over, parts, bytes: at };
    });
    return { groups, total };
  }

  let map, chosen = 0, player = null;
  const all = () => map.groups.flatMap((group) => group.parts);

  function draw() {
    const longest = Math.max(...map.groups.map((group) => group.bytes));
    const wide = stage.picture.clientWidth * 0.8;
    const rows = map.groups.map((group) => make("div",
      { class: "move-arena-row" },
      make("span", {}, group.name),
      make("div", { class: `move-bar move-c${COLOURS[group.name] ?? 0}` },
        ...group.parts.map((part) => {
          const share = part.bytes / longest;
          const fits = share * wide > 7.5 * part.tensor.length;
          return part.box = make("div", { class: "move-tensor",
            style: `width: ${100 * share}%`,
            title: `${part.tensor}: ${grouped(part.bytes)} bytes`,
            onclick: () => player.by(all().indexOf(part) + 1 - player.step) },
          fits ? part.tensor : "");
        }), group.over ? make("span", { class: "move-over" },
          "the bytes of the line above") : null)));
    stage.picture.replaceChildren(...rows, make("p",
      { class: "move-total" }, "In all ", make("b", {}, short(map.total)),
      ` (${grouped(map.total)} bytes); the longest line is `
      + `${short(longest)}.`));
    stage.figure.dataset.total = map.total;
  }

  // Step 0 is the whole; after that, one tensor a step.
  function show(step) {
    chosen = step;
    for (const part of all()) part.box.classList.remove("move-now");
    if (step === 0) {
      const parts = ["params", "grads", "m", "v"];
      const still = map.groups.filter((g) => parts.includes(g.name))
        .reduce((sum, group) => sum + group.bytes, 0);
      const share = Math.round(100 * still / map.total);
      stage.say(`Parameters, gradients, m and v take ${share} % of the `
        + "memory. Step through the tensors, or click on one.");
      return;
    }
    const part = all()[step - 1];
    part.box.classList.add("move-now");
    stage.say(`${part.group}, ${part.tensor}: (${part.letters.join(", ")}) = `
      + `${grouped(part.count)} numbers, ${grouped(part.bytes)} bytes.`);
  }

  function restart() {
    map = layout();
    draw();
    if (player) player.start(all().length + 1, chosen);
    else player = stage.play(all().length + 1, show);
  }

  for (const letter of ["B", "T", "L", "C"]) {
    const first = SIZES[letter].indexOf(now[letter]);
    stage.slide(letter, SIZES[letter], first, (value) => {
      now[letter] = value;
      restart();
    });
  }
  stage.choose("V", Object.keys(VOCABULARY), (i) => {
    now.Vp = Object.values(VOCABULARY)[i];
    restart();
  });
  stage.fit(restart);
});
