// Curves on a canvas: the mean as a line, least and largest as a band, so that no spike is lost.
// beside: the values of all curves that share its axis, to be compared
import { h } from "./dom.js";

export function curve({ title, values }, steps, starts, total, colour = "--mark", beside = values) {
  const canvas = h("canvas", { class: "curve", role: "img" }),
    number = h("output", { class: "number" });
  const numbers = values.filter(Boolean),
    latest = numbers.at(-1)?.[2];
  const ends = (all) => [Math.min(...all.map((v) => v[0])), Math.max(...all.map((v) => v[1]))];
  const [least, most] = ends(numbers),
    [low, high] = ends(beside.filter(Boolean));
  const short = (value) => (value === undefined ? "" : Number(value.toPrecision(3)).toString());
  canvas.setAttribute(
    "aria-label",
    `${title}: ${short(latest)} at step ${steps.at(-1)}, between ${short(least)} and ${short(most)}`,
  );
  number.textContent = short(latest);
  const box = h(
    "figure",
    { class: "curve-box" },
    h("figcaption", {}, title, number),
    canvas,
    h("div", { class: "axis number", "aria-hidden": "true" }, h("span", {}, short(low)), h("span", {}, short(high))),
  );
  const draw = () => {
    const ratio = Math.min(2, devicePixelRatio || 1),
      w = canvas.clientWidth,
      t = canvas.clientHeight;
    if (!w) return;
    canvas.width = w * ratio;
    canvas.height = t * ratio;
    const ink = canvas.getContext("2d"),
      style = getComputedStyle(canvas);
    ink.scale(ratio, ratio);
    const across = (step) => 2 + ((w - 4) * step) / Math.max(1, total ?? steps.at(-1));
    const up = (value) => t - 4 - ((t - 8) * (value - low)) / (high - low || 1);
    ink.strokeStyle = style.getPropertyValue("--line");
    for (const step of starts) ink.strokeRect(across(step), 0, 0, t);
    const points = values.map((value, i) => value && [across(steps[i]), ...value.map(up)]).filter(Boolean);
    if (!points.length) return;
    ink.beginPath();
    points.forEach(([x, least]) => ink.lineTo(x, least));
    points.toReversed().forEach(([x, , most]) => ink.lineTo(x, most));
    ink.fillStyle = style.getPropertyValue(colour);
    ink.globalAlpha = 0.25;
    ink.fill();
    ink.globalAlpha = 1;
    ink.strokeStyle = style.getPropertyValue(colour);
    ink.lineWidth = 1.5;
    ink.lineJoin = "round";
    ink.beginPath();
    points.forEach(([x, , , mean]) => ink.lineTo(x, mean));
    ink.stroke();
  };
  new ResizeObserver(draw).observe(canvas); // also at first, once it has a size
  canvas.addEventListener("recolour", draw);
  return box;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const canvas of document.querySelectorAll(".curve")) canvas.dispatchEvent(new Event("recolour"));
});
