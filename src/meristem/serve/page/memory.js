// The memory view: what a turn did to the memory, and what the memory did for a turn.

import { Refused, ask } from "./api.js";
import { chart, element, nats, short } from "./chart.js";

const SURPRISE = [0.25, 1, 2, 3, 4, 5.5, 7]; // nats from which a token has the next shade
const GAIN = [0.25, 1, 2, 4];
const LONGEST_QUOTE = 70;

const at = (id) => document.getElementById(id);

/**
 * The view, in its place in the page. Returns { show(session, turns), select(turn), pause(), resume() }: while the session
 * is changed the view asks nothing of it.
 */
export function memoryView() {
  const readings = new Map(); // by turn and the time it was made, of the session that is shown
  const norms = chart(at("norms"), { title: "Norm of each memory", x: "turn", y: "norm", isWhole: true });
  const halfLives = chart(at("half-lives"), {
    title: "Half-life of what each holds",
    x: "turn", y: "tokens", isWhole: true, isLog: true,
  });
  let shown = { id: null, turns: [] };
  let selected = null;
  let looking = null; // the AbortController of the requests under way
  let isPaused = false;

  function show(session, turns) {
    isPaused = false;
    looking?.abort();
    if (session?.id !== shown.id) readings.clear();
    const isNew = session?.id !== shown.id || turns.length !== shown.turns.length;
    shown = { id: session?.id ?? null, turns };
    at("memory-empty").hidden = turns.length > 0;
    at("memory-parts").hidden = at("turn").parentElement.hidden = !turns.length;
    if (!turns.length) return;
    if (isNew || !turns.some((each) => each.turn === selected)) selected = turns[turns.length - 1].turn;
    at("turn").replaceChildren(...turns.map((each) => element("option", { value: each.turn }, `${each.turn}: ${quote(each)}`)));
    at("turn").value = String(selected);
    look();
  }

  function select(turn) {
    selected = turn;
    at("turn").value = String(turn);
    if (!isPaused) look();
  }

  function pause() {
    isPaused = true;
    looking?.abort();
  }

  /** Go on, if nothing was shown meanwhile. */
  function resume() {
    if (isPaused && shown.turns.length) look();
    isPaused = false;
  }

  /** Show the selected turn, then what it drew on, and then all turns over time. */
  async function look() {
    looking?.abort();
    const mine = (looking = new AbortController());
    const { signal } = mine;
    const turn = shown.turns.find((each) => each.turn === selected);
    at("memory-parts").setAttribute("aria-busy", "true");
    try {
      const reading = await readingOf(turn, signal);
      showReading(reading);
      showSources(null);
      if (reading) {
        showSources(await ask(`${path(turn)}/sources`, { signal }), shown.turns);
      }
      showTime();
      for (const each of [...shown.turns].reverse()) {
        if (readings.has(key(each))) continue;
        await readingOf(each, signal);
        showTime();
      }
    } catch (error) {
      if (!signal.aborted) note(error instanceof Refused ? error.message : `This view failed: ${error.message}`);
    } finally {
      if (mine === looking) at("memory-parts").removeAttribute("aria-busy");
    }
  }

  function path(turn) {
    return `/v1/sessions/${shown.id}/turns/${turn.turn}`;
  }

  /** Whether the states before and after a turn are there, between which it can be read again. */
  function isKept(turn) {
    const before = shown.turns.find((each) => each.turn === turn.turn - 1);
    return turn.can_return && (turn.turn === 1 || Boolean(before?.can_return));
  }

  /** What the server says of a turn; null where it does not keep what it would need. */
  async function readingOf(turn, signal) {
    signal.throwIfAborted();
    if (!isKept(turn)) return null;
    if (!readings.has(key(turn))) {
      const found = await ask(`${path(turn)}/reading`, { signal }).catch((error) => {
        if (error.code === "session_not_found") return null;
        throw error;
      });
      readings.set(key(turn), found);
    }
    return readings.get(key(turn));
  }

  function showReading(reading) {
    note(reading ? "" : "Where the session stood before this turn, or its tokens, are not kept any more, so that it cannot be looked into.");
    for (const id of ["tokens-card", "sources-card", "changed-card"]) at(id).hidden = !reading;
    if (!reading) return;
    showTokens(reading);
    showChanges(reading.layers);
  }

  function showTime() {
    const found = shown.turns.map((turn) => [turn.turn, readings.get(key(turn))]).filter(([, reading]) => reading);
    const layers = [...new Set(found.flatMap(([, reading]) => Object.keys(reading.layers)))];
    at("time-card").hidden = !layers.length;
    const lines = (what) =>
      layers.map((layer) => ({
        name: named(layer),
        points: found.map(([turn, reading]) => [turn, reading.layers[layer]?.[what] ?? NaN]),
      }));
    norms.show(lines("norm"));
    halfLives.show(lines("half_life"));
  }

  at("turn").addEventListener("change", () => select(Number(at("turn").value)));
  for (const radio of document.querySelectorAll("[name=shade]")) {
    radio.addEventListener("change", () => {
      const reading = readings.get(key(shown.turns.find((each) => each.turn === selected)));
      if (reading) showTokens(reading);
    });
  }
  return { show, select, pause, resume };
}

function key(turn) {
  return `${turn.turn} ${turn.created}`;
}

function note(text) {
  at("memory-note").textContent = text;
  at("memory-note").hidden = !text;
}

function quote(turn) {
  const text = turn.text || turn.reply;
  return text.length > LONGEST_QUOTE ? `${text.slice(0, LONGEST_QUOTE - 1)}…` : text;
}

/** `layer.2.recall` as `layer 3`; a name of another form as it is. */
function named(layer) {
  const found = /^layer\.(\d+)(?:\.recall)?$/.exec(layer);
  return found ? `layer ${Number(found[1]) + 1}` : layer;
}

// Tokens

function showTokens({ tokens, n_left_out }) {
  const isGain = document.querySelector("[name=shade]:checked").value === "gain";
  const readout = element("p", { class: "readout", "aria-live": "polite" }, "Point at a token, or go along with the arrow keys.");
  const parts = [["read", 0, tokens.n_read], ["written", tokens.n_read, tokens.texts.length]].filter(([, from, to]) => to > from);
  const marks = [];
  const blocks = parts.map(([what, from, to]) => {
    const block = element("p", { class: "tokens" });
    const last = tokens.texts.findLastIndex((text, index) => index < to && text.trim());
    for (let index = from; index < to; index += 1) {
      const made = element("span", { class: `token ${shade(tokens, index, isGain)}` }, visible(tokens.texts[index]));
      made.addEventListener("pointerenter", () => point(index));
      marks.push(made);
      block.append(made, index < last && tokens.texts[index].includes("\n") ? "\n" : "");
    }
    return element("div", {}, element("h4", {}, what === "read" ? "Read" : "Written by itself, and read"), block);
  });
  let pointed = null;
  function point(index) {
    if (pointed !== null) marks[pointed].classList.remove("pointed");
    pointed = index;
    marks[index].classList.add("pointed");
    readout.textContent = spoken(tokens, index);
  }
  const place = element("div", { class: "token-blocks", tabindex: 0, role: "group", "aria-label": "Tokens; arrow keys go from one to the next" }, ...blocks);
  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    point(Math.min(Math.max((pointed ?? (step > 0 ? -1 : marks.length)) + step, 0), marks.length - 1));
  });
  at("tokens").replaceChildren(
    place,
    readout,
    scale(isGain),
    ...(n_left_out ? [element("p", { class: "muted small" }, `${n_left_out} tokens more are not shown.`)] : []),
    element("p", { class: "muted small" }, isGain
      ? "By how many nats the memory of earlier turns made each token likelier: its surprise with an empty memory, less its surprise with the memory as it was."
      : "Surprise is −ln p of a token, given all before it: 0 nats for one that was certain, 0.7 for one chance in two, 7 for one in a thousand."),
    valuesOf(tokens),
  );
}

/** White space is made visible where it is all there is; a token inside a character has a dot. */
function visible(text) {
  if (!text) return "·";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

function gainOf(tokens, index) {
  const [with_, without] = [tokens.nats[index], tokens.nats_without[index]];
  return with_ === null || without === null ? null : without - with_;
}

function shade(tokens, index, isGain) {
  const value = isGain ? gainOf(tokens, index) : tokens.nats[index];
  if (value === null) return "unknown";
  if (!isGain) return `shade-${SURPRISE.filter((least) => value >= least).length}`;
  return `${value < 0 ? "loss" : "gain"}-${GAIN.filter((least) => Math.abs(value) >= least).length}`;
}

function spoken(tokens, index) {
  const value = tokens.nats[index];
  const said = [`“${visible(tokens.texts[index])}”`];
  if (value === null) said.push("nothing was before it");
  else {
    said.push(`${nats(value)} nats`, `p = ${Number(Math.exp(-value).toPrecision(2))}`);
    const without = tokens.nats_without[index];
    if (without !== null) said.push(`${nats(without)} with an empty memory`);
  }
  return said.join(" · ");
}

function scale(isGain) {
  const steps = isGain
    ? ["loss-4", "loss-3", "loss-2", "loss-1", "gain-0", "gain-1", "gain-2", "gain-3", "gain-4"]
    : Array.from({ length: SURPRISE.length + 1 }, (_, level) => `shade-${level}`);
  const ends = isGain ? ["less likely", "likelier"] : ["expected", `${SURPRISE[SURPRISE.length - 1]} nats and more`];
  return element(
    "p",
    { class: "scale muted small" },
    ends[0],
    element("span", { class: "steps", "aria-hidden": "true" }, ...steps.map((step) => element("span", { class: step }))),
    ends[1],
  );
}

function valuesOf(tokens) {
  const rows = element("details", { class: "values" }, element("summary", {}, "Values"));
  rows.addEventListener("toggle", () => {
    if (!rows.open || rows.childElementCount > 1) return;
    const cells = (...texts) => element("tr", {}, ...texts.map((text, column) => element(column ? "td" : "th", column ? {} : { scope: "row" }, text)));
    const head = ["token", "nats", "empty memory"].map((name) => element("th", { scope: "col" }, name));
    const body = tokens.texts.map((text, index) => cells(visible(text), nats(tokens.nats[index]), nats(tokens.nats_without[index])));
    const table = element("table", {}, element("caption", {}, "Surprise of each token"), element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
    rows.append(element("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Surprise of each token" }, table));
  });
  return rows;
}

// Sources

function showSources(found, turns) {
  const place = at("sources");
  at("sources-title").textContent = found?.measured === "text" ? "What reading it drew on" : "What the reply drew on";
  if (!found) return place.replaceChildren(element("p", { class: "muted small" }, "It is being measured …"));
  const what = found.measured === "reply" ? "reply" : "text";
  const through = found.nats_fresh - found.nats_without;
  const rows = [
    ...found.sources.map(({ first, last, nats: value }) =>
      first === last
        ? { name: `Turn ${last}`, text: quote(turns.find((each) => each.turn === last) ?? { text: "", reply: "" }), value }
        : { name: `Turns ${first}–${last}`, text: "", value },
    ),
    { name: "Attention", text: "the words it still sees", value: through },
  ];
  const most = Math.max(1, ...rows.map((row) => Math.abs(row.value)));
  const total = found.nats_without - found.nats;
  place.replaceChildren(
    element("p", { class: "figure" }, element("strong", { class: "number" }, signed(total)), ` nats came through the memory: it made the ${what} ${times(total)}.`),
    element("ul", { class: "bars" }, ...rows.map((row) => bar(row, most))),
    measured(`The ${found.n_tokens} tokens of the ${what} have a surprise of ${nats(found.nats)} nats with the memory as it was, and of ${nats(found.nats_without)} with an empty one. A turn counts for what the ${what} gained in likelihood when the memory before that turn was exchanged for the memory after it, all else being left as it was; the turns add up to the ${signed(total)} nats. Attention counts for what it gained, with an empty memory, by all that a session carries beside its memory. Below 0 it made the ${what} less likely.`),
  );
}

function signed(value) {
  const rounded = nats(Math.abs(value));
  return Number(rounded) === 0 ? "0" : `${value < 0 ? "−" : "+"}${rounded}`;
}

/** How much likelier so many nats make something. */
function times(value) {
  const factor = Math.exp(Math.abs(value));
  if (factor < 1.005) return "neither likelier nor less likely";
  // As a power it is said of the logarithm: a long reply can be likelier by more than a number holds.
  const power = String(Math.round(Math.abs(value) / Math.LN10));
  const said = factor < 1e4 ? Number(factor.toPrecision(2)).toLocaleString("en") : `some 10${[...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`;
  return `${said} times ${value > 0 ? "as likely" : "less likely"}`;
}

/** How something is measured, for those who want to know. */
function measured(text) {
  return element("details", { class: "values" }, element("summary", {}, "How this is measured"), element("p", { class: "muted" }, text));
}

/** A row with a bar as wide as its nats are of the most. */
function bar({ name, text, value }, most) {
  const drawn = element("span", { class: `fill ${value < 0 ? "loss" : ""}` });
  const share = Math.abs(value) / most;
  drawn.style.setProperty("width", share < 0.005 ? "0" : `${100 * share}%`);
  return element(
    "li",
    {},
    element("span", { class: "name" }, name),
    element("span", { class: "muted text" }, text),
    element("span", { class: "number" }, signed(value)),
    element("span", { class: "track", "aria-hidden": "true" }, drawn),
  );
}

// Changes

function showChanges(layers) {
  const found = Object.entries(layers);
  if (!found.length) {
    return at("changed").replaceChildren(element("p", { class: "muted small" }, "This model has no memory."));
  }
  const head = ["memory", "norm", "moved by", "half-life"].map((name) => element("th", { scope: "col" }, name));
  const rows = found.map(([layer, { norm, change, half_life }]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, named(layer)),
      element("td", {}, short(norm)),
      element("td", {}, moved(change, norm)),
      element("td", {}, half_life === null ? "no end" : `${short(half_life)} tokens`),
    ),
  );
  at("changed").replaceChildren(
    element("div", { class: "scroller" }, element("table", { class: "wide" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows))),
    measured("Norm: length of all that a memory holds, at the end of the turn. Moved by: length of its difference to the beginning of the turn, and as a share of the norm. Half-life: after how many tokens half of it is left, at the median head, with the gates that this turn gave. “No end” is more than a thousand million."),
  );
}

function moved(change, norm) {
  if (change === null) return "–";
  return norm > 0 ? `${short(change)} (${Math.round((100 * change) / norm)} %)` : short(change);
}
