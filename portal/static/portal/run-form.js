// The form of a new tuning run: a preset fills it in, and the same run as a command follows what is in it.

const form = document.getElementById("run-form");
const { presets, chatglm, checkpoints, url, measured } = JSON.parse(document.getElementById("run-form-data").textContent);
const recipe = [...form.querySelectorAll("[data-recipe]")];

function fill(name) {
  form.elements.preset.value = name;
  const quantises = chatglm.includes(Number(form.elements.checkpoint.value));
  for (const field of recipe) {
    let value = presets[name][field.name];
    if (field.name === "quantization_bit" && !quantises) value = null; // only ChatGLM-6B is quantised on loading
    if (field.type === "checkbox") field.checked = value;
    else field.value = value ?? "";
  }
  show();
}

// What differs from the preset; without a preset (a copied recipe) everything.
function values() {
  const preset = presets[form.elements.preset.value] ?? {};
  const found = {};
  for (const field of recipe) {
    let value = field.type === "checkbox" ? field.checked : field.value;
    if (field.dataset.recipe === "text") value = value.trim();
    else if (value === "") value = null;
    else if (typeof value === "string" && !Number.isNaN(Number(value))) value = Number(value);
    if (value !== preset[field.name]) found[field.name] = value;
  }
  if (!chatglm.includes(Number(form.elements.checkpoint.value)) && found.quantization_bit === null) delete found.quantization_bit;
  return found;
}

const quoted = (text) => (/^[\w.,/+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

// One variant as REST takes it; values with spaces stay the server's to read.
function changes(line) {
  const pairs = [...line.matchAll(/([\w-]+)=('[^']*'|"[^"]*"|[^\s,]+)/g)].map(([, key, value]) => {
    const bare = value.replace(/^(['"])(.*)\1$/, "$2");
    const typed = bare !== "" && !Number.isNaN(Number(bare)) ? Number(bare) : { true: true, false: false }[bare] ?? bare;
    return [key.replaceAll("-", "_"), typed];
  });
  return Object.fromEntries(pairs);
}

function show() {
  const [preset, name] = [form.elements.preset.value, form.elements.name.value];
  const [dataset, checkpoint] = [Number(form.elements.dataset.value), Number(form.elements.checkpoint.value)];
  const hyper = values();
  const lines = ["python manage.py train", `--dataset ${dataset}`, `--checkpoint ${quoted(checkpoints[checkpoint] ?? "")}`];
  if (preset) lines.push(`--preset ${preset}`);
  if (name) lines.push(`--name ${quoted(name)}`);
  for (const [key, value] of Object.entries(hyper)) {
    if (value === false) continue; // a flag that is left out
    const flag = `--${key.replaceAll("_", "-")}`;
    lines.push(value === true ? flag : `${flag} ${value === null ? 0 : quoted(String(value))}`);
  }
  const variants = form.elements.sweep.value.split("\n").map((line) => line.trim()).filter(Boolean);
  for (const variant of variants) lines.push(`--variant ${quoted(variant)}`);
  document.querySelector("#panel-cli code").textContent = lines.join(" \\\n  ");
  const body = { dataset, checkpoint, ...(preset && { preset }), ...(name && { name }), ...hyper, ...(variants.length && { sweep: variants.map(changes) }) };
  const json = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  document.querySelector("#panel-curl code").textContent =
    `curl -X POST ${url} \\\n  -H "Authorization: Bearer $KEY" \\\n  -H "Content-Type: application/json" \\\n  -d '${json}'`;
}

const estimate = document.getElementById("estimate");

function duration(seconds) {
  const [unit, n] = seconds < 90 ? ["seconds", seconds] : seconds < 5400 ? ["minutes", seconds / 60] : ["hours", seconds / 3600];
  return estimate.dataset[unit].replace("{n}", n < 10 && unit !== "seconds" ? n.toFixed(1) : Math.round(n));
}

// Time by the speed that the newest run on the base told: rows weigh what their longest may be.
function guess() {
  const known = measured[form.elements.checkpoint.value];
  const read = (name) => Number(form.elements[name].value) || 0;
  const rows = read("per_device_train_batch_size") * read("gradient_accumulation_steps") * (1 + (read("kl_weight") ? read("kl_share") : 0));
  const variants = Math.max(1, form.elements.sweep.value.split("\n").filter((line) => line.trim()).length);
  const tokens = read("max_source_length") + read("max_target_length") + read("pre_seq_len");
  const seconds = known && (read("max_steps") * rows * variants * tokens) / known.tokens / known.rows_per_second;
  if (!known || !Number.isFinite(seconds) || seconds <= 0) {
    estimate.textContent = known ? "" : estimate.dataset.unknown;
    return;
  }
  const text = known.memory ? estimate.dataset.known : estimate.dataset.timed;
  estimate.textContent = text
    .replace("{time}", duration(seconds))
    .replace("{run}", known.run)
    .replace("{memory}", `${(known.memory / 2 ** 30).toFixed(1)} GiB`);
}

form.addEventListener("input", (event) => {
  if (event.target.name === "preset-choice") fill(event.target.value);
  else show();
  guess();
});
document.getElementById("commands").hidden = false;
show();
guess();
