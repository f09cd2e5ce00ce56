// Proposed masks: a click asks SAM, a word asks CLIPSeg. The proposal stands in place of the mask until it is taken or dropped.
import { address, ask, send } from "./api.js";
import { stop } from "./app.js";
import { button, h, labelled, percent, problem, put, quiet, speak } from "./dom.js";
import { Mask } from "./tiles.js";

// models: for each method null, or what is missing; word(): of the chosen concept; take(mask); draw()
export function proposals(scene, models, studio, { word, take, draw }) {
  const status = h("div"),
    threshold = h("input", { type: "number", min: 0.05, max: 0.95, step: 0.05, value: 0.5 });
  const field = h("input", { id: "named", placeholder: "its word", "aria-label": "What to find", maxLength: 100 });
  let points = [],
    mask = null,
    job = null,
    busy = false,
    told = "";
  const needs = (text, line) => quiet(`${text}: ${line}`);
  const box = h(
    "details",
    {},
    h("summary", {}, "Propose a mask"),
    h(
      "div",
      { class: "stack" },
      models.sam
        ? needs("A click needs SAM", models.sam)
        : quiet("Choose the tool Click and click on the concept. Each further click adds a point."),
      models.clipseg
        ? needs("A word needs CLIPSeg", models.clipseg)
        : h(
            "form",
            {
              class: "row",
              onsubmit: (event) => {
                event.preventDefault();
                named();
              },
            },
            field,
            h("button", { id: "propose" }, "Propose"),
          ),
      models.sam && models.clipseg ? null : labelled("Threshold", threshold, "A higher one gives a smaller mask."),
    ),
  );

  function say(key, ...parts) {
    if (key !== told) put(status, h("div", { class: "card", role: "status" }, parts));
    told = key;
  }

  function failed(line) {
    reset();
    put(status, problem("No mask is proposed", line));
  }

  function reset() {
    [points, mask, job, busy, told] = [[], null, null, false, ""];
    put(status);
    draw();
  }

  function drop() {
    if (job) stop({ id: job }, "now");
    reset();
  }

  async function request(prompt) {
    mask = null;
    busy = true;
    waits("Proposing …");
    draw();
    try {
      job = (await send("POST", "jobs", { kind: "masks", scene, threshold: Number(threshold.value), ...prompt })).id;
      await studio.refresh();
      // The job may have ended before its name was known here.
      update(studio.state);
    } catch (error) {
      failed(error.message);
    }
  }

  const waits = (text) => say(text, h("p", {}, text), button("Drop it", drop));

  function named() {
    if (busy) return;
    points = [];
    request({ method: "clipseg", word: field.value.trim() || word() || "" });
  }

  async function show(id) {
    try {
      mask = await Mask.unpack(await (await ask("GET", `${address("jobs", id)}/mask`)).arrayBuffer());
    } catch (error) {
      return failed(error.message);
    }
    busy = false;
    const text = `Proposed: ${percent(mask.share())} of the photograph.`;
    say(
      id,
      h("p", {}, text),
      h("p", { class: "row" }, button("Take it", taken, { class: "main", id: "take" }), button("Drop it", drop, { id: "drop" })),
    );
    speak(`${text} Enter takes it, Escape drops it.`);
    draw();
  }

  function taken() {
    const found = mask;
    reset();
    take(found);
  }

  function update(state) {
    const found = job && state.jobs.find((each) => each.id === job);
    if (!found) return;
    if (found.state === "waiting") waits("Waiting for the job at work …");
    else if (found.state === "running") waits("Proposing …");
    else if (found.state === "lost") waits("It does not answer: it was killed, or it starts slowly.");
    else {
      job = null;
      if (found.state === "done") show(found.id);
      else failed(found.line);
    }
  }

  return {
    box,
    status,
    drop,
    get mask() {
      return mask;
    },
    click(x, y) {
      if (busy) return speak("A mask is being proposed already");
      points.push([x, y]);
      request({ method: "sam", points });
    },
    key({ key }) {
      if (key === "Escape" && (mask || busy)) drop();
      else if (key === "Enter" && mask) taken();
      else return false;
      return true;
    },
    update,
  };
}
