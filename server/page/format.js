// Numbers and elements as the page shows them.

export function bytes(count) {
  const gib = count / 2 ** 30;
  if (Math.abs(gib) >= 1) return `${gib.toFixed(gib >= 10 ? 1 : 2)} GiB`;
  const mib = count / 2 ** 20;
  return `${mib.toFixed(mib >= 100 ? 0 : 1)} MiB`;
}

export function number(value) {
  if (value >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(value >= 10 ? 1 : 2);
}

export function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

// element("p", { class: "quiet" }, "text", child, ...)
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function table(className, caption, head, rows) {
  return element("table", { class: className },
    element("caption", { class: "visually-hidden" }, caption),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows));
}

export const SETTING_NAMES = {
  quantization: "Weights",
  kv_dtype: "KV cache",
  kv_memory: "KV memory",
  max_model_len: "Context",
  max_sequences: "Sequences",
  speculation: "Speculation",
};

export function settingValue(name, value) {
  if (name === "kv_memory") return bytes(value);
  if (name === "max_model_len") return `${value.toLocaleString("en")} tokens`;
  if (name === "quantization" && value === "none") return "bf16";
  return String(value);
}
