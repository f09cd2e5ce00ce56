// Draw: a prompt with handles, boxes for them, variations, every combination, and the gallery of a run.
import { Away, address, get, send } from "./api.js";
import { layout } from "./boxes.js";
import { chooseRun, finished, withoutRun } from "./choice.js";
import { button, h, labelled, linesOf, link, plural, problem, put, remember, remembered, speak } from "./dom.js";
import { gallery } from "./gallery.js";
import { PLACES, promptField } from "./prompt.js";
import { counter, settingsForm } from "./settings.js";
import { jobLines } from "./work.js";

const subsets = (count) => 2 ** count - 1;
const KINDS = {
  sample: ["A prompt", "Number", 4],
  vary: ["Variations", "Variations", 9],
  explore: ["Combinations", "Images of each", 1],
};
const ABOUT = {
  vary: "All concepts together, each time from another seed.",
  explore: "Each concept alone and each combination of them, in every place that is ticked.",
};

export async function open(main, [name], studio) {
  const run = finished(studio, name ?? studio.state.runs.find((each) => each.state === "done")?.name);
  if (!run) return withoutRun(main, "Draw", name, studio);
  const fields = (await get("settings")).sample.filter((field) => field.name !== "num_images"),
    prompt = promptField(run, `prompt ${run.name}`, `a photo of ${run.handles.join(" and ")} ${PLACES[0]}`);
  const form = settingsForm(fields, `draw ${run.name}`, ["seed"]),
    seed = form.box[0].firstChild,
    boxes = layout(run, `boxes ${run.name}`),
    places = placesForm(`places ${run.name}`, label);
  const counters = Object.fromEntries(
    Object.entries(KINDS).map(([kind, [, text, usual]]) => [kind, counter(`count ${kind} ${run.name}`, text, usual)]),
  );
  let kind = remembered(`kind ${run.name}`, "sample"),
    busy = "",
    version = null;
  const work = h("div", { class: "stack" }),
    notices = h("div", {}),
    start = button("Draw", draw, { class: "main large", id: "draw" }),
    asked = h("div", { class: "stack" });
  const ways = h(
    "fieldset",
    { class: "ways" },
    h("legend", { class: "unseen" }, "What to draw"),
    Object.entries(KINDS).map(([each, [text]]) =>
      h(
        "label",
        {},
        h("input", { type: "radio", name: "way", value: each, checked: each === kind, onchange: () => choose(each) }),
        text,
      ),
    ),
  );
  for (const { field } of Object.values(counters)) field.addEventListener("input", label);
  const shown = gallery(run, "pictures", (picture) => [
    picture.settings.prompt && [
      button("Other seeds", () => again(picture)),
      button("Take its settings", () => take(picture), { title: "Prompt, settings and boxes of this image go into the form" }),
    ],
    picture.settings.prompt &&
      !picture.maps.length &&
      button("Where did it look?", (event) => attend(picture, event.target, false), {
        title: "Draws it once more and shows the attention of each handle",
      }),
    picture.settings.prompt &&
      picture.maps.length <= run.handles.length &&
      button("Each word", (event) => attend(picture, event.target, true), {
        title: "Draws it once more and shows the attention of each word",
        "aria-label": "Where did each word look?",
      }),
    link("Edit this", `#/${address("edit", run.name, picture.file)}`, { class: "button" }),
  ]);
  put(
    main,
    h("header", { class: "row" }, h("h1", {}, "Draw"), chooseRun("draw", run.name, studio)),
    h(
      "div",
      { class: "columns draw" },
      h("section", { class: "stack", "aria-label": "What to draw" }, ways, asked, notices, start),
      h("section", { class: "pictures", "aria-label": "Images" }, work, shown.box),
    ),
  );
  choose(kind);

  function choose(way) {
    kind = KINDS[way] ? way : "sample";
    remember(`kind ${run.name}`, kind);
    ways.querySelector(`[value=${kind}]`).checked = true;
    put(
      asked,
      kind === "sample" ? prompt.box : h("p", {}, ABOUT[kind]),
      kind === "explore" && places.box,
      h("div", { class: "form short" }, counters[kind].box, seed),
      form.box[1],
      kind === "sample" && boxes.box,
    );
    label();
  }
  function label() {
    const count = counters[kind].count(),
      all = subsets(run.handles.length) * places.chosen().length * count;
    start.textContent =
      kind === "sample" ? `Draw ${count}` : kind === "vary" ? `Draw ${plural(count, "variation")}` : `Draw ${plural(all, "image")}`;
    start.disabled = all === 0 && kind === "explore";
  }

  async function draw() {
    if (start.disabled) return;
    start.disabled = true;
    put(notices);
    const body = { kind, run: run.name, settings: { ...form.sent(), num_images: counters[kind].count() } };
    if (kind === "sample")
      Object.assign(body, { prompt: prompt.field.value, boxes: boxes.used(prompt.field.value), own_pixels: boxes.own.checked });
    if (kind === "explore") body.places = places.chosen();
    try {
      await send("POST", "jobs", body);
      speak("Drawing");
      await studio.refresh();
    } catch (error) {
      put(notices, problem("This cannot be drawn", error.message));
    }
    start.disabled = false;
  }

  async function attend(picture, from, words) {
    from.disabled = true;
    put(notices);
    try {
      await send("POST", "jobs", { kind: "attend", run: run.name, file: picture.file, words });
      speak("Reading its attention");
      await studio.refresh();
    } catch (error) {
      from.disabled = false;
      put(notices, problem("Its attention cannot be shown", error.message));
    }
  }

  function take(picture) {
    choose("sample");
    prompt.set(picture.settings.prompt);
    form.load(picture.settings);
    boxes.load(picture.boxes ?? {});
    boxes.own.checked = Boolean(picture.settings.own_pixels);
    speak("The form has the settings of this image");
  }

  function again(picture) {
    take(picture);
    form.load({ ...picture.settings, seed: Number(picture.settings.seed ?? 0) + counters.sample.count() });
    draw();
  }

  return {
    update(state) {
      const text = JSON.stringify([
        state.jobs.filter((job) => job.name === run.name),
        state.jobs.filter((job) => job.kind === "train" && job.state === "running"),
      ]);
      if (text !== busy) put(work, jobLines(state, run.name, ["sample", "vary", "explore", "attend"], studio.refresh));
      busy = text;
      const now = state.runs.find((each) => each.name === run.name)?.gallery;
      if (now === version) return;
      version = now;
      shown.renew().catch((error) => {
        version = null;
        if (!(error instanceof Away)) put(notices, problem("The gallery cannot be read", error.message));
      });
    },
    key(event) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
    },
    leave() {
      shown.close();
    },
  };
}

// The places of an exploration: those of the chips to tick, and one's own, a line each.
function placesForm(key, onchange) {
  const kept = remembered(key, { ticked: PLACES.slice(0, 3), own: "" });
  const own = h("textarea", { rows: 2, value: kept.own, placeholder: "in a box" }),
    keep = () => {
      kept.own = own.value;
      remember(key, kept);
      onchange();
    };
  own.addEventListener("input", keep);
  const tick = (place) => (event) => {
    kept.ticked = PLACES.filter((each) => (each === place ? event.target.checked : kept.ticked.includes(each)));
    keep();
  };
  return {
    chosen: () => [...new Set([...kept.ticked, ...linesOf(kept.own)])],
    box: h(
      "fieldset",
      { class: "stack" },
      h("legend", { class: "unseen" }, "Places"),
      h(
        "div",
        { class: "row picks" },
        PLACES.map((place) =>
          h(
            "label",
            { class: "row" },
            h("input", { type: "checkbox", checked: kept.ticked.includes(place), onchange: tick(place) }),
            place,
          ),
        ),
      ),
      labelled("More places, a line each", own),
    ),
  };
}
