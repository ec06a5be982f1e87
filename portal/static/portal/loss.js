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

// Mean over a window around each point; a sixtieth of the curve to either side keeps its shape and lags behind nothing.
function smooth(values) {
  const half = Math.floor(values.length / 60);
  return values.map((_value, at) => {
    const window = values.slice(Math.max(0, at - half), at + half + 1);
    return window.reduce((sum, value) => sum + value, 0) / window.length;
  });
}

// The steps of all curves on one axis; what was not measured at a step is bridged.
function data({ points, others }) {
  const every = [points, ...others.map((other) => other.points)].flat();
  const steps = [...new Set(every.map((point) => point[0]))].sort((a, b) => a - b);
  const along = (found) => steps.map((step) => found.get(step) ?? null);
  const of = (rows, values) => new Map(rows.map((point, at) => [point[0], values[at]]));
  const losses = (rows) => rows.map((point) => point[1]);
  const series = [along(of(points, losses(points))), along(of(points, smooth(losses(points)))), along(of(points, points.map((point) => point[2])))];
  for (const other of others) series.push(along(of(other.points, smooth(losses(other.points)))));
  return [steps, ...series];
}

// As the legend above the chart has them (portal.css, .line-other).
const OTHERS = ["--ink-3", "--good", "--warn", "--bad"];

function draw() {
  const { total, points, others } = figures();
  if (points.length === 0) return;
  const line = (label, stroke, more) => ({ label, stroke, width: 2, spanGaps: true, points: { show: false }, value: number, ...more });
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
      scales: { x: { time: false, range: (chart, low, high) => (low === chart.data[0][0] && high === chart.data[0].at(-1) ? [0, total] : [low, high]) } },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 40 }],
      series: [
        { label: box.dataset.step },
        { label: box.dataset.loss, stroke: accent, alpha: 0.32, width: 1, spanGaps: true, points: { show: false }, value: number },
        line(box.dataset.smooth, accent, { points: { show: points.length < 2 } }),
        line(box.dataset.validation, colour("--ink"), { dash: [5, 4], show: points.some((point) => point[2] !== null) }),
        ...others.map((other, at) => line(other.label, colour(OTHERS[at % OTHERS.length]), at < OTHERS.length ? {} : { dash: [2, 3] })),
      ],
    },
    data(figures()),
    box,
  );
}

function number(_plot, value) {
  return value == null ? "—" : value.toFixed(3);
}

document.addEventListener("portal:live", (event) => {
  if (event.detail.id !== "loss-points") return;
  const { points } = figures();
  if (plot && points.length > 1) plot.setData(data(figures()));
  else draw();
});
document.addEventListener("portal:theme", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => plot && plot.width !== box.clientWidth && plot.setSize({ width: box.clientWidth, height: 240 })).observe(box);
draw();
