// The page of runs: asks for what is new, and draws what changed.

import { chart, element, short } from "./chart.js";
import { groupsOf } from "./plots.js";
import { lastOf, latest, metricNames, newRun, pointsOf, take } from "./runs.js";
import { timelines } from "./timeline.js";

const PAUSE_MS = { created: 1000, running: 1000 }; // between questions, by status
const LONG_PAUSE_MS = 4000; // of a run that has ended, which may go on
const AXES = { step: "steps", tokens: "tokens", minutes: "minutes" };
const SEVERITIES = ["debug", "info", "warning", "error", "critical"];
const DRAW_EVERY_MS = 300;
const N_EVENTS = 15; // shown at first

const at = (id) => document.getElementById(id);
const runs = [];
const charts = new Map(); // by key: { place, drawn, isLog, across }
const due = new Set(); // what is to be drawn
let nEvents = N_EVENTS;
let drawnGroups = "";
let drawnSamples = "";
let isAway = false;
let drawnAt = -Infinity;

/** Draws what is due at the next moment that the browser has for it, and not too often while a long run is read. */
function plan(...parts) {
  if (parts.length && !due.size) setTimeout(() => requestAnimationFrame(draw), drawnAt + DRAW_EVERY_MS - performance.now());
  for (const part of parts) due.add(part);
}

function draw() {
  drawnAt = performance.now();
  const parts = new Set(due);
  due.clear();
  if (parts.has("run") || parts.has("metrics")) drawRuns();
  if (parts.has("metrics")) drawCharts();
  if (parts.has("metrics") || parts.has("events")) drawGrowth();
  if (parts.has("events")) drawEvents();
  if (parts.has("samples")) drawSamples();
}

const shown = () => runs.filter((run) => run.isShown);
const label = (run) => (runs.some((other) => other !== run && other.name === run.name) ? run.path : run.name);

// What is read

async function follow(run) {
  for (;;) {
    let wait = 0;
    try {
      const answer = await fetch(`/runs/${run.number}?after=${encodeURIComponent(run.after)}`);
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      const news = await answer.json();
      plan(...take(run, news));
      if (news.is_end) wait = PAUSE_MS[run.status] ?? LONG_PAUSE_MS;
      away(null);
    } catch (error) {
      away(error);
      wait = 2000;
    }
    if (wait) await new Promise((resolve) => setTimeout(resolve, wait));
    if (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

/** Says that the server does not answer, or that it does again. */
function away(error) {
  if (isAway === Boolean(error)) return;
  isAway = Boolean(error);
  at("state").classList.toggle("wrong", isAway);
  if (isAway) {
    const why = error instanceof TypeError ? "it cannot be reached" : error.message;
    at("state").textContent = `The server does not answer: ${why}. Start \`meristem watch\` again; this page goes on by itself.`;
  } else drawState();
}

function drawState() {
  if (isAway) return;
  const reading = runs.filter((run) => !run.isRead && !run.problem);
  const running = runs.filter((run) => run.status === "running");
  const words = reading.length ? `Reading ${reading.map(label).join(", ")} …` : running.length ? "Live, as it is written." : "No run is training now.";
  if (at("state").textContent !== words) at("state").textContent = words;
  const [first] = running.length ? running : runs;
  const last = first && latest(first);
  document.title = last ? `step ${last.step} · ${label(first)} · meristem watch` : "meristem watch";
}

// Runs

const cards = new Map();

function drawRuns() {
  drawState();
  for (const run of runs) {
    if (!cards.has(run)) {
      cards.set(run, cardOf(run));
      at("runs").append(cards.get(run).card);
    }
    cards.get(run).update();
  }
}

function cardOf(run) {
  const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of Object.entries({ width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" })) line.setAttribute(key, value);
  const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [key, value] of Object.entries({ x1: 1, x2: 21, y1: 5, y2: 5, class: `line main series-${(run.colour % 8) + 1}` })) stroke.setAttribute(key, value);
  line.append(stroke);
  const name = element("span", {});
  const status = element("span", { class: "status" });
  const box = element("input", { type: "checkbox", checked: true, onchange: (event) => show(run, event.target.checked) });
  const title = element("label", { class: "name" }, runs.length > 1 ? box : null, line, name, status);
  const figures = element("dl", { class: "figures" });
  const problem = element("p", { class: "notice small", role: "status", hidden: true });
  const card = element("li", { class: "card run" }, title, figures, problem);
  return {
    card,
    update() {
      name.textContent = label(run);
      name.title = run.path;
      status.textContent = run.status;
      status.className = `status ${run.status}`;
      const last = latest(run);
      const words = run.problem ?? (run.isRead && !last ? "Nothing is recorded yet." : "");
      if (problem.textContent !== words) problem.textContent = words;
      problem.hidden = !words;
      problem.classList.toggle("wrong", Boolean(run.problem));
      figures.hidden = !last;
      if (last) figures.replaceChildren(...figuresOf(run, last).map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))));
    },
  };
}

function figuresOf(run, last) {
  const found = [["step", last.step.toLocaleString("en")], ["tokens", short(last.tokens)], ["minutes", short(last.minutes)]];
  const add = (term, value) => value !== undefined && found.push([term, short(value)]);
  add("loss", last.of("bits_per_byte"));
  add("held-out", lastOf(run, "val")?.of("bits_per_byte"));
  add("tokens/s", last.of("tokens_per_s"));
  return found;
}

function show(run, isShown) {
  run.isShown = isShown;
  plan("metrics", "events", "samples");
}

// Charts

function drawCharts() {
  const splits = [...new Set(runs.flatMap((run) => [...run.metrics.keys()]))];
  const groups = groupsOf(metricNames(runs), splits);
  const key = JSON.stringify(groups.map(({ group, plots }) => [group, ...plots.map((plot) => plot.key)]));
  if (key !== drawnGroups) layOut(groups);
  drawnGroups = key;
  for (const { plots } of groups) for (const plot of plots) drawChart(plot);
}

/** Puts the charts that there are now into their groups; those that were there stay as they are. */
function layOut(groups) {
  const isOpen = new Map([...at("charts").querySelectorAll("details.group")].map((each) => [each.dataset.group, each.open]));
  at("charts").replaceChildren(
    ...groups.map(({ group, plots }, number) => {
      for (const { key } of plots) if (!charts.has(key)) charts.set(key, { place: element("div", { class: "card" }) });
      const inside = element("div", { class: "plots" }, ...plots.map((plot) => charts.get(plot.key).place));
      const open = isOpen.get(group) ?? (group !== "More" && number < 3);
      return element("details", { class: "group", "data-group": group, open, ontoggle: () => plan("metrics") }, element("summary", {}, group), inside);
    }),
  );
}

function drawChart(plot) {
  const held = charts.get(plot.key);
  if (!held.place.closest("details").open) return;
  const across = at("across").value;
  const isLog = plot.isLog || at("log").checked;
  if (!held.drawn || held.isLog !== isLog || held.across !== across) {
    const settings = { title: plot.title, x: AXES[across], y: plot.y, isLog, isWhole: across !== "minutes" };
    Object.assign(held, { drawn: chart(held.place, settings), isLog, across });
  }
  const isOne = runs.length === 1;
  const series = shown().flatMap((run) =>
    plot.lines.map(({ name, label: what, look, split }) => ({
      name: isOne ? what || label(run) : [label(run), what].filter(Boolean).join(" "),
      colour: run.colour,
      look,
      points: pointsOf(run, split, name, across),
    })),
  );
  held.drawn.show(series.filter((each) => each.points.length));
}

function drawGrowth() {
  at("growth").hidden = false; // its width is that of what is shown
  const made = timelines(shown(), Math.max(280, at("timeline").clientWidth));
  at("growth").hidden = !made.length;
  const open = [...at("timeline").querySelectorAll("details")].map((each) => each.open);
  at("timeline").replaceChildren(...made);
  at("timeline").querySelectorAll("details").forEach((each, number) => (each.open = open[number] ?? false));
}

// Events

const entries = new Map(); // by run and seq, so that what is open stays open

function drawEvents() {
  const least = Number(at("severity").value);
  const all = shown()
    .flatMap((run) => run.events.map((event) => ({ run, event })))
    .filter(({ event }) => SEVERITIES.indexOf(event.severity) >= least)
    .sort((one, other) => other.event.seconds - one.event.seconds || other.event.seq - one.event.seq);
  const kept = all.slice(0, nEvents);
  at("events").replaceChildren(...kept.map(({ run, event }) => entryOf(run, event)));
  at("events-rest").textContent = all.length > kept.length ? `The newest ${kept.length} of ${all.length}.` : all.length ? "" : "None.";
  at("events-more").hidden = all.length <= kept.length;
}

function entryOf(run, event) {
  const key = `${run.number} ${event.seq} ${event.seconds}`;
  if (!entries.has(key)) entries.set(key, newEntry(run, event));
  return entries.get(key);
}

function newEntry(run, event) {
  const severity = event.severity === "info" || event.severity === "debug" ? null : element("span", { class: `severity ${event.severity}` }, event.severity);
  const when = new Date(event.seconds * 1000);
  const summary = element(
    "summary",
    {},
    element("span", { class: "number muted" }, `step ${event.payload.step ?? event.step}`),
    severity,
    element("strong", {}, event.name),
    runs.length > 1 ? element("span", { class: "muted" }, label(run)) : null,
    element("span", { class: "what" }, wordsOf(event.payload)),
    element("time", { class: "muted number", datetime: when.toISOString() }, when.toLocaleTimeString("en-GB")),
  );
  const entry = element("details", {}, summary);
  entry.addEventListener("toggle", () => entry.open && entry.childElementCount === 1 && entry.append(element("pre", { tabindex: 0, "aria-label": `Payload of ${event.name}` }, JSON.stringify(event.payload, null, 2))));
  return element("li", {}, entry);
}

/** A payload in one line; what is inside of values is left to who opens it. */
function wordsOf(payload) {
  const words = Object.entries(payload).map(([name, value]) => {
    if (typeof value === "number") return `${name} ${short(value)}`;
    if (value !== null && typeof value === "object") return null;
    return `${name} ${value}`;
  });
  const text = words.filter(Boolean).join(", ");
  return text.length > 160 ? `${text.slice(0, 160)} …` : text;
}

// Samples

function drawSamples() {
  const all = shown().flatMap((run) => run.samples.map((sample) => ({ run, sample })));
  const steps = [...new Set(all.map(({ sample }) => sample.step))].sort((one, other) => other - one);
  const chosen = at("moment").value || "last";
  const key = JSON.stringify([chosen, all.map(({ run, sample }) => [run.number, sample.seq, run.samples.length])]);
  if (key === drawnSamples) return;
  drawnSamples = key;
  const choices = [["last", "the last of each run"], ...steps.map((step) => [String(step), `step ${step}`])];
  at("moment").replaceChildren(...choices.map(([value, words]) => element("option", { value }, words)));
  at("moment").value = choices.some(([value]) => value === chosen) ? chosen : "last";
  at("moment").hidden = !all.length;
  const isChosen = ({ run, sample }) => (at("moment").value === "last" ? sample.step === run.samples.at(-1).step : String(sample.step) === at("moment").value);
  const entriesOf = all.filter(isChosen).map(({ run, sample }) =>
    element(
      "li",
      {},
      element("p", { class: "muted small" }, [runs.length > 1 ? label(run) : null, `step ${sample.step}`].filter(Boolean).join(" · ")),
      element("p", { class: "text" }, element("span", { class: "prompt" }, sample.prompt), sample.text),
    ),
  );
  at("samples").replaceChildren(...(entriesOf.length ? entriesOf : [element("li", { class: "muted small" }, "None yet. A run writes them at its end.")]));
}

async function begin() {
  for (;;) {
    try {
      const answer = await fetch("/runs");
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      runs.push(...(await answer.json()).runs.map(newRun));
      break;
    } catch (error) {
      away(error);
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
  away(null);
  for (const id of ["across", "log"]) at(id).addEventListener("change", () => plan("metrics"));
  at("severity").addEventListener("change", () => plan("events"));
  at("moment").addEventListener("change", () => plan("samples"));
  at("events-more").addEventListener("click", () => {
    nEvents += 100;
    plan("events");
  });
  let width = 0;
  new ResizeObserver(() => {
    if (at("timeline").clientWidth !== width) plan("events");
    width = at("timeline").clientWidth;
  }).observe(document.body);
  plan("run", "metrics", "events", "samples");
  await Promise.all(runs.map(follow));
}

begin();
