// The page at /: the list of sessions, the conversation, and what can be done with a session.

import { Refused, allSessions, ask, hasKey, listen, useKey } from "./api.js";
import { element, nats, short } from "./chart.js";
import { memoryView } from "./memory.js";

const MOST_LISTED = 200;
const LONGEST_NAME = 60;
const HINTS = ["Ada lives in Oslo.", "Bruno works as a baker.", "Where does Ada live?"];

const at = (id) => document.getElementById(id);
const memory = memoryView();
const now = { sessions: [], session: null, turns: [], waiting: [], isBusy: false, abort: null };

/**
 * Do something for the user when what came before is done: controls rest meanwhile, and what is refused is said.
 * After a refusal nothing that waits is done, so that the user sees it first.
 */
async function act(work) {
  now.waiting.push(work);
  if (now.isBusy) return showControls();
  now.isBusy = true;
  while (now.waiting.length) {
    const next = now.waiting.shift();
    memory.pause();
    at("wrong").hidden = true;
    showControls();
    try {
      await next();
    } catch (error) {
      now.waiting = [];
      complain(error);
    }
  }
  now.isBusy = false;
  memory.resume();
  showControls();
}

function complain(error) {
  if (error.status === 401) {
    at("key-form").hidden = false;
    at("key").focus();
    if (!hasKey()) return;
  }
  at("wrong").textContent = error instanceof Refused ? error.message : `This page failed: ${error.message}`;
  at("wrong").hidden = false;
}

function showControls() {
  const { session, isBusy } = now;
  const isWriting = now.abort !== null;
  for (const id of ["save", "fork", "forget"]) at(id).disabled = isBusy || !session?.turn;
  at("delete").disabled = isBusy || !session;
  at("send").hidden = isWriting;
  at("waiting").textContent = now.waiting.length ? "It will be sent after this." : "";
  at("stop").hidden = !isWriting;
  at("log").setAttribute("aria-busy", String(isWriting));
  for (const button of document.querySelectorAll("#list button, #turns button, #new")) button.disabled = isBusy;
}

// Sessions

/** All sessions, the one used last first. */
function showList() {
  const sessions = now.sessions.sort((one, other) => other.used - one.used);
  at("list").replaceChildren(...sessions.slice(0, MOST_LISTED).map(listed));
  const rest = sessions.length - MOST_LISTED;
  at("list-note").textContent = rest > 0 ? `and ${rest} used less recently` : sessions.length ? "" : "There is none yet.";
}

function listed(session) {
  const isOpen = session.id === now.session?.id;
  return element(
    "li",
    {},
    element(
      "button",
      { type: "button", class: "session", "aria-current": isOpen ? "true" : null, onclick: () => act(() => open(session.id)) },
      element("span", { class: "name" }, session.name),
      element("span", { class: "muted small number" }, `${counted(session.turn, "turn")} · ${counted(session.n_tokens, "token")}`),
    ),
  );
}

async function open(id) {
  const session = await ask(`/v1/sessions/${id}`);
  const turns = (await ask(`/v1/sessions/${id}/turns`)).data;
  Object.assign(now, { session, turns, sessions: [session, ...others(id)] });
  history.replaceState(null, "", `#${id}`);
  showView("chat");
  showList();
  showSession();
}

function others(id) {
  return now.sessions.filter((each) => each.id !== id);
}

function close() {
  Object.assign(now, { session: null, turns: [] });
  history.replaceState(null, "", "#");
  at("wrong").hidden = true;
  showView("chat");
  showList();
  showSession();
}

/** Ask the server for the session again, and show it. */
async function refresh() {
  await open(now.session.id);
}

function showSession() {
  const { session, turns } = now;
  at("session-name").textContent = session?.name ?? "New session";
  at("session-state").textContent = session
    ? `${counted(session.n_tokens, "token")} read · ${bytes(session.size_bytes)} remembered${session.learn === "memory" ? "" : ` · learns: ${session.learn}`}`
    : "";
  at("welcome").hidden = turns.length > 0;
  at("learn").parentElement.hidden = session !== null;
  at("turns").replaceChildren(...turns.map(turnEntry));
  at("log").scrollTop = at("log").scrollHeight;
  memory.show(session, turns);
  showControls();
}

// The conversation

function turnEntry(turn) {
  const entry = element("li", { class: "turn", "data-turn": turn.turn });
  if (turn.text) entry.append(said("You", "text", turn.text));
  if (turn.n_drawn) entry.append(said("meristem", "reply", turn.reply));
  const figures = [`Turn ${turn.turn}`, counted(turn.n_read + turn.n_drawn, "token")];
  if (turn.n_read) figures.push(`surprise ${nats(turn.nats / turn.n_read)} nats a token`);
  const last = now.turns[now.turns.length - 1];
  entry.append(
    element(
      "div",
      { class: "below" },
      element("span", { class: "muted small number" }, figures.join(" · ")),
      turn.label ? element("span", { class: "label small" }, `saved: ${turn.label}`) : null,
      element("button", { type: "button", class: "quiet small", "aria-label": `Inspect turn ${turn.turn}`, onclick: () => inspect(turn.turn) }, "Inspect"),
      turn.can_return && turn.turn !== last.turn
        ? element("button", { type: "button", class: "quiet small", "aria-label": `Roll back to turn ${turn.turn}`, onclick: () => rollBack(turn.turn) }, "Roll back to here")
        : null,
    ),
  );
  return entry;
}

function said(who, kind, text) {
  return element("p", { class: kind }, element("span", { class: "unseen" }, `${who}: `), text);
}

function inspect(turn) {
  memory.select(turn);
  showView("memory");
  at("turn").focus();
}

async function send() {
  if (!at("message").value.trim()) return at("message").focus();
  await act(async () => {
    const text = at("message").value.trim();
    if (!text) return; // it was sent while this waited
    if (!now.session) {
      const name = text.length > LONGEST_NAME ? `${text.slice(0, LONGEST_NAME - 1)}…` : text;
      now.session = await ask("/v1/sessions", { method: "POST", body: { name, learn: at("learn").value } });
    }
    at("message").value = "";
    const isOnlyRead = at("only-read").checked;
    try {
      await (isOnlyRead ? read(text) : reply(text));
    } catch (error) {
      // A turn is kept whole or not at all: what was not read is there to be sent again, before what was typed since.
      at("message").value = [text, at("message").value].filter(Boolean).join("\n");
      if (error.name !== "AbortError") {
        await refresh().catch(() => {});
        throw error;
      }
      now.waiting = [];
      await refresh();
      at("status").textContent = "Stopped. Nothing of this turn was kept.";
      at("turns").append(element("li", { class: "notice small" }, "Stopped. Nothing of this turn was kept; your message is back in the field."));
      at("log").scrollTop = at("log").scrollHeight;
      return;
    }
    await refresh();
    at("status").textContent = isOnlyRead ? "It has read the text." : "The reply is complete.";
  });
  at("message").focus();
}

async function read(text) {
  begun(text).remove();
  await ask(`/v1/sessions/${now.session.id}/feed`, { method: "POST", body: { text } });
}

async function reply(text) {
  const place = begun(text);
  now.abort = new AbortController();
  showControls();
  const body = { session: now.session.id, messages: [{ role: "user", content: text }], stream: true };
  try {
    await listen("/v1/chat/completions", body, now.abort.signal, (chunk) => {
      const piece = chunk.choices[0]?.delta?.content;
      if (!piece) return;
      place.append(piece);
      at("log").scrollTop = at("log").scrollHeight;
    });
  } finally {
    now.abort = null;
    place.classList.remove("writing");
  }
}

/** The turn that is on its way, in the log; gives where its reply goes. */
function begun(text) {
  at("welcome").hidden = true;
  const place = said("meristem", "reply", "");
  place.classList.add("writing");
  at("turns").append(element("li", { class: "turn" }, said("You", "text", text), place));
  at("log").scrollTop = at("log").scrollHeight;
  return place;
}

// What can be done with a session

async function save() {
  const label = await asked({
    title: "Save this turn",
    text: "The session can return to it, however much is said later. Without a name the last 16 turns are kept.",
    yes: "Save",
    value: `Turn ${now.session.turn}`,
  });
  if (label) await act(async () => done(await post("save", { label }), "Saved."));
}

async function fork() {
  const name = await asked({
    title: "Fork this session",
    text: "A second session begins where this one stands. From here on neither knows of the other.",
    yes: "Fork",
    value: `${now.session.name} (fork)`.slice(0, 200),
  });
  if (!name) return;
  await act(async () => {
    now.session = await post("fork", { name });
    await done(null, "This is the fork.");
  });
}

async function rollBack(to) {
  const isSure = await asked({
    title: `Roll back to turn ${to}?`,
    text: `What was said after turn ${to} is deleted, from the memory and from the disk. Fork first to keep it.`,
    yes: "Roll back",
  });
  if (isSure) await act(async () => done(await post("rollback", { to }), `Back at turn ${to}.`));
}

async function forget() {
  const isSure = await asked({
    title: "Forget everything?",
    text: "The memory becomes what it was before the first turn, and all turns are deleted from the disk, saved ones too.",
    yes: "Forget",
  });
  if (isSure) await act(async () => done(await post("rollback", { to: 0 }), "Forgotten."));
}

async function remove() {
  const isSure = await asked({
    title: "Delete this session?",
    text: `“${now.session.name}” and its memory are deleted from the disk. That cannot be undone.`,
    yes: "Delete",
  });
  if (!isSure) return;
  await act(async () => {
    const { id } = now.session;
    await ask(`/v1/sessions/${id}`, { method: "DELETE" });
    now.sessions = others(id);
    close();
    at("status").textContent = "Deleted.";
  });
  at("message").focus();
}

function post(what, body) {
  return ask(`/v1/sessions/${now.session.id}/${what}`, { method: "POST", body });
}

async function done(_, text) {
  await refresh();
  at("status").textContent = text;
}

/** Ask the user: true or the text given, and false where it is cancelled. */
function asked({ title, text, yes, value }) {
  at("ask-title").textContent = title;
  at("ask-text").textContent = text;
  at("ask-yes").textContent = yes;
  at("ask-field").hidden = value === undefined;
  at("ask-value").value = value ?? "";
  at("ask-value").required = value !== undefined;
  const dialog = at("ask");
  dialog.returnValue = "";
  dialog.showModal();
  if (value !== undefined) at("ask-value").select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" && (value === undefined || at("ask-value").value.trim())), { once: true });
  });
}

// Everything else

/** On a narrow screen one of the three parts is seen at a time. */
function showView(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("[data-to]")) button.setAttribute("aria-pressed", String(button.dataset.to === name));
}

function counted(n, what) {
  return `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
}

function bytes(n) {
  return n < 1000 ? `${n} B` : n < 1e6 ? `${short(n / 1e3)} kB` : `${short(n / 1e6)} MB`;
}

async function begin() {
  const models = await ask("/v1/models");
  const name = models.data[0].id;
  at("model").textContent = name === "meristem" ? "" : name;
  now.sessions = await allSessions();
  showList();
  const wanted = location.hash.slice(1);
  if (now.sessions.some((each) => each.id === wanted)) await open(wanted);
  at("key-form").hidden = true;
}

at("hints").append(
  ...HINTS.map((text) =>
    element("li", {}, element("button", { type: "button", class: "hint", onclick: () => ((at("message").value = text), at("message").focus()) }, text)),
  ),
);
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => now.abort?.abort());
at("new").addEventListener("click", () => (close(), at("message").focus()));
at("save").addEventListener("click", save);
at("fork").addEventListener("click", fork);
at("forget").addEventListener("click", forget);
at("delete").addEventListener("click", remove);
at("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("ask").close("yes");
});
at("ask-no").addEventListener("click", () => at("ask").close("no"));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
  at("key").value = "";
  act(begin);
});
for (const button of document.querySelectorAll("[data-to]")) button.addEventListener("click", () => showView(button.dataset.to));
showSession();
act(begin);
