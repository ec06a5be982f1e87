// Uploading a dataset: suggests the columns from the file's head, shows how far the upload is, keeps the form when it is refused.

const HEAD = 1 << 20; // bytes of the file that are looked at for its columns

const field = (name) => document.querySelector(`#upload [name="${name}"]`);

document.addEventListener("change", async (event) => {
  if (event.target.name !== "file" || !event.target.files.length) return;
  const file = event.target.files[0];
  const note = document.getElementById("suggestion");
  note.hidden = true;
  if (/\.(gz|tgz|zip|tar|xlsx)$/i.test(file.name)) return; // packed: the server recognises the columns when it unpacks
  const body = new FormData();
  body.append("file", file.slice(0, HEAD), file.name);
  body.append("csrfmiddlewaretoken", field("csrfmiddlewaretoken").value);
  const answer = await fetch(document.getElementById("upload").dataset.columns, { method: "POST", body });
  const found = await answer.json();
  note.hidden = false;
  note.dataset.tone = answer.ok ? "" : "bad";
  if (!answer.ok) return note.firstElementChild.replaceChildren(found.problem);
  const text = document.getElementById("found-text").content.firstElementChild.cloneNode(true);
  text.querySelector("[data-part=columns]").textContent = found.columns.join(", ");
  note.firstElementChild.replaceChildren(text);
  const list = document.getElementById("column-names");
  list.replaceChildren(...found.columns.map((name) => Object.assign(document.createElement("option"), { value: name })));
  for (const name of ["prompt_column", "response_column", "history_column"]) field(name).value = found[name] ?? "";
  if (field("name").value === "") field("name").value = file.name.replace(/\.[^.]+$/, "");
});

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.id !== "upload") return;
  event.preventDefault();
  const area = document.getElementById("upload-progress");
  const bar = area.querySelector("progress");
  const request = new XMLHttpRequest();
  request.open("POST", form.action);
  request.setRequestHeader("Accept", "application/json");
  request.upload.addEventListener("progress", (step) => {
    bar.value = Math.round((100 * step.loaded) / step.total);
    document.getElementById("upload-percent").textContent = `${bar.value}%`;
  });
  request.upload.addEventListener("load", () => {
    bar.removeAttribute("value"); // sent; how long the check takes is not known
    document.getElementById("upload-percent").textContent = "";
    area.querySelector("[data-when-sending]").hidden = true;
    area.querySelector("[data-when-checking]").hidden = false;
  });
  request.addEventListener("load", () => {
    if (request.status < 300) return location.assign(JSON.parse(request.responseText).url);
    const fresh = new DOMParser().parseFromString(request.responseText, "text/html").getElementById("upload-part");
    if (!fresh) return form.submit();
    // A file field cannot be filled by a page: carry the chosen file over, so that only what was wrong is done again.
    for (const name of ["file", "validation"]) fresh.querySelector(`[name=${name}]`).replaceWith(field(name));
    document.getElementById("upload-part").replaceWith(document.adoptNode(fresh));
    document.querySelector("#upload-part [role=alert], #upload-part .error")?.scrollIntoView({ block: "center" });
  });
  request.addEventListener("error", () => form.submit());
  area.hidden = false;
  form.querySelector("button[type=submit]").disabled = true;
  request.send(new FormData(form));
});
