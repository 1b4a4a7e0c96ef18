"use strict";
(() => {
  const button = document.querySelector("button.lines");
  if (button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const on = document.body.classList.toggle("break-lines");
      button.setAttribute("aria-pressed", String(on));
    });
  }
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest("input, select, textarea, .scroll")) return;
    const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const link = rel && document.querySelector(`a[rel="${rel}"]`);
    if (link) location.href = link.href;
  });
})();
