// What the book uses of the theme's large library of parts, in a few lines:
// menus that open under their button, sidebars over the page, and the button
// that leads to the top.

(() => {
function toggle(button, open) {
  const menu = button.parentElement.querySelector(".dropdown-menu");
  menu?.classList.toggle("show", open);
  button.setAttribute("aria-expanded", open);
}

const buttons = [...document.querySelectorAll("[data-bs-toggle=dropdown]")];
const isOpen = (button) => button.getAttribute("aria-expanded") === "true";

for (const button of buttons)
  button.addEventListener("click", () => toggle(button, !isOpen(button)));

// A click elsewhere closes a menu, and so does Esc.
addEventListener("click", (event) => {
  for (const button of buttons)
    if (isOpen(button) && !button.contains(event.target))
      toggle(button, false);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const button of buttons.filter(isOpen)) {
    toggle(button, false);
    button.focus();
  }
});

// A sidebar opens over a narrow page at the place where one is, and gives the
// focus back.
for (const which of ["primary", "secondary"]) {
  const sidebar = document.querySelector(`#pst-${which}-sidebar-modal`);
  const button = document.querySelector(`.${which}-toggle`);
  button?.addEventListener("click", () => requestAnimationFrame(() => {
    const here = sidebar?.querySelector("a.current, a.active");
    here?.focus();
    here?.scrollIntoView({ block: "center" });
  }));
  sidebar?.addEventListener("close", () => button?.focus());
}

// The way back to the top shows once you scroll up again.
const top = document.querySelector("#pst-back-to-top");
let before = scrollY;
addEventListener("scroll", () => {
  const up = scrollY < before && scrollY > innerHeight;
  before = scrollY;
  if (top) top.style.display = up ? "block" : "none";
}, { passive: true });
top?.addEventListener("click", () => scrollTo(0, 0));
})();
