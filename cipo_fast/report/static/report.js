/* The report's page. Data comes as JSON and reaches the page as text nodes alone: nothing of it is ever parsed as HTML. */
"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const $ = (id) => document.getElementById(id);

/* ------------------------------------------------------------------------------------------------------ small parts */

// Control, format and separator characters, and halves of a character: what hides, or turns the text around.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

function visible(text) {
  return String(text).replace(UNSEEN, (c) => {
    const code = c.codePointAt(0);
    if (c === "\n" || c === "\t") return c;
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return code === 127 ? "\u2421" : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

// el("p", {class: "hint"}, "text", node): strings become text nodes.
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const button = (text, onclick, props = {}) => el("button", {type: "button", ...props, onclick}, text);
const share = (v) => (v === null || v === undefined ? "–" : v.toFixed(3).replace("-", "\u2212"));
const signed = (v) => (v === null || v === undefined ? "–" : (v >= 0 ? "+" : "\u2212") + Math.abs(v).toFixed(3));
const range = (low, high, form = share) => (low === null || low === undefined ? "" : `${form(low)} to ${form(high)}`);
const percent = (v) => (v === null || v === undefined ? "–" : `${(100 * v).toFixed(1)}%`);
const count = (v) => (v === null || v === undefined ? "–" : Math.round(v).toLocaleString("en"));

function short(v) {
  if (v === null || v === undefined) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) { const scale = unit === 1e4 ? 1e3 : unit; return `${+(v / scale).toPrecision(3)}${name}`; }
  }
  return size < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(3));
}

function duration(s) {
  if (s === null || s === undefined) return "–";
  if (s < 90) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  if (s < 5400) return `${(s / 60).toFixed(1)} min`;
  return `${(s / 3600).toFixed(1)} h`;
}

function table(head, rows, numeric = 1) {
  const cell = (tag, value, i) => el(tag, {class: i >= numeric ? "n" : null, scope: tag === "th" ? (i ? "col" : "row") : null},
    ...(Array.isArray(value) ? value : [value]));
  return el("div", {class: "scroll"}, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((h, i) => el("th", {class: i >= numeric ? "n" : null, scope: "col"}, h)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((v, i) => cell(i ? "td" : "th", v, i)))))));
}

function save(name, blob) {
  const link = el("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/* A long text is laid out a piece at a time, the next when its end comes near: 100,000 tokens cost what is looked at. */
function filled(box, chunks) {
  const next = chunks[Symbol.iterator]();
  const end = el("span", {});
  const add = () => {
    const {value, done} = next.next();
    if (done) { watch.disconnect(); end.remove(); return; }
    end.before(...value);
    watch.unobserve(end); // so that an end that is still in sight is told of again
    watch.observe(end);
  };
  const watch = new IntersectionObserver((found) => found.some((f) => f.isIntersecting) && add(), {root: box, rootMargin: "200px"});
  box.append(end);
  add();
  return box;
}

function* plainChunks(text, size = 8000) {
  for (let at = 0; at < text.length;) {
    let end = Math.min(at + size, text.length);
    if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end += 1; // not between halves of a character
    yield [document.createTextNode(visible(text.slice(at, end)))];
    at = end;
  }
}

/* -------------------------------------------------------------------------------------------------------- overview */

const NAMES = {
  greedy: "accuracy, greedy", t1: "accuracy, one answer (T=1)", wrong_to_right: "wrong attempts corrected",
  right_to_wrong: "right attempts broken", after_check_1: "accuracy after a check", after_check_2: "accuracy after two checks",
  after_check_3: "accuracy after three checks", check_gain: "gain by a check", correction_gap: "correction gap, over a fresh retry",
  verbatim_copies: "checks that repeat the answer", not_shown: "checks with nothing to show", truncated: "cut off",
  unparsable: "no answer found", timeout: "out of time", answers: "answers judged", failed: "answers not judged",
};
const FIRST = ["t1", "greedy", "pass", "after_check_1", "after_check_2", "after_check_3", "wrong_to_right", "right_to_wrong", "correction_gap"];

function nameOf(figure) {
  const k = /^(pass|all|maj)_at_(\d+)$/.exec(figure);
  if (k) return {pass: "pass@", all: "pass^", maj: "maj@"}[k[1]] + k[2];
  const round = /^(.*)_(\d)$/.exec(figure);
  return NAMES[figure] || (round && NAMES[round[1]] ? `${NAMES[round[1]]}, round ${round[2]}` : figure);
}

const ends = (run) => [run.evaluations[0], run.evaluations.length > 1 ? run.evaluations.at(-1) : undefined];
const largestPass = (names) => names.filter((n) => n.startsWith("pass_at_")).sort((a, b) => a.slice(8) - b.slice(8)).at(-1);

function overview() {
  const title = RUNS.length === 1 ? RUNS[0].name : RUNS.length <= 4 ? RUNS.map((r) => r.name).join(", ") : `${RUNS.length} runs`;
  document.title = `${visible(title)} · cipo_fast`;
  $("title").textContent = visible(title);
  const about = $("about");
  if (RUNS.length === 1) about.append(tiles(RUNS[0]));
  const figures = figuresTable();
  if (figures) about.append(el("h3", {}, "Held-out problems, before and after"), ...figures);
  about.append(...otherEvaluations());
  if (RUNS.length === 1) { about.append(runAbout(RUNS[0])); return; }
  about.append(...differing());
  for (const run of RUNS) about.append(el("details", {}, el("summary", {}, visible(run.name),
    ...(run.alarms.length ? [el("span", {class: "down"}, `  ⚠ ${run.alarms.map((a) => visible(a.name)).join(", ")}`)] : [])), runAbout(run)));
}

// Of several runs, the settings in which they differ, and what each took.
function differing() {
  const defaults = new Map(RUNS.flatMap((run) => run.settings.map(([key, , standard]) => [key, standard])));
  const of = (run, key) => run.settings.find(([k]) => k === key)?.[1] ?? defaults.get(key);
  const keys = [...defaults.keys()].filter((key) => new Set(RUNS.map((run) => of(run, key))).size > 1);
  const costs = [["tokens sampled", (c) => short(c.sampled)], ["tokens trained", (c) => short(c.forwarded)], ["saved by sharing", (c) => percent(c.saved)], ["training", (c) => duration(c.seconds)]];
  return [el("h3", {}, "What they took, and the settings in which they differ"), table(["", ...RUNS.map((run) => visible(run.name))], [
    ...costs.map(([name, form]) => [name, ...RUNS.map((run) => form(run.cost))]),
    ...keys.map((key) => [el("code", {}, visible(key)), ...RUNS.map((run) => visible(of(run, key)))]),
  ])];
}

function tiles(run) {
  const [before, after] = ends(run);
  const of = (point, name) => point?.figures[name]?.[0];
  const found = [];
  const tile = (label, value, more) => found.push(el("div", {class: "tile"}, el("div", {class: "label"}, label), value, el("div", {class: "more"}, more)));
  const names = Object.keys(before?.figures || {});
  const named = {t1: "one answer (T=1)", after_check_1: "after a check", wrong_to_right: "wrong, corrected", right_to_wrong: "right, broken"};
  for (const name of Object.keys(named).filter((n) => names.includes(n))) {
    const [b, a] = [of(before, name), of(after, name)];
    const value = el("div", {class: "value"}, el("span", {class: "from"}, after ? `${share(b)} → ` : ""), share(after ? a : b));
    const change = run.changes[name];
    tile(named[name], value, change ? range(change[1], change[2], signed) : "");
  }
  const c = run.cost;
  if (c.saved !== null) tile("saved by sharing", el("div", {class: "value"}, percent(c.saved)), `${short(c.forwarded)} of ${short(c.rows)} tokens`);
  if (c.seconds) tile("training", el("div", {class: "value"}, duration(c.seconds)), `${short(c.sampled)} tokens sampled`);
  return el("div", {class: "tiles"}, ...found);
}

const cell = (figure) => (figure ? [share(figure[0]), el("span", {class: "range"}, range(figure[1], figure[2]))] : "–");
const namesIn = (evaluations) => [...new Set(evaluations.flatMap((e) => Object.keys(e.figures)))];
const firstOf = (all) => FIRST.map((n) => (n === "pass" ? largestPass(all) : n)).filter((n) => all.includes(n));

// What `python -m cipo_fast.evaluate` has left in the runs' folders.
function otherEvaluations() {
  const found = RUNS.flatMap((run) => run.others.map((e) => ({...e, name: RUNS.length > 1 ? `${run.name}: ${e.name}` : e.name})));
  if (!found.length) return [];
  const names = firstOf(namesIn(found));
  return [el("h3", {}, "Evaluated since"), table(["", ...names.map(nameOf)], found.map((e) => [visible(e.name), ...names.map((n) => cell(e.figures[n]))]))];
}

function figuresTable() {
  const shown = RUNS.filter((run) => run.evaluations.length);
  if (!shown.length) return null;
  const all = namesIn(shown.flatMap((run) => run.evaluations));
  const first = firstOf(all);
  const change = (f) => (f ? [signed(f[0]), el("span", {class: "range"}, range(f[1], f[2], signed))] : "–");
  const several = shown.length > 1;
  const head = ["", ...shown.flatMap((run) => {
    const [before, after] = ends(run);
    return [before.step ? `step ${before.step}` : "before", after ? `step ${after.step}` : "after", "change"];
  })];
  const grouped = (found) => {
    if (!several) return found;
    found.firstChild.className = "several";
    found.querySelector("thead").prepend(el("tr", {}, el("th", {}), ...shown.map((run) => el("th", {colspan: "3", scope: "colgroup", class: "of"}, visible(run.name)))));
    return found;
  };
  const row = (n) => [nameOf(n), ...shown.flatMap((run) => {
    const [before, after] = ends(run);
    return [cell(before.figures[n]), cell(after?.figures[n]), change(run.changes[n])];
  })];
  const rest = all.filter((n) => !first.includes(n));
  return [
    grouped(table(head, first.map(row))),
    el("details", {}, el("summary", {}, `${rest.length} more figures`), grouped(table(head, rest.map(row)))),
    el("p", {class: "hint"}, "Small: 95% intervals, bootstrap over problems; those of changes are paired. docs/evaluation.md says what each figure is."),
  ];
}

function runAbout(run) {
  const pair = ([k, v]) => [el("dt", {}, k), el("dd", {}, visible(v))];
  const c = run.cost;
  const what = el("div", {}, el("h3", {}, "What ran"), el("dl", {}, ...run.about.flatMap(pair), ...pair(["folder", run.folder])));
  const costs = el("div", {}, el("h3", {}, "What it took"), el("dl", {}, ...[
    ["sampled", `${count(c.sampled)} tokens`],
    ["trained", `${count(c.forwarded)} tokens, ${percent(c.saved)} saved by sharing (${count(c.rows)} in rows)`],
    ["FLOPs", `${short(c.flops)}, sampling and training`], ["time", `${duration(c.seconds)} of training`],
    ...(c.skipped ? [["skipped", `${count(c.skipped)} updates that were not finite`]] : []),
  ].flatMap(pair)), phases(run));
  const alarms = [el("h3", {}, "Alarms"), ...(run.alarms.length ? run.alarms.map(alarm) : [el("p", {class: "muted"}, "None fired.")])];
  const settings = el("div", {}, el("h3", {}, "Settings that are not the defaults"), run.settings.length
    ? table(["setting", "here", "default"], run.settings.map(([k, v, d]) => [el("code", {}, visible(k)), visible(v), el("span", {class: "muted"}, visible(d))]), 9)
    : el("p", {class: "muted"}, "none"), ...alarms);
  const notes = run.skipped.length ? [el("div", {}, el("h3", {}, "Files that could not be read"), el("ul", {class: "notes"}, ...run.skipped.map((s) => el("li", {}, visible(s)))))] : [];
  return el("div", {class: "columns"}, what, costs, settings, ...notes);
}

function alarm(a) {
  const when = a.steps === 1 ? `at step ${a.first}` : `in ${a.steps} steps, ${a.first} to ${a.last}`;
  return el("div", {class: "alarm"}, el("strong", {}, `⚠ ${visible(a.name)} `), when,
    ...(a.causes.length ? [el("ol", {}, ...a.causes.map((cause) => el("li", {}, visible(cause))))] : []));
}

function phases(run) {
  const total = run.phases.reduce((sum, [, s]) => sum + s, 0);
  if (!total) return "";
  const colours = palette();
  const rows = run.phases.map(([phase, s], i) => [[el("span", {class: "swatch", style: `background:${colours[i % colours.length]}`}), phase], duration(s), percent(s / total)]);
  return el("div", {}, el("h3", {}, "Seconds by phase"),
    el("div", {class: "strip", "aria-hidden": "true"}, ...run.phases.map(([, s], i) => el("span", {style: `background:${colours[i % colours.length]};flex:${s / total} 0 0`}))),
    table(["phase", "time", "share"], rows));
}

/* ---------------------------------------------------------------------------------------------------------- curves */

const both = (key) => ({[`rollout/${key}`]: "rollouts", [`correction/${key}`]: "corrections"});
const all = (key) => ({[`rollout/all_${key}|rollout/${key}`]: "rollouts", [`correction/all_${key}|correction/${key}`]: "corrections"});
const CHARTS = [
  ["Accuracy"],
  {title: "Held-out accuracy", figures: {t1: "one answer (T=1)", greedy: "greedy", after_check_1: "after a check"}},
  {title: "Held-out pass@k", figures: "pass"},
  {title: "Accuracy of rollouts", keys: {"rollout/accuracy": "rollouts"}},
  {title: "Verdicts", unit: "share of answers", keys: {"verify/right": "right", "verify/wrong": "wrong", "verify/unparsable": "unparsable", "verify/timeout": "timeout"}},
  ["Corrections"],
  {title: "Correction flow", keys: {"correction/wrong_to_right": "wrong > right", "correction/right_to_wrong": "right > wrong", "correction/retention": "retention"}},
  {title: "Held-out correction flow", figures: {wrong_to_right: "wrong > right", right_to_wrong: "right > wrong", correction_gap: "gap"}},
  {title: "Replay controller", keys: {"replay/rho": "rho", "replay/retention": "retention, smoothed", "replay/target": "target"}},
  {title: "Anchors had and wanted", keys: {"anchors/right": "right", "anchors/wrong": "wrong", "anchors/right_wanted": "right, wanted", "anchors/wrong_wanted": "wrong, wanted"}, pairs: 2},
  {title: "Correction gap and copies", keys: {"correction/gap": "gap over a retry", "correction/verbatim_copy": "verbatim copies"}},
  ["Policy"],
  {title: "Entropy", unit: "nats a token", keys: all("entropy")},
  {title: "Length", unit: "tokens", keys: both("length")},
  {title: "Truncated", unit: "share", keys: both("truncated")},
  {title: "Groups without variance", unit: "share", keys: both("no_variance")},
  ["Optimisation"],
  {title: "Largest ratio", keys: both("ratio_max")},
  {title: "Clipped", unit: "share of tokens", keys: both("clip_fraction")},
  {title: "KL to the sampling policy", unit: "nats a token", keys: both("approx_kl")},
  {title: "Trainer–engine gap", unit: "mean |difference| of log-probs", keys: both("sampler_gap"), log: true},
  {title: "Gradient norm", keys: {"grad/norm": "norm"}},
  {title: "Loss", keys: {"loss/total": "loss"}},
  ["Speed"],
  {title: "Step time by phase", unit: "seconds", keys: {"time/step_s": "step", "time/generate_s": "generate", "time/train_s": "train", "time/verify_s": "verify", "time/old_logp_s": "old log-probs", "time/sync_s": "sync", "time/probe_s": "probe", "time/idle_s": "idle"}},
  {title: "Tokens a second", keys: {"rate/sampled": "sampled, while generating", "rate/trained": "trained, while training", "rate/all": "sampled, over the step"}},
  {title: "Tokens saved by sharing", unit: "share", keys: {"tokens/saved": "saved"}},
];
const view = {x: "step", smoothing: 0, log: false};
const plots = [];

const printed = matchMedia("print");
const dark = () => !printed.matches && (document.documentElement.dataset.theme === "dark"
  || (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches));
// Okabe and Ito's colours, told apart by colour-blind readers; lighter ones where the paper is dark.
const palette = () => (dark()
  ? ["#56B4E9", "#E69F00", "#2FBF9B", "#DE8FBE", "#F0E442", "#FF8A4C", "#B9C2CB", "#7E9BFF"]
  : ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B27B00", "#56B4E9", "#333333", "#7048B6"]);
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [12, 4]];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Where a run has a series: {x, y, low, high}, or null. `key` may name several, the first one that is there counts.
function ofRun(run, key) {
  const {series} = run.curves;
  const found = key.split("|").find((k) => series[k]);
  return found ? {step: run.curves.step, x: run.curves[view.x], y: series[found]} : null;
}
function ofEvaluations(run, figure) {
  const points = run.evaluations.filter((p) => p.figures[figure]);
  if (!points.length) return null;
  const get = (i) => points.map((p) => p.figures[figure][i]);
  return {step: points.map((p) => p.step), x: points.map((p) => p[view.x]), y: get(0), low: get(1), high: get(2), points: true};
}

// An arm's runs as one: the mean where all of them are, and the band from the lowest to the highest.
function merged(parts) {
  if (parts.length === 1) return parts[0];
  const at = parts.map((p) => new Map(p.step.map((s, i) => [s, i])));
  const steps = parts[0].step.filter((s) => at.every((m) => m.has(s)));
  const rows = steps.map((s) => {
    const values = parts.map((p, i) => p.y[at[i].get(s)]).filter((v) => v !== null);
    const xs = parts.map((p, i) => p.x[at[i].get(s)]);
    const mean = (v) => (v.length ? v.reduce((a, b) => a + b, 0) / v.length : null);
    return [mean(xs), mean(values), values.length ? Math.min(...values) : null, values.length ? Math.max(...values) : null];
  });
  const column = (i) => rows.map((r) => r[i]);
  return {step: steps, x: column(0), y: column(1), low: column(2), high: column(3), points: parts[0].points};
}

function smoothed(values, a) {
  if (!a || !values) return values;
  let sum = 0, weight = 0; // an exponential mean that knows how little it has seen at first
  return values.map((v) => {
    if (v === null) return null;
    sum = a * sum + (1 - a) * v;
    weight = a * weight + 1 - a;
    return sum / weight;
  });
}

function linesOf(chart) {
  const evaluated = Boolean(chart.figures);
  let keys = chart.keys || chart.figures;
  if (keys === "pass") {
    const names = [...new Set(RUNS.flatMap((r) => r.evaluations.flatMap((e) => Object.keys(e.figures))))].filter((n) => n.startsWith("pass_at_"));
    const sorted = names.sort((a, b) => a.slice(8) - b.slice(8));
    const kept = DATA.arms.length > 1 ? [sorted.at(-1)] : sorted.slice(-6);
    keys = Object.fromEntries(kept.filter(Boolean).map((n) => [n, nameOf(n)]));
  }
  const found = [];
  DATA.arms.forEach((arm, a) => Object.entries(keys).forEach(([key, label], k) => {
    const parts = arm.runs.map((r) => (evaluated ? ofEvaluations(RUNS[r], key) : ofRun(RUNS[r], key))).filter(Boolean);
    if (!parts.length) return;
    const several = DATA.arms.length > 1;
    const one = Object.keys(keys).length === 1;
    const name = several ? (one ? arm.name : `${arm.name}: ${label}`) : label;
    found.push({...merged(parts), name: visible(name), colour: several ? a : k % (chart.pairs || 99), dash: several ? k : Math.floor(k / (chart.pairs || 99))});
  }));
  return found.filter((line) => line.y.some((v) => v !== null));
}

function draw(chart) {
  const lines = linesOf(chart);
  chart.figure.hidden = !lines.length;
  chart.plot?.destroy();
  chart.plot = null;
  if (!lines.length) return;
  const log = chart.log !== undefined ? chart.log : view.log;
  chart.button.setAttribute("aria-pressed", String(log));
  const fit = (v) => (v === null || (log && v <= 0) ? null : v);
  const tables = [], series = [{label: view.x === "step" ? "step" : view.x, value: (u, v) => short(v)}], bands = [];
  const colours = palette();
  for (const line of lines) {
    const smooth = line.points ? 0 : view.smoothing;
    const colour = colours[line.colour % colours.length];
    const columns = [line.x, smoothed(line.y, smooth)];
    const main = {label: line.name, stroke: colour, width: 2, dash: DASHES[line.dash % DASHES.length], spanGaps: true,
      points: {show: Boolean(line.points) || line.y.length < 3, size: 6, fill: colour}, value: (u, v) => short(v)};
    if (line.low?.some((v) => v !== null)) {
      columns.push(smoothed(line.low, smooth), smoothed(line.high, smooth));
      const at = series.length;
      series.push(main, ...["low", "high"].map(() => ({label: "", class: "aux", stroke: "transparent", width: 0, spanGaps: true, points: {show: false}})));
      bands.push({series: [at + 2, at + 1], fill: `${colour}26`});
    } else if (smooth) {
      columns.push(line.y);
      series.push(main, {label: "", class: "aux", stroke: `${colour}40`, width: 1, spanGaps: true, points: {show: false}});
    } else series.push(main);
    // A point needs its place: where x is no step, several runs' places are a mean, and must rise.
    const keep = columns[0].map((x, i) => i).filter((i) => columns[0][i] !== null).sort((i, j) => columns[0][i] - columns[0][j]);
    tables.push(columns.map((column, c) => keep.map((i) => (c ? fit(column[i]) : column[i]))));
  }
  const axis = {stroke: css("--muted"), grid: {stroke: css("--grid"), width: 1}, ticks: {stroke: css("--grid"), width: 1, size: 4}, font: `11px ${getComputedStyle(document.body).fontFamily}`,
    values: (u, splits) => splits.map((v) => (v === null ? "" : short(v)))};
  const options = {
    width: chart.figure.clientWidth, height: 210, series, bands, padding: [8, 16, 0, 0],
    scales: {x: {time: false}, y: log ? {distr: 3} : {distr: 1, range: (u, low, high) => (low === high ? flat(low) : uPlot.rangeNum(low, high, 0.1, true))}},
    legend: {live: true, markers: {width: 2, dash: (u, i) => (series[i].dash?.length ? "dashed" : "solid")}},
    hooks: {ready: [lastValues], setLegend: [(u) => u.legend.idx === null && lastValues(u)]}, // without a cursor, the last values
    cursor: {sync: {key: "report", setSeries: false}, points: {size: 7}, focus: {prox: 24}}, focus: {alpha: 0.35},
    axes: [{...axis, size: 26, space: 60}, {...axis, size: 48, space: 34}],
  };
  chart.plot = new uPlot(options, uPlot.join(tables), chart.place);
}

const flat = (v) => (v === null ? [0, 1] : v === 0 ? [0, 1] : [Math.min(0, 2 * v), Math.max(0, 2 * v)]);

function lastValues(plot) {
  if (plot.data[0].length) plot.setLegend({idx: plot.data[0].length - 1}, false);
}

function chartFigure(chart) {
  chart.button = button("log", () => { chart.log = !(chart.log ?? view.log); draw(chart); }, {"aria-pressed": "false", title: "logarithmic axis"});
  chart.place = el("div", {});
  const caption = el("figcaption", {}, el("span", {class: "title"}, chart.title, el("span", {class: "hint"}, chart.unit ? ` ${chart.unit}` : "")), chart.button,
    button("PNG", () => savePng(chart)), button("CSV", () => saveCsv(chart)));
  chart.figure = el("figure", {tabindex: "0", "aria-label": `${chart.title}; arrow keys move the cursor`, onkeydown: (event) => moveCursor(chart, event)}, caption, chart.place);
  return chart.figure;
}

function moveCursor(chart, event) {
  const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!move || !chart.plot || event.target !== chart.figure) return;
  event.preventDefault();
  const {plot} = chart;
  const last = plot.data[0].length - 1;
  const idx = Math.max(0, Math.min(last, (plot.cursor.idx ?? (move > 0 ? -1 : last + 1)) + move));
  plot.setCursor({left: plot.valToPos(plot.data[0][idx], "x"), top: 8});
}

const fileName = (chart, end) => `${chart.title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.${end}`;

function saveCsv(chart) {
  const quote = (v) => (v === null || v === undefined ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v);
  const rows = [["line", view.x, "value", "low", "high"]];
  for (const line of linesOf(chart)) line.x.forEach((x, i) => rows.push([line.name, x, line.y[i], line.low?.[i], line.high?.[i]]));
  save(fileName(chart, "csv"), new Blob([rows.map((row) => row.map(quote).join(",")).join("\n") + "\n"], {type: "text/csv"}));
}

function savePng(chart) {
  const from = chart.plot.ctx.canvas;
  const scale = from.width / chart.plot.width;
  const shown = chart.plot.series.slice(1).filter((s) => s.class !== "aux");
  const canvas = el("canvas", {width: from.width, height: from.height + (26 + 18 * shown.length) * scale});
  const ink = canvas.getContext("2d");
  ink.fillStyle = css("--paper");
  ink.fillRect(0, 0, canvas.width, canvas.height);
  ink.scale(scale, scale);
  ink.fillStyle = css("--ink");
  ink.font = "600 14px system-ui, sans-serif";
  ink.fillText(`${chart.title}${chart.unit ? `, ${chart.unit}` : ""}`, 8, 18);
  ink.drawImage(from, 0, 26, chart.plot.width, chart.plot.height);
  ink.font = "12px system-ui, sans-serif";
  shown.forEach((s, i) => {
    const y = 26 + chart.plot.height + 18 * i + 6;
    ink.strokeStyle = s.stroke();
    ink.lineWidth = 2;
    ink.setLineDash(s.dash || []);
    ink.beginPath(); ink.moveTo(12, y); ink.lineTo(40, y); ink.stroke();
    ink.fillText(s.label, 48, y + 4);
  });
  canvas.toBlob((blob) => save(fileName(chart, "png"), blob));
}

function curves() {
  if (!RUNS.some((run) => run.curves.step.length || run.evaluations.length)) {
    $("charts").append(el("p", {class: "muted"}, "No step has been recorded."));
    $("curve-controls").hidden = true;
    return;
  }
  let heading = null;
  for (const chart of CHARTS) {
    if (Array.isArray(chart)) { heading = el("h3", {}, chart[0]); continue; }
    if (!linesOf(chart).length) continue;
    if (heading) { $("charts").append(heading); heading = null; }
    $("charts").append(chartFigure(chart));
    plots.push(chart);
  }
  const redraw = () => plots.forEach(draw);
  $("x-axis").addEventListener("change", (event) => { view.x = event.target.value; redraw(); });
  $("log-axis").addEventListener("change", (event) => { view.log = event.target.checked; plots.forEach((c) => delete c.log); redraw(); });
  $("smoothing").addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value);
    $("smoothing-said").textContent = event.target.value;
    redraw();
  });
  const every = Math.max(...RUNS.map((run) => run.curves.every));
  if (every > 1) $("curve-controls").append(el("span", {class: "hint"}, `a point is the mean of up to ${every} steps`));
  const merged = DATA.arms.filter((arm) => arm.runs.length > 1).map((arm) => `${visible(arm.name)} (${arm.runs.length} seeds)`);
  if (merged.length) $("curve-controls").append(el("span", {class: "hint"}, `mean and band from lowest to highest of ${merged.join(", ")}`));
  redraw();
  new ResizeObserver(() => plots.forEach((c) => c.plot && c.figure.clientWidth && c.plot.width !== c.figure.clientWidth
    && c.plot.setSize({width: c.figure.clientWidth, height: 210}))).observe($("charts"));
}

/* -------------------------------------------------------------------------------------------------------- rollouts */

const filters = {run: "0", step: "", verdict: "", flip: "", source: "", text: ""};
const right = (answer) => answer.verdict === "right";
const FLIPS = {"wrong > right": [false, true], "right > wrong": [true, false], "stays right": [true, true], "stays wrong": [false, false]};
const flipOf = (attempt, correction) => Object.keys(FLIPS).find((name) => FLIPS[name][0] === right(attempt) && FLIPS[name][1] === right(correction));
const corrections = (problem) => problem.attempts.flatMap((a) => (a.corrections || []).map((c) => [a, c]));
const answers = (problem) => problem.attempts.flatMap((a) => [a, ...(a.corrections || [])]);
let items = [], current = null, listed = 100, colour = "";

function choice(label, key, options, onchange) {
  const select = el("select", {id: `filter-${key}`, onchange: () => { filters[key] = select.value; onchange(); }}, ...options.map(([v, t]) => el("option", {value: v}, t)));
  return el("label", {}, label, select);
}

function rollouts() {
  if (!RUNS.some((run) => run.rollouts.length)) {
    $("rollouts-said").textContent = "No rollouts were recorded (run.save_rollouts_every).";
    return;
  }
  filters.run = String(RUNS.findIndex((run) => run.rollouts.length));
  buildFilters();
  $("problem-list").addEventListener("keydown", (event) => {
    const move = {ArrowDown: 1, ArrowUp: -1}[event.key];
    const buttons = [...$("problem-list").querySelectorAll("li button")];
    const at = buttons.indexOf(document.activeElement);
    if (move && at >= 0) { event.preventDefault(); (buttons[at + move] || buttons[at]).focus(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "/") { event.preventDefault(); $("search").focus(); }
    if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
  });
  filter();
}

function buildFilters() {
  const run = RUNS[filters.run];
  const any = ["", "any"];
  const steps = run.rollouts.map((s) => [String(s.step), String(s.step)]);
  const found = run.rollouts.flatMap((s) => s.problems);
  const verdicts = [...new Set(found.flatMap((p) => answers(p).map((a) => a.verdict)))];
  const sources = [...new Set(found.map((p) => p.source))];
  const parts = [];
  if (RUNS.length > 1) {
    const runs = RUNS.map((r, i) => [String(i), visible(r.name)]).filter(([i]) => RUNS[i].rollouts.length);
    parts.push(choice("run", "run", runs, () => { Object.assign(filters, {step: "", verdict: "", flip: "", source: "", text: ""}); buildFilters(); filter(); }));
    parts[0].querySelector("select").value = filters.run;
  }
  parts.push(choice("step", "step", [any, ...steps], filter), choice("verdict", "verdict", [any, ...verdicts.map((v) => [v, visible(v)])], filter),
    choice("correction", "flip", [any, ...Object.keys(FLIPS).map((f) => [f, f])], filter));
  if (sources.length > 1) parts.push(choice("source", "source", [any, ...sources.map((s) => [s, visible(s)])], filter));
  let timer = 0;
  const search = el("input", {type: "search", id: "search", placeholder: "text  ( / )", "aria-label": "text of prompt or answers",
    oninput: () => { clearTimeout(timer); timer = setTimeout(() => { filters.text = search.value; filter(); }, 120); }});
  parts.push(search);
  $("rollout-filters").replaceChildren(...parts);
}

function matches(problem) {
  const f = filters, text = f.text.toLowerCase();
  return (!f.verdict || answers(problem).some((a) => a.verdict === f.verdict))
    && (!f.flip || corrections(problem).some(([a, c]) => flipOf(a, c) === f.flip))
    && (!f.source || problem.source === f.source)
    && (!text || problem.prompt.toLowerCase().includes(text) || answers(problem).some((a) => a.text.toLowerCase().includes(text)));
}

function filter() {
  const run = RUNS[filters.run];
  const steps = run.rollouts.filter((s) => !filters.step || String(s.step) === filters.step);
  items = steps.flatMap((s) => s.problems.filter(matches).map((problem) => ({step: s.step, problem})));
  listed = 100;
  const sampled = run.rollouts.reduce((n, s) => n + s.problems.length, 0), of = run.rollouts.reduce((n, s) => n + s.of, 0);
  $("rollouts-said").textContent = `${count(items.length)} problems. ` + (sampled < of || run.rollouts.length < run.curves.step.length
    ? `This page holds a sample: ${count(sampled)} problems of ${run.rollouts.length} steps. ` : "") + "Keys: / searches, j and k go on and back.";
  select(items[0] || null);
}

function list() {
  const lines = items.slice(0, listed).map((item) => {
    const li = el("li", {}, button("", () => select(item), {"aria-current": item === current ? "true" : null}));
    const {problem} = item;
    const flips = corrections(problem).map(([a, c]) => flipOf(a, c));
    const up = flips.filter((f) => f === "wrong > right").length, down = flips.filter((f) => f === "right > wrong").length;
    const counts = [`step ${item.step}`, `${problem.attempts.filter(right).length}/${problem.attempts.length} right`, ...(up ? [`${up} corrected`] : []), ...(down ? [`${down} broken`] : [])];
    li.firstChild.append(el("span", {class: "asked"}, visible(problem.prompt.slice(0, 120)).replaceAll("\n", " ")), el("span", {class: "counts"}, counts.join(" · ")));
    return li;
  });
  const more = items.length > listed ? [button(`${count(items.length - listed)} more`, () => { listed += 200; list(); }, {class: "more"})] : [];
  const top = $("problem-list").scrollTop;
  $("problem-list").replaceChildren(el("ul", {"aria-label": "problems"}, ...lines), ...more);
  $("problem-list").scrollTop = top;
}

function step(move) {
  const at = items.indexOf(current) + move;
  if (items[at]) { if (at >= listed) listed = at + 100; select(items[at]); $("problem-list").querySelector("[aria-current]")?.scrollIntoView({block: "nearest"}); }
}

function select(item) {
  const focused = document.activeElement && $("problem-list").contains(document.activeElement);
  current = item;
  list();
  if (focused) $("problem-list").querySelector("[aria-current]")?.focus({preventScroll: true});
  $("problem").replaceChildren(...(item ? tree(item) : [el("p", {class: "muted"}, "Nothing matches.")]));
}

const COLOURS = {
  logp: {label: "log-prob (engine)", low: "0", high: "−5 nats", rgb: "--token-a", of: (v) => -v / 5},
  gap: {label: "trainer − engine log-prob", low: "0", high: "±0.1 nats", rgb: "--token-a", below: "--token-b", of: (v) => Math.abs(v) / 0.1},
  entropy: {label: "entropy", low: "0", high: "2 nats", rgb: "--token-b", of: (v) => v / 2},
};

function tree({step: at, problem}) {
  const has = Object.keys(COLOURS).filter((key) => answers(problem).some((a) => a[key]));
  if (colour && !has.includes(colour)) colour = "";
  const chooser = el("select", {id: "colour", onchange: () => { colour = chooser.value; select(current); $("colour").focus(); }},
    el("option", {value: ""}, "none"), ...has.map((key) => el("option", {value: key, selected: key === colour}, COLOURS[key].label)));
  const tools = has.length ? el("label", {class: "hint"}, "colour tokens by ", chooser, colour ? scaleOf(COLOURS[colour]) : "")
    : el("span", {class: "hint"}, "no token colours: the run has not recorded this problem's tokens (run.save_tokens)");
  return [
    el("div", {class: "head"}, el("strong", {}, visible(problem.id)), el("span", {class: "muted"}, `step ${at}`), problem.source ? el("span", {class: "muted"}, visible(problem.source)) : ""),
    el("div", {class: "asked-for"}, filled(el("div", {class: "text", tabindex: "0", "aria-label": "prompt"}), plainChunks(problem.prompt)),
      problem.answer !== null && problem.answer !== undefined && problem.answer !== "" ? el("p", {class: "hint"}, "wanted: ", el("code", {}, visible(typeof problem.answer === "string" ? problem.answer : JSON.stringify(problem.answer)).slice(0, 2000))) : ""),
    el("div", {class: "controls"}, tools),
    el("ol", {class: "tree", "aria-label": "attempts"}, ...problem.attempts.map((attempt, i) => el("li", {}, nodeOf(attempt, `attempt ${i + 1}`), textOf(attempt),
      attempt.corrections?.length ? el("ul", {"aria-label": `corrections of attempt ${i + 1}`}, ...attempt.corrections.map((c) => correctionOf(attempt, c))) : ""))),
  ];
}

function scaleOf(c) {
  const box = (rgb, a) => el("i", {style: `background:rgb(${css(rgb)}, ${a})`});
  return el("span", {class: "scale"}, c.low, ...[0.1, 0.25, 0.4, 0.55].map((a) => box(c.rgb, a)), c.high, ...(c.below ? [box(c.rgb, 0.5), "below the engine", box(c.below, 0.5), "above"] : []));
}

function nodeOf(answer, name, ...more) {
  const good = right(answer);
  return el("div", {class: "node"},
    el("span", {class: `badge ${good ? "right" : "wrong"}`}, `${good ? "✓" : "✗"} ${visible(answer.verdict)}`), el("span", {}, name),
    answer.advantage !== null ? el("span", {title: "advantage in the loss"}, `advantage ${answer.advantage ? signed(answer.advantage) : "0"}`) : "",
    answer.tokens ? el("span", {}, `${count(answer.tokens)} tokens`) : "", answer.truncated ? el("span", {class: "badge wrong"}, "cut off") : "",
    answer.hint !== undefined ? el("span", {}, `with hint ${Number(answer.hint) + 1}`) : "",
    ...more, answer.why ? el("span", {class: "why"}, visible(answer.why)) : "");
}

function textOf(answer) {
  if (colour && answer[colour]) return tokensOf(answer);
  const box = el("div", {class: "text", tabindex: answer.text.length > 1500 ? "0" : null});
  return filled(box, answer.text ? plainChunks(answer.text) : [[el("span", {class: "muted"}, "(nothing)")]]);
}

/* Coloured tokens; a token's values are said on touch, and for the arrow keys, not to a mouse alone. */
function tokensOf(answer) {
  const said = el("p", {class: "hint", role: "status"});
  let at = null;
  const choose = (token) => {
    if (!token) return;
    at?.removeAttribute("class");
    at = token;
    at.className = "chosen";
    at.scrollIntoView({block: "nearest"});
    said.textContent = `token ${[...box.children].indexOf(at) + 1} “${at.textContent}”: ${at.title}`;
  };
  const box = el("div", {
    class: "text", tabindex: "0", "aria-label": "tokens: left and right go through them",
    onclick: (event) => choose(event.target.closest(".text > span[title]")),
    onkeydown: (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      event.preventDefault();
      const next = event.key === "ArrowRight" ? at?.nextElementSibling : at?.previousElementSibling;
      choose(at ? next?.title && next : box.firstElementChild);
    },
  });
  filled(box, tokenChunks(answer));
  const both = document.createDocumentFragment();
  both.append(box, said);
  return both;
}

const valuesOf = (answer, i) => [["log-prob", answer.logp], ["gap", answer.gap], ["entropy", answer.entropy]]
  .filter(([, values]) => values).map(([name, values]) => `${name} ${values[i] ?? "–"}`).join(", ");

function* tokenChunks(answer, size = 800) {
  const c = COLOURS[colour], rgb = css(c.rgb), below = c.below ? css(c.below) : rgb;
  for (let at = 0; at < answer.pieces.length; at += size) {
    yield answer.pieces.slice(at, at + size).map((piece, i) => {
      const v = answer[colour][at + i];
      const alpha = v === null ? 0 : Math.max(0, Math.min(1, c.of(v))) * 0.6;
      return el("span", {title: valuesOf(answer, at + i), style: alpha > 0.01 ? `background:rgb(${v > 0 && c.below ? below : rgb}, ${alpha.toFixed(2)})` : null}, visible(piece));
    });
  }
}

function correctionOf(attempt, correction) {
  const flip = flipOf(attempt, correction);
  const kind = {"wrong > right": "right", "right > wrong": "wrong"}[flip] || "";
  const place = el("div", {});
  const toggle = button("side by side", () => {
    const open = toggle.getAttribute("aria-expanded") !== "true";
    toggle.setAttribute("aria-expanded", String(open));
    place.replaceChildren(...(open ? [sideBySide(attempt, correction)] : []));
  }, {"aria-expanded": "false"});
  return el("li", {}, nodeOf(correction, el("span", {class: `badge ${kind}`}, flip.replace(">", "→")), toggle), textOf(correction), place);
}

/* Attempt and correction, differences marked. Characters where both are short, else words (Myers' O(ND), bounded: where
   more than so many words differ, what lies between the common ends counts as changed). */
function sideBySide(attempt, correction) {
  const split = (t) => (Math.max(attempt.text.length, correction.text.length) < 200 ? [...t] : t.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || []);
  const [left, rightSide] = differences(split(attempt.text), split(correction.text));
  const side = (name, parts, tag) => el("div", {}, el("h4", {}, name), filled(el("div", {class: "text"}), marked(parts, tag)));
  return el("div", {class: "sides"}, side("attempt", left, "del"), side("correction", rightSide, "ins"));
}

function* marked(parts, tag, size = 500) {
  let nodes = [];
  for (const [changed, text] of parts) for (const [node] of plainChunks(text)) {
    nodes.push(changed ? el(tag, {}, node) : node);
    if (nodes.length === size || node.length > size) { yield nodes; nodes = []; }
  }
  yield nodes;
}

function differences(a, b, most = 500) {
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const x = a.slice(start, a.length - end), y = b.slice(start, b.length - end);
  const keptX = new Array(x.length).fill(false), keptY = new Array(y.length).fill(false);
  const trace = [];
  let reach = new Map([[1, 0]]), done = x.length + y.length === 0;
  for (let d = 0; d <= Math.min(most, x.length + y.length) && !done; d += 1) {
    trace.push(new Map(reach));
    for (let k = -d; k <= d; k += 2) {
      let i = k === -d || (k !== d && (reach.get(k - 1) ?? -1) < (reach.get(k + 1) ?? -1)) ? reach.get(k + 1) : reach.get(k - 1) + 1;
      while (i < x.length && i - k < y.length && x[i] === y[i - k]) i += 1;
      reach.set(k, i);
      if (i >= x.length && i - k >= y.length) { backtrack(trace, d, x.length, y.length, keptX, keptY); done = true; break; }
    }
  }
  const side = (all, kept, length) => {
    const parts = [];
    const add = (changed, text) => (parts.length && parts.at(-1)[0] === changed ? (parts.at(-1)[1] += text) : parts.push([changed, text]));
    all.forEach((text, i) => add(i >= start && i < start + length && !kept[i - start], text));
    return parts;
  };
  return [side(a, keptX, x.length), side(b, keptY, y.length)];
}

function backtrack(trace, d, i, j, keptX, keptY) {
  for (let step = d; step >= 0; step -= 1) {
    const reach = trace[step], k = i - j;
    const down = k === -step || (k !== step && (reach.get(k - 1) ?? -1) < (reach.get(k + 1) ?? -1));
    const before = down ? k + 1 : k - 1, x = step ? reach.get(before) : 0, y = step ? x - before : 0;
    while (i > x && j > y && (step === 0 || i > x + (down ? 0 : 1) || j > y + (down ? 1 : 0))) {
      if (step && i === x + (down ? 0 : 1) && j === y + (down ? 1 : 0)) break;
      i -= 1; j -= 1; keptX[i] = true; keptY[j] = true;
    }
    i = x; j = y;
  }
}

/* --------------------------------------------------------------------------------------------------------- compare */

const MEASURES = {
  greedy: ["greedy answer", (c) => (c?.greedy ? Number(c.greedy[0] === "right") : null)],
  t1: ["share of attempts right (T=1)", (c) => (c?.n ? c.right / c.n : null)],
  check: ["share right after a check", (c) => (c?.checked ? c.kept / c.checked : null)],
};
const chosen = {a: 0, b: 0, measure: "greedy", show: "changed", listed: 50};

function compare() {
  const {columns, problems} = DATA.compare;
  const common = (a, b) => problems.filter((p) => p.cells[a] && p.cells[b]).length;
  if (columns.length < 2 || !columns.some((x, a) => columns.some((y, b) => a < b && common(a, b)))) {
    $("compare-said").textContent = columns.length < 2 ? "Nothing to compare: fewer than two evaluations." : "No two evaluations have a problem in common.";
    return;
  }
  const heads = columns.map((c) => `${RUNS.length > 1 ? `${visible(RUNS[c.run].name)}, ` : ""}${c.when}`);
  const lasts = columns.map((c, i) => i).filter((i) => columns[i + 1]?.run !== columns[i].run);
  // Of several runs the last evaluations, where they are of the same problems; else one run's before and after.
  const pairs = lasts.flatMap((a, i) => lasts.slice(i + 1).map((b) => [a, b])).filter(([a, b]) => common(a, b));
  [chosen.a, chosen.b] = pairs[0] || [0, Math.max(1, lasts[0])];
  const pick = (label, key, options) => {
    const select = el("select", {id: `compare-${key}`, onchange: () => { chosen[key] = typeof chosen[key] === "number" ? Number(select.value) : select.value; chosen.listed = 50; rows(heads); }},
      ...options.map(([v, t]) => el("option", {value: v, selected: v === chosen[key]}, t)));
    return el("label", {}, label, select);
  };
  const each = heads.map((h, i) => [i, h]);
  $("compare-controls").append(pick("from", "a", each), pick("to", "b", each), pick("by", "measure", Object.entries(MEASURES).map(([k, [name]]) => [k, name])),
    pick("show", "show", [["changed", "won and lost"], ["won", "won"], ["lost", "lost"], ["all", "all"]]));
  rows(heads);
}

function rows(heads) {
  const {problems, columns, of} = DATA.compare;
  const value = MEASURES[chosen.measure][1];
  const asked = problems.filter((p) => p.cells[chosen.a] && p.cells[chosen.b]);
  const scored = asked.map((p) => {
    const [a, b] = [value(p.cells[chosen.a]), value(p.cells[chosen.b])];
    return {p, change: a === null || b === null ? null : b - a};
  });
  const won = scored.filter((s) => s.change >= 0.5).length, lost = scored.filter((s) => s.change !== null && s.change <= -0.5).length;
  const kinds = {changed: (s) => Math.abs(s.change) >= 0.5, won: (s) => s.change >= 0.5, lost: (s) => s.change !== null && s.change <= -0.5, all: () => true};
  const shown = scored.filter(kinds[chosen.show]).sort((s, t) => Math.abs(t.change) - Math.abs(s.change) || t.change - s.change);
  $("compare-said").textContent = `${won} won, ${lost} lost of ${count(asked.length)} problems that both have`
    + (chosen.measure === "greedy" ? "" : " (a change of at least one half)")
    + (problems.length < of ? `; this page has the ${count(problems.length)} of ${count(of)} problems that differ most.` : ".");
  // With few evaluations all stand side by side; with many, the two that are compared.
  const each = columns.length <= 6 ? heads.map((h, i) => i).filter((i) => asked.some((p) => p.cells[i])) : [chosen.a, chosen.b];
  const body = el("tbody", {});
  const cell = (s, i) => {
    const v = value(s.p.cells[i]);
    return el("td", {class: "n"}, chosen.measure === "greedy" ? (v === null ? "–" : el("span", {class: v ? "up" : "down"}, v ? "✓ right" : "✗ wrong")) : share(v));
  };
  for (const s of shown.slice(0, chosen.listed)) {
    const open = button(visible(s.p.prompt || s.p.id).slice(0, 100).replaceAll("\n", " "), () => {
      const is = open.getAttribute("aria-expanded") === "true";
      open.setAttribute("aria-expanded", String(!is));
      if (is) row.nextSibling.remove();
      else row.after(el("tr", {}, el("td", {class: "wide", colspan: String(each.length + 2)}, answersOf(s.p, each, heads))));
    }, {"aria-expanded": "false"});
    const change = el("span", {class: s.change > 0 ? "up" : s.change < 0 ? "down" : null},
      chosen.measure === "greedy" ? {1: "won", 0: "", "-1": "lost"}[s.change] ?? "–" : signed(s.change));
    const row = el("tr", {}, el("td", {}, open), ...each.map((i) => cell(s, i)), el("td", {class: "n"}, change));
    body.append(row);
  }
  const head = el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "problem"), ...each.map((i) => el("th", {scope: "col", class: "n"}, heads[i])), el("th", {scope: "col", class: "n"}, "change")));
  const more = shown.length > chosen.listed ? [button(`${count(shown.length - chosen.listed)} more`, () => { chosen.listed += 200; rows(heads); }, {class: "more"})] : [];
  $("compared").replaceChildren(el("div", {class: "scroll"}, el("table", {}, head, body)), ...more);
}

function answersOf(problem, each, heads) {
  const answer = (label, found) => (found ? [el("div", {class: "node"}, label, el("span", {class: `badge ${found[0] === "right" ? "right" : "wrong"}`}, `${found[0] === "right" ? "✓" : "✗"} ${visible(found[0])}`)),
    filled(el("div", {class: "text"}), plainChunks(found[1]))] : []);
  const column = (i) => {
    const c = problem.cells[i];
    if (!c) return "";
    return el("div", {}, el("strong", {}, heads[i]), el("p", {class: "hint"}, `${c.right} of ${c.n} attempts right` + (c.checked ? `, ${c.kept} of ${c.checked} after a check` : "")),
      ...answer("greedy", c.greedy), ...answer("an attempt", c.attempt), ...answer("its check", c.check));
  };
  return el("div", {}, filled(el("div", {class: "text"}), plainChunks(problem.prompt)),
    problem.answer !== null ? el("p", {class: "hint"}, "wanted: ", el("code", {}, visible(problem.answer))) : "", el("div", {class: "answers"}, ...each.map(column)));
}

/* ------------------------------------------------------------------------------------------------------------ start */

const THEMES = ["auto", "light", "dark"];
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme || "auto") + 1) % 3];
  if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
  $("theme").textContent = `◐ ${next}`;
  $("theme").setAttribute("aria-label", `theme: ${next}`);
  plots.forEach(draw);
});
for (const media of [matchMedia("(prefers-color-scheme: dark)"), printed]) media.addEventListener("change", () => plots.forEach(draw));
$("made").textContent = `Made by cipo_fast on ${DATA.made} from the runs' own files.`;
$("library").textContent = `Charts: ${DATA.library.name} ${DATA.library.version}, ${DATA.library.licence} licence`;
overview();
curves();
rollouts();
compare();
document.documentElement.dataset.ready = "true";
})();
