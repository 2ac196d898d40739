// Line charts in SVG, each with a legend and the same numbers as a table.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 10, right: 14, bottom: 22, left: 56 };
const MOST_POINTS = 800; // of a line: more are not seen at the width of a page
const MOST_DOTS = 24; // of a line: more run into each other
const MOST_ROWS = 40; // of the table
const NEAR = 6; // px from the cursor at which a value is still said
const N_COLOURS = 8; // that style.css has, as --series-1 and so on

/** An HTML element with properties and children; texts become text nodes, never markup. */
export function element(name, properties = {}, ...children) {
  return filled(document.createElement(name), properties, children);
}

function drawn(name, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, name), properties, children);
}

function filled(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Nats, with as many decimals as mean something. */
export function nats(value) {
  return value === null || value === undefined ? "–" : value.toFixed(value < 10 ? 2 : 1);
}

/** A number to four significant digits, with k, M, G and T for thousands and more. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(2);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${Number((value / (name === "k" ? 1e3 : unit)).toPrecision(4))}${name}`;
  }
  return String(Number(value.toPrecision(4)));
}

/**
 * A chart in `place`, an element that it fills.
 *
 * title: what is shown, its caption. x, y: names of the axes with their units. isLog: the y axis is logarithmic, and
 * values that are not above 0 are left out. isWhole: x counts something, so that ticks are whole numbers. height: px.
 * Returns { show(series, marks) }, which draws anew: series as [{ name, points: [[x, y], ...] }] with x rising (a y that
 * is no finite number breaks the line), marks as [{ x, label }], upright lines. A series may name its colour, a number
 * from 0 (by default its place), and its look, a class of its line beside that of the colour.
 */
export function chart(place, { title, x, y, isLog = false, isWhole = false, height = 200 }) {
  const picture = drawn("svg", { class: "plot", role: "img", "aria-label": title, height, tabindex: 0 });
  const legend = element("ul", { class: "legend" });
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  const table = element("table");
  const rows = element("details", { class: "values" }, element("summary", {}, "Values"), scroller(table, title));
  const figure = element("figure", { class: "chart" }, element("figcaption", {}, title), picture, legend, rows, readout);
  place.replaceChildren(figure);
  const settings = { title, x, y, isLog, isWhole, height };
  let shown = { series: [], marks: [] };
  let layout = null;
  let cursor = null;

  function show(series, marks = []) {
    const isTheSame = inked(series) === inked(shown.series);
    shown = { series, marks };
    if (!isTheSame) legend.replaceChildren(...series.map((each, at) => legendEntry(each.name, inkOf(each, at))));
    legend.hidden = series.length < 2;
    draw();
    if (rows.open) fillTable(table, settings, series);
  }

  function draw() {
    layout = layoutOf(shown, settings, Math.max(picture.clientWidth || place.clientWidth || 320, 160));
    picture.replaceChildren(...parts(layout, shown, settings));
    point(cursor);
  }

  /** Shows the values nearest to an x; none for null. */
  function point(at) {
    cursor = at;
    picture.querySelector(".cursor")?.remove();
    if (at === null || !layout || !layout.xs.length) {
      readout.textContent = "";
      return;
    }
    const nearest = layout.xs.reduce((best, each) => (Math.abs(each - at) < Math.abs(best - at) ? each : best));
    cursor = nearest;
    picture.append(cursorAt(nearest, layout, shown.series));
    const said = shown.series.map((each) => {
      const found = pointAt(each.points, nearest, layout)?.[1] ?? null;
      return found === null ? null : `${shown.series.length > 1 ? `${each.name} ` : ""}${short(found)}`;
    });
    const near = shown.marks.filter((mark) => mark.x === nearest).map((mark) => mark.label);
    readout.textContent = [`${x} ${short(nearest)}`, ...said.filter(Boolean), ...near].join(" · ");
  }

  picture.addEventListener("pointermove", (event) => {
    if (layout) point(layout.invert(event.clientX - picture.getBoundingClientRect().left));
  });
  picture.addEventListener("pointerleave", () => point(null));
  picture.addEventListener("blur", () => point(null));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !layout || !layout.xs.length) return;
    event.preventDefault();
    const at = cursor === null ? (step > 0 ? -1 : layout.xs.length) : layout.xs.indexOf(cursor);
    point(layout.xs[Math.min(Math.max(at + step, 0), layout.xs.length - 1)]);
  });
  rows.addEventListener("toggle", () => rows.open && fillTable(table, settings, shown.series));
  let width = 0;
  new ResizeObserver(() => {
    if (picture.clientWidth === width) return;
    width = picture.clientWidth;
    draw();
  }).observe(picture);
  return { show };
}

function scroller(table, title) {
  return element("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": `${title}: values` }, table);
}

/** The classes of a series: its colour, and its look where it has one of its own. */
function inkOf({ colour, look }, at) {
  return `series-${((colour ?? at) % N_COLOURS) + 1}${look ? ` ${look}` : ""}`;
}

function inked(series) {
  return series.map((each, at) => `${each.name} ${inkOf(each, at)}`).join("\n");
}

function legendEntry(name, ink) {
  const line = drawn("line", { x1: 1, y1: 5, x2: 21, y2: 5, class: `line ${ink}` });
  const swatch = drawn("svg", { width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" }, line);
  return element("li", {}, swatch, name);
}

/** Where everything stands: scales, ticks and what is finite of each line. */
function layoutOf({ series, marks }, { isLog, isWhole, height }, width) {
  const fits = (value) => Number.isFinite(value) && (!isLog || value > 0);
  const all = series.flatMap((each) => each.points).filter(([x, y]) => Number.isFinite(x) && fits(y));
  const across = extent([...all.map(([x]) => x), ...marks.map((mark) => mark.x)]);
  const up = extent(all.map(([, y]) => (isLog ? Math.log10(y) : y)));
  const [least, most] = roomy(up, isLog);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const span = across[1] - across[0] || 1;
  const toX = (x) => (across[0] === across[1] ? (MARGIN.left + right) / 2 : MARGIN.left + ((x - across[0]) / span) * (right - MARGIN.left));
  const toY = (y) => bottom - (((isLog ? Math.log10(y) : y) - least) / (most - least)) * (bottom - MARGIN.top);
  return {
    width, right, bottom, toX, toY, fits,
    isEmpty: !all.length,
    xs: [...new Set(all.map(([x]) => x))].sort((one, other) => one - other),
    invert: (pixel) => across[0] + ((pixel - MARGIN.left) / (right - MARGIN.left)) * span,
    xTicks: ticks(across[0], across[1], Math.max(2, Math.floor(width / 60)), isWhole),
    yTicks: isLog ? logTicks(least, most) : ticks(least, most, 4, false),
  };
}

function extent(values) {
  let [least, most] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < least) least = value;
    if (value > most) most = value;
  }
  return least > most ? [0, 1] : [least, most];
}

/** A little more than the extent; from 0 where that is near. */
function roomy([least, most], isLog) {
  if (isLog) {
    // At least one decade and its two ends, so that there are always ticks.
    return most - least < 1 ? [Math.floor(least), Math.max(Math.ceil(most), Math.floor(least) + 1)] : [least - 0.05, most + 0.05];
  }
  const room = most - least || Math.abs(most) || 1;
  const from = least >= 0 && least < 0.6 * most ? 0 : least - 0.08 * room;
  return [from, most + 0.08 * room];
}

/** Round numbers from least to most, about n of them. */
function ticks(least, most, n, isWhole) {
  if (least === most) return [least];
  const raw = (most - least) / n;
  const unit = 10 ** Math.floor(Math.log10(raw));
  let step = unit * [1, 2, 5, 10].find((each) => each * unit >= raw * 0.999);
  if (isWhole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let at = Math.ceil(least / step - 1e-9); at * step <= most + step * 1e-9; at += 1) {
    found.push(Number((at * step).toPrecision(12)));
  }
  return found;
}

function logTicks(least, most) {
  const [first, last] = [Math.ceil(least - 1e-9), Math.floor(most + 1e-9)];
  const step = Math.max(1, Math.ceil((last - first) / 5));
  const found = [];
  for (let power = first; power <= last; power += step) found.push(10 ** power);
  return found.length ? found : [10 ** least, 10 ** most];
}

/** The parts of the picture, the lowest first. */
function parts(layout, { series, marks }, { x, y }) {
  const { right, bottom, toX, toY } = layout;
  // Values that differ only behind their fourth digit, as of a speed that hardly changes, are written in full.
  const isFine = new Set(layout.yTicks.map(short)).size < layout.yTicks.length;
  const grid = layout.yTicks.flatMap((value) => [
    drawn("line", { class: "grid", x1: MARGIN.left, x2: right, y1: toY(value), y2: toY(value) }),
    drawn("text", { class: "tick", x: MARGIN.left - 8, y: toY(value), dy: "0.32em", "text-anchor": "end" }, isFine ? String(value) : short(value)),
  ]);
  const foot = layout.xTicks.map((value) =>
    drawn("text", { class: "tick", x: toX(value), y: bottom + 15, "text-anchor": "middle" }, short(value)),
  );
  const axes = [
    drawn("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
    drawn("text", { class: "tick", x: MARGIN.left - 12, y: bottom + 15, "text-anchor": "end" }, x),
    drawn("text", { class: "tick", transform: `translate(12 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y),
  ];
  const upright = marks.map((mark) =>
    drawn("line", { class: "mark", x1: toX(mark.x), x2: toX(mark.x), y1: MARGIN.top, y2: bottom }, drawn("title", {}, mark.label)),
  );
  const lines = series.flatMap((each, at) => lineOf(each.points, layout, inkOf(each, at)));
  const nothing = layout.isEmpty
    ? [drawn("text", { class: "tick", x: (MARGIN.left + right) / 2, y: (MARGIN.top + bottom) / 2, "text-anchor": "middle" }, "nothing yet")]
    : [];
  return layout.isEmpty ? [...axes, ...nothing] : [...grid, ...foot, ...axes, ...upright, ...lines];
}

/** One line, broken where a value is no number, with dots where it has few points. */
function lineOf(points, layout, ink) {
  const kept = thinned(points, MOST_POINTS);
  let path = "";
  let isOpen = false;
  const dots = [];
  for (const [x, y] of kept) {
    if (!layout.fits(y)) {
      isOpen = false;
      continue;
    }
    const at = `${layout.toX(x).toFixed(1)} ${layout.toY(y).toFixed(1)}`;
    path += `${isOpen ? "L" : "M"}${at}`;
    isOpen = true;
    if (kept.length <= MOST_DOTS) dots.push(drawn("circle", { class: `dot ${ink}`, cx: layout.toX(x), cy: layout.toY(y), r: 2.5 }));
  }
  return [drawn("path", { class: `line ${ink}`, d: path }), ...dots];
}

/** At most n of the points, evenly spread, the first and the last among them. */
function thinned(points, n) {
  if (points.length <= n) return points;
  return Array.from({ length: n }, (_, at) => points[Math.round((at * (points.length - 1)) / (n - 1))]);
}

/** The drawn point of a line nearest to x, where it is so near that it is seen there; lines may be measured at other x. */
function pointAt(points, x, layout) {
  let [least, most] = [0, points.length - 1];
  while (least < most) {
    const middle = (least + most) >> 1;
    if (points[middle][0] < x) least = middle + 1;
    else most = middle;
  }
  const near = [points[least - 1], points[least]].filter((point) => point && layout.fits(point[1]));
  near.sort((one, other) => Math.abs(one[0] - x) - Math.abs(other[0] - x));
  return near.length && Math.abs(layout.toX(near[0][0]) - layout.toX(x)) <= NEAR ? near[0] : null;
}

function cursorAt(x, layout, series) {
  const at = layout.toX(x);
  const group = drawn("g", { class: "cursor" }, drawn("line", { x1: at, x2: at, y1: MARGIN.top, y2: layout.bottom }));
  series.forEach((each, index) => {
    const found = pointAt(each.points, x, layout);
    if (found) {
      const [cx, cy] = [layout.toX(found[0]), layout.toY(found[1])];
      group.append(drawn("circle", { class: `dot ${inkOf(each, index)}`, cx, cy, r: 4 }));
    }
  });
  return group;
}

function fillTable(table, { title, x }, series) {
  const all = [...new Set(series.flatMap((each) => each.points.map((point) => point[0])))].sort((one, other) => one - other);
  const xs = thinned(all, MOST_ROWS);
  const values = series.map((each) => new Map(each.points));
  const rest = xs.length < all.length ? ` (${xs.length} of ${all.length} points)` : "";
  table.replaceChildren(
    element("caption", {}, `${title}${rest}`),
    element("thead", {}, element("tr", {}, ...[x, ...series.map((each) => each.name)].map((name) => element("th", { scope: "col" }, name)))),
    element(
      "tbody",
      {},
      ...xs.map((each) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, short(each)),
          ...values.map((found) => element("td", {}, short(found.get(each)))),
        ),
      ),
    ),
  );
}
