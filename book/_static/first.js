// Stands in the head of every page: what must happen before its body is there.
// Folds open as they arrive, so nothing jumps once the page stands.

window.llmnbFolds = (() => {
  const page = document.documentElement;

  /** The view chosen before, where the browser stores one. */
  function storedView() {
    try {
      return localStorage.getItem("llmnb-view");
    } catch {
      return null;
    }
  }

  /** Whether a view opens a fold; what an author folded opens in All only. */
  function opens(fold, view) {
    if (view !== "code") return view === "all";
    if (fold.closest(".tag_export, .tag_exporti")) return true;
    return !fold.matches(".authors, .exercise, .gained");
  }

  function openFolds() {
    for (const fold of document.querySelectorAll("details.fold")) {
      fold.open = opens(fold, page.dataset.view);
    }
  }

  const view = storedView();
  page.dataset.view = ["code", "all"].includes(view) ? view : "read";
  const arrivals = new MutationObserver(openFolds);
  if (page.dataset.view !== "read") {
    arrivals.observe(page, { childList: true, subtree: true });
  }

  // Ask for the fonts before the text needs them. (From the disk they are at
  // hand, and browsers refuse to load them ahead.)
  const names = ["llmnb-serif", "llmnb-serif-italic", "llmnb-code"];
  for (const name of location.protocol.startsWith("http") ? names : []) {
    const link = document.createElement("link");
    Object.assign(link, { rel: "preload", as: "font", type: "font/woff2" });
    link.crossOrigin = "anonymous";
    link.href = `${page.dataset.content_root}_static/fonts/${name}.woff2`;
    document.head.append(link);
  }

  return { openFolds, arrivals };
})();
