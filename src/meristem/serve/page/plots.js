// Which charts there are for the metrics of some runs, in groups, and the lines of each.

const RATES = "tokens per second";

/** Charts that a reader looks for first. lines: [metric, name, look]; split beside "train" where it has its own. */
const KNOWN = [
  { group: "Training", title: "Loss", y: "bits per byte", lines: [["bits_per_byte", "training", "faint", "train"], ["bits_per_byte", "held-out", "main", "val"]] },
  { group: "Training", title: "Learning rate", y: "", lines: [["rate"]] },
  { group: "Training", title: "Speed", y: RATES, lines: [["tokens_per_s"]] },
  { group: "Training", title: "Gradient norm", y: "", lines: [["grad_norm"]] },
  { group: "Memory and its gates", title: "Write rate", y: "", lines: [["memory/write"]] },
  {
    group: "Memory and its gates", title: "Half-lives of the heads", y: "tokens", isLog: true,
    lines: [["memory/half_life", "median", "main"], ["memory/half_life_least", "shortest", "dotted"], ["memory/half_life_most", "longest", "dashed"]],
  },
  { group: "Memory and its gates", title: "Momentum", y: "", lines: [["memory/momentum"]] },
  { group: "Memory and its gates", title: "Norm of the memory", y: "", lines: [["memory/norm"]] },
];
const LEVEL = /^memory\/(.+)\.level\.(\d+)\/(.+)$/;
const LOOKS = ["main", "dashed", "dotted", "mixed"];
const FIGURES = {
  write_budget: "Write rate", half_life: "Half-life", n_fires: "Writes while 128 tokens are read", memory_change: "Change at a write",
  share: "Share of the output", rate: "Rate of writes",
};

/** The groups of charts for these metrics: [{ group, plots: [{ key, title, y, isLog, lines: [{ name, label, look, split }] }] }]. */
export function groupsOf(names, splits) {
  const left = new Set(names);
  const groups = new Map();
  const add = (group, plot) => groups.set(group, [...(groups.get(group) ?? []), { ...plot, key: `${group}/${plot.title}` }]);
  for (const { group, title, y, isLog = false, lines } of KNOWN) {
    const there = lines.filter(([name, , , split]) => names.includes(name) && (!split || splits.includes(split)));
    if (!there.length) continue;
    add(group, { title, y, isLog, lines: there.map(([name, label = "", look = "", split = "train"]) => ({ name, label, look, split })) });
    for (const [name] of there) left.delete(name);
  }
  for (const [key, levels] of levelsOf(names)) {
    const [path, figure] = JSON.parse(key);
    const lines = levels.map(({ index, name }) => ({ name, label: `level ${index}`, look: LOOKS[index % LOOKS.length], split: "train" }));
    const isLog = figure === "half_life" || figure === "memory_change";
    add(`Levels of ${path}`, { title: FIGURES[figure] ?? figure, y: figure === "half_life" ? "tokens" : "", isLog, lines });
    for (const { name } of levels) left.delete(name);
  }
  for (const name of left) {
    const lines = splits.map((split, at) => ({ name, label: split, look: LOOKS[at % LOOKS.length], split }));
    add("More", { title: name, y: "", isLog: false, lines });
  }
  return [...groups].map(([group, plots]) => ({ group, plots }));
}

function levelsOf(names) {
  const found = new Map();
  for (const name of names) {
    const [, path, index, figure] = LEVEL.exec(name) ?? [];
    if (!path) continue;
    const key = JSON.stringify([path, figure]);
    found.set(key, [...(found.get(key) ?? []), { index: Number(index), name }]);
  }
  return found;
}
