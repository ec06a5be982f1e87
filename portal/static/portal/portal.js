// Small behaviours shared by every page. Everything here only improves a page that already works without it.

const root = document.documentElement;
const toasts = document.querySelector(".toasts");

function applyTheme(choice) {
  if (choice === "auto") delete root.dataset.theme;
  else root.dataset.theme = choice;
  // The server reads this cookie and writes data-theme itself, so the first paint is right.
  document.cookie = `theme=${choice}; path=/; max-age=31536000; SameSite=Lax`;
  document.dispatchEvent(new Event("portal:theme"));
}

function toast(text, seconds = 4) {
  const item = document.createElement("div");
  item.className = "toast";
  item.textContent = text;
  toasts.append(item);
  setTimeout(() => item.remove(), seconds * 1000);
}

// navigator.clipboard exists only on https and localhost; a portal inside a company network often has neither.
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "vh";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

document.addEventListener("portal:copied", () => toast(toasts.dataset.copied));

document.addEventListener("change", (event) => {
  if (event.target.name === "theme") applyTheme(event.target.value);
  if (event.target.matches("[data-submits]")) event.target.form.requestSubmit();
});

document.addEventListener("input", (event) => {
  if (event.target.dataset.filter) filterList(event.target);
  for (const id of (event.target.dataset.out ?? "").split(" ").filter(Boolean)) {
    document.getElementById(id)?.replaceChildren(event.target.value);
  }
});

function filterList(field) {
  const wanted = field.value.trim().toLowerCase();
  for (const item of document.querySelectorAll(field.dataset.filter)) {
    item.hidden = !item.textContent.toLowerCase().includes(wanted);
  }
}

document.addEventListener("click", async (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
  const opener = event.target.closest("[data-open]");
  if (opener) document.getElementById(opener.dataset.open)?.showModal();
  const closer = event.target.closest("[data-close]");
  if (closer) closer.closest("dialog").close();

  const tab = event.target.closest("[role=tab]");
  if (tab) selectTab(tab);

  const copy = event.target.closest("[data-copy]");
  if (copy) {
    const source = copy.dataset.copy
      ? document.getElementById(copy.dataset.copy)
      : copy.closest(".code, .turn")?.querySelector("pre, .md");
    // Tabs keep hidden panels inside the copied element: take what is shown.
    const shown = source?.querySelector("[role=tabpanel]:not([hidden])") ?? source;
    // innerText leaves out what is hidden; the line above a code block (language, button) is not part of the answer.
    const heads = shown?.querySelectorAll(".code-head") ?? [];
    for (const head of heads) head.hidden = true;
    const text = shown?.innerText.trim() ?? "";
    for (const head of heads) head.hidden = false;
    await copyText(text);
    toast(toasts.dataset.copied);
  }
});

document.addEventListener("submit", (event) => {
  // A slow request says so: the button is disabled and its form marked busy until the next page is there.
  const button = event.submitter;
  if (event.target.method !== "post" || event.defaultPrevented || !button) return;
  setTimeout(() => {
    if (event.defaultPrevented) return;
    event.target.setAttribute("aria-busy", "true");
    button.disabled = true;
  });
});

addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  for (const form of document.querySelectorAll("form[aria-busy]")) {
    form.removeAttribute("aria-busy");
    for (const button of form.querySelectorAll("button")) button.disabled = false;
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    const menu = event.target.closest("details.menu[open]");
    if (menu) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  }
  const tab = event.target.closest("[role=tab]");
  if (tab && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    const tabs = [...tab.parentElement.querySelectorAll("[role=tab]")];
    const step = event.key === "ArrowRight" ? 1 : tabs.length - 1;
    const next = tabs[(tabs.indexOf(tab) + step) % tabs.length];
    selectTab(next);
    next.focus();
  }
});

function selectTab(tab) {
  for (const other of tab.parentElement.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}

// Without this module every panel stays visible, one under the other.
for (const tab of document.querySelectorAll("[role=tab][aria-selected=true]")) selectTab(tab);
for (const item of document.querySelectorAll(".toast[data-fades]")) setTimeout(() => item.remove(), 6000);

/* Pages about running work fetch themselves again and swap the parts marked data-live (each has an id). So every text,
   number and translation stays in the template. The server says how often (data-live-every, seconds) and drops the mark
   when nothing changes any more. */
async function refresh() {
  if (document.hidden) return plan();
  let fresh;
  try {
    const answer = await fetch(location.href, { headers: { "X-Requested-With": "live" } });
    if (!answer.ok || answer.redirected) return plan();
    fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch {
    return plan(); // the portal restarts: try again
  }
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    if (!other || other.outerHTML === part.outerHTML || part.contains(document.activeElement)) continue;
    for (const box of part.querySelectorAll("input[type=checkbox]:checked")) {
      const same = other.querySelector(`input[name="${box.name}"][value="${CSS.escape(box.value)}"]`);
      if (same) same.checked = true; // what has been ticked stays ticked
    }
    const log = other.querySelector(".log");
    part.replaceWith(document.adoptNode(other));
    if (log) follow(log);
    document.dispatchEvent(new CustomEvent("portal:live", { detail: other }));
  }
  const every = fresh.body.dataset.liveEvery;
  if (every) document.body.dataset.liveEvery = every;
  else delete document.body.dataset.liveEvery;
  plan();
}

function plan() {
  const every = Number(document.body.dataset.liveEvery);
  if (every) setTimeout(refresh, every * 1000);
}

function follow(log) {
  if (document.getElementById("follow-log")?.checked !== false) log.scrollTop = log.scrollHeight;
}

for (const log of document.querySelectorAll(".log")) follow(log);
plan();
