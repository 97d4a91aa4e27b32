"use strict";
// Elements of the page. Data becomes text nodes and attribute values only, so that nothing in it is read as HTML.

/** An element with attributes and children; a child that is no element is shown as text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

function note(text) {
  return element("p", { class: "note" }, text);
}

/** A table that scrolls sideways where it is too wide. `columns`: {name, class}; `rows`: cells, the first a heading. */
function table(label, columns, rows) {
  const head = columns.map(({ name, class: kind }) => element("th", { scope: "col", class: kind }, name));
  const body = rows.map(([first, ...cells]) =>
    element("tr", {}, element("th", { scope: "row", class: columns[0].class }, first), cells.map((cell, i) => tableCell(cell, columns[i + 1].class))),
  );
  return element(
    "div",
    { class: "scroll", role: "region", "aria-label": label, tabindex: 0 },
    element("table", {}, element("thead", {}, element("tr", {}, head)), element("tbody", {}, body)),
  );
}

function tableCell(cell, kind) {
  return cell instanceof HTMLTableCellElement ? cell : element("td", { class: kind }, cell);
}

/** Buttons of which one is chosen; `choose` gets its number, also of the first one now. */
function choice(legend, names, choose) {
  const group = `choice-${choice.count++}`;
  const one = (name, i) =>
    element("label", {}, element("input", { type: "radio", name: group, checked: i === 0 ? "" : null, onchange: () => choose(i) }), " ", name);
  return element("fieldset", {}, element("legend", {}, legend), names.map(one));
}
choice.count = 0;

/** A labelled form control. */
function field(text, control, kind = "") {
  control.id = `field-${field.count++}`;
  return element("div", { class: `field ${kind}` }, element("label", { class: "above", for: control.id }, text), control);
}
field.count = 0;

/** What a screen reader says next. */
function speak(text) {
  document.getElementById("spoken").textContent = text;
}

/** The value of a colour of the page, which changes with the reader's light or dark setting. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Colours that colour-blind readers can tell apart, by number. */
function seriesColour(number) {
  return colour(`c${number % 7}`);
}

function swatch(number) {
  const mark = element("span", { class: "swatch", "aria-hidden": "true" });
  mark.style.background = `var(--c${number % 7})`;
  return mark;
}

function short(text, most) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
}

function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}
