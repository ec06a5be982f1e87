// How many rows the lengths of the form would cut: asked of the newest check of that dataset with that base, which a
// button starts where there is none.

const part = document.getElementById("cuts");
const form = document.getElementById("run-form");
const [told, button] = [part.querySelector("[data-told]"), part.querySelector("button")];
const URL_OF_CHECKS = part.dataset.url;
let wish = 0; // number of the newest question: answers to earlier ones are dropped

const ask = async (path, options) => {
  const answer = await fetch(path, { headers: { Accept: "application/json" }, ...options });
  return answer.ok ? answer.json() : null;
};

function say(lines, tone) {
  told.replaceChildren(...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })));
  if (tone) part.dataset.tone = tone;
  else delete part.dataset.tone;
}

const of = (name) => form.elements[name].value;

async function show() {
  const mine = ++wish;
  const query = new URLSearchParams({ dataset: of("dataset"), checkpoint: of("checkpoint"), status: "succeeded" });
  const found = (await ask(`${URL_OF_CHECKS}?${query}`))?.results[0];
  if (mine !== wish) return;
  button.hidden = Boolean(found);
  if (!found) return say([part.dataset.unknown]);
  const lengths = new URLSearchParams({
    max_source_length: of("max_source_length"),
    max_target_length: of("max_target_length"),
  });
  const cuts = await ask(`${URL_OF_CHECKS}${found.id}/cuts/?${lengths}`);
  if (mine !== wish || !cuts) return;
  say(cuts.told.length ? cuts.told : [part.dataset.fits], cuts.told.length ? "warn" : "good");
}

button.addEventListener("click", async () => {
  button.disabled = true;
  let run = await ask(URL_OF_CHECKS, {
    method: "POST",
    headers: {
      Accept: "application/json",
      "Content-Type": "application/json",
      "X-CSRFToken": form.elements.csrfmiddlewaretoken.value,
    },
    body: JSON.stringify({ dataset: Number(of("dataset")), checkpoint: Number(of("checkpoint")) }),
  });
  while (run && ["queued", "running"].includes(run.status)) {
    say([`${part.dataset.counting} ${Math.round(100 * run.progress)}%`]);
    await new Promise((done) => setTimeout(done, 1000));
    run = await ask(`${URL_OF_CHECKS}${run.id}/`);
  }
  button.disabled = false;
  if (run?.status === "succeeded") await show();
  else say([run?.error?.message ?? part.dataset.failed], "bad");
});

form.addEventListener("change", (event) => {
  if (["dataset", "checkpoint", "preset-choice", "max_source_length", "max_target_length"].includes(event.target.name)) show();
});
part.hidden = false;
show();
