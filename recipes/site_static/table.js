// A table of class "sortable": a click on a button in its head sorts its rows by that column, a second one reverses.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head, column));
    });
  }
});

function sort(table, head, column) {
  const falling = head.ariaSort === "ascending";
  for (const other of table.querySelectorAll("th")) other.ariaSort = null;
  head.ariaSort = falling ? "descending" : "ascending";
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b)) * (falling ? -1 : 1));
  rows.sort((a, b) => (value(a) === "") - (value(b) === "")); // what was not measured stands last
  table.tBodies[0].append(...rows);
}

function compare(a, b) {
  return Number.isNaN(Number(a)) || Number.isNaN(Number(b)) ? a.localeCompare(b) : a - b;
}
