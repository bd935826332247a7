// A formula within a line does not break. Where it is wider than its
// paragraph (on a phone), it scrolls in a box of its own.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  const formulas = document.querySelectorAll("article span.math");
  // A full stop or comma after a formula stays on the formula's line.
  for (const x of formulas) {
    const after = x.nextSibling;
    const mark = after?.nodeType === 3 && after.data.match(/^[.,:;?!)’]+/);
    if (!mark || x.closest("table")) continue;
    const line = document.createElement("span");
    line.className = "formula-and-mark";
    x.replaceWith(line);
    after.data = after.data.slice(mark[0].length);
    line.append(x, mark[0]);
  }
  const fit = () => {
    for (const x of formulas) x.classList.remove("wide");
    for (const x of formulas) {
      const block = x.closest("p, li, dd, td, th, h1, h2, h3");
      if (!block || x.closest("table")) continue;
      const right = block.getBoundingClientRect().right;
      const wide = x.getBoundingClientRect().right > right + 1;
      x.classList.toggle("wide", wide);
    }
  };
  fit();
  addEventListener("resize", fit);
  addEventListener("toggle", fit, true); // a fold that opens
});
