// The loss curve of a run: uPlot over the figures that the page carries as JSON; portal.js swaps them while the run trains.

const box = document.getElementById("loss-chart");
let plot = null;

function figures() {
  return JSON.parse(document.getElementById("loss-data").textContent);
}

// Canvas cannot read light-dark(): resolve a token through an element's computed colour.
function colour(token) {
  const probe = document.createElement("span");
  probe.hidden = true;
  box.append(probe);
  probe.style.color = `var(${token})`;
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

// Exponential mean, corrected for its start, so that the first points are not pulled to zero.
function smooth(values, keep = 0.7) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function data(points) {
  const losses = points.map((point) => point[1]);
  return [points.map((point) => point[0]), losses, smooth(losses)];
}

function draw() {
  const { total, points } = figures();
  if (points.length === 0) return;
  plot?.destroy();
  box.replaceChildren();
  const accent = colour("--accent");
  const axis = { stroke: colour("--ink-3"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  plot = new window.uPlot(
    {
      width: box.clientWidth,
      height: 240,
      padding: [12, 18, 0, 0],
      cursor: { y: false, drag: { x: true, y: false } },
      legend: { live: true },
      scales: { x: { time: false, range: (_plot, low, high) => (high >= total * 0.98 || low > 0.02 * total ? [low, high] : [0, total]) } },
      axes: [axis, { ...axis, size: 40 }],
      series: [
        { label: box.dataset.step },
        { label: box.dataset.loss, stroke: accent, alpha: 0.32, width: 1, points: { show: false }, value: number },
        { label: box.dataset.smooth, stroke: accent, width: 2, points: { show: points.length < 2 }, value: number },
      ],
    },
    data(points),
    box,
  );
}

function number(_plot, value) {
  return value == null ? "—" : value.toFixed(3);
}

document.addEventListener("portal:live", (event) => {
  if (event.detail.id !== "loss-points") return;
  const { points } = figures();
  if (plot && points.length > 1) plot.setData(data(points));
  else draw();
});
document.addEventListener("portal:theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => plot && plot.width !== box.clientWidth && plot.setSize({ width: box.clientWidth, height: 240 })).observe(box);
draw();
