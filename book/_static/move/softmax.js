// Online softmax over a row of the reader's own numbers: chapter 2.5.
// data.row: the scores to begin with; data.group: how many come at a time.
"use strict";

Move.kind("softmax", (stage, data) => {
  const { make } = Move;
  const { group } = data;
  let row = data.row, states, player = null;
  const input = make("input", { type: "text", value: row.join(" "),
    spellcheck: "false", autocomplete: "off", inputmode: "text",
    oninput: () => restart() });
  const short = (x) => (Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-3)
    ? x.toExponential(2) : String(+x.toFixed(3)));

  // (2.5.1): the maximum and the sum after each group, the first row before
  function online(scores) {
    const out = [{ m: -1e30, sum: 0, factor: 0, old: 0, added: 0 }];
    for (let u = 0; u < scores.length; u += group) {
      const { m: before, sum } = out.at(-1);
      const some = scores.slice(u, u + group);
      const m = Math.max(before, ...some);
      const factor = Math.exp(before - m), old = factor * sum;
      const added = some.reduce((a, s) => a + Math.exp(s - m), 0);
      out.push({ m, factor, old, added, sum: old + added });
    }
    return out;
  }

  function bars(step) {
    const low = Math.min(0, ...row), high = Math.max(...row, low + 1e-9);
    const seen = step * group, { m } = states[step];
    const rise = (x) => 100 * (x - low) / (high - low || 1);
    const level = step ? make("i", { class: "move-level",
      style: `bottom: ${rise(m)}%` }) : null;
    return make("div", { class: "move-scores" }, level, ...row.map((s, i) => {
      const fresh = i >= seen - group && i < seen;
      const name = i >= seen ? "move-later" : fresh ? "move-fresh" : "";
      return make("div", { class: `move-score ${name}` }, make("b",
        { style: `height: ${Math.max(2, rise(s))}%` }),
      make("small", {}, short(s)));
    }));
  }

  function share(step) {
    const { old, added } = states[step];
    const most = Math.max(...states.map((x) => x.sum)) || 1;
    return make("div", { class: "move-sum" }, make("span", {}, "sum"),
      make("div", {}, make("i", { class: "move-old",
        style: `width: ${100 * old / most}%` }),
      make("i", { class: "move-added",
        style: `width: ${100 * added / most}%` })),
      make("output", {}, short(states[step].sum)));
  }

  function show(step) {
    const { m, sum, factor, old, added } = states[step];
    stage.picture.replaceChildren(bars(step), share(step));
    stage.figure.dataset.m = m;
    stage.figure.dataset.sum = sum;
    if (!step) {
      stage.say(`${row.length} scores, ${group} at a time. None is seen yet.`);
      return;
    }
    const repair = step === 1 ? "Nothing is old."
      : factor < 1 ? `A new maximum: the old sum is multiplied by `
        + `${short(factor)}.` : "The maximum stays, and so does the old sum.";
    const end = step < states.length - 1 ? ""
      : ` The row's log-sum-exp is ${short(m + Math.log(sum))}.`;
    stage.say(`m = ${short(m)}. ${repair} Sum: ${short(old)} + `
      + `${short(added)} = ${short(sum)}.${end}`);
  }

  function restart() {
    const found = input.value.split(/[\s,;]+/).filter(Boolean).map(Number);
    const good = found.length && found.length <= 24
      && found.every(Number.isFinite);
    input.setAttribute("aria-invalid", String(!good));
    if (!good) {
      stage.say("Write up to 24 numbers with blanks between them.");
      return;
    }
    row = found;
    states = online(row);
    if (player) player.start(states.length);
    else player = stage.play(states.length, show);
  }

  stage.choices.append(make("label", { class: "move-text" },
    make("span", {}, "scores"), input));
  restart();
});
