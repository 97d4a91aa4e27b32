"use strict";
// The sections of the page, filled from its data.

const report = JSON.parse(document.getElementById("data").textContent);
const { runs } = report;

function fill(section, ...content) {
  document.querySelector(`#${section} .content`).replaceChildren(...content.flat().filter((part) => part !== null));
}

/** A heading for each column that is a run's. */
function runColumns(kind) {
  return runs.map((run) => ({ name: runs.length > 1 ? run.name : "", class: kind }));
}

/** A section's part of one run, with a choice of the run where there are several. */
function perRun(parts, show) {
  const place = element("div");
  const put = (i) => place.replaceChildren(show(parts[i], i));
  put(0);
  return [runs.length > 1 ? element("div", { class: "controls" }, choice("Run", runs.map((run) => run.name), put)) : null, place];
}

function showHead() {
  document.title = `Training report: ${runs.map((run) => run.name).join(", ")}`;
  const names = runs.map((run, i) =>
    element("span", { class: "run-name" }, runs.length > 1 ? swatch(i) : null, element("strong", {}, run.name), `  step ${run.progress}`));
  document.getElementById("runs").append(...names);
  document.getElementById("written").textContent = `Written ${report.written} by python3 -m verl.report.`;
}

function showAlerts() {
  const prefix = (run) => (runs.length > 1 ? `${run.name}: ` : "");
  const alerts = runs.flatMap((run) => run.alerts.map((alert) => element(
    "li", { class: "alert" },
    element("strong", {}, prefix(run) + alert.name.replaceAll("_", " ")),
    alert.text,
    element("div", { class: "measures" }, alert.first === alert.last ? `step ${alert.first}` : `from step ${alert.first} to step ${alert.last}`),
  )));
  const quiet = runs.filter((run) => run.diagnosed && !run.alerts.length).map((run) => note(`${prefix(run)}No alerts.`));
  const blind = runs.filter((run) => !run.diagnosed && !run.alerts.length).map((run) => note(
    `${prefix(run)}No alerts, but nothing was diagnosed either: ${run.why_blind}`));
  const problems = runs.flatMap((run) => run.problems.map((problem) => note(`${prefix(run)}${problem}.`)));
  fill("alerts", alerts.length ? element("ul", { class: "plain" }, alerts) : null, quiet, blind, problems);
}

function showSettings() {
  const { facts, settings, versions, commands } = report.facts;
  const differs = (cells) => new Set(cells).size > 1;
  const row = ({ name, cells }) => [name, ...cells];
  const changed = settings.map(({ name, cells, default: usual }) =>
    [element("code", {}, name), ...cells.map((cell) => element("td", { class: runs.length > 1 && differs(cells) ? "value differs" : "value" }, cell)), usual]);
  const columns = [{ name: "setting" }, ...runColumns("value").map((c) => ({ ...c, name: c.name || "value" })), { name: "default", class: "value" }];
  fill(
    "settings",
    table("What was run", [{ name: "" }, ...runColumns("value")], facts.map(row)),
    element("h3", {}, "Settings that are not the defaults"),
    changed.length ? table("Settings that are not the defaults", columns, changed) : note("None, or the settings are not known."),
    commands.some(Boolean) ? element("h3", {}, commands.length > 1 ? "Commands" : "Command") : null,
    commands.filter(Boolean).map((command) => element("pre", {}, command)),
    versions.length ? element("details", { class: "part" }, element("summary", {}, "Versions"),
      table("Versions", [{ name: "package" }, ...runColumns("").map((c) => ({ ...c, name: c.name || "version" }))], versions.map(row))) : null,
  );
}

function showCurves() {
  if (!report.curves.length) return fill("curves", note("No step is recorded yet: metrics.jsonl has no figures."));
  return fill("curves", report.curves.map(({ title, charts }) => element(
    "div", {}, element("h3", {}, title), element("div", { class: "charts" }, charts.map((chart) => chartFigure(chart, runs))))));
}

function showPhases() {
  const bar = (share) => {
    const made = element("div");
    made.style.width = `${100 * share}%`;
    return element("td", { class: "bar" }, made);
  };
  const columns = [{ name: "phase" }, { name: "" }, { name: "share", class: "number" }, { name: "time", class: "number" }];
  const one = (phases, i) => element(
    "div", {}, runs.length > 1 ? element("h3", {}, runs[i].name) : null,
    phases.length ? table("Time by phase", columns, phases.map(({ phase, share, text }) => [phase, bar(share), `${(100 * share).toFixed(1)} %`, text])) : note("No step is recorded yet."));
  fill("phases", element("div", { class: "bars" }, report.phases.map(one)));
}

function showScores() {
  const { columns, rows, missing } = report.scores;
  const head = columns.map(({ run, label }) => ({ name: runs.length > 1 ? `${runs[run].name}: ${label}` : label, class: "number" }));
  const cell = ({ score, change }) => element("td", { class: "number" }, score, change ? ["  ", element("span", { class: change.startsWith("-") ? "down" : "up" }, change)] : null);
  fill("scores",
    rows.length ? table("Evaluation before and after", [{ name: "task" }, ...head], rows.map(({ task, cells }) => [task, ...cells.map(cell)])) : null,
    missing.map(note));
}

function showRationales() {
  const { texts, missing } = report.rationales;
  const place = element("div", { class: "steps", "aria-live": "polite" });
  const show = (i) => place.replaceChildren(
    element("div", {}, element("span", { class: "tag" }, texts[i].role), element("p", { class: "text" }, texts[i].text)),
    ...texts[i].steps.map(({ step, cells }) => element("div", { class: "step" }, element("h4", {}, `step ${step}`), cells.map(rationaleCell))));
  const options = texts.map(({ text, role }, i) => element("option", { value: i }, `${short(text, 100)} (${role})`));
  const list = element("select", { onchange: (event) => show(Number(event.target.value)) }, options);
  if (texts.length) show(0);
  fill("rationales", texts.length ? [element("div", { class: "controls" }, field("Text", list, "wide")), place] : null, missing.map(note));
}

function rationaleCell(cell, i) {
  const name = runs.length > 1 ? `${runs[i].name}: ` : "";
  if (!cell) return element("div", {}, element("p", { class: "muted" }, `${name}not diagnosed at this step`));
  const measures = [
    `${cell.tokens} tokens${cell.cut ? ", cut" : ""}`,
    cell.log_likelihood === null ? null : `log-likelihood ${cell.log_likelihood}`,
    cell.cos_without === null ? null : `cosine to the vector without it ${cell.cos_without}`,
  ].filter(Boolean).join(" · ");
  return element("div", {}, element("p", { class: "rationale" }, cell.rationale || "(empty)"), element("p", { class: "measures" }, name + measures));
}

function showGroups() {
  fill("groups", perRun(report.groups, ({ groups, steps, of, missing }) => {
    if (missing) return note(missing);
    return element("div", {}, element("p", { class: "muted" }, `Of the ${of} groups kept of steps ${steps[0]} to ${steps[1]}.`), groups.map(groupPart));
  }));
}

function groupPart(group, i, all) {
  const first = i === 0 || all[i - 1].rank !== group.rank;
  const columns = [{ name: "rationale", class: "long" }, ...["reward", "advantage", ...group.parts, "tokens"].map((name) => ({ name: name.replaceAll("_", " "), class: "number" }))];
  const rows = group.rationales.map((row) => [row.rationale, number(row.reward), number(row.advantage), ...group.parts.map((part) => number(row.parts[part])),
    `${row.tokens ?? "–"}${row.cut ? " (cut)" : ""}`]);
  return element(
    "details", { class: "part", open: first ? "" : null },
    element("summary", {}, `${group.rank === "best" ? "Best" : "Worst"}: mean reward ${number(group.mean)}, step ${group.step}`),
    textWithRole(group.text, group.role),
    table(`Rationales of a group of step ${group.step}`, columns, rows),
    group.anchors.map(({ text, role, rationale }) => [textWithRole(text, role), element("p", { class: "rationale" }, rationale)]),
  );
}

function textWithRole(text, role) {
  return element("div", { class: "line" }, element("span", { class: "tag" }, role), element("p", { class: "text" }, text));
}

/** The link of the section that is read now is the current one. */
function followReading() {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
    links.forEach((link) => link.removeAttribute("aria-current"));
    links.get(entry.target.id).setAttribute("aria-current", "true");
  }), { rootMargin: "-10% 0px -80% 0px" });
  document.querySelectorAll("main section").forEach((section) => seen.observe(section));
}

showHead();
showAlerts();
showSettings();
showCurves();
showPhases();
showScores();
showRationales();
showGroups();
fill("map", perRun(report.maps, mapSection));
followReading();
