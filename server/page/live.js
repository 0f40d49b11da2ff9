// The tiles at the top: what /metrics and, where there are any, telemetry and speculation say.

import { json, request } from "./api.js";
import { bytes, element, number } from "./format.js";

const NUM_POINTS = 90;
const INTERVAL_MS = 1000;
const SVG = "http://www.w3.org/2000/svg";

const TILES = [
  { id: "speed", title: "Output", unit: "tokens/s", show: number },
  { id: "ttft", title: "Time to first token", unit: "ms", show: number },
  { id: "kv", title: "KV cache in use", unit: "%", show: (v) => v.toFixed(1), most: 100 },
  { id: "requests", title: "Requests", unit: "running", show: (v) => String(v) },
  { id: "speculation", title: "Speculation", unit: "tokens/step", show: (v) => v.toFixed(2), optional: true },
  { id: "memory", title: "Device memory", unit: "%", show: (v) => v.toFixed(0), most: 100, optional: true },
  { id: "utilization", title: "Device load", unit: "%", show: (v) => v.toFixed(0), most: 100, optional: true },
  { id: "temperature", title: "Temperature", unit: "°C", show: (v) => v.toFixed(0), optional: true },
  { id: "energy", title: "Energy", unit: "tokens/J", show: (v) => v.toFixed(2), optional: true },
  { id: "power", title: "Power", unit: "W", show: (v) => v.toFixed(0), optional: true },
];

class Tile {
  constructor({ title, unit, show, most, optional }) {
    this.points = [];
    this.show = show;
    this.most = most;
    this.value = element("p", { class: "value" }, "–");
    this.note = element("p", { class: "note" });
    this.unit = unit;
    this.title = title;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${NUM_POINTS - 1} 40`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.area = document.createElementNS(SVG, "path");
    this.area.setAttribute("class", "area");
    this.curve = document.createElementNS(SVG, "path");
    this.curve.setAttribute("class", "curve");
    this.svg.append(this.area, this.curve);
    this.node = element("article", { class: "tile", hidden: optional },
      element("h3", {}, title), this.value, this.note, this.svg);
  }

  push(value, note = "") {
    this.points = [...this.points, value].slice(-NUM_POINTS);
    this.node.hidden = false;
    this.value.replaceChildren(
      value === null ? "–" : this.show(value), element("small", {}, ` ${this.unit}`));
    this.note.textContent = note;
    this.draw();
  }

  draw() {
    const known = this.points.map((value) => value ?? 0);
    const most = this.most ?? Math.max(1e-9, ...known) * 1.15;
    const first = NUM_POINTS - known.length;
    const places = known.map((v, i) => `${first + i},${(38 - 35 * Math.min(1, v / most)).toFixed(1)}`);
    const line = `M${places.join("L")}`;
    this.curve.setAttribute("d", line);
    this.area.setAttribute("d", `${line}L${NUM_POINTS - 1},40L${first},40Z`);
    const last = this.points.at(-1);
    const text = last === null ? "no value" : `${this.show(last)} ${this.unit}`;
    this.svg.setAttribute("aria-label", `${this.title}, last ${known.length} s, now ${text}`);
  }
}

function parseMetrics(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = /^(fulcrum_\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) samples.set(match[1], (samples.get(match[1]) ?? 0) + Number(match[2]));
  }
  return samples;
}

export class Live {
  constructor(container) {
    this.tiles = new Map(TILES.map((tile) => [tile.id, new Tile(tile)]));
    container.append(...[...this.tiles.values()].map((tile) => tile.node));
    this.former = null;
    this.paths = null;
    this.ttft = null;
  }

  start() {
    const turn = async () => {
      if (!document.hidden) await this.refresh();
      setTimeout(turn, INTERVAL_MS);
    };
    turn();
  }

  async refresh() {
    const dot = document.getElementById("health-dot");
    const text = document.getElementById("health-text");
    try {
      const samples = parseMetrics(await (await request("/metrics")).text());
      this.showMetrics(samples, performance.now());
      const health = await fetch("/health");
      const { status } = await health.json();
      dot.className = `dot ${health.ok ? (status === "ok" ? "ok" : "warn") : "bad"}`;
      text.textContent = status;
    } catch {
      dot.className = "dot bad";
      text.textContent = "unreachable";
      this.former = null;
      return;
    }
    await this.optional("/v1/telemetry", (report) => this.showTelemetry(report));
    await this.optional("/v1/speculation", (report) => this.showSpeculation(report));
  }

  showMetrics(samples, nowMs) {
    const get = (name) => samples.get(`fulcrum_${name}`) ?? 0;
    const former = this.former;
    const counts = {
      tokens: get("generated_tokens_total"),
      ttftSum: get("time_to_first_token_seconds_sum"),
      ttftCount: get("time_to_first_token_seconds_count"),
    };
    this.former = { ...counts, nowMs };
    if (former) {
      const speed = (1000 * (counts.tokens - former.tokens)) / (nowMs - former.nowMs);
      this.tiles.get("speed").push(speed, `${counts.tokens.toLocaleString("en")} in all`);
      if (counts.ttftCount > former.ttftCount) {
        this.ttft = (1000 * (counts.ttftSum - former.ttftSum)) / (counts.ttftCount - former.ttftCount);
      }
      this.tiles.get("ttft").push(this.ttft, this.ttft === null ? "no request yet" : "of the latest requests");
    }
    this.tiles.get("kv").push(100 * get("kv_usage_ratio"),
      `${get("kv_blocks_held").toLocaleString("en")} of ${get("kv_blocks").toLocaleString("en")} blocks`);
    this.tiles.get("requests").push(get("requests_running"), `${get("requests_waiting")} waiting`);
  }

  showTelemetry(report) {
    // What computes; where telemetry is off, whatever is sensed.
    const samples = report.samples ?? {};
    const sample = samples[report.source] ?? samples.gpu ?? samples.host;
    if (!sample) return;
    const { memory_used_bytes: used, memory_total_bytes: total } = sample;
    if (used && total) this.tiles.get("memory").push((100 * used) / total, `${bytes(used)} of ${bytes(total)}`);
    if (typeof sample.utilization === "number") {
      this.tiles.get("utilization").push(100 * sample.utilization, sample.name ?? "");
    }
    if (typeof sample.temperature_c === "number") this.tiles.get("temperature").push(sample.temperature_c);
    this.showEnergy(sample.energy_j);
    if (typeof sample.power_w === "number") this.tiles.get("power").push(sample.power_w);
  }

  // Tokens generated for each joule since the last look; nothing where none were.
  showEnergy(joules) {
    const tokens = this.former?.tokens;
    if (typeof joules !== "number" || tokens === undefined) return;
    const former = this.formerEnergy;
    this.formerEnergy = { joules, tokens };
    if (!former || joules <= former.joules) return;
    this.tiles.get("energy").push((tokens - former.tokens) / (joules - former.joules));
  }

  showSpeculation(report) {
    const used = report.drafters.filter((drafter) => drafter.num_drafts > 0);
    if (used.length === 0) return;
    this.tiles.get("speculation").push(report.tokens_per_step,
      `${used.map((drafter) => drafter.name).join(", ")}, K ${report.num_verified}`);
  }

  // An endpoint that this server may not have; its own description says so.
  async optional(path, show) {
    try {
      this.paths ??= new Set(Object.keys((await json("/openapi.json")).paths));
      if (this.paths.has(path)) show(await json(path));
    } catch (error) {
      if (error.status === 401) this.paths = new Set();
    }
  }
}
