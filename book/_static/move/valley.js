// Four optimisers in one valley, at a learning rate of the reader's: 1.12.
// data: curvature, lowest and start of the valley; steps; rules with the
// settings of each, by name.
"use strict";

Move.kind("valley", (stage, data) => {
  const { make } = Move;
  const X = [-1.6, 4.4], Y = [-0.6, 2.4];
  const names = Object.keys(data.rules);
  const rates = names.map((name) => data.rules[name].lr);
  const RATES = [...new Set([...rates, ...Array.from({ length: 49 },
    (_, i) => +(10 ** (-3 + i / 16)).toPrecision(2))])]
    .sort((a, b) => a - b);
  let which = 0, path, player = null;

  // A rule's step for one coordinate: (1.12.2), (1.12.3), (1.12.4) to (1.12.8)
  function move(name, w, g, state, step) {
    const { beta, beta1, beta2, eps, decay } = data.rules[name];
    const lr = rates[which];
    if (name === "gradient descent") return w - lr * g;
    if (name === "momentum") {
      state.m = beta * state.m + g;
      return w - lr * state.m;
    }
    state.m = beta1 * state.m + (1 - beta1) * g;
    state.v = beta2 * state.v + (1 - beta2) * g * g;
    const mean = state.m / (1 - beta1 ** step);
    const square = state.v / (1 - beta2 ** step);
    return (1 - lr * (decay ?? 0)) * w - lr * mean / (Math.sqrt(square) + eps);
  }

  function descend(name) {
    const out = [data.start], state = [{ m: 0, v: 0 }, { m: 0, v: 0 }];
    for (let step = 1; step <= data.steps; step++) {
      out.push(out.at(-1).map((w, i) => move(name, w,
        data.curvature[i] * (w - data.lowest[i]), state[i], step)));
    }
    return out;
  }

  const distance = ([x, y]) => Math.hypot(x - data.lowest[0],
    y - data.lowest[1]);

  function draw(step) {
    const width = stage.picture.clientWidth || 600, height = width / 2;
    const at = ([x, y]) => [
      (x - X[0]) / (X[1] - X[0]) * width,
      (Y[1] - y) / (Y[1] - Y[0]) * height,
    ];
    const inside = ([x, y]) => x > 2 && x < width - 2 && y > 2
      && y < height - 2;
    // A line through points, broken where it leaves the picture
    const line = (points) => points.map((p, i) => (!inside(p) ? ""
      : `${i && inside(points[i - 1]) ? "L" : "M"}${p.join(" ")}`)).join("");
    const [cx, cy] = at(data.lowest);
    const rings = data.levels.map((level) => {
      const [rx, ry] = data.curvature.map((k) => Math.sqrt(2 * level / k));
      const points = Array.from({ length: 361 }, (_, i) => at([
        data.lowest[0] + rx * Math.cos(i * Math.PI / 180),
        data.lowest[1] + ry * Math.sin(i * Math.PI / 180)]));
      return make("path", { d: line(points), class: "move-ring" });
    });
    const gone = path.slice(0, step + 1).map(at);
    stage.picture.replaceChildren(make("svg", { class: "move-valley",
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": "the path so far, on the valley's contour lines" },
    ...rings,
    make("path", { class: "move-lowest",
      d: `M${cx - 9} ${cy}h18M${cx} ${cy - 9}v18` }),
    make("path", { class: "move-path", d: line(gone) }),
    ...gone.map((p, i) => (inside(p) ? make("circle", { cx: p[0], cy: p[1],
      r: i === step ? 5 : 2.2, class: "move-dot" }) : null))));
  }

  function show(step) {
    draw(step);
    const point = path[step], far = distance(point);
    stage.figure.dataset.point = JSON.stringify(point);
    const flown = !(far < 1e3);
    stage.words.classList.toggle("move-alarm", flown);
    stage.say(flown ? `Step ${step}: the path has flown apart. The learning `
      + "rate is too large for the steep walls."
      : `Step ${step}: ${far.toPrecision(3)} away from the lowest point.`);
  }

  function restart() {
    path = descend(names[which]);
    player ??= stage.play(path.length, show);
    player.start(path.length, path.length - 1);
  }

  stage.choose("rule", names, (i) => {
    which = i;
    setRate(RATES.indexOf(rates[i]));
    restart();
  });
  const setRate = stage.slide("learning rate", RATES,
    RATES.indexOf(rates[0]), (value) => {
      rates[which] = value;
      restart();
    });
  stage.fit(() => (player ? show(player.step) : restart()));
});
