// Headers of tables become buttons that sort their column; without scripts the tables stay as written.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 2) continue;
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    if (!button.textContent.trim()) button.setAttribute("aria-label", "sort by this column");
    header.append(button);
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      const value = row => {
        const text = row.cells[header.cellIndex].textContent.trim();
        const number = /^[<[]?\s*[−-]?[\d.,]*\d(e[+-]?\d+)?/i.exec(text);
        return { text, number: number ? parseFloat(number[0].replace(/[<[,\s]/g, "").replace("−", "-")) : NaN, missing: text === "–" || text === "" };
      };
      const rows = [...body.rows].map(row => [value(row), row]);
      const numeric = rows.every(([v]) => v.missing || !isNaN(v.number));
      rows.sort(([a], [b]) => {
        if (a.missing || b.missing) return a.missing - b.missing;  // always last
        const order = numeric ? a.number - b.number : a.text.localeCompare(b.text, undefined, { numeric: true });
        return descending ? -order : order;
      });
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...rows.map(([, row]) => row));
    });
  }
}
