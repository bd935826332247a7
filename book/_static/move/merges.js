// Byte-pair encoding of the reader's own text, merge by merge: chapter 1.2.
// data: pairs (the two tokens of each merge, by rank, in one text), words (the
// expression that cuts a text), text (to begin with), sizes of vocabularies.
"use strict";

Move.kind("merges", (stage, data) => {
  const { make } = Move;
  const numbers = data.pairs.split(" ").map(Number);
  const pairs = Array.from({ length: numbers.length / 2 }, (_, i) =>
    numbers.slice(2 * i, 2 * i + 2));
  const UTF8 = new TextDecoder("utf-8", { fatal: true });
  // \s means what Unicode calls white space, as it does in tiktoken
  const cut = new RegExp(data.words.replaceAll("\\s", "\\p{White_Space}")
    .replaceAll("\\S", "\\P{White_Space}"), "gu");
  const rank = new Map(pairs.map(([a, b], i) => [`${a},${b}`, i]));

  // The bytes of a token: those of its parts, one after the other (1.2.3)
  const bytes = (token) => (token < 256 ? [token]
    : [...bytes(pairs[token - 256][0]), ...bytes(pairs[token - 256][1])]);

  // A token as text; where it is part of a character, its bytes in hex
  function spell(token) {
    try {
      return UTF8.decode(new Uint8Array(bytes(token))).replaceAll(" ", "␣")
        .replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    } catch {
      return bytes(token).map((x) => x.toString(16).padStart(2, "0"))
        .join(" ");
    }
  }

  // The lowest rank among all neighbours, or Infinity if none may merge
  function next(words, most) {
    let least = Infinity;
    for (const word of words) {
      for (let i = 1; i < word.length; i++) {
        const found = rank.get(`${word[i - 1]},${word[i]}`);
        if (found < Math.min(least, most)) least = found;
      }
    }
    return least;
  }

  // Put the token of a merge in place of its pair everywhere, from the left
  function merge(word, which) {
    const [a, b] = pairs[which], out = [];
    for (let i = 0; i < word.length; i++) {
      const here = word[i] === a && word[i + 1] === b;
      out.push(here ? 256 + which : word[i]);
      if (here) i++;
    }
    return out;
  }

  // Bytes first, then the words after each merge: [merge, words] a stage
  function stages(text, size) {
    const utf8 = new TextEncoder();
    let words = (text.match(cut) ?? []).map((w) => [...utf8.encode(w)]);
    const out = [[null, words]];
    for (;;) {
      const which = next(words, size - 257);
      if (which === Infinity) return out;
      words = words.map((word) => merge(word, which));
      out.push([which, words]);
    }
  }

  const input = make("input", { type: "text", value: data.text,
    maxlength: 80, spellcheck: "false", autocomplete: "off",
    oninput: () => restart() });
  const pieces = make("div", { class: "move-pieces" });
  stage.picture.append(pieces);
  let size = data.sizes.at(-1), all, player = null;

  function show(step) {
    const [which, words] = all[step];
    pieces.replaceChildren(...words.map((word) => make("span",
      { class: "move-word" }, ...word.map((token) => make("span", {
        class: "move-piece" + (token === 256 + which ? " move-new" : "")
          + (token > 255 ? " move-joined" : ""),
      }, make("b", {}, spell(token)), make("small", {}, String(token)))))));
    const count = words.flat().length, first = all[0][1].flat().length;
    const what = which === null ? `The ${first} bytes of the text.`
      : `Merge ${which + 1} of ${size - 257}: ${spell(pairs[which][0])} and `
        + `${spell(pairs[which][1])} become token ${256 + which}.`;
    const end = step === all.length - 1 ? " No pair is left to merge." : "";
    stage.say(`${what} ${count} token${count === 1 ? "" : "s"}.${end}`);
  }

  function restart(end = false) {
    all = stages(input.value, size);
    const last = all.length - 1;
    if (!player) player = stage.play(all.length, show);
    else player.start(all.length, end ? last : 0);
  }

  stage.choices.append(make("label", { class: "move-text" },
    make("span", {}, "your text"), input));
  stage.slide("vocabulary", data.sizes, data.sizes.length - 1, (value) => {
    size = value;
    restart(true);
  }, (value) => `${value}`);
  restart();
});
