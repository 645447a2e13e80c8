"use strict";
// Tables in a .sortable are sorted by their headings, all of one .sortable together; without a script they are tables.
function key(row, column) {
  const cell = row.cells[column], figure = cell.querySelector("data");
  if (cell.dataset.key !== undefined) return Number(cell.dataset.key);
  if (figure) return Number(figure.value);
  const text = cell.textContent.trim();
  return text === "–" ? "" : text;
}
function compare(a, b, way) {
  if (a === "" || b === "") return (a === "") - (b === ""); // what has no value comes last, whichever way
  return way * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
}
function sort(group, column, button) {
  const heads = [...group.querySelectorAll(`thead th:nth-child(${column + 1})`)];
  const down = heads[0].getAttribute("aria-sort") === "ascending";
  const bodies = [...group.querySelectorAll("tbody")], sizes = bodies.map((body) => body.rows.length);
  const rows = bodies.flatMap((body) => [...body.rows]).map((row) => [key(row, column), row]);
  rows.sort((a, b) => compare(a[0], b[0], down ? -1 : 1));
  bodies.forEach((body, i) => body.append(...rows.splice(0, sizes[i]).map((pair) => pair[1])));
  group.querySelectorAll("thead th[aria-sort]").forEach((head) => head.setAttribute("aria-sort", "none"));
  heads.forEach((head) => head.setAttribute("aria-sort", down ? "descending" : "ascending"));
  document.getElementById("told").textContent = `sorted by ${button.textContent}, ${down ? "descending" : "ascending"}`;
}
for (const group of document.querySelectorAll(".sortable")) {
  for (const head of group.querySelectorAll("thead th:not(.still)")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(group, head.cellIndex, button));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  }
}
const folded = [];
addEventListener("beforeprint", () => {
  folded.push(...document.querySelectorAll("details:not([open])"));
  folded.forEach((each) => { each.open = true; });
});
addEventListener("afterprint", () => folded.splice(0).forEach((each) => { each.open = false; }));
