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
  };
}

// What differs from the defaults.
function sampling() {
  const values = {};
  for (const field of composer.querySelectorAll("[data-sampling]")) {
    if (field.value !== "" && field.value !== field.dataset.default) values[field.name] = Number(field.value);
  }
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
function showRendered(turn, html) {
  const parsed = new DOMParser().parseFromString(html, "text/html");
  part(turn, "text").replaceChildren(...parsed.body.childNodes);
  dressCode(turn);
}

function showEnd(turn, frame) {
  if (frame.html) showRendered(turn, frame.html);
  setStatus(turn, frame.status ?? "complete");
  if (frame.finish_reason === "length") turn.dataset.cut = "true";
  const tokens = frame.usage?.completion_tokens;
  if (tokens) part(turn, "tokens").textContent = tokens;
  const speed = frame.timings?.tokens_per_second;
  if (speed) part(turn, "speed").textContent = speed.toFixed(1);
  turn.dataset.figures = tokens ? (speed ? "all" : "tokens") : "";
}

const show = {
  "message.queued"(turn, frame) {
    setStatus(turn, "queued");
    part(turn, "position").textContent = frame.position ?? 0;
    turn.dataset.next = (frame.position ?? 0) > 0 ? "false" : "true";
  },
  "message.started"(turn) {
    setStatus(turn, "streaming");
  },
  "message.delta"(turn, frame) {
    setStatus(turn, "streaming");
    part(turn, "stream").append(frame.text);
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
  socket.send(JSON.stringify({ type: "attach", message: Number(turn.dataset.message), after: Number(turn.dataset.seq) }));
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
  if (!page.dataset.socket || socket?.readyState !== WebSocket.OPEN) return; // a new conversation: the form does it
  event.preventDefault();
  const model = chosenModel();
  const frame = { type: "message.send", content, sampling: sampling() };
  if (model) Object.assign(frame, { checkpoint: model.checkpoint, adapter: model.adapter });
  socket.send(JSON.stringify(frame));
  unanswered = content;
  addQuestion(content);
  say.value = "";
  busy();
  toBottom(true);
});

say.addEventListener("keydown", (event) => {
  // isComposing: Enter chooses a word in an input method and must not send half a sentence.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (composer.dataset.busy !== "true") composer.requestSubmit(document.getElementById("send"));
});

document.getElementById("stop").addEventListener("click", () => {
  for (const turn of inFlight()) {
    socket?.send(JSON.stringify({ type: "message.stop", message: Number(turn.dataset.message) }));
  }
});

document.getElementById("sampling-reset")?.addEventListener("click", () => {
  for (const field of composer.querySelectorAll("[data-sampling]")) {
    field.value = field.dataset.default;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }
});

for (const example of document.querySelectorAll("[data-say]")) {
  example.addEventListener("click", () => {
    say.value = example.dataset.say;
    say.focus();
  });
}

// The renderer marks code blocks and names their languages; the button that copies one and the colours are the page's.
async function dressCode(place) {
  for (const head of place.querySelectorAll(".code-head:not(:has(button))")) {
    head.append(document.getElementById("copy-code").content.firstElementChild.cloneNode(true));
  }
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
if (!thread.hidden) toBottom(true); // a conversation opens at its newest turn, the greeting at its beginning
if (matchMedia("(min-width: 681px)").matches) say.focus();
