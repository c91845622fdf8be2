"use strict";
// Cells carry their explanation in `title`, so the page also works without scripts. Here it becomes a tooltip that the
// keyboard reaches: one tab stop for the map, arrow keys inside it, Escape closes.
(() => {
  const map = document.querySelector(".map");
  const tip = document.getElementById("tip");
  if (!map) return;
  const rows = [...map.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
  rows.forEach((row, y) => row.forEach((cell, x) => {
    cell.dataset.text = cell.title;
    cell.setAttribute("aria-label", cell.title.replaceAll("\n", ". ").replaceAll("\t", ", "));
    cell.removeAttribute("title");
    cell.tabIndex = x + y ? -1 : 0;
    cell.dataset.at = `${x} ${y}`;
  }));

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  function fill(cell) {
    const [where, what, saving, ...tried] = cell.dataset.text.split("\n");
    tip.replaceChildren(element("div", "where", where), element("div", "what", what), element("div", "where", saving));
    if (!tried.length) return;
    const table = element("table");
    for (const line of tried) {
      const [name, loss, limit, verdict] = line.split("\t");
      const row = table.insertRow();
      row.insertCell().textContent = name;
      const middle = row.insertCell();
      const value = parseFloat(loss.replace(/[^0-9.e+-]+/, ""));
      const bound = parseFloat((limit || "").replace(/[^0-9.e+-]+/, ""));
      if (Number.isFinite(value) && bound > 0) {
        const meter = element("span", value < bound ? "meter" : "meter over");
        const bar = element("i");
        bar.style.width = `${Math.min(100, (50 * value) / bound)}%`;
        meter.append(bar, element("b"));
        middle.append(meter);
      }
      middle.append(element("span", "where", [loss, limit].filter(Boolean).map((text) => text.replaceAll(" ", limit ? "\u00a0" : " ")).join(" · ")));
      row.insertCell().textContent = verdict || "";
    }
    tip.append(table);
  }

  function show(cell) {
    fill(cell);
    tip.hidden = false;
    const at = cell.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const below = at.bottom + 8 + size.height < innerHeight || at.top - 8 - size.height < 0;
    tip.style.top = `${Math.max(8, below ? Math.min(at.bottom + 8, innerHeight - size.height - 8) : at.top - 8 - size.height)}px`;
    tip.style.left = `${Math.min(Math.max(12, at.left - 24), Math.max(12, innerWidth - size.width - 12))}px`;
  }
  const hide = () => { tip.hidden = true; };

  map.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td");
    if (cell) show(cell); else hide();
  });
  map.addEventListener("pointerleave", hide);
  map.addEventListener("focusin", (event) => { if (event.target.matches("td")) show(event.target); });
  map.addEventListener("focusout", hide);
  addEventListener("scroll", hide, { passive: true, capture: true });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { hide(); return; }
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    const cell = event.target.closest("td");
    if (!cell || (!move && event.key !== "Home" && event.key !== "End")) return;
    event.preventDefault();
    const [x, y] = cell.dataset.at.split(" ").map(Number);
    let next;
    if (move) next = rows[y + move[1]]?.[x + move[0]];
    else next = event.key === "Home" ? rows[y][0] : rows[y].at(-1);
    if (!next) return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
    requestAnimationFrame(() => show(next));
  });

  const buttons = [...document.querySelectorAll(".legend button")];
  for (const button of buttons) button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    for (const other of buttons) other.setAttribute("aria-pressed", String(pressed && other === button));
    map.classList.toggle("dimmed", pressed);
    for (const cell of rows.flat()) cell.classList.toggle("picked", pressed && cell.classList.contains(button.dataset.pick));
  });
})();
