// Figures that move. A page holds <figure class="move" data-kind="threads">
// with its numbers as JSON; move/threads.js calls Move.kind("threads", build)
// and gets the stage to draw on. Scripts are deferred: the page is there.
"use strict";

(() => {
const Move = {
  // make("p", {class: "x", onclick: f}, "text", child): a new element
  make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "g", "rect", "circle", "line", "text"];
    const space = "http://www.w3.org/2000/svg";
    const x = svg.includes(tag)
      ? document.createElementNS(space, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) x.addEventListener(name.slice(2), value);
      else if (value === true) x.setAttribute(name, name);
      else if (value !== false) x.setAttribute(name, value);
    }
    x.append(...children.filter((child) => child !== null));
    return x;
  },

  // Bring all figures of a kind to life. If one fails, its still remains.
  kind(name, build) {
    for (const figure of document.querySelectorAll(
      `figure.move[data-kind="${name}"]`)) {
      const data = JSON.parse(figure.querySelector("script").textContent);
      build(new Stage(figure), data);
      (figure.closest(".cell_output") ?? figure).classList.add("move-live");
    }
  },
};

// The buttons' signs, drawn: no font is sure to have them.
const SIGNS = {
  first: "M3 2h2v12H3zM14 2v12L6 8z",
  back: "M12 2v12L4 8z",
  play: "M4 2v12l9-6z",
  pause: "M4 2h3v12H4zM9 2h3v12H9z",
  step: "M2 2v12l8-6zM11 2h2v12h-2z",
};

let stages = 0; // how many there are: each names its parts

// Where one figure is drawn: choices above, a picture, what it says, buttons.
class Stage {
  constructor(figure) {
    const { make } = Move;
    this.figure = figure;
    this.name = `move-${++stages}`;
    this.choices = make("div", { class: "move-choices" });
    this.picture = make("div", { class: "move-picture" });
    this.words = make("p", { class: "move-words", "aria-live": "polite" });
    this.buttons = make("div", { class: "move-buttons" });
    figure.append(this.choices, this.picture,
      make("div", { class: "move-foot" }, this.words, this.buttons));
    figure.setAttribute("role", "group");
    figure.setAttribute("aria-roledescription", "figure that moves");
    const captions = [...document.querySelectorAll(".figure-caption")];
    const caption = captions.find((x) => figure.compareDocumentPosition(x)
      & Node.DOCUMENT_POSITION_FOLLOWING);
    const number = caption?.textContent.match(/Figure [\dA.]*\d/)?.[0];
    figure.setAttribute("aria-label", number ?? "figure");
  }

  say(text) {
    if (this.words.textContent !== text) this.words.textContent = text;
  }

  // One of several, as a row of radio buttons: change(index) when chosen.
  choose(label, names, change) {
    const { make } = Move;
    const name = `${this.name}-${this.choices.children.length}`;
    const box = make("fieldset", {}, make("legend", {}, label));
    names.forEach((text, i) => box.append(make("label", {},
      make("input", { type: "radio", name, checked: i === 0,
        onchange: () => change(i) }), make("span", {}, text))));
    this.choices.append(box);
  }

  // A slider over the given values: change(value). Returns set(index), which
  // moves it without a change.
  slide(label, values, first, change, show = String) {
    const { make } = Move;
    const out = make("output");
    const input = make("input", { type: "range", min: 0,
      max: values.length - 1, "aria-label": label });
    const set = (index) => {
      input.value = index;
      out.textContent = show(values[index]);
      input.setAttribute("aria-valuetext", out.textContent);
    };
    input.addEventListener("input", () => {
      set(+input.value);
      change(values[input.value]);
    });
    set(first);
    this.choices.append(make("label", { class: "move-slide" },
      make("span", {}, label), input, out));
    return set;
  }

  // Buttons and a slider for `count` steps, shown by show(step).
  // The player's start(count) begins anew, with another number of steps.
  play(count, show) {
    return new Player(this, count, show);
  }

  // Call draw(width) now and whenever the picture's width changes.
  fit(draw) {
    let before = 0;
    const look = () => {
      const width = Math.floor(this.picture.clientWidth);
      if (width && width !== before) draw(before = width);
    };
    new ResizeObserver(look).observe(this.picture);
    look();
  }
}

class Player {
  constructor(stage, count, show) {
    const { make } = Move;
    const button = (sign, label, act) => make("button",
      { type: "button", "aria-label": label, title: label, onclick: act },
      make("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
        make("path", { d: SIGNS[sign] })));
    this.stage = stage;
    this.show = show;
    this.toggle = button("play", "play", () => this.run(!this.timer));
    this.slider = make("input", { type: "range", min: 0, value: 0,
      "aria-label": "step", oninput: () => {
        this.run(false);
        this.go(+this.slider.value);
      } });
    this.place = make("span", { class: "move-place", "aria-hidden": "true" });
    stage.buttons.append(
      button("first", "first step", () => this.by(-Infinity)),
      button("back", "step back", () => this.by(-1)), this.toggle,
      button("step", "step", () => this.by(1)), this.slider, this.place);
    stage.figure.tabIndex = 0;
    stage.figure.addEventListener("keydown", (event) => this.key(event));
    this.start(count);
  }

  start(count, step = 0) {
    this.run(false);
    this.last = count - 1;
    this.slider.max = this.last;
    this.go(step);
  }

  go(step) {
    this.step = Math.max(0, Math.min(step, this.last));
    this.slider.value = this.step;
    this.place.textContent = `${this.step} / ${this.last}`;
    this.slider.setAttribute("aria-valuetext",
      `step ${this.step} of ${this.last}`);
    this.show(this.step);
    if (this.step === this.last) this.run(false);
  }

  // A step of the reader's own ends the playing.
  by(steps) {
    this.run(false);
    this.go(this.step + steps);
  }

  run(on) {
    clearInterval(this.timer);
    this.timer = null;
    if (on && this.step === this.last) this.go(0);
    const pause = Math.max(150, Math.min(900, 15000 / this.last));
    if (on) this.timer = setInterval(() => this.go(this.step + 1), pause);
    const label = on ? "pause" : "play";
    this.toggle.querySelector("path").setAttribute("d", SIGNS[label]);
    this.toggle.setAttribute("aria-label", label);
    this.toggle.title = label;
  }

  // Arrow keys, wherever in the figure they are not needed for something else
  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1,
      Home: -Infinity, End: Infinity }[event.key];
    if (steps === undefined || event.target.tagName === "INPUT"
      || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.by(steps);
  }
}

window.Move = Move;
})();
