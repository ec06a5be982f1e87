// One conversation over one websocket. Frames are described in docs/api.md ("Websocket").
//
// The page is complete without this module: the server has rendered every turn and the composer is a form. An article of an
// answer carries its state (data-message, data-status, data-seq); the stylesheet shows what belongs to that state, so all
// texts stay in the template. After a reload or a reconnect the module attaches with the last seq it has and loses nothing.

const page = document.getElementById("main");
const thread = document.getElementById("thread");
const stream = document.getElementById("stream");
const composer = document.getElementById("composer");
const say = document.getElementById("say");
const offline = document.getElementById("offline");
const explanations = JSON.parse(document.getElementById("explanations").textContent); // by an error's code
const IN_FLIGHT = ["queued", "streaming"];
const CLOSED = { notLoggedIn: 4401, notYours: 4404 }; // chat/api/websocket.py
const ACKNOWLEDGE = 32 * 1024; // characters of frames between two acknowledgements

let socket = null;
let pause = 500; // milliseconds before the next connection attempt
let unanswered = null; // the text that was sent and that no frame has acknowledged yet
let read = 0; // characters of frames since the last acknowledgement
let sticky = true; // stay at the newest line until the reader scrolls up

const answers = () => [...thread.querySelectorAll("[data-message]")];
const inFlight = () => answers().filter((turn) => IN_FLIGHT.includes(turn.dataset.status));
const part = (turn, name) => turn.querySelector(`[data-part="${name}"]`);

stream.addEventListener("scroll", () => {
  sticky = stream.scrollHeight - stream.scrollTop - stream.clientHeight < 60;
});

function toBottom(force) {
  if (force) sticky = true;
  if (sticky) stream.scrollTop = stream.scrollHeight;
}

function busy() {
  const writing = inFlight().length > 0 || unanswered !== null;
  composer.dataset.busy = writing;
  stream.setAttribute("aria-busy", writing);
}

function setStatus(turn, status) {
  turn.dataset.status = status;
  turn.setAttribute("aria-busy", IN_FLIGHT.includes(status));
  busy();
}

function chosenModel() {
  const chip = composer.elements.model ? document.querySelector("input[name=model]:checked") : null;
  if (!chip) return null;
  return {
    checkpoint: Number(chip.dataset.checkpoint),
    adapter: chip.dataset.adapter ? Number(chip.dataset.adapter) : null, // null: prefix off
    label: chip.dataset.label,
    withHistory: chip.dataset.history !== "False", // as it was trained
  };
}

// Whether the model is shown the earlier turns: what was chosen, or null: as it was trained.
function withHistory() {
  return { yes: true, no: false }[composer.elements.history.value] ?? null;
}

// The choice that is made for the member is told in full: it depends on the model.
function tellHistory() {
  const [asTrained] = composer.elements.history.options;
  const chip = document.querySelector("input[name=model]:checked");
  const known = { False: "false", unknown: "unknown" }[chip?.dataset.history] ?? "true";
  asTrained.textContent = asTrained.dataset[known];
  composer.elements.thinking.hidden = chip?.dataset.thinking !== "switch";
  document.getElementById("plain-note").hidden = !(chip && "plain" in chip.dataset);
}

// What differs from the defaults.
function sampling() {
  const values = {};
  for (const field of composer.querySelectorAll("[data-sampling]")) {
    if (field.value !== "" && field.value !== field.dataset.default) values[field.name] = Number(field.value);
  }
  const { thinking } = composer.elements;
  if (!thinking.hidden && thinking.value) values.thinking = thinking.value === "yes";
  return values;
}

function addTurn(template) {
  document.getElementById("greeting")?.remove();
  thread.hidden = false;
  const turn = document.getElementById(template).content.firstElementChild.cloneNode(true);
  thread.append(turn);
  return turn;
}

function addQuestion(text) {
  addTurn("question-turn").querySelector(".bubble").textContent = text;
}

function addAnswer(id) {
  const model = chosenModel();
  const turn = addTurn("answer-turn");
  turn.dataset.message = id;
  turn.id = `turn-${id}`;
  for (const button of turn.querySelectorAll("button[value='']")) button.value = id;
  const edit = turn.previousElementSibling?.querySelector("[data-edit]");
  if (edit) edit.href = `?edit=${id}`; // the question of that answer
  part(turn, "alone").hidden = withHistory() ?? model?.withHistory ?? true;
  turn.dataset.seq = 0;
  const now = new Date();
  part(turn, "time").dateTime = now.toISOString();
  // as the server writes it: 24 hours, in the portal's time zone
  const clock = { hour: "2-digit", minute: "2-digit", timeZone: page.dataset.zone };
  part(turn, "time").textContent = now.toLocaleTimeString("en-GB", clock);
  const who = turn.querySelector(".who");
  who.classList.toggle("tuned", Boolean(model?.adapter));
  who.querySelector("use").setAttribute("href", model?.adapter ? "#i-prefix" : "#i-noprefix");
  who.querySelector("span").textContent = model?.label ?? "";
  return turn;
}

// What the server rendered and sanitised becomes nodes without passing through innerHTML: scripts in it would stay inert.
function nodesOf(html) {
  return [...new DOMParser().parseFromString(html, "text/html").body.childNodes];
}

// Of an answer that is rendered as it comes: the nodes of its open block, and what takes the next text.
const open = new WeakMap();

function showRendered(turn, frame) {
  const place = part(turn, "text");
  const stream = part(turn, "stream");
  const closed = nodesOf(frame.html);
  const nodes = nodesOf(frame.open);
  if (frame.from === 0) place.replaceChildren(stream);
  for (const node of open.get(turn)?.nodes ?? []) node.remove();
  stream.before(...closed, ...nodes);
  for (const node of [...closed, ...nodes]) if (node instanceof Element) addCopyButtons(node);
  for (const node of closed) if (node instanceof Element) colourCode(node);
  stream.hidden = frame.code;
  const code = frame.code ? nodes.find((node) => node.matches?.(".code")).querySelector("code") : null;
  stream.textContent = "";
  (code ?? stream).textContent = frame.text;
  open.set(turn, { nodes, target: code ?? stream });
}

function showEnd(turn, frame) {
  if (frame.html) {
    part(turn, "text").replaceChildren(...nodesOf(frame.html));
    dressCode(turn);
  }
  setStatus(turn, frame.status ?? "complete");
  if (frame.finish_reason === "length") turn.dataset.cut = "true";
  const tokens = frame.usage?.completion_tokens;
  if (tokens) part(turn, "tokens").textContent = tokens;
  const speed = frame.timings?.tokens_per_second;
  if (speed) part(turn, "speed").textContent = speed.toFixed(1);
  const timings = frame.timings ?? {};
  const first = (timings.queued_s ?? NaN) + (timings.prefill_s ?? NaN);
  turn.querySelector("[data-first]").hidden = Number.isNaN(first);
  part(turn, "first").textContent = first.toFixed(1);
  showFill(frame.usage?.total_tokens);
  turn.dataset.figures = tokens ? (speed ? "all" : "tokens") : "";
}

// How much of the context the last prompt and its answer took.
function showFill(used) {
  const fill = document.getElementById("context-fill");
  if (!fill || !used) return;
  const bar = fill.querySelector("progress");
  bar.value = Math.min(used, bar.max);
  fill.querySelector("[data-used]").textContent = bar.value.toLocaleString("en");
  fill.hidden = false;
}

const show = {
  "message.loading"(turn, frame) {
    setStatus(turn, "queued");
    const paused = frame.phase === "paused";
    part(turn, "loading").hidden = paused;
    part(turn, "paused").hidden = !paused;
    part(turn, "in-line").hidden = true;
    part(turn, "loaded").textContent = frame.checkpoint ?? "";
    part(turn, "seconds").textContent = frame.seconds;
    part(turn, "usual").hidden = !frame.usual_seconds;
    part(turn, "usual-seconds").textContent = Math.ceil(frame.usual_seconds ?? 0);
  },
  "message.queued"(turn, frame) {
    setStatus(turn, "queued");
    part(turn, "loading").hidden = part(turn, "paused").hidden = true;
    part(turn, "in-line").hidden = false;
    part(turn, "position").textContent = frame.position ?? 0;
    turn.dataset.next = (frame.position ?? 0) > 0 ? "false" : "true";
  },
  "message.started"(turn, frame) {
    setStatus(turn, "streaming");
    part(turn, "left").hidden = !frame.left_out;
    part(turn, "left-count").textContent = frame.left_out ?? 0;
  },
  "message.delta"(turn, frame) {
    setStatus(turn, "streaming");
    (open.get(turn)?.target ?? part(turn, "stream")).append(frame.text);
  },
  "message.rendered"(turn, frame) {
    setStatus(turn, "streaming");
    showRendered(turn, frame);
  },
  "message.finished": showEnd,
  "message.failed"(turn, frame) {
    const message = frame.error?.message ?? "";
    part(turn, "error").textContent = explanations[frame.error?.code] ?? message;
    part(turn, "error").title = message;
    turn.dataset.error = frame.error?.code ?? "";
    // Too long: the text is back in the composer, to be shortened.
    if (turn.dataset.error === "context_length_exceeded" && say.value === "") {
      say.value = turn.previousElementSibling?.querySelector(".bubble")?.textContent ?? "";
    }
    showEnd(turn, { ...frame, status: frame.status ?? "failed" });
  },
};

// The server closes at 256 KB that nobody acknowledged. Each acknowledgement costs it as much as a frame, so they are few.
function acknowledge(frame, size) {
  if (frame.seq == null || (read += size) < ACKNOWLEDGE) return;
  read = 0;
  socket.send(JSON.stringify({ type: "ack", message: frame.message, seq: frame.seq }));
}

function receive(frame) {
  if (frame.type === "error" || !show[frame.type] || frame.message == null) return refused(frame);
  let turn = thread.querySelector(`[data-message="${frame.message}"]`);
  if (!turn) turn = addAnswer(frame.message);
  unanswered = null;
  if (frame.seq != null) {
    if (frame.seq <= Number(turn.dataset.seq) && frame.type === "message.delta") return; // seen before the reconnect
    turn.dataset.seq = Math.max(frame.seq, Number(turn.dataset.seq));
  }
  show[frame.type](turn, frame);
  toBottom();
}

function refused(frame) {
  const text = frame.error?.message;
  if (!text) return;
  const notice = addTurn("refusal");
  part(notice, "error").textContent = text;
  if (unanswered !== null && say.value === "") say.value = unanswered;
  unanswered = null;
  busy();
  toBottom(true);
}

function attach(turn) {
  const [message, after] = [Number(turn.dataset.message), Number(turn.dataset.seq)];
  socket.send(JSON.stringify({ type: "attach", message, after, render: true }));
}

// The server's view of the conversation in place of ours.
async function reread() {
  const answer = await fetch(location.href);
  if (!answer.ok || answer.redirected) return location.reload(); // logged out, or deleted
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("thread");
  thread.replaceChildren(...fresh.childNodes);
  thread.hidden = false;
  dressCode(thread);
  toBottom();
}

// Earlier messages join those that are shown, which stay where they are.
thread.addEventListener("click", async (event) => {
  const link = event.target.closest("[data-earlier]");
  if (!link || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const answer = await fetch(link.href);
  if (!answer.ok || answer.redirected) return location.reload();
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("thread");
  fresh.querySelector(":scope > .earlier:last-child")?.remove(); // the way back to the newest
  const below = stream.scrollHeight - stream.scrollTop;
  const nodes = [...fresh.childNodes];
  link.closest(".earlier").replaceWith(...nodes);
  stream.scrollTop = stream.scrollHeight - below;
  for (const node of nodes) if (node instanceof Element) dressCode(node);
});

// A message was sent and the connection broke before any frame came: the server knows whether it arrived.
async function resynchronise() {
  const text = unanswered;
  await reread();
  unanswered = null;
  const questions = [...thread.querySelectorAll(".turn.me .bubble")];
  if (questions.at(-1)?.textContent !== text && say.value === "") say.value = text;
}

// Another tab may have gone on with this conversation meanwhile.
document.addEventListener("visibilitychange", async () => {
  if (document.hidden || socket?.readyState !== WebSocket.OPEN || composer.dataset.busy === "true") return;
  await reread();
  inFlight().forEach(attach);
  busy();
});

async function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}${page.dataset.socket}`);
  socket.addEventListener("message", (event) => {
    const frame = JSON.parse(event.data);
    acknowledge(frame, event.data.length);
    receive(frame);
  });
  socket.addEventListener("open", async () => {
    pause = 500;
    offline.hidden = true;
    if (unanswered !== null) await resynchronise();
    inFlight().forEach(attach);
    busy();
  });
  socket.addEventListener("close", (event) => {
    if (event.code === CLOSED.notLoggedIn) return location.reload(); // the session has ended: the login page
    if (event.code === CLOSED.notYours) return;
    if (pause > 500) offline.hidden = false; // one quick reconnect needs no words
    setTimeout(connect, pause);
    pause = Math.min(pause * 2, 10000);
  });
}

composer.addEventListener("submit", (event) => {
  if (event.submitter?.hasAttribute("formaction")) return; // "answer again" is an ordinary form request
  const content = say.value.trim();
  if (content === "" || composer.dataset.busy === "true") return event.preventDefault();
  if (composer.querySelectorAll("[name=models]:checked").length > 1) return; // several answers side by side: the form does it
  if (!page.dataset.socket || socket?.readyState !== WebSocket.OPEN) return; // a new conversation: the form does it
  event.preventDefault();
  const model = chosenModel();
  const frame = { type: "message.send", content, sampling: sampling(), render: true };
  if (model) Object.assign(frame, { checkpoint: model.checkpoint, adapter: model.adapter });
  if (composer.elements.system) frame.system = composer.elements.system.value;
  if (withHistory() !== null) frame.with_history = withHistory();
  socket.send(JSON.stringify(frame));
  unanswered = content;
  addQuestion(content);
  say.value = "";
  busy();
  toBottom(true);
});

document.addEventListener("change", (event) => {
  if (event.target.name === "model") tellHistory();
});
tellHistory();

document.getElementById("stop").addEventListener("click", () => {
  for (const turn of inFlight()) {
    socket?.send(JSON.stringify({ type: "message.stop", message: Number(turn.dataset.message) }));
  }
});

for (const example of document.querySelectorAll("[data-say]")) {
  example.addEventListener("click", () => {
    say.value = example.dataset.say;
    say.focus();
  });
}

// The renderer marks code blocks and names their languages; the button that copies one and the colours are the page's.
function dressCode(place) {
  addCopyButtons(place);
  colourCode(place);
}

function addCopyButtons(place) {
  for (const head of place.querySelectorAll(".code-head:not(:has(button))")) {
    head.append(document.getElementById("copy-code").content.firstElementChild.cloneNode(true));
  }
}

async function colourCode(place) {
  const blocks = place.querySelectorAll("pre > code[class^=language-]:not([data-highlighted])");
  if (blocks.length === 0) return; // most conversations never load the highlighter
  const { default: highlighter } = await import(page.dataset.highlighter);
  for (const code of blocks) {
    if (highlighter.getLanguage(code.className.slice("language-".length))) highlighter.highlightElement(code);
  }
}

document.querySelector("input[name=model]:checked")?.closest(".chip").scrollIntoView({ inline: "center", block: "nearest" });
dressCode(thread);
if (page.dataset.socket) connect();
busy();
const named = location.hash.startsWith("#turn-") && document.querySelector(location.hash);
if (named && named !== thread.lastElementChild) {
  sticky = false;
  named.scrollIntoView({ block: "center" });
} else if (!thread.hidden) toBottom(true); // a conversation opens at its newest turn, the greeting at its beginning
const edited = document.getElementById("edited");
if (edited) edited.focus();
else if (matchMedia("(min-width: 681px)").matches) say.focus();
