// Edit: paint a region of a photograph or another image, and say what shall be there.
import { Away, address, fileOf, get, send } from "./api.js";
import { chooseRun, finished, withoutRun } from "./choice.js";
import { button, h, link, plural, problem, put, quiet, speak } from "./dom.js";
import { gallery, titleOf } from "./gallery.js";
import { Painter } from "./painter.js";
import { promptField } from "./prompt.js";
import { counter, settingsForm } from "./settings.js";
import { Mask } from "./tiles.js";
import { jobLines } from "./work.js";

const NEWEST = 30; // images to choose from, besides the photographs

export async function open(main, [name, source], studio) {
  const run = finished(studio, name ?? studio.state.runs.find((each) => each.state === "done")?.name);
  if (!run) return withoutRun(main, "Edit", name, studio);
  const scenes = studio.state.scenes.filter((scene) => !scene.problem);
  const from = source?.startsWith("scene:")
    ? { scene: source.slice(6) }
    : source
      ? { of: run.name, file: source }
      : scenes[0]
        ? { scene: scenes.find((each) => each.name === run.scene)?.name ?? scenes[0].name }
        : null;
  const fields = (await get("settings")).sample.filter(
    (field) => !["num_images", "height", "width", "separate"].includes(field.name),
  );
  fields.push({
    name: "blending_start_percentage",
    kind: "float",
    help: "share of the steps to leave out: a larger share keeps more of the image",
    default: 0.25,
    least: 0,
    most: 0.99,
    optional: false,
    choices: [],
  });
  const prompt = promptField(run, `edit ${run.name}`, `a photo of ${run.handles[0]}`),
    form = settingsForm(fields, `editing ${run.name}`, ["seed"]),
    counted = counter(`count edit ${run.name}`, "Number", 1);
  form.box[0].prepend(counted.box);
  const work = h("div", {}),
    notices = h("div", {}),
    start = button("Edit", go, { class: "main large", id: "edit" });
  const opened = Date.now();
  let mask = null,
    busy = "",
    version = null;
  const painter = new Painter("The image to edit", {
    over: { brush: "what may change", eraser: "what shall stay" },
    target: () => mask && { mask },
    part: from?.scene
      ? (box, side) => `api/${address("scenes", from.scene)}/view?box=${box.join(",")}&side=${side}&v=${opened}`
      : null,
    layers: () => (mask ? [{ mask, colour: [86, 180, 233], strength: 1 }] : []),
    changed() {
      start.disabled = !mask.share();
      hint.textContent = mask.share() ? "" : "Paint what may change. All else stays as it is, to the pixel.";
    },
  });
  const hint = quiet("Paint what may change. All else stays as it is, to the pixel.");
  const shown = gallery(
    run,
    "edits",
    (picture) => [link("Go on from this", `#/${address("edit", run.name, picture.file)}`, { class: "button" })],
    (picture, image) => beforeAndAfter(run, picture, image),
  );
  const { pictures, edits } = await get(`${address("runs", run.name)}/pictures`),
    here = source ?? `scene:${from?.scene}`;
  const titled = (picture) =>
    [titleOf(picture), picture.settings.seed !== undefined && `seed ${picture.settings.seed}`].filter(Boolean).join(", ");
  const made = [...edits, ...pictures].filter(({ file }, i) => i < NEWEST || file === source);
  const choices = [
    ...scenes.map((scene) => [`scene:${scene.name}`, `photograph of ${scene.name}`]),
    ...made.map((picture) => [picture.file, titled(picture)]),
  ];
  const pick = h(
    "label",
    { class: "row" },
    h("span", {}, "Image"),
    h(
      "select",
      { id: "source", onchange: (event) => studio.go("edit", run.name, event.target.value) },
      choices.map(([value, text]) => h("option", { value, selected: value === here }, text)),
    ),
  );
  put(
    main,
    h("header", { class: "row" }, h("h1", {}, "Edit"), chooseRun("edit", run.name, studio), pick),
    from
      ? h(
          "div",
          { class: "columns editing" },
          h("section", { class: "paint" }, painter.bar, painter.stage.root),
          h("section", { class: "stack" }, hint, prompt.box, form.box, notices, start, work, shown.box),
        )
      : h(
          "div",
          { class: "empty" },
          h("p", { class: "large" }, "No image to edit"),
          link("Bring a photograph", "#/home", { class: "button main" }),
        ),
  );
  start.disabled = true;
  if (!from) return {};
  const url = from.scene ? `api/${address("scenes", from.scene)}/view?v=${opened}` : fileOf(run.name, from.file);
  const size = from.scene ? await get(address("scenes", from.scene)) : await measure(url);
  mask = new Mask(size.width, size.height);
  painter.load(url, size.width, size.height);

  function measure(address) {
    return new Promise((done, failed) => {
      const image = new Image();
      image.onload = () => done({ width: image.naturalWidth, height: image.naturalHeight });
      image.onerror = () => failed(new Error("the image is not here any more"));
      image.src = address;
    });
  }

  async function go() {
    if (start.disabled) return;
    start.disabled = true;
    put(notices);
    try {
      const data = await mask.pack([...mask.tiles.keys()]);
      const text = btoa(Array.from(data, (byte) => String.fromCharCode(byte)).join(""));
      await send("POST", "jobs", {
        kind: "edit",
        run: run.name,
        ...from,
        prompt: prompt.field.value,
        settings: { ...form.sent(), num_images: counted.count() },
        mask: text,
      });
      speak("Editing");
      await studio.refresh();
    } catch (error) {
      put(notices, problem("This cannot be edited", error.message));
    }
    start.disabled = false;
  }

  return {
    update(state) {
      const text = JSON.stringify([
        state.jobs.filter((job) => job.name === run.name),
        state.jobs.filter((job) => job.kind === "train" && job.state === "running"),
      ]);
      if (text !== busy) put(work, jobLines(state, run.name, ["edit"], studio.refresh));
      busy = text;
      const now = state.runs.find((each) => each.name === run.name)?.gallery;
      if (now === version) return;
      version = now;
      shown.renew().catch((error) => {
        version = null;
        if (!(error instanceof Away)) put(notices, problem("The results cannot be read", error.message));
      });
    },
    key(event, typing) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
      else painter.key(event, typing);
    },
    leave() {
      painter.stage.close();
      shown.close();
    },
  };
}

// A result over the image that it was made from, with a slider between both.
function beforeAndAfter(run, picture, after) {
  const box = h("div", { class: "slide" }, after);
  get(`${address("runs", run.name)}/edited?file=${encodeURIComponent(picture.file)}`)
    .then(({ job, outside }) => {
      const slider = h("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Before and after", oninput: cut });
      function cut() {
        after.style.setProperty("clip-path", `inset(0 ${100 - slider.value}% 0 0)`);
      }
      put(
        box,
        h("img", { src: `api/${address("jobs", job)}/image`, alt: "Before" }),
        after,
        h("div", { class: "row" }, h("span", {}, "before"), slider, h("span", {}, "after")),
        h(
          "p",
          { class: outside ? "error" : "good" },
          outside ? `outside: ${plural(outside, "pixel")} changed` : "outside: unchanged, 0 pixels",
        ),
      );
      cut();
    })
    .catch((error) => box.append(quiet(`Without a slider: ${error.message}.`)));
  return box;
}
