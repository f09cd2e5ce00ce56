"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const scrub = document.getElementById("scrub");
const plots = [...document.querySelectorAll(".chart")];
const first = data.steps[0], last = data.steps[data.steps.length - 1];

function show(index) {
  scrub.value = index;
  document.getElementById("at").textContent = data.phases[index] + ", step " + data.steps[index];
  const x = 1000 * (data.steps[index] - first) / (last - first);
  for (const plot of plots) {
    const value = data.series[plot.dataset.series][index];
    plot.querySelector("output").textContent = value === null ? "none" : Number(value.toPrecision(4)).toString();
    const cursor = plot.querySelector(".cursor");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
}

function nearest(step) {
  let best = 0;
  data.steps.forEach((other, i) => { if (Math.abs(other - step) < Math.abs(data.steps[best] - step)) best = i; });
  return best;
}

if (plots.length) {
  scrub.max = data.steps.length - 1;
  scrub.addEventListener("input", () => show(Number(scrub.value)));
  for (const plot of plots) {
    const area = plot.querySelector(".plot");
    for (const kind of ["pointermove", "pointerdown"]) {
      area.addEventListener(kind, (event) => {
        const box = area.getBoundingClientRect();
        show(nearest(first + (last - first) * (event.clientX - box.left) / box.width));
      });
    }
  }
  show(data.steps.length - 1);
}
