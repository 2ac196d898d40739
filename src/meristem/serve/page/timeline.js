// The lives of seeds as bars over the steps of their run, coloured by stage, and the same as a table.

import { element, short } from "./chart.js";
import { livesOf } from "./runs.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 44; // of a life
const BAR = 16;
const [LEFT, RIGHT] = [8, 12];

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The growth of some runs: a figure for each that has seeds, and a key of the stages. Empty where there are none. */
export function timelines(runs, width) {
  const found = runs.map((run) => ({ run, lives: livesOf(run) })).filter(({ lives }) => lives.length);
  if (!found.length) return [];
  const stages = [...new Set(found.flatMap(({ lives }) => lives.flatMap((life) => life.stages.map((each) => each.stage))))];
  return [...found.map((each) => timeline(each, found.length > 1, width)), key(stages.filter((stage) => stage !== "dormant"))];
}

function timeline({ run, lives }, isNamed, width) {
  const last = Math.max(1, ...lives.flatMap((life) => life.stages.map((each) => each.to)));
  const toX = (step) => LEFT + (step / last) * (width - LEFT - RIGHT);
  const bottom = lives.length * HEIGHT;
  const picture = drawn("svg", { class: "lives", role: "img", "aria-label": `Stages of the seeds of ${run.name}`, width, height: bottom + 24 });
  lives.forEach((life, at) => picture.append(...lifeParts(life, at * HEIGHT, toX, width)));
  picture.append(drawn("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom + 4, y2: bottom + 4 }));
  for (const [step, anchor] of [[0, "start"], [Math.round(last / 2), "middle"], [last, "end"]]) {
    picture.append(drawn("text", { class: "tick", x: toX(step), y: bottom + 19, "text-anchor": anchor }, step === last ? `step ${short(step)}` : short(step)));
  }
  const caption = element("figcaption", {}, isNamed ? run.name : "Stages over the steps; the line is the blend weight");
  return element("figure", { class: "chart" }, caption, picture, tableOf(run, lives));
}

function lifeParts(life, top, toX, width) {
  const parts = [];
  const now = life.stages.at(-1);
  const words = [life.seed, life.blueprint, `${now.stage} since step ${now.from}`].filter(Boolean).join(" · ");
  // A name that begins far to the right would leave the picture.
  const x = toX(life.stages[0].from);
  const anchor = x > width / 2 ? "end" : "start";
  parts.push(drawn("text", { x: anchor === "end" ? width - RIGHT : x, y: top + 14, "text-anchor": anchor }, words));
  for (const { stage, from, to } of life.stages) {
    if (stage === "dormant") continue;
    const title = drawn("title", {}, `${life.seed}: ${stage}, steps ${from} to ${to}`);
    parts.push(drawn("rect", { class: `stage ${stage}`, x: toX(from), y: top + 20, width: Math.max(toX(to) - toX(from), 2), height: BAR }, title));
  }
  if (life.blend.length) {
    const at = life.blend.map(([step, weight]) => `${toX(step).toFixed(1)} ${(top + 20 + BAR * (1 - weight)).toFixed(1)}`);
    parts.push(drawn("path", { class: "blend", d: `M${at.join("L")}` }));
  }
  return parts;
}

function tableOf(run, lives) {
  const titles = ["seed", "blueprint", "stage", "from", "to", "reason"].map((name) => element("th", { scope: "col" }, name));
  const rows = lives.flatMap((life) =>
    life.stages.map(({ stage, from, to, reason }) =>
      element("tr", {}, element("th", { scope: "row" }, life.seed), ...[life.blueprint ?? "", stage, from, to, reason].map((each) => element("td", {}, String(each)))),
    ),
  );
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...rows));
  const place = element("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": `Stages of the seeds of ${run.name}` }, table);
  return element("details", { class: "values" }, element("summary", {}, "Values"), place);
}

function key(stages) {
  const entries = stages.map((stage) => {
    const swatch = drawn("svg", { width: 14, height: 14, "aria-hidden": "true" }, drawn("rect", { class: `stage ${stage}`, x: 1, y: 1, width: 12, height: 12 }));
    return element("li", {}, swatch, stage);
  });
  return element("ul", { class: "legend", "aria-label": "Stages" }, ...entries);
}
