// The conversation: streams an answer and says how fast it came.

import { events } from "./api.js";
import { element, number } from "./format.js";

const MAX_TOKENS = 512;

export class Chat {
  constructor() {
    this.log = document.getElementById("chat-log");
    this.input = document.getElementById("chat-input");
    this.send = document.getElementById("chat-send");
    this.stop = document.getElementById("chat-stop");
    this.empty = this.log.firstElementChild;
    this.messages = [];
    this.abort = null;
    this.model = "";
    document.getElementById("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(this.input.value.trim());
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask(this.input.value.trim());
    });
    this.stop.addEventListener("click", () => this.abort?.abort());
    document.getElementById("chat-clear").addEventListener("click", () => this.clear());
  }

  clear() {
    this.abort?.abort();
    this.messages = [];
    this.log.replaceChildren(this.empty);
    this.input.focus();
  }

  async ask(text) {
    if (!text || this.abort) return;
    this.empty.remove();
    this.input.value = "";
    this.messages.push({ role: "user", content: text });
    this.log.append(element("div", { class: "message user" }, text));
    const content = document.createTextNode("");
    const stats = element("span", { class: "stats" });
    const answer = element("div", { class: "message assistant", "aria-busy": true }, content, stats);
    this.log.append(answer);
    this.setBusy(true);
    try {
      await this.stream(content, stats);
    } catch (error) {
      if (error.name !== "AbortError") {
        answer.classList.add("error");
        stats.textContent = error.message;
      }
    } finally {
      this.messages.push({ role: "assistant", content: content.data });
      answer.removeAttribute("aria-busy");
      this.setBusy(false);
    }
  }

  async stream(content, stats) {
    const began = performance.now();
    const body = {
      model: this.model,
      messages: this.messages,
      max_tokens: MAX_TOKENS,
      stream: true,
      stream_options: { include_usage: true },
      fulcrum: { usage: true },
    };
    let first = null;
    let numChunks = 0;
    let usage = null;
    for await (const event of events("/v1/chat/completions", body, this.abort.signal)) {
      usage = event.usage ?? usage;
      const piece = event.choices[0]?.delta?.content;
      if (!piece) continue;
      first ??= performance.now();
      numChunks += 1;
      const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
      content.data += piece;
      stats.textContent = describe(began, first, numChunks, usage);
      if (atEnd) this.log.scrollTop = this.log.scrollHeight;
    }
    stats.textContent = describe(began, first, numChunks, usage);
  }

  setBusy(isBusy) {
    this.abort = isBusy ? new AbortController() : null;
    this.send.disabled = isBusy;
    this.stop.hidden = !isBusy;
    this.log.scrollTop = this.log.scrollHeight;
  }
}

function describe(began, first, numChunks, usage) {
  if (first === null) return "";
  const numTokens = usage?.completion_tokens ?? numChunks;
  const seconds = (performance.now() - first) / 1000;
  const parts = [`${numTokens} tokens`];
  if (numTokens > 1 && seconds > 0) parts.push(`${number((numTokens - 1) / seconds)} tokens/s`);
  parts.push(`first after ${Math.round(first - began)} ms`);
  const own = usage?.fulcrum;
  if (own?.drafted_tokens) parts.push(`${own.accepted_tokens} of ${own.drafted_tokens} drafts accepted`);
  if (usage?.prompt_tokens_details?.cached_tokens) {
    parts.push(`${usage.prompt_tokens_details.cached_tokens} prompt tokens from the cache`);
  }
  return parts.join(" · ");
}
