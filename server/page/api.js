// Requests to this server, with the key where one is set. A 401 asks for it once for everybody.

const dialog = document.getElementById("key-dialog");
const input = document.getElementById("key-input");
const STORAGE = "fulcrum-key";
let asking = null;

export class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function askForKey() {
  asking ??= new Promise((resolve) => {
    input.value = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const key = dialog.returnValue === "ok" ? input.value.trim() : "";
      if (key) sessionStorage.setItem(STORAGE, key);
      resolve(Boolean(key));
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

function headers(hasBody) {
  const key = sessionStorage.getItem(STORAGE);
  return {
    ...(hasBody && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
  };
}

export async function request(path, { body, signal } = {}) {
  for (;;) {
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: headers(body !== undefined),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
    if (response.ok) return response;
    if (response.status === 401 && (await askForKey())) continue;
    let message = `${response.status} ${response.statusText}`;
    try {
      message = (await response.json()).error.message;
    } catch { /* not the server's own envelope: the status says it */ }
    throw new RequestError(response.status, message);
  }
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

// The events of a streamed answer, parsed.
export async function* events(path, body, signal) {
  const response = await request(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new RequestError(500, event.error.message);
      yield event;
    }
  }
}
