"use strict";
// Curves, drawn by uPlot when they come into view.

const DASHES = [undefined, [7, 4], [2, 3], [9, 3, 2, 3]];
const CHART_HEIGHT = 190;
/** Between the numbers of the step axis: there is no step 1.5. */
const STEP_INCREMENTS = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));

/** What is drawn now: each draws itself anew in other colours or another width. */
const drawn = new Set();

/** Draw `draw()`, a uPlot, into `place` as soon as it comes near the window, and again when the reader's colours change. */
function drawWhenSeen(place, draw) {
  const picture = { plot: null, draw: () => { picture.plot?.destroy(); picture.plot = draw(place.clientWidth); } };
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen.disconnect();
    picture.draw();
    drawn.add(picture);
    new ResizeObserver(() => fitWidth(picture.plot, place.clientWidth)).observe(place);
  }, { rootMargin: "300px" });
  seen.observe(place);
  return picture;
}

function fitWidth(plot, width) {
  if (width > 0 && width !== plot.width) plot.setSize({ width, height: plot.height });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((picture) => picture.draw()));

/** A chart with its title, how to read it, and its lines in words. */
function chartFigure(chart, runs) {
  const names = chart.lines.map((line) => lineName(line, chart, runs));
  const place = element("div", { class: "plot" });
  const words = chart.lines.map((line, i) => element("li", {}, `${names[i]}: ${line.summary}`));
  drawWhenSeen(place, (width) => drawChart(place, chart, names, width));
  return element(
    "figure", { role: "group", "aria-label": chart.title },
    element("figcaption", {}, element("h4", {}, chart.title), chart.about ? element("p", {}, chart.about) : null),
    place,
    element("details", { class: "words" }, element("summary", {}, "In words"), element("ul", {}, words)),
  );
}

function lineName(line, chart, runs) {
  if (runs.length < 2) return line.label;
  return figuresOf(chart).length === 1 ? runs[line.run].name : `${line.label}, ${runs[line.run].name}`;
}

function figuresOf(chart) {
  return [...new Set(chart.lines.map((line) => line.label))];
}

/** Runs differ by colour where a chart has one figure; else figures differ by colour, and runs by dashes. */
function lineStyle(line, chart) {
  const figures = figuresOf(chart);
  if (figures.length === 1) return { stroke: seriesColour(line.run), dash: DASHES[line.run % DASHES.length] };
  return { stroke: seriesColour(figures.indexOf(line.label)), dash: DASHES[line.run % DASHES.length] };
}

function drawChart(place, chart, names, width) {
  const columns = [chart.steps], series = [{ label: "step", class: "range" }], bands = [];
  chart.lines.forEach((line, i) => {
    const style = lineStyle(line, chart);
    series.push({ label: names[i], width: 1.75, spanGaps: true, points: { size: 5 }, value: (_, v) => shown(v), ...style });
    columns.push(line.values);
    if (line.low) addRange(line, style.stroke, series, columns, bands);
  });
  const plot = new uPlot({
    width, height: CHART_HEIGHT, series, bands,
    scales: { x: { time: false } },
    axes: [axis({ size: 32, incrs: STEP_INCREMENTS }), axis({ size: axisWidth, values: (_, ticks) => ticks.map(shown) })],
    cursor: { sync: { key: "steps" }, y: false, hover: { skip: [null, undefined] } },
    legend: { markers: { dash: (u, i) => (u.series[i].dash ? "dashed" : "solid") } },
    hooks: { setCursor: [showLastWithoutCursor], setSeries: [hideRangeWithLine] },
  }, columns, place);
  showLastWithoutCursor(plot);
  makeReadable(plot, `${chart.title}. ${chart.lines.map((line, i) => `${names[i]}: ${line.summary}`).join(". ")}`);
  return plot;
}

/** The lowest and the highest value of the steps behind each point of a thinned line, as a shade. */
function addRange(line, stroke, series, columns, bands) {
  const edge = { width: 0, spanGaps: true, points: { show: false }, class: "range", stroke: "transparent" };
  series.push({ ...edge, label: "lowest" }, { ...edge, label: "highest" });
  columns.push(line.low, line.high);
  bands.push({ series: [series.length - 1, series.length - 2], fill: `color-mix(in srgb, ${stroke} 16%, transparent)` });
}

function hideRangeWithLine(plot, index, options) {
  if (index === null || options.show === undefined) return;
  for (const i of [index + 1, index + 2]) {
    if (plot.series[i]?.class !== "range") return;
    if (plot.series[i].show !== options.show) plot.setSeries(i, { show: options.show });
  }
}

function axis(options) {
  const line = colour("line");
  return { stroke: colour("muted"), grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 },
    font: "12px system-ui, sans-serif", gap: 4, ...options };
}

/** As wide as the longest number on the axis. */
function axisWidth(plot, values) {
  return 14 + 7 * Math.max(3, ...(values ?? []).map((value) => `${value ?? ""}`.length));
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
  return `${Number(value.toPrecision(4))}`;
}

/** Without a cursor the legend shows the newest value of each line. */
function showLastWithoutCursor(plot) {
  if (plot.cursor.left >= 0) return;
  plot.setLegend({ idxs: plot.data.map((column) => column.findLastIndex((value) => value !== null && value !== undefined)) }, false);
}

/** Give a plot a text alternative, its steps the arrow keys, and the names in its legend the keyboard. */
function makeReadable(plot, text) {
  const picture = plot.root.querySelector(".u-wrap");
  for (const [name, value] of Object.entries({ role: "img", "aria-label": text, tabindex: 0 })) picture.setAttribute(name, value);
  picture.addEventListener("keydown", (event) => stepByKey(plot, event));
  picture.addEventListener("blur", () => plot.setCursor({ left: -10, top: -10 }));
  plot.root.querySelectorAll(".u-legend tr.u-series:not(.range) th").forEach((name) => {
    name.setAttribute("tabindex", 0);
    name.setAttribute("role", "button");
    name.setAttribute("title", "show or hide this line");
    name.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      name.click();
    });
  });
}

function stepByKey(plot, event) {
  const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  const last = plot.data[0].length - 1;
  const from = plot.cursor.left >= 0 ? plot.cursor.idx : by > 0 ? -1 : last + 1;
  const index = Math.min(last, Math.max(0, from + by));
  plot.setCursor({ left: plot.valToPos(plot.data[0][index], "x"), top: 10 });
  const values = plot.series.slice(1).map((line, i) => ({ line, value: plot.data[i + 1][index] }));
  const told = values.filter(({ line, value }) => line.show && line.class !== "range" && value !== null && value !== undefined);
  speak(`step ${plot.data[0][index]}: ${told.map(({ line, value }) => `${line.label} ${shown(value)}`).join(", ")}`);
}
