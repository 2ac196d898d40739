// A session of meristem in the browser: the core is edge.wasm, the same source as the C library (meristem.h). Nothing is
// asked of any other host, and nothing leaves the page but a file that is saved.

const GREEDY = 0, BEGINNING = "\n", END_OF_REPLY = "\n\n";
const KINDS = ["memory", "head", "last_mlp"];  // what learns, as the core counts it
const FRAME_MS = 25;  // that the page computes before it shows what was written

class Failed extends Error {}

// Byte pairs as the tokenizers of meristem have them: words (Radford et al. 2019), and in each the first merge of all.
class Tokenizer {
  static WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

  constructor(described) {
    const model = described.model ?? {};
    const isPlain = model.type === "BPE" && described.pre_tokenizer?.type === "ByteLevel" && !described.added_tokens?.length;
    if (described.kind !== "byte" && !isPlain) throw new Failed("The tokenizer of this model is of a kind that the page does not encode.");
    this.isByte = described.kind === "byte";
    this.ids = new Map(Object.entries(model.vocab ?? {}));
    this.ranks = new Map((model.merges ?? []).map((pair, rank) => [pair.join(" "), rank]));
    // Every byte has a sign that is shown: itself, or one behind all of those.
    let next = 256;
    const isShown = (b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
    this.signs = Array.from({ length: 256 }, (_, b) => String.fromCharCode(isShown(b) ? b : next++));
    this.bytes = new TextEncoder();
  }

  encode(text) {
    if (this.isByte) return [...this.bytes.encode(text)];
    return (text.match(Tokenizer.WORDS) ?? []).flatMap((word) => this.parts(word).map((part) => this.ids.get(part)));
  }

  parts(word) {
    const parts = [...this.bytes.encode(word)].map((b) => this.signs[b]);
    while (parts.length > 1) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; ++i) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts;
  }
}

// One handle of the C interface. Memory grows, so views of it are made anew for each use.
class Model {
  constructor(core, content) {
    this.core = core;
    core._initialize?.();
    this.place = core.malloc(32);
    this.with(content, (at) => this.check(core.meristem_open_bytes(at, content.length, this.place)));
    this.handle = this.number(this.place);
  }

  get bytes() { return new Uint8Array(this.core.memory.buffer); }
  number(at) { return new DataView(this.core.memory.buffer).getInt32(at, true); }

  with(content, use) {
    const at = this.core.malloc(content.length + 1);
    if (!at) throw new Failed("The browser has no memory left for this file.");
    this.bytes.set(content, at);
    this.bytes[at + content.length] = 0;
    try {
      return use(at);
    } finally {
      this.core.free(at);
    }
  }

  check(code) {
    if (!code) return;
    const at = this.core.meristem_error(), bytes = this.bytes;
    throw new Failed(new TextDecoder().decode(bytes.slice(at, bytes.indexOf(0, at))));
  }

  get nTokens() { return Number(this.core.meristem_n_tokens(this.handle)); }
  get nIds() { return this.core.meristem_vocabulary(this.handle); }
  get logits() {
    const at = this.core.meristem_logits(this.handle);
    return at ? new Float32Array(this.core.memory.buffer, at, this.nIds).slice() : null;
  }

  read(ids) {
    const content = new Uint8Array(Int32Array.from(ids).buffer);
    this.with(content, (at) => this.check(this.core.meristem_read(this.handle, at, ids.length)));
  }

  step({ temperature = GREEDY, topP = 1, topK = 0, seed = 0 } = {}) {
    const how = new ArrayBuffer(16), view = new DataView(how);
    view.setFloat32(0, temperature, true);
    view.setFloat32(4, topP, true);
    view.setInt32(8, topK, true);
    view.setUint32(12, seed, true);
    this.with(new Uint8Array(how), (at) => this.check(this.core.meristem_step(this.handle, at, this.place)));
    return this.number(this.place);
  }

  piece(id) {
    const at = this.core.meristem_piece(this.handle, id, this.place);
    return this.bytes.slice(at, at + this.number(this.place));
  }

  // What learns from now on, before anything is read. A session that is loaded learns what it did where it was saved.
  learn(which, { chunk = 64, rate = -1, gradClip = 1 } = {}) {
    const how = new ArrayBuffer(16), view = new DataView(how);
    view.setInt32(0, KINDS.indexOf(which), true);
    view.setInt32(4, chunk, true);
    view.setFloat32(8, rate, true);
    view.setFloat32(12, gradClip, true);
    this.with(new Uint8Array(how), (at) => this.check(this.core.meristem_learn(this.handle, at)));
    this.check(this.core.meristem_learn(this.handle, 0));
  }
  get learned() {
    this.check(this.core.meristem_learning_now(this.handle, this.place));
    const view = new DataView(this.core.memory.buffer, this.place);
    return { which: KINDS[view.getInt32(0, true)], nSteps: view.getInt32(4, true), nChunks: Number(view.getBigInt64(8, true)), rate: view.getFloat32(16, true), savedNats: view.getFloat32(20, true) };
  }

  forget() { this.core.meristem_forget(this.handle); }
  load(content) { this.with(content, (at) => this.check(this.core.meristem_load_bytes(this.handle, at, content.length))); }
  save() {
    this.check(this.core.meristem_save_bytes(this.handle, this.place, this.place + 4));
    const at = this.number(this.place);
    return this.bytes.slice(at, at + this.number(this.place + 4));
  }

  note(name, value) {
    const json = new TextEncoder().encode(JSON.stringify(value));
    this.with(new TextEncoder().encode(name), (of) => this.with(json, (at) => this.check(this.core.meristem_note(this.handle, of, at, json.length))));
  }
  noted(name) {
    return this.with(new TextEncoder().encode(name), (of) => {
      const at = this.core.meristem_noted(this.handle, of, this.place);
      if (!at) return undefined;
      try {
        return JSON.parse(new TextDecoder().decode(this.bytes.slice(at, at + this.number(this.place))));
      } catch {
        return undefined;
      }
    });
  }
}

const part = (id) => document.getElementById(id);
const breath = () => new Promise((resolve) => setTimeout(resolve));

class Page {
  constructor(model, tokenizer) {
    this.model = model;
    this.tokenizer = tokenizer;
    this.turns = [];
    this.isStopped = false;
    part("open").onclick = () => part("file").click();
    part("file").onchange = () => this.tried(() => this.open());
    part("save").onclick = () => this.tried(() => this.save());
    part("new").onclick = () => this.tried(() => this.begin());
    part("learn").onchange = () => this.tried(() => this.model.learn(part("learn").value));
    part("stop").onclick = () => { this.isStopped = true; };
    part("say").onsubmit = (event) => { event.preventDefault(); this.tried(() => this.say()); };
    part("message").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      part("say").requestSubmit();
    };
    this.ready(true);
    this.told();
  }

  ready(is) {
    for (const id of ["open", "save", "new", "message", "send"]) part(id).disabled = !is;
    part("learn").disabled = !is || this.model.nTokens > 0;
    part("send").hidden = !is;
    part("stop").hidden = is;
    if (is) part("message").focus();
  }

  told() {
    part("model").textContent = `${this.model.nIds} tokens in the vocabulary, ${this.model.nTokens.toLocaleString("en")} read`;
    const { which, nSteps, nChunks, rate, savedNats } = this.model.learned;
    part("learn").value = which;
    const undone = nChunks && !nSteps ? (rate ? "undone, " : "given up, ") : "";
    part("learned").textContent = which === "memory" ? "" : `${undone}${nSteps} step${nSteps === 1 ? "" : "s"}, rate ${Number(rate.toPrecision(3))}, saved ${savedNats.toFixed(2)} nats`;
  }

  async tried(work) {
    part("error").hidden = true;
    try {
      await work();
    } catch (error) {
      part("error").textContent = error instanceof WebAssembly.RuntimeError ? "The core stopped: the browser has no memory left. Reload the page." : error.message;
      part("error").hidden = false;
    }
    this.ready(true);
    this.told();
  }

  shown(kind, text) {
    const line = document.createElement("p");
    line.className = kind;
    line.textContent = text;
    part("turns").append(line);
    part("turns").scrollTop = part("turns").scrollHeight;
    return line;
  }

  begin() {
    this.model.forget();
    this.clear("A new session. The model runs in this page; what you write stays on this machine.");
  }

  clear(note) {
    this.turns = [];
    part("turns").replaceChildren();
    this.shown("muted", note);
  }

  async open() {
    const file = part("file").files[0];
    part("file").value = "";
    if (!file) return;
    this.model.load(new Uint8Array(await file.arrayBuffer()));
    const turns = this.model.noted("turns");
    const how = this.model.noted("sampling");
    if (Number.isFinite(how?.temperature)) part("temperature").value = how.temperature;
    this.clear(`${file.name}: ${this.model.nTokens.toLocaleString("en")} tokens were read in it.${Array.isArray(turns) ? "" : " The file does not hold what was said; the memory does."}`);
    for (const turn of Array.isArray(turns) ? turns : []) {
      if (typeof turn?.text === "string" && turn.text) this.shown("said", turn.text.trim());
      if (typeof turn?.reply === "string" && turn.reply) this.shown("reply", turn.reply.trim());
      if (turn && typeof turn === "object") this.turns.push(turn);
    }
  }

  save() {
    if (this.turns.length) this.model.note("turns", this.turns);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([this.model.save()], { type: "application/octet-stream" }));
    link.download = `session-${this.model.nTokens}.safetensors`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  // Compute in portions, so that the page stays alive; false once it was stopped.
  async *portions() {
    let until = performance.now() + FRAME_MS;
    while (!this.isStopped) {
      yield;
      if (performance.now() < until) continue;
      await breath();
      until = performance.now() + FRAME_MS;
    }
  }

  async say() {
    const text = part("message").value;
    if (!text.trim()) return;
    part("message").value = "";
    this.isStopped = false;
    this.ready(false);
    this.shown("said", text);
    const line = this.shown("reply", ""), before = this.model.nTokens, seed = crypto.getRandomValues(new Uint32Array(1))[0];
    const how = { temperature: Math.max(Number(part("temperature").value) || 0, 0), seed };
    const most = Math.max(Math.trunc(Number(part("most").value)) || 1, 1);
    const ids = this.tokenizer.encode(text + BEGINNING), characters = new TextDecoder();
    let reply = "", nRead = 0, nDrawn = 0, spent = 0;
    const timed = (work) => { const from = performance.now(); const found = work(); spent += performance.now() - from; return found; };
    try {
      for await (const _ of this.portions()) {
        if (nRead < ids.length) {
          timed(() => this.model.read(ids.slice(nRead, ++nRead)));
          continue;
        }
        const id = timed(() => this.model.step(how));
        ++nDrawn;
        reply += characters.decode(this.model.piece(id), { stream: true });
        line.textContent = reply.trimStart();
        part("turns").scrollTop = part("turns").scrollHeight;
        if (nDrawn >= most || reply.trimStart().includes(END_OF_REPLY)) break;
      }
    } finally {
      reply += characters.decode();
      line.textContent = reply.trim();
      this.turns.push({ turn: this.turns.length + 1, text: text + BEGINNING, reply, finish: this.isStopped ? "stop" : nDrawn >= most ? "length" : "stop", n_read: nRead, n_drawn: nDrawn });
      part("speed").textContent = `${Math.round((this.model.nTokens - before) / Math.max(spent / 1000, 1e-6)).toLocaleString("en")} tokens/s`;
    }
  }
}

const fetched = async (name) => {
  const found = await fetch(name);
  if (!found.ok) throw new Failed(`${name} is not beside this page (${found.status}). Serve the whole folder.`);
  return found;
};

try {
  const from = performance.now();
  const [core, content, described] = await Promise.all([
    fetched("edge.wasm").then((found) => found.arrayBuffer()).then((bytes) => WebAssembly.instantiate(bytes, {})),
    fetched("model.safetensors").then((found) => found.arrayBuffer()),
    fetched("tokenizer.json").then((found) => found.json()),
  ]);
  const loaded = performance.now();
  const page = new Page(new Model(core.instance.exports, new Uint8Array(content)), new Tokenizer(described));
  document.documentElement.dataset.openMs = Math.round(performance.now() - loaded);
  document.documentElement.dataset.startMs = Math.round(performance.now() - from);
  globalThis.meristem = page;
} catch (error) {
  part("error").textContent = location.protocol === "file:" ? "A page that is opened as a file may not read the model beside it. Serve the folder: python -m http.server" : `The model could not be opened: ${error.message}`;
  part("error").hidden = false;
  part("model").textContent = "";
}
