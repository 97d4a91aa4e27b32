"use strict";
// The map of the probe texts, and the neighbours of the chosen one.

const ROLES = ["positive", "query", "negative"];
const MAP_HEIGHT = 380;
const MOST_OPTIONS = 300;
/** Words that more than this share of the rationales hold say nothing of two of them. */
const COMMON_SHARE = 0.15;

/** The map of one run with everything that belongs to it. */
function mapSection(map) {
  if (map.missing) return note(map.missing);
  const view = { map, chosen: 0, moment: map.moments.length - 1, plots: [], words: rationaleWords(map) };
  view.details = element("div", { class: "close", "aria-live": "polite" });
  view.choose = (text) => {
    view.chosen = text;
    view.list.value = text;
    view.plots.forEach((plot) => plot.redraw(false));
    view.details.replaceChildren(...neighbourhood(view));
  };
  const maps = element("div", { class: "maps" }, map.moments.map((_, i) => mapFigure(view, i)));
  const controls = mapControls(view);
  view.choose(0);
  return element("div", {}, maps, controls, view.details);
}

function mapControls(view) {
  view.list = element("select", { onchange: (event) => view.choose(Number(event.target.value)) });
  const search = element("input", { type: "search", oninput: (event) => fillList(view, event.target.value) });
  fillList(view, "");
  const moments = view.map.moments.map(({ step }, i) => momentName(view.map, i, step));
  const now = choice("Neighbours", moments, (i) => { view.moment = i; view.choose(view.chosen); });
  now.querySelectorAll("input")[view.moment].checked = true;
  return element("div", { class: "controls" }, field("Search the texts", search, "wide"), field("Chosen text", view.list, "wide"), now);
}

function momentName(map, i, step) {
  if (map.moments.length < 2) return `at step ${step}`;
  return `${i === 0 ? "before" : "after"} (step ${step})`;
}

/** The texts that hold the searched words, as options. */
function fillList(view, search) {
  const wanted = search.toLowerCase();
  const found = view.map.texts.map((_, i) => i).filter((i) => view.map.texts[i].toLowerCase().includes(wanted));
  const options = found.slice(0, MOST_OPTIONS).map((i) => element("option", { value: i }, `${short(view.map.texts[i], 90)} (${view.map.roles[i]})`));
  if (found.length > MOST_OPTIONS) options.push(element("option", { disabled: "" }, `${found.length - MOST_OPTIONS} more: search for words`));
  if (!found.length) options.push(element("option", { disabled: "" }, "no text holds this"));
  view.list.replaceChildren(...options);
  if (search && found.length) view.choose(found[0]);
}

function mapFigure(view, i) {
  const { step } = view.map.moments[i];
  const title = momentName(view.map, i, step);
  const place = element("div", { class: "plot" });
  const tip = element("div", { class: "tip", role: "tooltip", hidden: "" });
  drawWhenSeen(place, (width) => (view.plots[i] = drawMap(place, tip, view, i, width)));
  const figure = element("figure", { role: "group", "aria-label": `Map ${title}` }, element("figcaption", {}, element("h4", {}, title[0].toUpperCase() + title.slice(1))), place, tip);
  if (i === 0) figure.append(element("p", { class: "measures" }, `The two directions show ${Math.round(100 * view.map.explained)} % of all variance.`));
  return figure;
}

function drawMap(place, tip, view, i, width) {
  const { map } = view, { x, y } = map.moments[i];
  const order = map.texts.map((_, text) => text).sort((a, b) => x[a] - x[b]);
  const roles = ROLES.filter((role) => map.roles.includes(role));
  const columns = roles.map((role) => order.map((text) => (map.roles[text] === role ? y[text] : null)));
  const nearest = (plot) => nearestPoint(plot, order, view, i);
  const plot = new uPlot({
    width, height: MAP_HEIGHT,
    series: [{ class: "range" }, ...roles.map(pointStyle)],
    scales: { x: { time: false, range: rangeOver(map, "x") }, y: { range: rangeOver(map, "y") } },
    axes: [{ show: false }, { show: false }],
    padding: [0, 0, 0, 0],
    cursor: { x: false, y: false, points: { show: false }, drag: { x: true, y: true, uni: 20 } },
    legend: { live: false },
    hooks: {
      setCursor: [(u) => showTip(tip, view, i, u, u.cursor.left < 0 ? null : nearest(u))],
      draw: [(u) => ringPoints(u, view, i)],
    },
  }, [order.map((text) => x[text]), ...columns], place);
  plot.over.addEventListener("click", () => { const text = nearest(plot); if (text !== null) view.choose(text); });
  makeReadable(plot, mapInWords(map, i));
  plot.root.querySelector(".u-wrap").addEventListener("keydown", (event) => walkByKey(plot, view, i, event));
  return plot;
}

/** Roles differ by more than their colour: filled, hollow, small. */
function pointStyle(role) {
  const number = ROLES.indexOf(role), stroke = seriesColour(number);
  const points = { show: true, size: role === "negative" ? 4 : 7, fill: role === "query" ? colour("card") : stroke, stroke, width: 1.25 };
  return { label: role, class: role, stroke, paths: () => null, points };
}

/** One range for all moments, so that before and after compare. */
function rangeOver(map, name) {
  const all = map.moments.flatMap((moment) => moment[name]);
  const low = Math.min(...all), high = Math.max(...all), room = (high - low || 1) * 0.04;
  return () => [low - room, high + room];
}

function mapInWords(map, i) {
  const count = map.texts.length;
  return `Map of ${count} probe texts at step ${map.moments[i].step}. The arrow keys go from point to point, Enter chooses one. ` +
    "The list of texts below does the same.";
}

/** The text whose point is nearest to the cursor, at most 20 pixels away; null without one. */
function nearestPoint(plot, order, view, i) {
  const { x, y } = view.map.moments[i], { left, top } = plot.cursor;
  let best = null, least = 20 * 20;
  for (const text of order) {
    const away = (plot.valToPos(x[text], "x") - left) ** 2 + (plot.valToPos(y[text], "y") - top) ** 2;
    if (away < least && roleIsShown(plot, view.map.roles[text])) [best, least] = [text, away];
  }
  return best;
}

function roleIsShown(plot, role) {
  return plot.series.some((series) => series.label === role && series.show);
}

function showTip(tip, view, i, plot, text) {
  tip.hidden = text === null;
  if (text === null) return;
  const { x, y, rationales } = view.map.moments[i];
  tip.replaceChildren(
    element("span", { class: "tag" }, view.map.roles[text]),
    element("p", {}, short(view.map.texts[text], 300)),
    element("p", { class: "muted" }, rationales[text] ? `→ ${short(rationales[text], 500)}` : "→ (no rationale)"),
  );
  const left = plot.valToPos(x[text], "x"), top = plot.valToPos(y[text], "y"), { offsetLeft, offsetTop } = plot.root;
  const right = left > plot.over.clientWidth / 2;
  tip.style.left = right ? "auto" : `${offsetLeft + left + 22}px`;
  tip.style.right = right ? `${plot.root.clientWidth - left + 14}px` : "auto";
  tip.style.top = `${offsetTop + Math.min(top, MAP_HEIGHT - 160)}px`;
}

/** Rings around the chosen point and its neighbours. */
function ringPoints(plot, view, i) {
  const { x, y, neighbours } = view.map.moments[i], { ctx } = plot;
  const ring = (text, radius, width) => {
    ctx.lineWidth = width * devicePixelRatio;
    ctx.beginPath();
    ctx.arc(plot.valToPos(x[text], "x", true), plot.valToPos(y[text], "y", true), radius * devicePixelRatio, 0, 2 * Math.PI);
    ctx.stroke();
  };
  ctx.save();
  ctx.beginPath();
  ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  ctx.clip();
  ctx.strokeStyle = colour("text");
  ring(view.chosen, 8, 2.25);
  neighbours[view.chosen].forEach(([text]) => ring(text, 6, 1));
  ctx.restore();
}

/** The arrow keys go to the nearest point in their direction; Enter and the space bar choose it. */
function walkByKey(plot, view, i, event) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    view.choose(view.walked ?? view.chosen);
    return;
  }
  const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  if (!direction) return;
  event.preventDefault();
  view.walked = nextPoint(view, i, view.walked ?? view.chosen, direction);
  const { x, y } = view.map.moments[i];
  plot.setCursor({ left: plot.valToPos(x[view.walked], "x"), top: plot.valToPos(y[view.walked], "y") });
  showTip(plot.root.parentElement.parentElement.querySelector(".tip"), view, i, plot, view.walked);
  speak(`${view.map.roles[view.walked]}: ${view.map.texts[view.walked]}`);
}

function nextPoint(view, i, from, [dx, dy]) {
  const { x, y } = view.map.moments[i];
  let best = from, least = Infinity;
  view.map.texts.forEach((_, text) => {
    const along = (x[text] - x[from]) * dx + (y[text] - y[from]) * dy;
    const across = Math.abs((x[text] - x[from]) * dy) + Math.abs((y[text] - y[from]) * dx);
    if (text !== from && along > 0 && across <= along && along + across < least) [best, least] = [text, along + across];
  });
  return best;
}

/** The chosen text on one side, its neighbours on the other, the words marked that rationales of both sides hold. */
function neighbourhood(view) {
  const { map, chosen } = view, moment = map.moments[view.moment];
  const found = moment.neighbours[chosen], own = view.words.of(moment.rationales[chosen]);
  const theirs = new Set(found.flatMap(([text]) => [...view.words.of(moment.rationales[text])]));
  const card = element(
    "div", { class: "chosen" },
    element("h3", {}, "Chosen text"),
    element("span", { class: "tag" }, map.roles[chosen]),
    element("p", { class: "text" }, map.texts[chosen]),
    map.moments.map(({ step, rationales }, i) => [
      element("p", { class: "measures" }, `rationale ${momentName(map, i, step)}`),
      markedRationale(rationales[chosen], i === view.moment ? theirs : new Set()),
    ]),
  );
  const cards = found.map(([text, cosine, plain]) => neighbourCard(view, moment, own, { text, cosine, plain }));
  return [card, element("div", {}, element("h3", {}, `Why are these close? Neighbours at step ${moment.step}`), element("div", { class: "neighbours" }, cards))];
}

function neighbourCard(view, moment, own, { text, cosine, plain }) {
  const { map } = view, sameSample = map.samples[text] === map.samples[view.chosen];
  return element(
    "div", { class: "neighbour" },
    element(
      "div", { class: "line" },
      element("strong", {}, `cosine ${number(cosine)}`),
      element("span", { class: "measures" }, `${number(plain)} without rationales`),
      element("span", { class: "tag" }, map.roles[text] + (sameSample ? " of the same sample" : "")),
      element("button", { type: "button", onclick: () => { view.choose(text); view.list.focus(); } }, "Choose this text"),
    ),
    element("p", { class: "text" }, map.texts[text]),
    markedRationale(moment.rationales[text], own),
  );
}

function markedRationale(text, words) {
  if (!text) return element("p", { class: "rationale muted" }, "(no rationale)");
  const parts = text.split(/([\p{L}\p{N}]+)/u);
  return element("p", { class: "rationale" }, parts.map((part) => (words.has(part.toLowerCase()) ? element("mark", {}, part) : part)));
}

/** The words of rationales that say something: not those that many rationales hold. */
function rationaleWords(map) {
  const split = (text) => new Set(text.toLowerCase().match(/[\p{L}\p{N}]{3,}/gu) ?? []);
  const counts = new Map(), all = map.moments.flatMap((moment) => moment.rationales);
  all.forEach((text) => split(text).forEach((word) => counts.set(word, (counts.get(word) ?? 0) + 1)));
  const most = Math.max(2, COMMON_SHARE * all.length);
  return { of: (text) => new Set([...split(text)].filter((word) => counts.get(word) <= most)) };
}
