// The form of settings: its preview beside today's, apply with progress, and the receipt.

import { json } from "./api.js";
import { bytes, element, number, percent, table } from "./format.js";
import { COMPONENTS, COMPONENT_NAMES, receiptNode } from "./tables.js";

const PREVIEW_DELAY_MS = 250;
const POLL_MS = 250;
const STEPS = [["previewing", "Preview"], ["building", "Build"], ["checking", "Self-check"],
  ["switching", "Switch"], ["measuring", "Measure"]];
const LEVEL_NAMES = { auto: "Auto", none: "bf16", off: "Off", ngram: "Lookup", mtp: "MTP head" };

export class Settings {
  constructor(onApplied) {
    this.onApplied = onApplied;
    this.form = document.getElementById("preview-form");
    this.preview = document.getElementById("preview");
    this.applyButton = document.getElementById("apply-button");
    this.resetButton = document.getElementById("reset-button");
    this.status = document.getElementById("apply-status");
    this.today = null;
    this.applying = false;
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.changed());
    this.applyButton.addEventListener("click", () => this.apply());
    this.resetButton.addEventListener("click", () => this.show(this.overview));
  }

  show(overview) {
    this.overview = overview;
    this.today = overview.today.setting;
    const choices = (kind, field) => overview.techniques
      .filter((row) => row.kind === kind && row.qualified && row.setting?.[field])
      .map((row) => row.setting[field]);
    const { kv_memory: kv, max_model_len: length, max_sequences: count } = this.today;
    const mostKv = Math.max(kv, overview.available_bytes);
    this.form.replaceChildren(
      segments("quantization", "Weights", choices("weights", "quantization"), this.today.quantization),
      segments("kv_dtype", "Keys and values", choices("kv", "kv_dtype"), this.today.kv_dtype),
      segments("speculation", "Speculation",
        ["off", "auto", ...choices("speculation", "speculation")], this.today.speculation),
      slider("kv_memory", "KV memory", powers(32 * 2 ** 20, mostKv, kv), kv, bytes),
      slider("max_model_len", "Longest sequence", powers(256, overview.max_position, length), length,
        (value) => `${value.toLocaleString("en")} tokens`),
      slider("max_sequences", "Sequences at once", powers(1, 256, count), count, String),
      slider("concurrency", "Streams to predict for", powers(1, 64, 8), 8, String));
    this.changed(0);
    if (overview.apply && !this.applying && !ended(overview.apply)) this.follow(overview.apply);
  }

  // What the form changes of today's values.
  proposal() {
    const changed = {};
    for (const [name, value] of Object.entries(this.today)) {
      const chosen = this.value(name);
      if (chosen !== undefined && chosen !== value) changed[name] = chosen;
    }
    return changed;
  }

  value(name) {
    const field = this.form.elements[name];
    if (!field) return undefined;
    return field.choices ? field.choices[Number(field.value)] : field.value;
  }

  changed(delayMs = PREVIEW_DELAY_MS) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), delayMs);
    const isSame = Object.keys(this.proposal()).length === 0;
    this.applyButton.disabled = true;
    this.resetButton.disabled = isSame;
  }

  async refresh() {
    this.abort?.abort();
    this.abort = new AbortController();
    const proposal = this.proposal();
    this.preview.setAttribute("aria-busy", "true");
    if (!this.preview.firstChild) {
      this.preview.append(element("p", { class: "quiet" },
        "Measuring this machine for the first preview; this takes some seconds."));
    }
    try {
      const body = { ...proposal, concurrency: this.value("concurrency") };
      const { today, proposed } = await json("/v1/optimizations/preview", { body, signal: this.abort.signal });
      const isSame = Object.keys(proposal).length === 0;
      this.preview.replaceChildren(...this.previewNodes(today, proposed, isSame));
      this.applyButton.disabled = isSame || !proposed.memory.fits || this.applying;
    } catch (error) {
      if (error.name === "AbortError") return;
      this.preview.replaceChildren(element("p", { class: "notice bad", role: "alert" }, error.message));
    }
    this.preview.setAttribute("aria-busy", "false");
  }

  previewNodes(today, proposed, isSame) {
    const scale = Math.max(today.memory.total_bytes, proposed.memory.total_bytes);
    const rows = [["Today", today]];
    if (!isSame) rows.push(["Proposed", proposed]);
    const nodes = [
      element("div", { class: "bars" }, ...rows.flatMap(([name, side]) => bar(name, side.memory, scale))),
      legend(proposed.memory.components, today.memory.components),
    ];
    if (!proposed.memory.fits) nodes.push(this.shortage(proposed.memory));
    nodes.push(comparison(today, proposed, isSame));
    nodes.push(element("p", { class: "basis" }, `Memory of ${bytes(proposed.memory.available_bytes)} available. Speed: ${proposed.speed_basis}.`));
    return nodes;
  }

  shortage(memory) {
    return element("div", { class: "notice bad", role: "alert" },
      `${bytes(memory.short_bytes)} short of memory.`,
      element("div", { class: "remedies" }, ...memory.remedies.slice(0, 4).map((remedy) =>
        element("button", { type: "button", onclick: () => this.fill(remedy.setting) }, remedy.text))));
  }

  fill(setting) {
    for (const [name, value] of Object.entries(setting)) {
      const field = this.form.elements[name];
      if (!field) continue;
      if (!field.choices) field.value = value;
      else {
        // The largest value that does not exceed it.
        const index = Math.max(0, field.choices.filter((v) => v <= value).length - 1);
        field.value = String(index);
        field.dispatchEvent(new Event("input", { bubbles: true }));
      }
    }
    this.changed(0);
  }

  async apply() {
    const body = {
      ...this.proposal(),
      concurrency: this.value("concurrency"),
      auto_rollback: document.getElementById("auto-rollback").checked,
    };
    this.applyButton.disabled = true;
    try {
      await this.follow(await json("/v1/optimizations/apply", { body }));
    } catch (error) {
      this.status.replaceChildren(element("p", { class: "notice bad", role: "alert" }, error.message));
    }
  }

  async follow(status) {
    this.applying = true;
    this.applyButton.disabled = true;
    let last = "previewing";
    while (!ended(status)) {
      last = status.state;
      this.status.replaceChildren(steps(last, false), element("p", { class: "quiet" }, status.detail));
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      status = await json(`/v1/optimizations/apply/${encodeURIComponent(status.id)}`);
    }
    this.applying = false;
    this.status.replaceChildren(
      steps(status.state === "done" ? null : last, status.state !== "done"),
      status.receipt ? receiptNode(status.receipt) : element("p", {}, status.detail));
    await this.onApplied();
  }
}

function ended(status) {
  return ["done", "failed", "rolled_back"].includes(status.state);
}

function segments(name, title, values, chosen) {
  return element("fieldset", { class: values.length > 5 ? "wide" : null }, element("legend", {}, title),
    element("div", { class: "segments" }, ...values.map((value) =>
      element("label", {},
        element("input", { type: "radio", name, value, checked: value === chosen }),
        LEVEL_NAMES[value] ?? value))));
}

function slider(name, title, values, chosen, show) {
  const id = `setting-${name}`;
  const output = element("output", { for: id }, show(chosen));
  const input = element("input", {
    type: "range", id, name, min: 0, max: values.length - 1, step: 1, value: values.indexOf(chosen),
    "aria-valuetext": show(chosen),
  });
  input.choices = values;
  input.addEventListener("input", () => {
    const text = show(values[Number(input.value)]);
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
  });
  return element("div", { class: "slider" }, element("label", { for: id }, title), output, input);
}

// Powers of two, and the half steps between, within the bounds, with today's value among them.
function powers(least, most, today) {
  const values = new Set([today]);
  for (let value = least; value <= most; value *= 2) {
    values.add(value);
    if (value >= 64 && 1.5 * value <= most) values.add(1.5 * value);
  }
  return [...values].sort((a, b) => a - b);
}

function bar(name, memory, scale) {
  const parts = COMPONENTS.filter((part) => memory.components[part]);
  const text = parts.map((part) => `${COMPONENT_NAMES[part]} ${bytes(memory.components[part])}`).join(", ");
  const track = element("div", { class: "bar", role: "img", "aria-label": `${name}: ${text}` });
  for (const part of parts) {
    const piece = element("span", { class: part, title: `${COMPONENT_NAMES[part]} ${bytes(memory.components[part])}` });
    piece.style.width = `${(100 * memory.components[part]) / scale}%`;
    track.append(piece);
  }
  return [element("span", { class: "name" }, name), track,
    element("span", { class: "total" }, bytes(memory.total_bytes))];
}

function legend(components, others) {
  const parts = COMPONENTS.filter((part) => components[part] || others[part]);
  return element("ul", { class: "legend" }, ...parts.map((part) =>
    element("li", {}, element("i", { class: part }), `${COMPONENT_NAMES[part]} ${bytes(components[part])}`)));
}

function comparison(today, proposed, isSame) {
  const head = ["", "Today", ...(isSame ? [] : ["Proposed", "Change"])].map((name, index) =>
    element("th", { scope: "col", class: index ? "number" : null }, name || element("span", { class: "visually-hidden" }, "Figure")));
  const count = proposed.speed?.concurrency ?? today.speed?.concurrency;
  const rows = [
    row("One stream, tokens/s", today.speed?.decode_tokens_per_s, proposed.speed?.decode_tokens_per_s, isSame),
    row(`${count ?? ""} streams, tokens/s`, today.speed?.total_tokens_per_s, proposed.speed?.total_tokens_per_s, isSame),
    ...draftRows(today.speed, proposed.speed, isSame),
    row("Prefill, tokens/s", today.speed?.prefill_tokens_per_s, proposed.speed?.prefill_tokens_per_s, isSame),
    row("First token, ms", today.speed?.ttft_ms, proposed.speed?.ttft_ms, isSame, true),
    row(`Sequences of ${proposed.routes.sequence_tokens} tokens`, point(today.routes.count), point(proposed.routes.count), isSame),
    qualityRow(today.quality, proposed.quality, isSame),
  ];
  return table("compare", "Today's figures and the proposed ones", head, rows);
}

// What drafts add, where either side has some.
function draftRows(today, proposed, isSame) {
  const sides = isSame ? [today] : [today, proposed];
  if (!sides.some((speed) => speed && speed.speculation !== "off")) return [];
  const cells = sides.map((speed) => {
    if (!speed) return element("td", { class: "number" }, "unknown");
    if (speed.speculation === "off") return element("td", { class: "number" }, "off");
    return element("td", { class: "number" }, `× ${speed.speculation_gain.toFixed(2)}`,
      element("span", { class: "range" }, speed.speculation));
  });
  return [element("tr", {}, element("th", { scope: "row" }, "Drafts, one stream"), ...cells,
    isSame ? null : element("td", {}))];
}

function point(value) {
  return { value };
}

function row(name, today, proposed, isSame, lessIsBetter = false) {
  const cells = [cell(today), ...(isSame ? [] : [cell(proposed), change(today, proposed, lessIsBetter)])];
  return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
}

function cell(interval) {
  if (!interval) return element("td", { class: "number" }, "unknown");
  const range = interval.low === undefined ? null
    : element("span", { class: "range" }, `${number(interval.low)} to ${number(interval.high)}`);
  const text = Number.isInteger(interval.value) ? interval.value.toLocaleString("en") : number(interval.value);
  return element("td", { class: "number" }, text, range);
}

function change(today, proposed, lessIsBetter) {
  if (!today?.value || !proposed) return element("td", { class: "number" }, "");
  const share = proposed.value / today.value - 1;
  if (Math.abs(share) < 0.005) return element("td", { class: "number" }, "=");
  const isBetter = share > 0 !== lessIsBetter;
  const text = `${share > 0 ? "+" : "−"}${Math.abs(100 * share).toFixed(0)} %`;
  return element("td", { class: `number ${isBetter ? "better" : "worse"}` }, text);
}

function qualityRow(today, proposed, isSame) {
  const show = (quality) => {
    if (quality.kl_divergence === null) return element("td", { class: "number" }, quality.basis, element("span", { class: "range" }, quality.note));
    return element("td", { class: "number" }, percent(quality.top1_agreement),
      element("span", { class: "range" }, `KL ${quality.kl_divergence.toFixed(4)}, ${quality.basis}`));
  };
  return element("tr", {}, element("th", { scope: "row" }, "Same token as bf16"),
    show(today), ...(isSame ? [] : [show(proposed), element("td", {})]));
}

// The way of an apply; `now` is the step it is in, null once it has arrived.
function steps(now, isBroken) {
  const at = now === null ? STEPS.length : STEPS.findIndex(([state]) => state === now);
  return element("ol", { class: "steps" }, ...STEPS.map(([, name], index) =>
    element("li", {
      class: index < at ? "past" : index > at ? null : isBroken ? "broken" : "now",
      "aria-current": index === at ? "step" : null,
    }, name)));
}
