/* Names each cell of a list by its column, for narrow screens, where admin.css stacks them. */
const heads = [...document.querySelectorAll("#result_list thead th")].map((head) =>
  (head.querySelector(".text") ?? head).textContent.trim(),
);
for (const row of document.querySelectorAll("#result_list tbody tr")) {
  [...row.cells].forEach((cell, at) => {
    if (heads[at] && !cell.querySelector(".action-select")) cell.dataset.label = heads[at];
  });
}
