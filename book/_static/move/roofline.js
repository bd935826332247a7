// The roofline of the reader's machine: chapter 2.4. data.layers: [name, C,
// OC]; data.rows: the values of N; data.copy and data.peak: GB/s and GFLOP/s
// of the machine that measured data.points of the layer data.measured, each
// [N, intensity, GFLOP/s].
"use strict";

Move.kind("roofline", (stage, data) => {
  const { make } = Move;
  const X = [0.25, 512];
  let layer = data.layers[0], player = null;
  const fields = {};
  const machine = () => [+fields.copy.value, +fields.peak.value];

  const intensity = (N, [, C, OC]) => 0.5 / (1 / OC + 1 / N + 1 / C); // (2.4.1)
  const roof = (i) => Math.min(machine()[1], i * machine()[0]);
  const short = (x) => (x < 10 ? x.toFixed(1) : x.toFixed(0));

  function draw(N) {
    const width = stage.picture.clientWidth || 600, height = 280;
    const [copy, peak] = machine(), left = 48, bottom = 34;
    const most = 2 * Math.max(peak, ...data.points.map((p) => p[2]));
    const low = Math.min(copy * X[0], ...data.points.map((p) => p[2])) / 1.5;
    const part = (v, [a, b]) => Math.log(v / a) / Math.log(b / a);
    const x = (i) => left + part(i, X) * (width - left - 12);
    const y = (v) => height - bottom - part(v, [low, most])
      * (height - bottom - 8);
    const text = (at, up, words, anchor = "middle") => make("text",
      { x: at, y: up, "text-anchor": anchor }, words);
    const ticks = (values, [a, b]) => values.filter((v) => v >= a && v <= b);
    const tens = [0.01, 0.1, 1, 10, 100, 1e3, 1e4, 1e5];
    const ridge = Math.min(Math.max(peak / copy, X[0]), X[1]);
    const i = intensity(N, layer);
    stage.picture.replaceChildren(make("svg", { class: "move-roof",
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": "operations a second over operations a byte" },
    ...ticks([0.25, 1, 4, 16, 64, 256], X).map((v) =>
      text(x(v), height - 18, String(v))),
    text((left + width) / 2, height - 4, "operations a byte"),
    ...ticks(tens, [low, most]).map((v) =>
      text(left - 6, y(v) + 4, String(v), "end")),
    text(left + 4, 14, "GFLOP/s", "start"),
    text(width - 14, height - bottom - 10,
      `rings: ${data.measured}, measured by the book`, "end"),
    make("path", { class: "move-line", d: `M${x(X[0])} ${y(roof(X[0]))}`
      + `L${x(ridge)} ${y(roof(ridge))}L${x(X[1])} ${y(roof(X[1]))}` }),
    ...data.points.map(([, at, speed]) => make("circle", { cx: x(at),
      cy: y(speed), r: 4, class: "move-measured" })),
    make("path", { class: "move-drop",
      d: `M${x(i)} ${height - bottom}V${y(roof(i))}` }),
    make("circle", { cx: x(i), cy: y(roof(i)), r: 6, class: "move-dot" })));
  }

  function show(step) {
    const N = data.rows[step], i = intensity(N, layer);
    const [copy, peak] = machine();
    if (!(copy > 0 && peak > 0)) {
      stage.say("Write two numbers above 0: what your machine does.");
      return;
    }
    draw(N);
    stage.figure.dataset.intensity = i;
    stage.figure.dataset.roof = roof(i);
    const limit = i * copy < peak ? "memory" : "arithmetic";
    stage.say(`N = ${N}: ${short(i)} operations a byte, at most `
      + `${short(roof(i))} GFLOP/s. The limit is ${limit}; the roof bends at `
      + `${short(peak / copy)} operations a byte.`);
  }

  const field = (name, label) => {
    fields[name] = make("input", { type: "number", min: 0, step: "any",
      value: data[name], oninput: () => show(player.step) });
    stage.choices.append(make("label", { class: "move-number" },
      make("span", {}, label), fields[name]));
  };
  field("copy", "memory, GB/s");
  field("peak", "arithmetic, GFLOP/s");
  stage.choose("layer", data.layers.map(([name]) => name), (i) => {
    layer = data.layers[i];
    show(player.step);
  });
  player = stage.play(data.rows.length, show);
  stage.fit(() => show(player.step));
});
