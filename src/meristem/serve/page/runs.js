// What is known of the runs: their records, of the branch that survived, and the series and lives made of them.

const MOST_POINTS = 600; // of a series: the least and the largest value of each of half as many stretches remain
const STREAMS = ["metrics", "events", "samples"];

/** A run of which nothing was read yet. colour: a number from 0, the same wherever the run is shown. */
export function newRun({ number, name, path }) {
  return { number, colour: number, name, path, isShown: true, ...nothing() };
}

function nothing() {
  return { after: "", isRead: false, status: "", problem: null, first: null, nReturns: 0, metrics: new Map(), events: [], samples: [] };
}

/** Adds an answer of the server to a run. Returns which of "metrics", "events", "samples" and "run" changed. */
export function take(run, news) {
  const changed = new Set();
  if (news.is_new) {
    if (run.after) for (const each of STREAMS) changed.add(each);
    Object.assign(run, nothing());
  }
  for (const key of ["name", "path", "status", "problem"]) {
    if (news[key] === undefined || news[key] === run[key]) continue;
    run[key] = news[key];
    changed.add("run");
  }
  if (news.is_end && !run.isRead) changed.add("run");
  run.isRead ||= news.is_end;
  run.after = news.after;
  // A return is known with the first records that come after it, so that all that are here are older than a new one.
  for (const [seq, step] of (news.returns ?? []).slice(run.nReturns)) goTo(run, seq, step, changed);
  run.nReturns = news.returns?.length ?? run.nReturns;
  for (const record of news.metrics ?? []) addMetrics(run, record);
  run.events.push(...(news.events ?? []));
  run.samples.push(...(news.samples ?? []));
  for (const each of STREAMS) if (news[each]?.length) changed.add(each);
  return changed;
}

/** Removes what lies on a branch from which the run returned to an earlier step. */
function goTo(run, seq, step, changed) {
  for (const columns of run.metrics.values()) if (cut(columns, step)) changed.add("metrics");
  const survives = (record) => record.seq > seq || record.step <= step;
  for (const stream of ["events", "samples"]) {
    const kept = run[stream].filter(survives);
    if (kept.length < run[stream].length) changed.add(stream);
    run[stream] = kept;
  }
}

// Metrics of one split and task, by rising step. values: by name, { at, is }: the places of the records that have it,
// and their values, NaN where one was not finite. As columns of numbers, since a long run has a hundred thousand records.

function noColumns() {
  return { step: [], tokens: [], seconds: [], values: new Map() };
}

/** A step that was measured again has its last value. */
function addMetrics(run, record) {
  run.first ??= record.seconds;
  const key = record.task === null ? record.split : `${record.split}/${record.task}`;
  if (!run.metrics.has(key)) run.metrics.set(key, noColumns());
  const columns = run.metrics.get(key);
  cut(columns, record.step - 1);
  const place = columns.step.length;
  for (const name of ["step", "tokens", "seconds"]) columns[name].push(record[name]);
  for (const name in record.metrics) {
    if (!columns.values.has(name)) columns.values.set(name, { at: [], is: [] });
    const column = columns.values.get(name);
    column.at.push(place);
    column.is.push(record.metrics[name] ?? NaN);
  }
}

/** Removes the records behind a step. Returns whether there were any. */
function cut(columns, step) {
  let n = columns.step.length;
  while (n && columns.step[n - 1] > step) n -= 1;
  if (n === columns.step.length) return false;
  for (const name of ["step", "tokens", "seconds"]) columns[name].length = n;
  for (const column of columns.values.values()) {
    let left = column.at.length;
    while (left && column.at[left - 1] >= n) left -= 1;
    column.at.length = column.is.length = left;
  }
  return true;
}

/** The last record of a split: { step, tokens, minutes, of(name) }, or null. */
export function lastOf(run, split) {
  const columns = run.metrics.get(split);
  const n = columns?.step.length ?? 0;
  if (!n) return null;
  const of = (name) => {
    const column = columns.values.get(name);
    return column?.at.at(-1) === n - 1 ? column.is.at(-1) : undefined;
  };
  return { step: columns.step[n - 1], tokens: columns.tokens[n - 1], minutes: (columns.seconds[n - 1] - run.first) / 60, of };
}

/** The last record of training; of any split where there is none; or null. */
export function latest(run) {
  const all = [...run.metrics.keys()].map((split) => lastOf(run, split)).filter(Boolean);
  return lastOf(run, "train") ?? all.sort((one, other) => other.step - one.step)[0] ?? null;
}

/** The names of all metrics of some runs, in the order in which they appear in their records. */
export function metricNames(runs) {
  return [...new Set(runs.flatMap((run) => [...run.metrics.values()].flatMap((columns) => [...columns.values.keys()])))];
}

/** The points [x, y] of one metric of one split, over "step", "tokens" or "minutes" since the first record. */
export function pointsOf(run, split, name, across) {
  const columns = run.metrics.get(split);
  const column = columns?.values.get(name);
  if (!column) return [];
  const x = columns[across] ?? columns.seconds;
  const point = (here) => [across === "minutes" ? (x[column.at[here]] - run.first) / 60 : x[column.at[here]], column.is[here]];
  return thinned(column.is).map(point);
}

/** The places of the values to be drawn: of each stretch the least, the largest and a gap, so that no peak is lost. */
function thinned(values) {
  const n = values.length;
  if (n <= MOST_POINTS) return values.map((_, here) => here);
  const found = [0];
  const nStretches = MOST_POINTS / 2 - 1;
  const edge = (stretch) => 1 + Math.floor((stretch * (n - 2)) / nStretches);
  for (let stretch = 0; stretch < nStretches; stretch += 1) {
    let [least, most, gap] = [-1, -1, -1];
    for (let here = edge(stretch); here < edge(stretch + 1); here += 1) {
      const value = values[here];
      if (Number.isNaN(value)) gap = here;
      else {
        if (least < 0 || value < values[least]) least = here;
        if (most < 0 || value > values[most]) most = here;
      }
    }
    found.push(...[...new Set([least, most, gap])].filter((here) => here >= 0).sort((one, other) => one - other));
  }
  found.push(n - 1);
  return found;
}

/** The seeds of a run, each with its stages as [{ stage, from, to, reason }], its blend weights and its blueprint. */
export function livesOf(run) {
  const lives = new Map();
  const inSlot = new Map();
  let blueprints = {};
  const end = latest(run)?.step ?? 0;
  for (const { name, step, payload } of run.events) {
    const at = payload.step ?? step;
    if (name === "graft.done" && payload.operation === "graft") blueprints = { ...blueprints, [payload.slot]: payload.blueprint };
    if (name === "blend.reported") inSlot.get(payload.slot)?.blend.push([at, payload.weight]);
    if (name !== "slot.stage_changed") continue;
    if (!lives.has(payload.seed)) {
      lives.set(payload.seed, { seed: payload.seed, slot: payload.slot, blueprint: blueprints[payload.slot], stages: [], blend: [] });
    }
    const life = lives.get(payload.seed);
    if (life.stages.length) life.stages.at(-1).to = at;
    life.stages.push({ stage: payload.to.toLowerCase(), from: at, to: Math.max(at, end), reason: payload.reason });
    if (["FOSSILIZED", "CULLED"].includes(payload.to)) inSlot.delete(payload.slot);
    else if (payload.to === "GERMINATED") inSlot.set(payload.slot, life);
  }
  return [...lives.values()];
}
