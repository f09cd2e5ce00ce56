// Draw: a prompt with handles, boxes for them, and the gallery of a run.
import { Away, address, fileOf, get, send, thumbOf } from "./api.js";
import { button, deleted, h, labelled, link, problem, put, remember, remembered, speak } from "./dom.js";

export const PLACES = ["at the beach", "in the snow", "in the jungle", "in the street", "on a wooden floor", "floating on water", "with a mountain in the background"];
export const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

export const finished = (studio, name) => studio.state.runs.find((run) => run.name === name && run.state === "done");

export function chooseRun(room, name, studio) {
  const done = studio.state.runs.filter((run) => run.state === "done");
  return h("label", { class: "row" }, h("span", {}, "Run"), h("select", { id: "run", onchange: (event) => studio.go(room, event.target.value) },
    done.map((run) => h("option", { value: run.name, selected: run.name === name }, run.name))));
}

export function withoutRun(main, title, text) {
  put(main, h("h1", {}, title), h("div", { class: "empty" }, h("p", { class: "large" }, text), h("p", {}, "Train a scene first; on the miniature that takes minutes."), link("To Home", "#/home", { class: "button main" })));
  return {};
}

// A prompt field with chips for the handles of a run.
export function promptField(run, key, start) {
  const field = h("textarea", { rows: 3, value: remembered(key, start), spellcheck: false, id: "prompt" });
  field.addEventListener("input", () => { remember(key, field.value); field.dispatchEvent(new Event("changed")); });
  const insert = (text) => {
    const from = document.activeElement === field ? field.selectionStart : field.value.length, to = document.activeElement === field ? field.selectionEnd : from;
    const space = from && !/\s$/.test(field.value.slice(0, from)) ? " " : "";
    field.setRangeText(space + text, from, to, "end");
    field.dispatchEvent(new Event("input"));
    field.focus();
  };
  const strength = (handle, by) => {  // (<toy>:1.3) in the text is all there is: the field stays the only truth
    const name = handle.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), found = new RegExp(`\\(\\s*${name}\\s*:\\s*([\\d.]+)\\s*\\)|${name}`);
    if (!found.test(field.value)) return insert(handle);
    field.value = field.value.replace(found, (_, weight) => {
      const value = Math.max(0, Math.round(10 * (Number(weight ?? 1) + by)) / 10);
      speak(`${handle} ${value}`);
      return value === 1 ? handle : `(${handle}:${value})`;
    });
    field.dispatchEvent(new Event("input"));
  };
  const held = { onmousedown: (event) => event.preventDefault() };  // the field keeps its cursor
  const chips = h("div", { class: "chips" }, run.handles.map((handle, i) => h("span", { class: "group" },
    button(handle, () => insert(handle), { class: "chip", style: { "--colour": COLOURS[i % COLOURS.length] }, title: `Insert ${handle}${run.words?.[i] ? `, the ${run.words[i]}` : ""}`, ...held }),
    button("−", () => strength(handle, -0.1), { class: "chip step", "aria-label": `${handle} weaker`, title: "Weaker", ...held }),
    button("+", () => strength(handle, 0.1), { class: "chip step", "aria-label": `${handle} stronger`, title: "Stronger", ...held }))));
  const places = h("div", { class: "chips" }, PLACES.map((place) => button(place, () => insert(place), { class: "chip plain", onmousedown: (event) => event.preventDefault() })));
  return { field, insert, box: h("div", { class: "stack" }, labelled("Prompt", field), h("div", { class: "stack" }, h("small", { class: "quiet" }, "Insert what was learnt"), chips), h("div", {}, h("small", { class: "quiet" }, "and a place"), places)) };
}

export function settingsForm(fields, key, shown) {
  const values = remembered(key, {});
  const row = (field) => {
    const value = values[field.name] ?? field.default, id = `draw-${field.name}`;
    const control = field.kind === "bool" ? h("input", { id, type: "checkbox", checked: Boolean(value) })
      : field.kind === "choice" ? h("select", { id }, field.choices.map((each) => h("option", { value: each, selected: each === value }, each)))
        : h("input", { id, type: field.kind === "str" ? "text" : "number", step: field.kind === "int" ? 1 : "any", min: field.least, max: field.most, value: value ?? "", placeholder: field.optional ? "default" : "" });
    control.addEventListener("input", () => {
      const text = String(control.value).trim();
      const found = field.kind === "bool" ? control.checked : field.kind === "str" || field.kind === "choice" ? text : text === "" ? null : Number(text);
      if (found === null || found === field.default) delete values[field.name]; else values[field.name] = found;
      remember(key, values);
    });
    return h("div", { class: `setting ${field.kind}` }, h("label", { for: id }, names[field.name] ?? field.name), control, h("small", { class: "quiet" }, field.help));
  };
  const names = { num_images: "Number", seed: "Seed", num_inference_steps: "Steps", guidance_scale: "Guidance", sampler: "Sampler", negative_prompt: "Not in it", separate: "Keep handles apart", height: "Height", width: "Width" };
  return { values, box: [h("div", { class: "form short" }, fields.filter((f) => shown.includes(f.name)).map(row)), h("details", {}, h("summary", {}, "More settings"), h("div", { class: "form" }, fields.filter((f) => !shown.includes(f.name)).map(row)))],
    set(name, value) { if (value === null) delete values[name]; else values[name] = value; remember(key, values); const control = document.getElementById(`draw-${name}`); if (control) control.value = value ?? ""; } };
}

// Boxes for handles: drag on the square to draw, drag a box to move it, its corner to resize; numbers do the same.
function layout(run, key) {
  const boxes = remembered(key, {}), frame = h("div", { class: "frame", role: "group", "aria-label": "Where each handle shall stand" }), list = h("div", { class: "stack" });
  let active = run.handles[0];
  const clamp = (value) => Math.min(1, Math.max(0, value)), round = (value) => Math.round(100 * value) / 100;
  const keep = () => { remember(key, boxes); draw(); };
  function draw() {
    put(frame, run.handles.filter((handle) => boxes[handle]).map((handle) => {
      const [left, top, right, bottom] = boxes[handle], i = run.handles.indexOf(handle);
      return h("div", { class: "box", "data-handle": handle, style: { "--colour": COLOURS[i % COLOURS.length], left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%` } }, handle, h("span", { class: "corner" }));
    }));
    put(list, run.handles.map((handle, i) => {
      const box = boxes[handle];
      return h("div", { class: "row boxrow" }, button(handle, () => { active = handle; draw(); }, { class: "chip", "aria-pressed": handle === active, style: { "--colour": COLOURS[i % COLOURS.length] } }),
        box ? ["left", "top", "right", "bottom"].map((side, place) => h("input", { type: "number", min: 0, max: 1, step: 0.05, value: box[place], "aria-label": `${side} of ${handle}`, onchange: (event) => { box[place] = clamp(Number(event.target.value)); keep(); } })) : h("small", { class: "quiet" }, "no box: drag one on the square"),
        box ? button("×", () => { delete boxes[handle]; keep(); }, { class: "plain", "aria-label": `Remove the box of ${handle}` }) : button("Add", () => { boxes[handle] = [0.25, 0.25, 0.75, 0.75]; active = handle; keep(); }, { "aria-label": `Add a box for ${handle}` }));
    }));
  }
  let drag = null;
  const place = (event) => { const area = frame.getBoundingClientRect(); return [clamp((event.clientX - area.left) / area.width), clamp((event.clientY - area.top) / area.height)]; };
  frame.addEventListener("pointerdown", (event) => {
    const target = event.target.closest(".box"), [x, y] = place(event);
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    if (target) active = target.dataset.handle;
    drag = { kind: !target ? "new" : event.target.classList.contains("corner") ? "corner" : "move", x, y, old: [...(boxes[active] ?? [])] };
  });
  frame.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [x, y] = place(event), { kind, old } = drag;
    if (kind === "new") boxes[active] = [Math.min(x, drag.x), Math.min(y, drag.y), Math.max(x, drag.x), Math.max(y, drag.y)].map(round);
    else if (kind === "corner") boxes[active] = [old[0], old[1], Math.max(old[0] + 0.05, x), Math.max(old[1] + 0.05, y)].map(round);
    else {
      const dx = Math.min(1 - old[2], Math.max(-old[0], x - drag.x)), dy = Math.min(1 - old[3], Math.max(-old[1], y - drag.y));
      boxes[active] = [old[0] + dx, old[1] + dy, old[2] + dx, old[3] + dy].map(round);
    }
    draw();
  });
  frame.addEventListener("pointerup", () => {
    const box = boxes[active];
    if (drag?.kind === "new" && box && (box[2] - box[0] < 0.05 || box[3] - box[1] < 0.05)) delete boxes[active];
    drag = null;
    keep();
  });
  draw();
  return { boxes, box: h("details", {}, h("summary", {}, "Boxes: say where each stands"), h("div", { class: "layout" }, frame, list)) };
}

const PART = 60;  // pictures of a gallery that come at once; more as one scrolls

// Pictures of a run with their settings. view: what is shown for one picture, of the picture and its image
export function gallery(run, folder, actions, view = (_picture, image) => image) {
  const grid = h("ul", { class: "gallery" }), detail = h("div", {}), gone = h("div", {});
  let pictures = [], chosen = null, count = PART;
  const end = h("li", { class: "end" }), watcher = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting || count >= pictures.length) return;
    end.before(...pictures.slice(count, count += PART).map(shot));
  }, { rootMargin: "600px" });
  watcher.observe(end);
  async function renew() {
    const found = (await get(`${address("runs", run.name)}/pictures`))[folder];
    if (JSON.stringify(found) === JSON.stringify(pictures)) return;
    const fresh = found.length > pictures.length;
    pictures = found;
    put(grid, pictures.slice(0, count).map(shot), end);
    if (pictures.length && (!chosen || fresh)) choose(pictures[0]);
    else if (!pictures.length) put(detail, h("p", { class: "quiet" }, "Pictures appear here, each with the settings that made it."));
    else choose(pictures.find((each) => each.file === chosen.file) ?? pictures[0]);
  }
  function shot(picture) {
    const { settings, star, file } = picture, prompt = settings.prompt ?? settings.prompts?.[0] ?? file;
    return h("li", {}, button([h("img", { src: thumbOf(run.name, file, "1"), alt: "", loading: "lazy" }), star ? h("span", { class: "star", "aria-hidden": "true" }, "★") : null], () => choose(picture),
      { class: "shot", "data-file": file, "aria-current": file === chosen?.file, "aria-label": `${prompt}, seed ${settings.seed ?? "?"}${star ? ", favourite" : ""}` }));
  }
  function choose(picture) {
    chosen = picture;
    const { settings } = picture;
    for (const shot of grid.querySelectorAll(".shot")) shot.setAttribute("aria-current", shot.dataset.file === picture.file);
    const image = h("img", { src: fileOf(run.name, picture.file), alt: settings.prompt ?? settings.prompts?.join(", ") ?? "A picture" });
    put(detail, h("figure", { class: "chosen" }, view(picture, image),
      h("figcaption", {}, h("p", {}, settings.prompt ?? settings.prompts?.join(", ") ?? ""), h("p", { class: "quiet number" }, [`seed ${settings.seed ?? "?"}`, settings.num_inference_steps && `${settings.num_inference_steps} steps`, settings.size?.join("×")].filter(Boolean).join(" · ")),
        h("p", { class: "row" }, actions(picture),
          button(picture.star ? "★ Favourite" : "☆ Favourite", () => mark(picture), { "aria-pressed": picture.star }),
          link("Download", `${fileOf(run.name, picture.file)}?download=1`, { class: "button", download: picture.file.split("/").at(-1) }),
          button("Delete", () => remove(picture), { class: "plain" })))), looks(run, picture));
  }
  async function mark(picture) {
    await send("PATCH", `${address("runs", run.name)}/pictures`, { file: picture.file, star: !picture.star });
    renew();
  }
  async function remove(picture) {
    const { trash } = await send("DELETE", `${address("runs", run.name)}/pictures`, { file: picture.file });
    put(gone, deleted("The picture", async () => { await send("POST", address("trash", trash)); await renew(); }));
    chosen = null;
    renew();
  }
  grid.addEventListener("keydown", (event) => {
    const shots = [...grid.querySelectorAll(".shot")], i = shots.indexOf(document.activeElement);
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: shots.length - 1 }[event.key];
    if (event.key === "Delete" && i >= 0) remove(pictures[i]);
    else if (shots[to]) { event.preventDefault(); shots[to].focus(); shots[to].click(); }
  });
  return { grid, detail: [gone, detail], renew };
}

// Where the handles of a picture looked while it was drawn.
function looks(run, picture) {
  if (!picture.maps.length) return null;
  return h("div", { class: "shots looks", role: "group", "aria-label": "Where each handle looked" }, picture.maps.map(({ name, file }) =>
    h("figure", {}, h("img", { src: fileOf(run.name, file), alt: `Where ${name} looked` }), h("figcaption", {}, name))));
}

// What a job for a run says: its progress, or why it ended.
export function jobLine(state, run, kind) {
  const mine = state.jobs.filter((job) => job.name === run && job.kind === kind), busy = mine.filter((job) => ["waiting", "running"].includes(job.state));
  if (busy.length) {
    const { progress: at, state: how } = busy.at(-1);
    return h("div", { class: "card live", role: "status" }, h("p", {}, how === "waiting" ? "Waits for what is at work" : at ? "At work" : "Loading the model …"), h("progress", at ? { max: at.total, value: at.done, "aria-label": "Steps" } : { "aria-label": "Loading" }));
  }
  const [latest] = mine;
  return latest && !["done", "stopped"].includes(latest.state) ? problem("The last one has failed", latest.line || "It ended without a word: killed, or out of memory.") : null;
}

export async function open(main, [name], studio) {
  const run = finished(studio, name ?? studio.state.runs.find((each) => each.state === "done")?.name);
  if (!run) return withoutRun(main, "Draw", name ? `${name} is not trained to its end yet` : "Nothing is trained yet");
  const fields = (await get("settings")).sample, prompt = promptField(run, `prompt ${run.name}`, `a photo of ${run.handles.join(" and ")} ${PLACES[0]}`);
  const form = settingsForm(fields, `draw ${run.name}`, ["num_images", "seed"]), boxes = layout(run, `boxes ${run.name}`);
  const work = h("div", {}), notices = h("div", {}), start = button("Draw", draw, { class: "main large", id: "draw" });
  const shown = gallery(run, "pictures", (picture) => [button("Other seeds", () => again(picture)), !picture.maps.length && button("Where did it look?", (event) => attend(picture, event.target), { title: "Draws it once more and shows the attention of each handle" }), link("Edit this", `#/edit/${encodeURIComponent(run.name)}/${encodeURIComponent(picture.file)}`, { class: "button" })]);
  put(main, h("header", { class: "row" }, h("h1", {}, "Draw"), chooseRun("draw", run.name, studio)),
    h("div", { class: "columns draw" }, h("section", { class: "stack" }, prompt.box, form.box, boxes.box, notices, start), h("section", { class: "stack" }, work, shown.detail, shown.grid)));
  let busy = "";

  async function draw() {
    start.disabled = true;
    put(notices);
    const used = Object.fromEntries(Object.entries(boxes.boxes).filter(([handle]) => prompt.field.value.includes(handle)));
    try {
      await send("POST", "jobs", { kind: "sample", run: run.name, prompt: prompt.field.value, settings: form.values, boxes: used });
      speak("Drawing");
      await studio.refresh();
    } catch (error) { put(notices, problem("This cannot be drawn", error.message)); }
    start.disabled = false;
  }

  async function attend(picture, from) {
    from.disabled = true;
    put(notices);
    try {
      await send("POST", "jobs", { kind: "attend", run: run.name, file: picture.file });
      speak("Reading where it looked");
      await studio.refresh();
    } catch (error) { from.disabled = false; put(notices, problem("Its attention cannot be shown", error.message)); }
  }

  function again(picture) {
    if (picture.settings.prompt) { prompt.field.value = picture.settings.prompt; prompt.field.dispatchEvent(new Event("input")); }
    form.set("seed", Number(picture.settings.seed ?? 0) + (form.values.num_images ?? 1));
    draw();
  }

  return {
    update(state) {
      const text = JSON.stringify(state.jobs.filter((job) => job.name === run.name));
      if (text === busy) return;
      busy = text;
      put(work, jobLine(state, run.name, "sample"), jobLine(state, run.name, "attend"));
      shown.renew().catch((error) => { if (!(error instanceof Away)) put(notices, problem("The gallery cannot be read", error.message)); });
    },
    key(event) { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw(); },
  };
}
