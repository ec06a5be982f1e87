// The form of a new tuning run: a preset fills it in, and the same run as a command follows what is in it.

const form = document.getElementById("run-form");
const { presets, chatglm, checkpoints, url } = JSON.parse(document.getElementById("run-form-data").textContent);
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
  document.querySelector("#panel-cli code").textContent = lines.join(" \\\n  ");
  const body = { dataset, checkpoint, ...(preset && { preset }), ...(name && { name }), ...hyper };
  const json = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  document.querySelector("#panel-curl code").textContent =
    `curl -X POST ${url} \\\n  -H "Authorization: Bearer $KEY" \\\n  -H "Content-Type: application/json" \\\n  -d '${json}'`;
}

form.addEventListener("input", (event) => {
  if (event.target.name === "preset-choice") fill(event.target.value);
  else show();
});
document.getElementById("commands").hidden = false;
show();
