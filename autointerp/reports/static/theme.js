"use strict";
// Light or dark as the system says, until the reader chooses; storage is refused to some files, hence the try.
(() => {
  const root = document.documentElement;
  const read = () => { try { return localStorage.getItem("autointerp-theme"); } catch { return null; } };
  const write = (value) => { try { localStorage.setItem("autointerp-theme", value); } catch { /* kept for this page only */ } };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const chosen = read();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  addEventListener("DOMContentLoaded", () => {
    for (const button of document.querySelectorAll("button.theme")) {
      const label = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`); };
      button.hidden = false;
      label();
      button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; write(root.dataset.theme); label(); });
    }
  });
})();
