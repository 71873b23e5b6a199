
// A served page reloads when its files have changed, and stays where it was read.
(() => {
  const { live } = document.documentElement.dataset;
  const state = document.getElementById("live"), KEPT = "dbtrain";
  const folds = () => [...document.querySelectorAll("details")];
  const at = (button) => [...document.querySelectorAll("[data-sort]")].indexOf(button);

  const kept = JSON.parse(sessionStorage.getItem(KEPT) || "null");
  sessionStorage.removeItem(KEPT);
  if (kept) {
    folds().forEach((fold, number) => { fold.open = kept.open[number] ?? fold.open; });
    for (const [number, order] of kept.sorted) {
      const button = document.querySelectorAll("[data-sort]")[number];
      for (let k = 0; button && k < 2 && button.closest("th").getAttribute("aria-sort") !== order; k++) button.click();
    }
    history.scrollRestoration = "manual";
    // Folded charts are drawn after this script, which changes the height of the page.
    requestAnimationFrame(() => requestAnimationFrame(() => scrollTo({ ...kept.scroll, behavior: "instant" })));
  }

  function reload() {
    const sorted = [...document.querySelectorAll("th[aria-sort]")]
      .map((head) => [at(head.querySelector("[data-sort]")), head.getAttribute("aria-sort")]);
    const scroll = { left: scrollX, top: scrollY };
    sessionStorage.setItem(KEPT, JSON.stringify({ scroll, sorted, open: folds().map((fold) => fold.open) }));
    location.reload();
  }

  // Whether the reader is looking at something that a reload would take away.
  const busy = () => document.querySelector("dialog[open], [data-zoomed]") || !getSelection().isCollapsed;

  async function look() {
    try {
      const answer = await fetch(location.href, { method: "HEAD", cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      state.textContent = "live";
      if (answer.headers.get("ETag") !== `"${live}"` && !busy()) return reload();
    } catch {
      state.textContent = "dbtrain report --serve has ended; this is what it showed last";
    }
    setTimeout(look, 1000);
  }
  setTimeout(look, 1000);
})();
