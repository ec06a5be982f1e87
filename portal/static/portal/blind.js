// Blind review by keyboard: 1 or ← the left answer, 2 or → the right one, 0 or space neither.
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 0: "tie", " ": "tie" };

document.addEventListener("keydown", (event) => {
  const side = KEYS[event.key];
  if (!side || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = document.querySelector(`#blind button[value="${side}"]`);
  if (!button) return;
  event.preventDefault();
  button.click();
});
