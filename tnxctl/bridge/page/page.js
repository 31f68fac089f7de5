// The page for people: asks the bridge for raw counts once a second, and shows what changed between them.
// Whatever the daemon says becomes text, never markup.
"use strict";

const STAGES = ["receive", "queue", "gather", "h2d", "compute", "d2h", "reply"];
const STAGE_TITLES = {
  receive: "taken in", queue: "waiting for a lane", gather: "batch put together", h2d: "copied to the GPU",
  compute: "computed", d2h: "copied back", reply: "answered",
};
const ERRORS = {
  INVALID_ARGUMENT: "The request could not work as it was sent",
  NOT_FOUND: "No such model, version or device",
  ALREADY_EXISTS: "The same request was under way already",
  FAILED_PRECONDITION: "The model could not be loaded",
  PERMISSION_DENIED: "The client may not do this",
  UNAUTHENTICATED: "The client did not show who it is",
  RESOURCE_EXHAUSTED: "A queue or a memory limit was full",
  DEADLINE_EXCEEDED: "It could not be done in the time that it had",
  CANCELLED: "The client withdrew the request",
  UNIMPLEMENTED: "The daemon does not know this kind of request",
  UNAVAILABLE: "The daemon was starting or draining",
  INTERNAL: "The model or the daemon failed",
};
const STATUS_KINDS = { ready: "good", starting: "warn", draining: "warn" };
const REFUSALS = { 401: ["needs a token", "warn"], 403: ["not allowed", "warn"] }; // by the status of HTTP
const EVERY_MS = 1000;
const SAMPLES = 121; // two minutes
const RECENT = 10; // seconds that tables tell of
const MODELS_EVERY = 10; // polls
const MOST_VALUES_SHOWN = 256;
const MOST_TEXT_SHOWN = 4096;

const $ = (id) => document.getElementById(id);

// --- documents --------------------------------------------------------------------------------------------------

/** An element. Children that are strings become text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A row of a table, whose cells have the headings beside them where there is no room for columns. */
function row(table, heading, ...cells) {
  const titles = [...table.tHead.rows[0].cells].slice(1).map((cell) => cell.textContent);
  return element("tr", {}, element("th", { scope: "row" }, heading),
    ...cells.map((cell, at) => element("td", { "data-label": titles[at] }, cell)));
}

/** A bar. Parts are [share of the whole, class]. */
function bar(parts, label) {
  const made = element("span", { class: "bar", role: "img", "aria-label": label });
  for (const [share, name] of parts) {
    const part = element("i", { class: name });
    part.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
    made.append(part);
  }
  return made;
}

function gauge(share, text) {
  return element("span", { class: "gauge" }, bar([[share, "fill"]], text), text);
}

// --- numbers in words -------------------------------------------------------------------------------------------

const digits = (value, places) => value.toLocaleString("en", { maximumFractionDigits: places });

function rate(value) {
  return digits(value, value < 10 ? 2 : 0);
}

function duration(us) {
  if (!Number.isFinite(us)) return "–";
  if (us < 1000) return `${digits(us, us < 10 ? 1 : 0)} µs`;
  if (us < 1e6) return `${digits(us / 1e3, us < 1e4 ? 2 : us < 1e5 ? 1 : 0)} ms`;
  return `${digits(us / 1e6, 2)} s`;
}

function age(seconds) {
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = Math.max(parts.findIndex(([, size]) => seconds >= size), 0);
  return parts.slice(seconds < 1 ? 3 : at, (seconds < 1 ? 3 : at) + 2).map(([unit, size]) => {
    const count = Math.floor(seconds / size);
    seconds -= count * size;
    return `${count} ${unit}`;
  }).join(" ");
}

const percent = (share) => `${digits(100 * share, 0)} %`;

function memory(mib) {
  return mib >= 1024 ? `${digits(mib / 1024, 1)} GiB` : `${digits(mib, 0)} MiB`;
}

/** A tensor, which is [name, datatype, shape], in words. */
const signature = ([name, datatype, shape]) => `${name}: ${datatype} [${shape.map((n) => (n < 0 ? "any" : n)).join(", ")}]`;

// --- histograms, as tnxctl/protocol/histograms.py has them ------------------------------------------------------

const STEPS = 8;
const EMPTY = [0, [], 0];

function lowerBound(bucket) {
  if (bucket === 0) return 0;
  return 2 ** Math.floor((bucket - 1) / STEPS) * (1 + ((bucket - 1) % STEPS) / STEPS);
}

/** Counts by bucket, and the sum: of what came between each of the pairs of histograms, taken together. */
function between(pairs) {
  const counts = [];
  let sum = 0;
  for (const [before, after] of pairs) {
    after[1].forEach((count, at) => { counts[after[0] + at] = (counts[after[0] + at] ?? 0) + count; });
    before[1].forEach((count, at) => { counts[before[0] + at] = (counts[before[0] + at] ?? 0) - count; });
    sum += after[2] - before[2];
  }
  return { counts, sum, count: counts.reduce((total, count) => total + (count ?? 0), 0) };
}

function quantile({ counts, count: all }, share) {
  const wanted = share * all;
  let below = 0;
  for (let bucket = 0; bucket < counts.length; bucket += 1) {
    const count = counts[bucket] ?? 0;
    if (count > 0 && below + count >= wanted) {
      const lower = lowerBound(bucket);
      return lower + (lowerBound(bucket + 1) - lower) * Math.max(wanted - below, 0) / count;
    }
    below += count;
  }
  return NaN;
}

const mean = ({ sum, count }) => (count > 0 ? sum / count : NaN);

// --- what changed between two reports ---------------------------------------------------------------------------

const keyOf = (version) => JSON.stringify([version.name, version.version]);
const titleOf = (version) => (version.version ? `${version.name}@${version.version}` : version.name);
const total = (errors) => Object.values(errors).reduce((sum, count) => sum + count, 0);

/** Versions of a report, with what they were in an earlier one. `wanted`: key of the only one, or "". */
function versionPairs(before, after, wanted) {
  const earlier = new Map(before.models.map((version) => [keyOf(version), version]));
  return after.models.filter((version) => !wanted || keyOf(version) === wanted)
    .map((version) => [earlier.get(keyOf(version)) ?? {}, version]);
}

const stagePairs = (pairs, stage) => pairs.map(([old, now]) => [old.stages?.[stage] ?? EMPTY, now.stages[stage] ?? EMPTY]);

function interval(before, after, wanted) {
  const seconds = (after.uptime_us - before.uptime_us) / 1e6;
  const pairs = versionPairs(before, after, wanted);
  const grown = (field) => pairs.reduce((sum, [old, now]) => sum + now[field] - (old[field] ?? 0), 0);
  const errors = wanted
    ? pairs.reduce((sum, [old, now]) => sum + total(now.errors) - total(old.errors ?? {}), 0)
    : total(after.errors) - total(before.errors);
  const totals = between(stagePairs(pairs, "total"));
  return {
    answers: grown("replies") / seconds,
    errors: errors / seconds,
    rowsPerBatch: grown("rows") / grown("batches"),
    p50: quantile(totals, 0.5),
    p99: quantile(totals, 0.99),
    stages: STAGES.map((stage) => mean(between(stagePairs(pairs, stage)))),
    waiting: wanted ? pairs.reduce((sum, [, now]) => sum + now.queued_rows, 0) : after.queued,
    running: after.running,
    busy: busyShare(before, after),
  };
}

/** Share of all lanes that ran batches. What ran on the serving thread counts as the time of one lane. */
function busyShare(before, after, name = null) {
  let busy = 0;
  let lanes = 0;
  for (const device of after.devices) {
    if (name !== null && device.name !== name) continue;
    const old = before.devices.find((other) => other.name === device.name) ?? { busy_us: 0, inline_us: 0 };
    busy += device.busy_us - old.busy_us + device.inline_us - old.inline_us;
    lanes += device.lanes;
  }
  return lanes ? busy / lanes / (after.uptime_us - before.uptime_us) : 0;
}

// --- charts -----------------------------------------------------------------------------------------------------

const WIDTH = SAMPLES - 1;

/** Lines over the last two minutes, the newest point at the right. */
function lines(series, label) {
  const highest = Math.max(...series.flat().filter(Number.isFinite), 1e-9);
  const made = drawing("svg", { viewBox: `0 0 ${WIDTH} 40`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  made.append(drawing("line", { class: "base", x1: 0, x2: WIDTH, y1: 39.5, y2: 39.5 }));
  series.forEach((values, place) => {
    let path = "";
    values.forEach((value, at) => {
      if (!Number.isFinite(value)) return;
      const x = WIDTH - (values.length - 1 - at);
      path += `${path && Number.isFinite(values[at - 1]) ? "L" : "M"}${x} ${(39 - 37 * value / highest).toFixed(2)}`;
      if (!Number.isFinite(values[at - 1]) && !Number.isFinite(values[at + 1])) path += "h0.5"; // a lone point shows
    });
    made.append(drawing("path", { class: place ? "trace second" : "trace", d: path }));
  });
  return made;
}

/** Areas on top of each other, the newest at the right. `columns`: values of all layers, by time. */
function areas(columns, classes, label) {
  const sums = columns.map((values) => values.reduce((sum, value) => sum + (Number.isFinite(value) ? value : 0), 0));
  const highest = Math.max(...sums, 1e-9);
  const made = drawing("svg", { viewBox: `0 0 ${WIDTH} 100`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  columns.forEach((values, at) => {
    let y = 100;
    values.forEach((value, layer) => {
      if (!(value > 0)) return;
      const height = 95 * value / highest;
      y -= height;
      made.append(drawing("rect", { class: classes[layer], x: WIDTH - columns.length + at, y, width: 1.05, height }));
    });
  });
  return [made, highest];
}

// --- asking the bridge ------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, cache: "no-store" });
  } catch {
    throw new Refused(0, "The bridge does not answer: it was stopped, or the network is gone.");
  }
  const text = await response.text();
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new Refused(response.status, `The bridge answered ${response.status}, and not with JSON.`);
  }
  if (!response.ok) throw new Refused(response.status, String(document.error ?? `The bridge answered ${response.status}.`));
  return [document, response.headers];
}

/** The entries of a Server-Timing header: times in milliseconds as numbers, descriptions as text. */
function serverTiming(headers) {
  const found = {};
  const entries = (headers.get("Server-Timing") ?? "").matchAll(/(\w+);(?:dur=([\d.]+)|desc="([^"]*)")/g);
  for (const [, name, time, text] of entries) found[name] = time === undefined ? text : Number(time);
  return found;
}

// --- state ------------------------------------------------------------------------------------------------------

const reports = []; // of the last two minutes, the oldest first
let daemons = [];
let models = [];
let modelsText = "";
let versionsShown = "";
let polls = 0;

async function poll() {
  try {
    if (!daemons.length) await askDaemons();
    const number = daemons.indexOf($("daemon").value);
    const [report] = await ask(`stats/${number}`);
    if (number !== daemons.indexOf($("daemon").value)) return; // another one was chosen meanwhile
    const last = reports.at(-1);
    if (last && last.started_s !== report.started_s) {
      reports.length = 0;
      polls = 0;
    }
    if (!reports.length || report.uptime_us > reports.at(-1).uptime_us) reports.push(report); // else it was overtaken
    if (reports.length > SAMPLES) reports.shift();
    const versions = report.models.map(keyOf).join();
    if (polls % MODELS_EVERY === 0 || versions !== versionsShown) await pollModels(number);
    versionsShown = versions;
    polls += 1;
    show();
    problem("");
    $("token").hidden = true;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("token").hidden = error.status !== 401;
    state(...(REFUSALS[error.status] ?? ["unreachable", "bad"]));
    problem(error.message);
    document.querySelector("main").classList.add("stale");
  }
}

/** Which daemons there are: of several, one is shown at a time. */
async function askDaemons() {
  const [found] = await ask("daemons");
  daemons = found.daemons;
  $("several").hidden = daemons.length < 2;
  $("daemon").replaceChildren(...daemons.map((address) => element("option", { value: address }, address)));
}

async function pollModels(number) {
  const [found] = await ask(`models/${number}`);
  const text = JSON.stringify(found.models.map((model) => ({ ...model, requests: 0, memory_mb: 0, audited: 0 })));
  models = found.models;
  if (text !== modelsText) {
    modelsText = text;
    showModels();
  }
}

function state(text, kind) {
  if ($("status").textContent !== text) $("status").replaceChildren(element("span", { class: `pill ${kind}` }, text));
  document.title = `${text} – TensorNext`;
}

function problem(text) {
  $("problem").hidden = !text;
  if ($("problem").textContent !== text) $("problem").textContent = text;
}

// --- showing ----------------------------------------------------------------------------------------------------

function show() {
  const report = reports.at(-1);
  document.querySelector("main").hidden = false;
  document.querySelector("main").classList.remove("stale");
  state(report.status, STATUS_KINDS[report.status] ?? "unknown");
  $("about").textContent = `version ${report.version} · up ${age(report.uptime_us / 1e6)} · ` +
    `${digits(report.connections, 0)} ${report.connections === 1 ? "connection" : "connections"}`;
  if (reports.length < 2) return;
  const wanted = $("of").value;
  const steps = reports.slice(1).map((after, at) => interval(reports[at], after, wanted));
  const recent = reports[Math.max(reports.length - 1 - RECENT, 0)];
  showTiles(steps, interval(recent, report, wanted));
  showStages(steps);
  showTraffic(recent, report);
  showDevices(recent, report);
  showErrors(reports[0], report);
}

function showTiles(steps, recent) {
  const column = (field) => steps.map((step) => step[field]);
  const tile = (title, number, small, series, spell) => {
    const peak = spell(Math.max(...series.flat().filter(Number.isFinite), 0));
    return element("div", { class: "tile" },
      element("div", { class: "quiet" }, title),
      element("div", { class: "number" }, number), element("div", { class: "quiet" }, small),
      lines(series, `${title} over the last two minutes: ${number} ${small} now, ${peak} at most`),
      element("div", { class: "quiet peak" }, `up to ${peak}`));
  };
  $("tiles").replaceChildren(
    tile("Answers", rate(recent.answers), "per second", [column("answers")], rate),
    tile("Errors", rate(recent.errors), "per second", [column("errors")], rate),
    tile("Time in the daemon", duration(recent.p50), `p50; p99 ${duration(recent.p99)}`,
      [column("p50"), column("p99")], duration),
    tile("Waiting", digits(recent.waiting, 0), $("of").value ? "rows" : `requests; ${digits(recent.running, 0)} running`,
      [column("waiting")], (value) => digits(value, 0)),
    tile("Lanes busy", percent(recent.busy), "of all devices", [column("busy")], percent));
}

function showStages(steps) {
  const [chart, highest] = areas(steps.map((step) => step.stages), STAGES, "Mean time by stage, last two minutes");
  const idle = !steps.some((step) => step.stages.some((value) => value > 0));
  $("stages").replaceChildren(chart, element("figcaption", {},
    element("span", {}, "two minutes ago"),
    element("span", {}, idle ? "no answers in this time" : `highest: ${duration(highest)}`),
    element("span", {}, "now")));
  const latest = steps.findLast((step) => step.stages.some(Number.isFinite));
  $("legend").replaceChildren(...STAGES.map((stage, at) => element("li", {},
    element("span", { class: `swatch ${stage}`, "aria-hidden": "true" }),
    `${STAGE_TITLES[stage]} (${stage}): ${latest ? duration(latest.stages[at]) : "–"}`)));
}

function showTraffic(before, after) {
  const table = $("traffic");
  const rows = after.models.map((version) => ({ version, now: interval(before, after, keyOf(version)) }));
  rows.sort((one, other) => other.now.answers - one.now.answers || titleOf(one.version).localeCompare(titleOf(other.version)));
  table.tBodies[0].replaceChildren(...rows.map(({ version, now }) => {
    const sum = now.stages.reduce((all, value) => all + value, 0);
    const parts = now.stages.map((value, at) => [value / sum, STAGES[at]]);
    const words = STAGES.map((stage, at) => `${stage} ${duration(now.stages[at])}`).join(", ");
    return row(table, titleOf(version), rate(now.answers), rate(now.errors),
      Number.isFinite(now.rowsPerBatch) ? digits(now.rowsPerBatch, 1) : "–", duration(now.p50), duration(now.p99),
      digits(version.queued_rows, 0), Number.isFinite(sum) ? bar(parts, words) : "no answers");
  }));
}

function showDevices(before, after) {
  const table = $("devices");
  table.tBodies[0].replaceChildren(...after.devices.map((device) => {
    const busy = busyShare(before, after, device.name);
    const used = device.memory_total_mb - device.memory_free_mb;
    return row(table, device.name, element("span", { class: device.status === "ready" ? "good" : "bad" }, device.status),
      digits(device.lanes, 0), gauge(busy, percent(busy)), digits(device.queued_rows, 0),
      device.memory_total_mb ? gauge(used / device.memory_total_mb, `${memory(used)} of ${memory(device.memory_total_mb)}`)
        : "–");
  }));
}

function showErrors(before, after) {
  const table = $("errors");
  const found = [];
  const seen = {};
  const earlier = new Map(before.models.map((version) => [keyOf(version), version]));
  for (const version of after.models) {
    for (const [code, count] of Object.entries(version.errors)) {
      seen[code] = (seen[code] ?? 0) + count;
      found.push({ code, where: titleOf(version), count, recent: count - (earlier.get(keyOf(version))?.errors[code] ?? 0) });
    }
  }
  for (const [code, count] of Object.entries(after.errors)) { // those that concern no model
    const rest = count - (seen[code] ?? 0);
    const old = (before.errors[code] ?? 0) - before.models.reduce((sum, version) => sum + (version.errors[code] ?? 0), 0);
    if (rest > 0) found.push({ code, where: "no model", count: rest, recent: Math.max(rest - old, 0) });
  }
  found.sort((one, other) => other.recent - one.recent || other.count - one.count);
  table.hidden = !found.length;
  $("no-errors").hidden = Boolean(found.length);
  table.tBodies[0].replaceChildren(...found.map(({ code, where, count, recent }) =>
    row(table, `${ERRORS[code] ?? "An error"} (${code})`, where, digits(count, 0), digits(recent, 0))));
}

function showModels() {
  $("models").replaceChildren(...models.map((model) => {
    const facts = [];
    const share = model.shadow ? "shadow" : `${digits(100 * model.traffic, 1)} % of its name`;
    if (model.version) facts.push(["Traffic", share]);
    if (model.inputs.length) facts.push(["Takes", model.inputs.map(signature).join("; ")]);
    if (model.outputs.length) facts.push(["Gives", model.outputs.map(signature).join("; ")]);
    facts.push(["Batches", model.max_batch_size ? `of up to ${digits(model.max_batch_size, 0)} rows` : "none"]);
    if (model.devices.length) facts.push(["On", model.devices.join(", ")]);
    if (model.format) facts.push(["Format", model.format]);
    for (const note of model.notes) facts.push(["Note", note]);
    const kind = { ready: "good", failed: "bad" }[model.status] ?? "warn";
    return element("article", { class: "card" },
      element("h3", {}, titleOf(model), " ", element("span", { class: `pill ${kind}` }, model.status),
        ...(model.default ? [" ", element("span", { class: "pill unknown" }, "default")] : [])),
      ...(model.error ? [element("p", { class: "bad" }, model.error)] : []),
      element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  }));
  choose($("of"), models.filter((model) => model.version), "all models");
  if (choose($("try-model"), models.filter((model) => model.status === "ready"))) showInputs();
}

/** Fill a list of models, and keep the choice where it can be kept. Returns whether it is another one. */
function choose(select, found, none) {
  const before = select.value;
  const options = found.map((model) => {
    const option = element("option", { value: keyOf(model) }, titleOf(model));
    option.selected = keyOf(model) === before || (!before && none === undefined && model.default);
    return option;
  });
  if (none !== undefined) options.unshift(element("option", { value: "" }, none));
  select.replaceChildren(...options);
  return select.value !== before;
}

// --- the form ---------------------------------------------------------------------------------------------------

const chosen = () => models.find((model) => keyOf(model) === $("try-model").value);

const FILLS = {
  zeros: () => 0,
  ones: () => 1,
  random: (datatype) => (/^(FP|BF)/.test(datatype) ? Math.round(2000 * Math.random() - 1000) / 1000 : Math.floor(2 * Math.random())),
};

function filled(datatype, shape, fill) {
  if (shape.length) return Array.from({ length: shape[0] }, () => filled(datatype, shape.slice(1), fill));
  if (datatype === "BYTES") return "some text";
  const value = FILLS[fill](datatype);
  return datatype === "BOOL" ? Boolean(value) : value;
}

function exampleShape(model, at) {
  return model.example_shapes[at] ?? model.inputs[at][2].map((length) => (length < 0 ? 1 : length));
}

function showInputs() {
  const model = chosen();
  $("answer").replaceChildren();
  $("try-inputs").replaceChildren(...(model?.inputs ?? []).map((spec, at) => {
    const [name, datatype] = spec;
    const shape = exampleShape(model, at);
    const size = shape.reduce((product, length) => product * length, 1);
    const text = element("textarea", { name: `values-${at}`, "aria-label": `Values of ${name}, as JSON`, spellcheck: "false" });
    const suggest = () => { text.value = JSON.stringify(filled(datatype, shape, "zeros")); };
    const fills = datatype === "BYTES" ? [] : Object.keys(FILLS);
    const choices = [...fills, "these values"].map((fill, place) => {
      const input = element("input", { type: "radio", name: `fill-${at}`, value: fill, ...(place ? {} : { checked: "" }) });
      input.addEventListener("change", () => {
        text.hidden = fill !== "these values";
        if (!text.hidden && !text.value && size <= 4096) suggest();
      });
      return element("label", {}, input, ` ${fill}`);
    });
    text.hidden = fills.length > 0;
    if (!text.hidden) suggest();
    return element("fieldset", {}, element("legend", {}, signature(spec)),
      element("div", { class: "choices" }, ...choices), element("p", { class: "quiet" }, `shape ${JSON.stringify(shape)}`), text);
  }));
}

async function send(event) {
  event.preventDefault();
  const model = chosen();
  if (!model) return;
  $("try-send").disabled = true;
  try {
    const path = `v2/models/${encodeURIComponent(model.name)}/versions/${encodeURIComponent(model.version)}/infer`;
    const body = JSON.stringify({ inputs: readInputs(model) });
    const began = performance.now();
    const [answer, headers] = await ask(path, body);
    showAnswer(answer, serverTiming(headers), performance.now() - began);
    showCommand(path, body);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("answer").replaceChildren(element("p", { class: "notice bad" }, error.message));
  } finally {
    $("try-send").disabled = false;
  }
}

/** The inputs of the form, as the Open Inference Protocol has them. */
function readInputs(model) {
  const form = new FormData($("try"));
  return model.inputs.map(([name, datatype], at) => {
    const fill = form.get(`fill-${at}`);
    const data = fill === "these values" ? parsed(name, form.get(`values-${at}`))
      : filled(datatype, exampleShape(model, at), fill);
    return { name, datatype, shape: shapeOf(data), data };
  });
}

function shapeOf(data) {
  return Array.isArray(data) ? [data.length, ...(data.length ? shapeOf(data[0]) : [])] : [];
}

function parsed(name, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Refused(0, `The values of ${name} are not JSON: ${error.message}`);
  }
}

function showAnswer(answer, stages, elapsedMs) {
  const words = STAGES.map((stage) => `${stage} ${duration(1000 * stages[stage])}`);
  $("answer").replaceChildren(
    element("p", { class: "notice good" }, `${titleOf({ name: answer.model_name, version: answer.model_version })} answered ` +
      `on ${stages.device} (${stages.reason}) in ${duration(1000 * stages.total)}; ${duration(1000 * elapsedMs)} as seen here.`),
    bar(STAGES.map((stage) => [stages[stage] / stages.total, stage]), words.join(", ")),
    element("p", { class: "quiet" }, words.join(" · ")),
    element("p", { class: "quiet" }, `In a batch of ${stages.batch} rows. Predicted ${duration(1000 * stages.predicted)}, ` +
      `it took ${duration(1000 * stages.actual)}, from its queueing to the end of its batch.`),
    ...answer.outputs.flatMap((output) => [
      element("h3", {}, signature([output.name, output.datatype, output.shape])),
      element("pre", { tabindex: "0" }, spelled(output.data.slice(0, MOST_VALUES_SHOWN)) +
        (output.data.length > MOST_VALUES_SHOWN ? ` and ${digits(output.data.length - MOST_VALUES_SHOWN, 0)} more` : ""))]));
}

/** Values as JSON, those with fractions to six digits. */
function spelled(values) {
  const rounded = values.map((value) => (Number.isFinite(value) && value % 1 ? Number(value.toPrecision(6)) : value));
  return `[${rounded.map((value) => JSON.stringify(value)).join(", ")}]`;
}

function showCommand(path, body) {
  if (body.length > MOST_TEXT_SHOWN) return;
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  $("answer").append(element("details", {}, element("summary", {}, "The same with curl"),
    element("pre", { tabindex: "0" }, `curl ${quoted(new URL(path, document.baseURI).href)} -d ${quoted(body)}`)));
}

// --- start ------------------------------------------------------------------------------------------------------

async function run() {
  for (;;) {
    const began = performance.now();
    if (!document.hidden) await poll();
    await new Promise((done) => { setTimeout(done, Math.max(EVERY_MS - (performance.now() - began), 100)); });
  }
}

$("of").addEventListener("change", show);
$("daemon").addEventListener("change", () => {
  reports.length = 0;
  polls = 0;
  poll();
});
$("try").addEventListener("submit", send);
$("try-model").addEventListener("change", showInputs);
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token-text").value);
  $("token-text").value = "";
  poll();
});
run();
