const byId = id => document.getElementById(id);
const COLOURS = 8;
const AXES = { steps: "steps", tokens: "tokens", seconds: "training time" };
// Letter and colour of the mark of each kind of event; kinds without one are in the table of events only.
const KINDS = {
  checkpoint: ["|", "--routine"], start: ["A", "--good"], resume: ["R", "--good"], finish: ["F", "--good"],
  rewind: ["W", "--warn"], skipped_update: ["K", "--warn"], restart: ["N", "--warn"], straggler: ["L", "--warn"],
  writer: ["M", "--warn"], spike: ["S", "--bad"], not_finite: ["I", "--bad"], hang: ["H", "--bad"],
  replicas_differ: ["D", "--bad"], failure: ["X", "--bad"],
};
// The charts, in order: a title, the names of metrics that belong in it, and whether noise may be smoothed away.
const GROUPS = [
  ["Validation loss by corpus", /^validation\/lm_loss\/./, false],
  ["Scores of tasks", /^(tasks|evaluation)\//, false],
  ["Learning rate", /^train\/learning_rate$/, false],
  ["Gradient norm", /^train\/grad_norm$/, true],
  ["Norm of the weights", /^train\/param_norm$/, false],
  ["Gradient noise scale", /noise_scale/, true],
  ["Loss scale", /^train\/loss_scale$/, false],
  ["Skipped updates", /^train\/skipped_(steps|updates)$/, false],
  ["Epochs", /^train\/epochs(\/|$)/, false],
  ["Tokens per second", /^runtime\/tokens_per_sec$/, true],
  ["Utilization of the peak", /flops_utilization$/, true],
  ["FLOP/s per device", /flops_per_sec_per_gpu$/, true],
  ["Memory", /mem(ory)?(_|\/|$)/, false],
  ["Seconds per step", /^runtime\/iteration_time$/, true],
  ["Seconds per step, of the slowest and the fastest rank", /_rank_seconds$/, true],
  ["Seconds per step, by phase", /^runtime\/.*_seconds$/, true],
];
const LOSS = "train/lm_loss", HELD_OUT = "validation/lm_loss", PERPLEXITY = "validation/lm_loss_ppl";

let report = JSON.parse(byId("data").textContent);
const state = { axis: "steps", smoothing: 0, logX: false, logY: false, range: null, runs: new Set(), kinds: new Set(["writer"]), open: new Map() };
const cards = new Map();  // of charts, by key: { element, plot, near, heading, chart, drawn }

// ---- elements

function made(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function table(content, label, tall = false, wordy = false) {
  const head = made("tr", {}, ...content.header.map(text => made("th", { scope: "col" }, text)));
  const rows = content.rows.map(row => made("tr", {},
    ...row.map((text, place) => place || !text ? made("td", {}, text) : made("th", { scope: "row" }, text))));
  const element = made("table", { className: "figures" + (wordy ? " wordy" : "") }, made("thead", {}, head), made("tbody", {}, ...rows));
  const region = made("div", { className: "scroll" + (tall ? " tall" : ""), tabIndex: 0, role: "region", "aria-label": label });
  if (content.rows.length) region.append(element);
  return content.note ? [region, made("p", { className: "note" }, content.note)] : [region];
}

/** A part that can be folded; it stays as it was left when the page gets news. */
function folded(key, title, fill, isOpen = false) {
  const summary = made("summary", {}, title), element = made("details", {}, summary);
  const show = () => { if (element.open && element.childElementCount === 1) element.append(...fill()); };
  element.addEventListener("toggle", () => { state.open.set(key, element.open); show(); });
  element.open = state.open.get(key) ?? isOpen;
  show();
  return element;
}

// ---- numbers

const digits = (value, count) => String(Number(value.toPrecision(count)));

function short(value, count = 4) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e18 || size < 1e-3) return value.toExponential(Math.max(0, count - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
  for (const [factor, letter] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= factor) return digits(value / (letter === "k" ? 1e3 : factor), count) + letter;
  }
  return digits(value, count);
}

function time(seconds) {
  const unit = [[172800, 86400, "d"], [7200, 3600, "h"], [120, 60, "min"], [0, 1, "s"]].find(one => seconds >= one[0]) ?? [0, 1, "s"];
  return `${digits(seconds / unit[1], 3)} ${unit[2]}`;
}

function onAxis(value) {
  if (value == null) return "–";
  if (state.axis === "seconds") return time(value);
  if (state.axis === "tokens") return short(value, 3).replace("G", "B");
  return Number.isInteger(value) ? value.toLocaleString("en") : digits(value, 6);
}

/** Places of a step on the chosen axis: the files say where some steps are, and others are in between. */
function placed(run, steps) {
  const { steps: known, [state.axis]: places } = run.axes;
  if (state.axis === "steps" || !places) return steps;
  const last = known.length - 1;
  let low = 0;
  return steps.map(step => {
    if (low && known[low] > step) low = 0;
    while (low < last - 1 && known[low + 1] < step) low++;
    const [x0, y0] = last ? [known[low], places[low]] : [0, 0];
    const [x1, y1] = last ? [known[low + 1], places[low + 1]] : [known[0], places[0]];
    return step < known[0] ? places[0] * step / known[0] : y0 + (y1 - y0) * (step - x0) / (x1 - x0 || 1);
  });
}

/** Means with weights that fall exponentially with the distance, to both sides, so that nothing is shifted. */
function smoothed(xs, ys, width) {
  const pass = order => {
    let sum = 0, weight = 0, before = null;
    const result = new Map();
    for (const i of order) {
      if (ys[i] == null) continue;
      const keep = before == null ? 0 : Math.exp(-Math.abs(xs[i] - before) / width);
      sum = sum * keep + ys[i]; weight = weight * keep + 1; before = xs[i];
      result.set(i, [sum, weight]);
    }
    return result;
  };
  const order = ys.map((_, i) => i), forward = pass(order), backward = pass(order.slice().reverse());
  return ys.map((y, i) => y == null ? null : (forward.get(i)[0] + backward.get(i)[0] - y) / (forward.get(i)[1] + backward.get(i)[1] - 1));
}

// ---- what is drawn

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shownRuns = () => report.runs.map((run, number) => ({ run, number })).filter(one => !state.runs.has(one.run.name));
const runColour = number => `--c${number % COLOURS}`;
const plainName = name => name.replace(/^(train|runtime|tasks|validation)\//, "").replace(/_seconds$/, "").replaceAll("_", " ");

function charts() {
  const names = [...new Set(report.runs.flatMap(run => Object.keys(run.curves)))], single = report.runs.length === 1;
  const left = new Set(names), found = [];
  const take = test => names.filter(name => left.has(name) && test(name) && left.delete(name));
  const line = (name, smooth, more = {}) => ({ name, smooth, label: plainName(name), colour: null, ...more });
  const losses = take(name => name === LOSS || name === HELD_OUT);
  if (losses.length) {
    const lines = losses.map(name => name === LOSS ? line(name, true, { label: "training" })
      : line(name, false, { label: "validation", points: true, dash: [6, 4], colour: single ? "--c1" : null }));
    found.push({ key: "loss", title: "Loss", wide: true, lines, aside: losses.includes(LOSS) });
  }
  take(name => [PERPLEXITY, "train/tokens", "train/samples", "runtime/samples_per_sec"].includes(name));  // what others show already
  const add = (title, members, smooth, rest) => {
    if (single && members.length <= COLOURS) {
      const lines = members.map((name, number) => line(name, smooth, { colour: `--c${number}` }));
      if (lines.length) found.push({ key: title, title, lines, rest });
    } else for (const name of members) {
      const own = members.length > 1 ? `${title}: ${plainName(name)}` : title;
      found.push({ key: own, title: own, lines: [line(name, smooth)], rest });
    }
  };
  for (const [title, pattern, smooth] of GROUPS) add(title, take(name => pattern.test(name)), smooth, false);
  const kin = new Map();  // the same metric of many layers
  for (const name of left) kin.set(name.replace(/\d+/g, "*"), [...(kin.get(name.replace(/\d+/g, "*")) ?? []), name]);
  for (const [pattern, members] of kin) {
    if (members.length === 1 || !single) { for (const name of members) add(name, [name], true, true); continue; }
    const lines = members.map((name, number) => line(name, true, { colour: `--c${number % COLOURS}` }));
    found.push({ key: pattern, title: pattern, lines, rest: true, crowded: members.length > COLOURS });
  }
  return found;
}

/** The lines of a chart with their points: { label, xs, ys, stroke, width, dash, points, raw }. */
function curves(chart) {
  const several = report.runs.length > 1, width = (fullRange()[1] - fullRange()[0]) * state.smoothing / 100, found = [];
  const add = (run, steps, values, look) => {
    let xs = placed(run, steps), ys = values;
    if (state.logY) ys = ys.map(y => y > 0 ? y : null);
    if (state.logX) { const kept = xs.map(x => x > 0); ys = ys.filter((_, i) => kept[i]); xs = xs.filter((_, i) => kept[i]); }
    if (look.smooth) ys = smoothed(xs, ys, width);
    found.push({ ...look, xs, ys });
  };
  for (const { run, number } of shownRuns()) {
    for (const one of chart.lines) {
      const curve = run.curves[one.name];
      if (!curve) continue;
      const stroke = colour(one.colour ?? runColour(number));
      const label = several ? (chart.lines.length > 1 ? `${run.name}, ${one.label}` : run.name) : one.label;
      const look = { label, stroke, width: 1.6, dash: one.dash, points: one.points || curve.steps.length < 3 };
      if (!(one.smooth && width > 0)) { add(run, curve.steps, curve.values, look); continue; }
      add(run, curve.steps, curve.values, { ...look, stroke: stroke + "50", width: 1, raw: true });
      const means = curve.means ?? curve;
      add(run, means.steps, means.values, { ...look, width: 2, smooth: true });
    }
    for (const gone of chart.aside ? run.aside : []) {
      const label = several ? `${run.name}, set aside` : "set aside";
      const first = !found.some(line => line.label === label);
      add(run, gone.steps, gone.values, { label, stroke: colour(runColour(number)) + "90", width: 1, dash: [2, 3], points: gone.steps.length < 3, raw: !first });
    }
  }
  return found;
}

function fullRange() {
  let low = Infinity, high = -Infinity;
  for (const { run } of shownRuns()) {
    const ends = placed(run, [run.axes.steps[0] ?? 0, run.axes.steps.at(-1) ?? 1]);
    low = Math.min(low, ends[0]); high = Math.max(high, ends[1]);
  }
  if (!(low <= high)) return [0, 1];
  if (!state.logX) low = Math.min(low, low <= high / 10 ? 0 : low);
  else low = Math.max(low, high / 1e9);
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}

function visibleMarks() {
  return shownRuns().flatMap(({ run }) => run.marks.filter(mark => mark.kind in KINDS && !state.kinds.has(mark.kind))
    .map(mark => ({ ...mark, run, x: placed(run, [mark.step])[0] })));
}

// ---- one chart

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (high / low < 2) {  // as on a linear axis
    const step = 10 ** Math.floor(Math.log10((high - low) / 3)), size = [1, 2, 5, 10].map(m => m * step).find(s => (high - low) / s <= 6);
    return Array.from({ length: Math.floor(high / size) - Math.ceil(low / size) + 1 }, (_, i) => Number(((Math.ceil(low / size) + i) * size).toPrecision(12)));
  }
  const ticks = [], each = decades < 1 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : decades < 3 ? [1, 2, 5] : [1], skip = Math.ceil(decades / 8);
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % skip === 0) for (const m of each) { const tick = Number(`${m}e${power}`); if (tick >= low && tick <= high) ticks.push(tick); }
  }
  return ticks;
}

const yRange = (_, low, high) => {
  if (low == null || !isFinite(low)) return state.logY ? [1, 10] : [0, 1];
  if (state.logY) return [low / 1.04, high * 1.04];
  return low === high ? [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1] : uPlot.rangeNum(low, high, 0.08, true);
};

function drawMarks(u) {
  const { ctx, bbox } = u, ratio = devicePixelRatio || 1, [low, high] = [u.scales.x.min, u.scales.x.max];
  ctx.save();
  ctx.font = `bold ${9 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  ctx.lineWidth = ratio;
  const drawn = new Map(), lettered = [];  // where there are marks and letters already
  for (const mark of u.marks) {
    if (!(mark.x >= low && mark.x <= high)) continue;
    const x = Math.round(u.valToPos(mark.x, "x", true)), [letter, name] = KINDS[mark.kind], routine = mark.kind === "checkpoint";
    if (drawn.get(mark.kind) === x) continue;
    drawn.set(mark.kind, x);
    ctx.strokeStyle = ctx.fillStyle = colour(name);
    ctx.setLineDash(routine ? [] : [5 * ratio, 3 * ratio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top - (routine ? 6 * ratio : 0));
    ctx.lineTo(x, bbox.top + (routine ? 0 : bbox.height));
    ctx.stroke();
    if (routine || lettered.some(other => Math.abs(other - x) < 8 * ratio)) continue;
    ctx.fillText(letter, x, bbox.top - 5 * ratio);
    lettered.push(x);
  }
  ctx.restore();
}

function tellMarks(u, near) {
  const left = u.cursor.left;
  const close = left < 0 ? [] : u.marks.filter(mark => Math.abs(u.valToPos(mark.x, "x") - left) < 7);
  near.textContent = close.slice(0, 3).map(mark =>
    `${report.runs.length > 1 ? `${mark.run.name}: ` : ""}${mark.kind.replaceAll("_", " ")} at step ${mark.step.toLocaleString("en")}: ${mark.text}`).join(" · ")
    + (close.length > 3 ? ` · and ${close.length - 3} more` : "");
}

function draw(card) {
  const lines = curves(card.chart), several = lines.length > 1;
  card.drawn?.destroy();
  card.drawn = null;
  card.lines = lines;
  if (!lines.length) return;
  const soft = colour("--soft"), grid = { stroke: colour("--line"), width: 1 }, font = "11px system-ui, sans-serif";
  const axis = { stroke: soft, grid, ticks: { ...grid, size: 4 }, font };
  const log = isLog => isLog ? { splits: (_, __, low, high) => logTicks(low, high), filter: (_, splits) => splits } : {};
  const data = uPlot.join(lines.map(line => [line.xs, line.ys]), lines.map(() => [1, 1]));
  const [low, high] = state.range ?? fullRange();
  card.drawn = new uPlot({
    width: Math.max(200, card.plot.clientWidth), height: (card.chart.wide ? 300 : 210) * (document.documentElement.classList.contains("printing") ? 0.75 : 1), padding: [16, 24, 0, 0],
    scales: { x: { time: false, distr: state.logX ? 3 : 1, range: () => state.range ?? [low, high] }, y: { distr: state.logY ? 3 : 1, range: yRange } },
    axes: [
      { ...axis, ...log(state.logX), size: 28, space: 70, values: (_, splits) => splits.map(onAxis) },
      { ...axis, ...log(state.logY), size: 54, values: (_, splits) => splits.map(value => short(value)) },
    ],
    series: [
      { label: AXES[state.axis].replace(/s$/, ""), value: (_, value) => onAxis(value) },
      ...lines.map(line => ({
        label: line.label, stroke: line.stroke, width: line.width, dash: line.dash, class: line.raw ? "raw" : null,
        points: { show: Boolean(line.points), size: 5, fill: line.stroke }, value: (_, value) => short(value, 5),
      })),
    ],
    legend: { show: !card.chart.crowded },
    // A line without a value at the point nearest to the mouse shows its own nearest one, unless that is another place.
    cursor: { hover: { prox: (u, line, at) => u.data[line][at] == null ? 30 : Infinity, skip: [undefined] }, sync: { key: "deepy", setSeries: false, scales: ["x", null] }, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => { zoom(null); } } },
    hooks: {
      draw: [drawMarks],
      setCursor: [u => tellMarks(u, card.near)],
      setSelect: [u => {
        if (u.select.width < 4) return;
        const range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        zoom(range);
      }],
      init: [u => { u.marks = visibleMarks(); }],
    },
  }, data, card.plot);
  // Legends turn lines on and off: with the keyboard as well.
  card.plot.querySelectorAll(".u-series:not(:first-child) th").forEach(label => {
    Object.assign(label, { tabIndex: several ? 0 : -1, title: several ? "Show or hide" : "" });
    label.setAttribute("role", "button");
    label.setAttribute("aria-pressed", "true");
    label.addEventListener("click", () => label.setAttribute("aria-pressed", String(!label.parentElement.classList.contains("u-off"))));
    label.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault(); event.stopPropagation();
      label.click();
    });
  });
  card.plot.setAttribute("aria-label", described(card));
}

function described(card) {
  const parts = card.lines.filter(line => !line.raw).slice(0, 6).map(line => {
    const ys = line.ys.filter(y => y != null);
    return ys.length ? `${line.label}: from ${short(ys[0])} to ${short(ys.at(-1))}, lowest ${short(ys.reduce((a, b) => Math.min(a, b)))}, highest ${short(ys.reduce((a, b) => Math.max(a, b)))}` : `${line.label}: no value`;
  });
  return `${card.chart.title} over ${AXES[state.axis]}. ${parts.join(". ")}.`;
}

/** Move the cursor of a chart by points, and say what is there. */
function step(card, direction) {
  const u = card.drawn, [xs] = u.data, { min, max } = u.scales.x;
  const from = u.cursor.left >= 0 && u.cursor.idx != null ? u.cursor.idx + direction : direction > 0 ? xs.findIndex(x => x >= min) : xs.findLastIndex(x => x <= max);
  const place = Math.min(xs.length - 1, Math.max(0, from));
  u.setCursor({ left: u.valToPos(Math.min(max, Math.max(min, xs[place])), "x"), top: u.over.clientHeight / 2 });
  const values = card.lines.map((line, i) => line.raw || u.data[i + 1][place] == null ? null : `${line.label} ${short(u.data[i + 1][place])}`);
  byId("spoken").textContent = [`${AXES[state.axis]} ${onAxis(xs[place])}`, ...values.filter(Boolean), card.near.textContent].join(", ");
}

function zoom(range) {
  const [low, high] = fullRange();
  if (range) range = [Math.max(low, range[0]), Math.min(high, range[1])];
  state.range = range && range[1] > range[0] && (range[0] > low || range[1] < high) ? range : null;
  const [min, max] = state.range ?? [low, high];
  for (const card of cards.values()) card.drawn?.setScale("x", { min, max });
}

/** factor: of the length of what is seen; shift: in parts of it. In logarithms where the axis is logarithmic. */
function move(factor, shift) {
  const [from, to] = state.logX ? [Math.log, Math.exp] : [x => x, x => x];
  const [low, high] = (state.range ?? fullRange()).map(from), [first, last] = fullRange().map(from);
  const length = Math.min(last - first, (high - low) * factor), middle = (low + high) / 2 + shift * (high - low);
  const start = Math.min(last - length, Math.max(first, middle - length / 2));
  zoom([to(start), to(start + length)]);
}

function press(card, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !card.drawn) return;
  const act = {
    ArrowLeft: () => step(card, -1), ArrowRight: () => step(card, 1), "+": () => move(0.5, 0), "=": () => move(0.5, 0),
    "-": () => move(2, 0), "0": () => zoom(null), Escape: () => zoom(null), PageUp: () => move(1, -0.5), PageDown: () => move(1, 0.5),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
}

// ---- the page

function showCharts() {
  const wanted = charts(), grid = byId("grid"), rest = wanted.filter(chart => chart.rest);
  for (const [key, card] of cards) if (!wanted.some(chart => chart.key === key)) { card.drawn?.destroy(); card.element.remove(); cards.delete(key); }
  for (const chart of wanted) {
    let card = cards.get(chart.key);
    if (!card) {
      const heading = made("h2", {}, chart.title), plot = made("div", { className: "plot", tabIndex: 0, role: "group" }), near = made("p", { className: "near" });
      card = { plot, near, element: made("div", { className: "card" + (chart.wide ? " wide" : "") }, heading, plot, near) };
      plot.addEventListener("keydown", event => press(card, event));
      cards.set(chart.key, card);
    }
    card.chart = chart;
    const place = chart.rest ? byId("rest") : grid;
    if (card.element.parentElement !== place) place.append(card.element);
  }
  const more = byId("more");
  more.hidden = !rest.length;
  more.querySelector("summary").textContent = `${rest.length} more ${rest.length === 1 ? "chart" : "charts"}`;
  redraw();
}

function redraw() {
  for (const card of cards.values()) if (!card.chart.rest || byId("more").open) draw(card);
}

function showControls() {
  const known = Object.keys(AXES).filter(axis => report.runs.every(run => run.axes[axis]));
  if (!known.includes(state.axis)) state.axis = "steps";
  byId("axis").replaceChildren(...known.map(axis => made("option", { value: axis, selected: axis === state.axis }, AXES[axis])));
  byId("width").textContent = state.smoothing ? `${state.smoothing}%` : "off";
  const chip = (name, label, hidden, swatch) => {
    const box = made("input", { type: "checkbox", checked: !hidden.has(name) });
    box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](name); redraw(); });
    return made("label", {}, box, swatch, label);
  };
  const swatch = (name, text) => { const one = made("span", { className: "swatch", "aria-hidden": "true" }, text); one.style.background = `var(${name})`; return one; };
  const runs = report.runs.length < 2 ? [] : report.runs.map((run, number) => chip(run.name, run.name, state.runs, swatch(runColour(number), "")));
  byId("runs").replaceChildren(byId("runs").firstElementChild, ...runs);
  const counts = new Map();
  for (const mark of report.runs.flatMap(run => run.marks)) if (mark.kind in KINDS) counts.set(mark.kind, (counts.get(mark.kind) ?? 0) + 1);
  const kinds = [...counts].map(([kind, count]) => chip(kind, `${kind.replaceAll("_", " ")} ${count}`, state.kinds, swatch(KINDS[kind][1], KINDS[kind][0])));
  byId("kinds").replaceChildren(byId("kinds").firstElementChild, ...kinds);
}

function showTexts() {
  const several = report.runs.length > 1;
  byId("made").textContent = LIVE ? `Live; as of ${report.made}` : `As of ${report.made}`;
  const notes = report.runs.flatMap(run => run.notes.map(note => made("p", { className: "note bad" }, several ? `${run.name}: ${note}` : note)));
  const thin = report.runs.filter(run => run.thinned).map(run => made("p", { className: "note" },
    `${several ? `${run.name}: ` : ""}${run.rows.toLocaleString("en")} steps with metrics; curves show the smallest and the largest value of each stretch.`));
  const left = report.left_out.length ? [made("p", { className: "note" }, `No room for ${report.left_out_count} metrics: ${report.left_out.join(", ")}`)] : [];
  const tiles = ([row]) => [made("dl", { className: "tiles" }, ...report.overview.header.slice(1).map((name, place) => made("div", { className: row[place + 1].length > 16 ? "long" : "" }, made("dt", {}, name), made("dd", {}, row[place + 1]))))];
  const overview = several ? table(report.overview, "The runs side by side", false, true) : tiles(report.overview.rows);
  byId("overview").replaceChildren(made("div", { className: "card" }, ...overview, ...thin, ...left, ...notes));
  const parts = [];
  if (report.difference) parts.push(made("section", { className: "card long" }, made("h2", {}, "Differences of the configurations"), ...table(report.difference, "Differences of the configurations", true)));
  for (const run of report.runs) {
    const inside = [], key = part => `${run.name} ${part}`;
    if (run.evaluations) inside.push(folded(key("evaluations"), "Evaluations", () => table(run.evaluations, `Evaluations of ${run.name}`, true), !several));
    if (run.samples.length) inside.push(folded(key("samples"), "Samples", () => samples(run), !several));
    if (run.events.rows.length) inside.push(folded(key("events"), `Events (${run.events.rows.length})`, () => table(run.events, `Events of ${run.name}`, true, true), !several));
    if (run.starts) inside.push(folded(key("starts"), "Starts", () => table(run.starts, `Starts of ${run.name}`, true, true)));
    if (run.configuration) inside.push(folded(key("configuration"), "Configuration", () => [
      ...table(run.configuration, `Configuration of ${run.name}`, true),
      ...Object.entries(run.config_files).flatMap(([name, text]) => [made("h3", {}, name), made("pre", {}, text)])]));
    parts.push(made("section", { className: "card long" }, made("h2", {}, run.name), made("p", { className: "note" }, run.folder), ...inside));
  }
  byId("details").replaceChildren(...parts);
}

function samples(run) {
  const steps = [...new Set(run.samples.map(one => one.step))].reverse();
  const found = steps.map((step, number) => folded(`${run.name} sample ${step}`, `Step ${step.toLocaleString("en")}`, () =>
    run.samples.filter(one => one.step === step).map(one => made("p", { className: "text" }, made("span", { className: "prompt" }, one.prompt), one.text)), number === 0));
  return run.samples_left_out ? [...found, made("p", { className: "note" }, `${run.samples_left_out.toLocaleString("en")} more are in samples.jsonl.`)] : found;
}

function show() { showControls(); showTexts(); showCharts(); }

const grid = made("div", { id: "grid", className: "grid" });
const more = made("details", { id: "more", className: "card" }, made("summary", {}), made("div", { id: "rest", className: "grid" }));
byId("charts").append(grid, more);
more.addEventListener("toggle", redraw);
byId("controls").addEventListener("submit", event => event.preventDefault());
byId("axis").addEventListener("change", () => { state.axis = byId("axis").value; state.range = null; redraw(); });
byId("smoothing").addEventListener("input", () => { state.smoothing = Number(byId("smoothing").value); showControls(); redraw(); });
for (const [id, name] of [["log-y", "logY"], ["log-x", "logX"]]) byId(id).addEventListener("change", () => { state[name] = byId(id).checked; state.range = null; redraw(); });
for (const [id, act] of [["closer", () => move(0.5, 0)], ["farther", () => move(2, 0)], ["earlier", () => move(1, -0.5)], ["later", () => move(1, 0.5)], ["all", () => zoom(null)]]) byId(id).addEventListener("click", act);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = 0;
new ResizeObserver(() => { if (grid.clientWidth !== width) { width = grid.clientWidth; requestAnimationFrame(redraw); } }).observe(grid);
const printing = on => { document.documentElement.classList.toggle("printing", on); redraw(); };
addEventListener("beforeprint", () => printing(true));
addEventListener("afterprint", () => printing(false));
show();

if (LIVE) {
  let version = null;
  const ask = async () => {
    try {
      const answer = await fetch("data", { headers: version ? { "If-None-Match": version } : {} });
      if (answer.status === 200) { version = answer.headers.get("ETag"); report = await answer.json(); show(); }
      else if (answer.status !== 304) byId("made").textContent = `As of ${report.made}; the server answers ${answer.status}: ${await answer.text()}`;
    } catch { byId("made").textContent = `As of ${report.made}; the server does not answer`; }
    setTimeout(ask, 2000);
  };
  setTimeout(ask, 1000);
}
