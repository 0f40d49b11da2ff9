// The tables below the form: memory by level, techniques, receipts.

import { bytes, element, number, percent, settingValue, SETTING_NAMES, table } from "./format.js";

const COMPONENTS = ["weights", "kv", "activations", "draft", "runtime"];
const COMPONENT_NAMES = { weights: "Weights", kv: "KV cache", activations: "Activations", draft: "Draft", runtime: "Runtime" };

export { COMPONENTS, COMPONENT_NAMES };

export function showLevels(container, { levels, available_bytes: available }) {
  const head = [element("th", { scope: "col" }, "Component"),
    ...levels.map((level) => element("th", { scope: "col", class: "number" }, level.name))];
  const rows = COMPONENTS.filter((name) => levels.some((level) => level.memory[name])).map((name) =>
    element("tr", {}, element("th", { scope: "row" }, COMPONENT_NAMES[name]),
      ...levels.map((level) => element("td", { class: "number" }, bytes(level.memory[name])))));
  rows.push(element("tr", {}, element("th", { scope: "row" }, "Total"),
    ...levels.map((level) => element("td", { class: "number" },
      element("strong", {}, bytes(level.total_bytes)),
      level.total_bytes > available ? element("span", { class: "range worse" }, "does not fit") : null))));
  container.replaceChildren(table("levels-table", "Memory by component for each level", head, rows));
}

export function showTechniques(container, { techniques }) {
  const head = ["Technique", "State", "Evidence"].map((name) => element("th", { scope: "col" }, name));
  const rows = techniques.map((row) => {
    const state = row.enabled ? ["on", "● in use"] : row.qualified ? ["yes", "✓ qualifies"] : ["no", "– does not"];
    return element("tr", {},
      element("th", { scope: "row" }, row.name),
      element("td", { class: `mark ${state[0]}` }, state[1]),
      element("td", {}, row.evidence,
        row.needs ? element("span", { class: "range" }, `Needs ${row.needs}.`) : null,
        row.gained ? element("span", { class: "range better" }, `Gained: ${row.gained}`) : null));
  });
  container.replaceChildren(table("techniques-table", "Techniques with evidence", head, rows));
}

export function showReceipts(container, { receipts }) {
  if (!receipts.length) {
    container.replaceChildren(element("p", { class: "quiet" },
      "None yet. After each applied setting, what was promised stands here beside what was measured."));
    return;
  }
  container.replaceChildren(...receipts.map(receiptNode));
}

export function receiptNode(receipt) {
  const facts = [];
  const { speed, memory, quality } = receipt;
  if (speed?.measured) {
    const how = speed.basis === "estimated" ? "estimated beforehand" : "promised";
    const promised = speed.predicted
      ? `, ${how} ${number(speed.predicted.value)} (${number(speed.predicted.low)} to ${number(speed.predicted.high)})`
      : "";
    facts.push(["Speed", `${number(speed.measured)} tokens/s measured${promised}`]);
  }
  if (memory) {
    const sum = (parts) => Object.values(parts).reduce((a, b) => a + b, 0);
    facts.push(["Memory", `${bytes(sum(memory.measured))} measured, promised ${bytes(sum(memory.predicted))}`]);
  }
  if (quality?.kl_divergence !== null && quality?.kl_divergence !== undefined) {
    facts.push(["Quality", `KL ${quality.kl_divergence.toFixed(4)}, same token ${percent(quality.top1_agreement)} (${quality.basis})`]);
  } else if (quality) facts.push(["Quality", quality.note || quality.basis]);
  if (receipt.longest_pause_s) {
    const [state] = Object.entries(receipt.pauses_s).find(([, seconds]) => seconds === receipt.longest_pause_s);
    facts.push(["Longest pause", `${(1000 * receipt.longest_pause_s).toFixed(0)} ms, while ${state}`]);
  }
  if (receipt.build_s) facts.push(["Built in", `${receipt.build_s.toFixed(1)} s, ${receipt.mode.replace("_", " ")}`]);
  return element("article", { class: "receipt" },
    element("div", {},
      element("span", { class: `outcome ${receipt.outcome}` }, receipt.outcome.replace("_", " ")),
      element("span", { class: "range" }, element("time", { datetime: receipt.at }, new Date(receipt.at).toLocaleString()))),
    element("div", {},
      element("div", {}, changes(receipt) || receipt.reason),
      element("dl", {}, ...facts.map(([name, value]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
      element("span", { class: "range" }, receipt.reason)));
}

function changes({ before, after }) {
  return Object.keys(after).filter((name) => before[name] !== after[name] && before[name] !== null)
    .map((name) => `${SETTING_NAMES[name] ?? name} ${settingValue(name, before[name])} → ${settingValue(name, after[name])}`)
    .join(", ");
}
