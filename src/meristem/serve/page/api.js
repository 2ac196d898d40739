// Requests to the server that this page came from, with the key where one was given.

const KEY = "meristem.key";

/** What the server refused: its message, status and code. */
export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Keep a key for this tab, until it is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

async function sent(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new Refused("The server does not answer. Is it still running?", 0, "unreachable");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // Something between here and the server answered, in its own way.
  }
  return new Refused(error.message ?? `The server answered with status ${answer.status}.`, answer.status, error.code);
}

/** The JSON that a request is answered with. */
export async function ask(path, options) {
  return (await sent(path, options)).json();
}

/** Send a request whose answer is a stream of events, and call `hear` with the JSON of each, as it comes. */
export async function listen(path, body, signal, hear) {
  const answer = await sent(path, { method: "POST", body, signal });
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    waiting += decoder.decode(value, { stream: true });
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Refused(found.error.message, 0, found.error.code);
      hear(found);
    }
  }
  throw new Refused("The reply was broken off.", 0, "broken_off");
}

/** Every session, in the order of their ids. */
export async function allSessions() {
  const found = [];
  for (let after = ""; ; ) {
    const page = await ask(`/v1/sessions?limit=1000&after=${after}`);
    found.push(...page.data);
    if (!page.has_more) return found;
    after = page.data[page.data.length - 1].id;
  }
}
