// A product through the caches, tile by tile: 2.4. data: rows, the panels of
// a; columns, the panels of b.
"use strict";

Move.kind("tiles", (stage, { rows, columns }) => {
  const { make } = Move;
  const WIDE = 10, HIGH = 8, LONG = 24, EDGE = 30; // a panel is LONG steps long
  const count = rows * columns;
  const box = (x, y, width, height) =>
    make("rect", { x, y, width, height, class: "move-part" });
  const each = (n, draw) => Array.from({ length: n }, (_, k) => draw(k));
  const a = each(rows, (i) => box(0, EDGE + i * HIGH, LONG, HIGH));
  const b = each(columns, (j) => box(EDGE + j * WIDE, 0, WIDE, LONG));
  const out = each(count, (t) => box(EDGE + Math.floor(t / rows) * WIDE,
    EDGE + (t % rows) * HIGH, WIDE, HIGH));
  const name = (text, x, y) => make("text", { x, y }, text);
  stage.picture.append(make("svg", { class: "move-tiles", role: "img",
    viewBox: `-1 -1 ${EDGE + columns * WIDE + 2} ${EDGE + rows * HIGH + 2}`,
    "aria-label": "the panels and the tile that are in use" },
  ...a, ...b, ...out, name("a", 11, 20), name("second level", 0, 26),
  name("b", 24, 13), name("third", 11, 4), name("level", 11, 8)));

  function show(step) {
    const t = step - 1, i = t % rows, j = Math.floor(t / rows);
    const part = (x, colour, now, done) => x.setAttribute("class",
      `move-part ${colour}${now ? " move-now" : done ? " move-done" : ""}`);
    a.forEach((x, k) => part(x, "move-c1", k === i, true));
    b.forEach((x, k) => part(x, "move-c2", t >= 0 && k === j, true));
    out.forEach((x, k) => part(x, "move-c0", k === t, k < t));
    stage.figure.dataset.second = step;
    stage.figure.dataset.third = step ? j + 1 : 0;
    if (!step) {
      stage.say("All panels of a lie in the second level, a block of b in the "
        + "third. Nothing is multiplied yet.");
      return;
    }
    const green = i ? "the panel of b is still in the first level"
      : `a panel of b comes into the first level, for ${rows} tiles`;
    const end = step < count ? "" : ` In all ${columns} panels came from the `
      + `third level and ${count} from the second, none from memory.`;
    stage.say(`Tile ${step}: ${green}; one of a passes by, from the second.`
      + end);
  }

  stage.play(count + 1, show);
});
