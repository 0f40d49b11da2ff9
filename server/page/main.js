// Starts the page's parts and keeps what they share: the server's account of its settings.

import { askForKey, json } from "./api.js";
import { Chat } from "./chat.js";
import { Live } from "./live.js";
import { Settings } from "./settings.js";
import { showLevels, showReceipts, showTechniques } from "./tables.js";

const chat = new Chat();
const settings = new Settings(refresh);
document.getElementById("key-button").addEventListener("click", async () => {
  if (await askForKey()) await refresh();
});
new Live(document.getElementById("tiles")).start();

async function refresh() {
  const models = await json("/v1/models");
  chat.model = models.data[0].id;
  document.getElementById("model-name").textContent = chat.model;
  document.title = `${chat.model} · Fulcrum`;
  let overview;
  try {
    overview = await json("/v1/optimizations");
  } catch (error) {
    // A server without a control plane has nothing to show here.
    for (const id of ["settings", "levels", "techniques", "receipts"]) {
      document.getElementById(id).closest("section").hidden = error.status === 404;
    }
    return;
  }
  document.getElementById("model-formats").textContent =
    `${overview.today.formats.split(", ").filter((part) => !part.endsWith("(0)")).join(", ")} · KV ${overview.today.setting.kv_dtype} · ${overview.today.isa}`;
  settings.show(overview);
  showLevels(document.getElementById("levels"), overview);
  showTechniques(document.getElementById("techniques"), overview);
  showReceipts(document.getElementById("receipts"), overview);
}

refresh();
