/* A box that scrolls sideways must be reachable by keyboard. Formulas are typeset late; widths change with the window. */
const boxes = "div.math, mjx-container, div.output, div.book-table, div.pst-scrollable-table-container, .highlight pre";
function makeScrollableReachable() {
  for (const box of document.querySelectorAll(boxes)) {
    if (box.scrollWidth > box.clientWidth && box.clientWidth) box.tabIndex = 0;
    else if (box.matches("div.math, mjx-container")) box.removeAttribute("tabindex");
  }
}
window.addEventListener("load", () => {
  const typeset = window.MathJax && window.MathJax.startup ? window.MathJax.startup.promise : Promise.resolve();
  typeset.then(makeScrollableReachable);
});
window.addEventListener("resize", makeScrollableReachable);
