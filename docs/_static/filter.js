// a box above every long table: shows the rows that hold all its words
addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 15) continue;
    const box = document.createElement("input");
    box.type = "search";
    box.className = "filter";
    box.placeholder = "filter rows, e.g. vmamba";
    box.setAttribute("aria-label", "filter the rows of this table");
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    const around = table.closest(".pst-scrollable-table-container") || table;
    around.before(box);
  }
});
