// What is set before a message is sent: which model, which models side by side, how; and the keys that send it. The messages
// themselves are chat.js's.

const composer = document.getElementById("composer");
const say = document.getElementById("say");

// An input method's Enter chooses a word and must not send half a sentence. Chromium and Firefox say so (isComposing, or key
// code 229); Safari ends the composition before the Enter that ended it, so what follows at once belongs to it still.
let composed = -Infinity; // when a composition ended
document.addEventListener("compositionend", (event) => {
  composed = event.timeStamp;
});
function composing(event) {
  return event.isComposing || event.keyCode === 229 || event.timeStamp - composed < 50;
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || !event.target.matches("#say, #edited")) return;
  if (composing(event)) return;
  event.preventDefault();
  if (composer.dataset.busy === "true") return;
  composer.requestSubmit(document.getElementById(event.target === say ? "send" : "send-edited"));
});

// The list of all models: the search has the focus, Enter takes the first match, arrows walk the rest. What is chosen joins the
// row above the conversation.
const picker = document.getElementById("picker");
const pickable = () => [...picker.querySelectorAll("[data-model]:not([hidden]) input")];

function choose(model) {
  const label = model.closest("[data-model]");
  label.className = "chip";
  document.querySelector(".chat-head .chips").prepend(label);
  picker.open = false;
  say.focus();
}

picker?.addEventListener("toggle", () => {
  if (picker.open) picker.querySelector("[type=search]").focus();
});
picker?.addEventListener("keydown", (event) => {
  if (composing(event)) return;
  const searching = event.target.type === "search";
  if (event.key === "Escape") {
    picker.open = false;
    picker.querySelector("summary").focus();
  } else if (event.key === "ArrowDown" && searching) {
    pickable()[0]?.focus();
  } else if (event.key === "Enter" && event.target.matches("input")) {
    const model = searching ? pickable()[0] : event.target;
    if (!model) return;
    model.checked = true;
    model.dispatchEvent(new Event("change", { bubbles: true }));
    choose(model);
  } else return;
  event.preventDefault();
});
picker?.addEventListener("click", (event) => {
  // an arrow key clicks too (detail is 0): it only walks
  if (event.detail > 0 && event.target.closest("[data-model]")) setTimeout(() => choose(picker.querySelector("input[name=model]:checked")));
});

// Models to compare: no more than the server takes, and how many there are.
const compare = document.getElementById("compare");
compare?.addEventListener("change", () => {
  const boxes = [...compare.querySelectorAll("[name=models]")];
  const chosen = boxes.filter((box) => box.checked);
  const most = Number(compare.querySelector("[data-most]").dataset.most);
  for (const box of boxes) box.disabled = !box.checked && chosen.length >= most;
  compare.querySelector("[data-count]").textContent = chosen.length || "";
  compare.classList.toggle("on", chosen.length > 1);
});

// What has been typed and not been sent outlives the page.
const draft = `draft ${location.pathname}`;
say.value ||= sessionStorage.getItem(draft) ?? "";
addEventListener("pagehide", () => {
  if (say.value.trim()) sessionStorage.setItem(draft, say.value);
  else sessionStorage.removeItem(draft);
});
composer.addEventListener("submit", (event) => {
  if (event.submitter?.id !== "send" || event.defaultPrevented) return;
  setTimeout(() => { say.value = ""; }); // the form has taken it
});

function setSampling(field, value) {
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
}
document.getElementById("sampling-reset")?.addEventListener("click", () => {
  for (const field of composer.querySelectorAll("[data-sampling]")) setSampling(field, field.dataset.default);
});
for (const preset of document.querySelectorAll("[data-preset]")) {
  preset.addEventListener("click", () => {
    for (const name of ["temperature", "top_p"]) setSampling(composer.elements[name], preset.dataset[name]);
  });
}

// An answer's own text, as the model wrote it, in place of what its rendering shows.
async function sourceOf(turn) {
  const answer = await fetch(`/api/v1/messages/${turn.dataset.message}/`);
  return (await answer.json()).content;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy-source]");
  if (!button) return;
  const source = sourceOf(button.closest("[data-message]"));
  if (navigator.clipboard?.write && window.ClipboardItem) {
    // as a promise: Safari allows copying only while the click is handled
    const text = source.then((content) => new Blob([content], { type: "text/plain" }));
    await navigator.clipboard.write([new ClipboardItem({ "text/plain": text })]);
  } else {
    const area = Object.assign(document.createElement("textarea"), { value: await source, className: "vh" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  document.dispatchEvent(new Event("portal:copied"));
});

// A rating is written down without loading the page anew; the same again takes it back.
document.addEventListener("submit", async (event) => {
  const button = event.submitter;
  if (event.target.id !== "turn-form" || !["up", "down"].includes(button?.name)) return;
  event.preventDefault();
  const body = new FormData(event.target, button);
  const answer = await fetch(button.formAction, { method: "POST", body, redirect: "manual" });
  if (answer.type !== "opaqueredirect") return location.reload();
  const pressed = button.getAttribute("aria-pressed") === "true";
  for (const other of button.parentElement.querySelectorAll("[name=up], [name=down]")) {
    other.setAttribute("aria-pressed", other === button && !pressed);
  }
});

// What the answer should have been: the dialog begins with what it is.
const correct = document.getElementById("correct");
document.addEventListener("click", async (event) => {
  const turn = event.target.closest("[data-correct]")?.closest("[data-message]");
  if (!turn) return;
  correct.querySelector("[name=message]").value = turn.dataset.message;
  correct.querySelector("textarea").value = await sourceOf(turn);
  correct.showModal();
  correct.querySelector("textarea").focus();
});
document.querySelector("dialog[data-opened]")?.showModal();
