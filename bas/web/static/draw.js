// Draw: a prompt with handles, boxes for them, variations, every combination, and the gallery of a run.
import { Away, address, get, send } from "./api.js";
import { stop } from "./app.js";
import { button, duration, h, labelled, link, plural, problem, put, remember, remembered, speak } from "./dom.js";
import { gallery } from "./gallery.js";

export const PLACES = ["at the beach", "in the snow", "in the jungle", "in the street", "on a wooden floor", "floating on water", "with a mountain in the background"];
export const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

export const finished = (studio, name) => studio.state.runs.find((run) => run.name === name && run.state === "done");

export function chooseRun(room, name, studio) {
  const done = studio.state.runs.filter((run) => run.state === "done");
  return h("label", { class: "row" }, h("span", {}, "Run"), h("select", { id: "run", onchange: (event) => studio.go(room, event.target.value) },
    done.map((run) => h("option", { value: run.name, selected: run.name === name }, run.name))));
}

// What a room says that needs a finished run.
export function withoutRun(main, title, name, studio) {
  const run = studio.state.runs.find((each) => each.name === name), live = run && ["running", "waiting", "elsewhere"].includes(run.state);
  put(main, h("h1", {}, title), h("div", { class: "empty" }, h("p", { class: "large" }, run ? `${name} is not trained to its end yet` : name ? `There is no run ${name}` : "Nothing is trained yet"),
    h("p", {}, live ? "Until then its previews show how it draws each concept: its weights are whole only at the end." : run ? "Continue its training: it goes on where it was stopped." : "Train a scene first; on the miniature that takes minutes."),
    run ? link("Watch it", `#/watch/${encodeURIComponent(name)}`, { class: "button main" }) : link("To Home", "#/home", { class: "button main" })));
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
  const set = (text) => { field.value = text; field.dispatchEvent(new Event("input")); };
  return { field, insert, set, box: h("div", { class: "stack" }, labelled("Prompt", field), h("div", {}, h("small", { class: "quiet" }, "Insert what was learnt"), chips), h("div", {}, h("small", { class: "quiet" }, "and a place"), places)) };
}

const NAMES = { seed: "Seed", num_inference_steps: "Steps", guidance_scale: "Guidance", sampler: "Sampler", negative_prompt: "Not in it", separate: "Keep handles apart", guidance_rescale: "Guidance rescale", eta: "Eta",
  steps_offset: "Steps offset", batch_size: "At once", height: "Height", width: "Width", blending_start_percentage: "Keep of the picture" };

// Settings that would change nothing beside the others, with the reason.
function idle(values) {
  const off = values.guidance_scale !== undefined && values.guidance_scale <= 1 && "a guidance of 1 or less turns it off";
  return { eta: (values.sampler ?? "ddim") !== "ddim" && "only the sampler ddim has it", negative_prompt: off, guidance_rescale: off };
}

// The settings of drawing. values: what differs from the defaults; sent: of those what has an effect
export function settingsForm(fields, key, shown) {
  const values = remembered(key, {}), rows = fields.map(row);
  function row(field) {
    const id = `draw-${field.name}`, says = h("small", { class: "quiet" }, field.help);
    const control = field.kind === "bool" ? h("input", { id, type: "checkbox" })
      : field.kind === "choice" ? h("select", { id }, field.choices.map((each) => h("option", { value: each }, each)))
        : h("input", { id, type: field.kind === "str" ? "text" : "number", step: field.kind === "int" ? 1 : "any", min: field.least, max: field.most, placeholder: field.optional ? "default" : "" });
    control.addEventListener("input", () => {
      const text = String(control.value).trim();
      set(field, field.kind === "bool" ? control.checked : field.kind === "str" || field.kind === "choice" ? text : text === "" ? null : Number(text));
      mark();
    });
    return { field, control, says, box: h("div", { class: `setting ${field.kind}` }, h("label", { for: id }, NAMES[field.name] ?? field.name), control, says) };
  }
  function set(field, value) {
    if (value === null || value === undefined || value === field.default) delete values[field.name]; else values[field.name] = value;
    remember(key, values);
  }
  function fill() {
    for (const { field, control } of rows) if (field.kind === "bool") control.checked = values[field.name] ?? field.default; else control.value = values[field.name] ?? field.default ?? "";
    mark();
  }
  function mark() {
    const reasons = idle(values);
    for (const { field, control, says } of rows) {
      control.disabled = Boolean(reasons[field.name]);
      says.textContent = reasons[field.name] ? `Without effect: ${reasons[field.name]}.` : field.help;
    }
  }
  fill();
  const part = (first) => rows.filter(({ field }) => shown.includes(field.name) === first).map(({ box }) => box);
  return { values, sent: () => Object.fromEntries(Object.entries(values).filter(([name]) => !idle(values)[name])),
    box: [h("div", { class: "form short" }, part(true)), h("details", {}, h("summary", {}, "More settings"), h("div", { class: "form" }, part(false)))],
    load(made) { for (const { field } of rows) set(field, made[field.name]); fill(); } };
}

// How many: a number that each kind of drawing remembers for itself.
export function counter(key, text, usual) {
  const field = h("input", { id: "draw-num_images", type: "number", min: 1, step: 1, value: remembered(key, usual) });
  field.addEventListener("input", () => remember(key, count()));
  const count = () => Math.max(1, Math.round(Number(field.value)) || 1);
  return { count, field, box: h("div", { class: "setting" }, h("label", { for: field.id }, text), field) };
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
  const own = h("input", { type: "checkbox", checked: remembered(`${key} own`, false), onchange: () => remember(`${key} own`, own.checked) });
  return { own, used: (prompt) => Object.fromEntries(Object.entries(boxes).filter(([handle]) => prompt.includes(handle))),
    load(found) { for (const handle of run.handles) delete boxes[handle]; Object.assign(boxes, found); keep(); },
    box: h("details", { open: Object.keys(boxes).length > 0 }, h("summary", {}, "Boxes: say where each stands"), h("div", { class: "layout" }, frame, list, h("label", { class: "row" }, own, "start from the concepts' own pixels in the photograph"))) };
}

// What the jobs of some kinds say for a run: their progress, what they wait for, their warnings, or why the last has ended.
export function jobLines(state, run, kinds, refresh) {
  const mine = state.jobs.filter((job) => job.name === run && kinds.includes(job.kind)), busy = mine.filter((job) => ["waiting", "running"].includes(job.state)).reverse();
  const lines = busy.slice(0, 3).map((job) => (job.state === "running" ? atWork(job) : waits(job, state, refresh)));
  if (busy.length > 3) lines.push(h("p", { class: "quiet" }, `${busy.length - 3} more wait.`));
  const [latest] = mine, warnings = (latest?.asked?.warnings ?? []).map((line) => h("p", { class: "warning" }, line));
  if (!busy.length && latest && !["done", "stopped"].includes(latest.state)) lines.push(problem("The last one has failed", latest.line || "It ended without a word: killed, or out of memory."));
  return [...lines, ...warnings];
}

function atWork(job) {
  const at = job.progress;
  return h("div", { class: "card live", role: "status" }, h("p", { class: "row" }, h("span", {}, job.stopping ? "Stopping …" : at ? "At work" : "Loading the model …"), at && h("span", { class: "quiet number" }, `${at.name.replace(/:$/, "")} ${at.done}/${at.total}${at.left ? `, ${duration(at.left)} left` : ""}`)),
    h("progress", at ? { max: at.total, value: at.done, "aria-label": "Steps" } : { "aria-label": "Loading" }));
}

function waits(job, state, refresh) {
  const training = state.jobs.find((each) => each.kind === "train" && each.state === "running"), said = h("div", {});
  const cancel = button("Do not draw it", () => stop(job, "save"), { class: "plain" });
  if (!training) return h("div", { class: "card live row", role: "status" }, "Waits for what is at work.", cancel);
  const at = state.runs.find((each) => each.name === training.name);
  if (training.stopping) return h("div", { class: "card live row", role: "status" }, `The training of ${training.name} is being saved. Then this is drawn${state.jobs.some((each) => each.asked?.resume && each.name === training.name && each.state === "waiting") ? ", and the training goes on" : ""}.`, cancel);
  const pause = async (event) => {
    event.target.disabled = true;
    try { await send("POST", "jobs", { kind: "pause", job: training.id }); await refresh(); } catch (error) { event.target.disabled = false; put(said, problem("The training is not paused", error.message)); }
  };
  return h("div", { class: "card live", role: "status" }, h("p", {}, `Waits for the training of ${training.name}${at?.total ? `, at step ${at.done} of ${at.total}` : ""}: one thing is computed at a time.`),
    h("p", { class: "row" }, button("Pause it, draw, go on", pause, { id: "pause", title: "Saves the training at its step, draws, and continues it by itself: the result is the same to the bit" }), cancel), said);
}

const subsets = (count) => 2 ** count - 1;
const KINDS = { sample: ["A prompt", "Number", 4], vary: ["Variations", "Variations", 9], explore: ["Combinations", "Pictures of each", 1] };
const ABOUT = { vary: "All concepts together, each time from another seed.", explore: "Each concept alone and each combination of them, in every place that is ticked." };

export async function open(main, [name], studio) {
  const run = finished(studio, name ?? studio.state.runs.find((each) => each.state === "done")?.name);
  if (!run) return withoutRun(main, "Draw", name, studio);
  const fields = (await get("settings")).sample.filter((field) => field.name !== "num_images"), prompt = promptField(run, `prompt ${run.name}`, `a photo of ${run.handles.join(" and ")} ${PLACES[0]}`);
  const form = settingsForm(fields, `draw ${run.name}`, ["seed"]), seed = form.box[0].firstChild, boxes = layout(run, `boxes ${run.name}`), places = placesForm(`places ${run.name}`, label);
  const counters = Object.fromEntries(Object.entries(KINDS).map(([kind, [, text, usual]]) => [kind, counter(`count ${kind} ${run.name}`, text, usual)]));
  let kind = remembered(`kind ${run.name}`, "sample"), busy = "", version = null;
  const work = h("div", { class: "stack" }), notices = h("div", {}), start = button("Draw", draw, { class: "main large", id: "draw" }), asked = h("div", { class: "stack" });
  const ways = h("fieldset", { class: "ways" }, h("legend", { class: "unseen" }, "What to draw"), Object.entries(KINDS).map(([each, [text]]) =>
    h("label", {}, h("input", { type: "radio", name: "way", value: each, checked: each === kind, onchange: () => choose(each) }), text)));
  for (const { field } of Object.values(counters)) field.addEventListener("input", label);
  const shown = gallery(run, "pictures", (picture) => [picture.settings.prompt && [button("Other seeds", () => again(picture)), button("Take its settings", () => take(picture), { title: "Prompt, settings and boxes of this picture go into the form" })],
    picture.settings.prompt && !picture.maps.length && button("Where did it look?", (event) => attend(picture, event.target, false), { title: "Draws it once more and shows the attention of each handle" }),
    picture.settings.prompt && picture.maps.length <= run.handles.length && button("Each word", (event) => attend(picture, event.target, true), { title: "Draws it once more and shows the attention of each word", "aria-label": "Where did each word look?" }),
    link("Edit this", `#/edit/${encodeURIComponent(run.name)}/${encodeURIComponent(picture.file)}`, { class: "button" })]);
  put(main, h("header", { class: "row" }, h("h1", {}, "Draw"), chooseRun("draw", run.name, studio)),
    h("div", { class: "columns draw" }, h("section", { class: "stack", "aria-label": "What to draw" }, ways, asked, notices, start), h("section", { class: "pictures", "aria-label": "Pictures" }, work, shown.box)));
  choose(kind);

  function choose(way) {
    kind = KINDS[way] ? way : "sample";
    remember(`kind ${run.name}`, kind);
    ways.querySelector(`[value=${kind}]`).checked = true;
    put(asked, kind === "sample" ? prompt.box : h("p", {}, ABOUT[kind]), kind === "explore" && places.box, h("div", { class: "form short" }, counters[kind].box, seed), form.box[1], kind === "sample" && boxes.box);
    label();
  }
  function label() {
    const count = counters[kind].count(), all = subsets(run.handles.length) * places.chosen().length * count;
    start.textContent = kind === "sample" ? `Draw ${count}` : kind === "vary" ? `Draw ${plural(count, "variation")}` : `Draw ${plural(all, "picture")}`;
    start.disabled = all === 0 && kind === "explore";
  }

  async function draw() {
    if (start.disabled) return;
    start.disabled = true;
    put(notices);
    const body = { kind, run: run.name, settings: { ...form.sent(), num_images: counters[kind].count() } };
    if (kind === "sample") Object.assign(body, { prompt: prompt.field.value, boxes: boxes.used(prompt.field.value), own_pixels: boxes.own.checked });
    if (kind === "explore") body.places = places.chosen();
    try {
      await send("POST", "jobs", body);
      speak("Drawing");
      await studio.refresh();
    } catch (error) { put(notices, problem("This cannot be drawn", error.message)); }
    start.disabled = false;
  }

  async function attend(picture, from, words) {
    from.disabled = true;
    put(notices);
    try {
      await send("POST", "jobs", { kind: "attend", run: run.name, file: picture.file, words });
      speak("Reading where it looked");
      await studio.refresh();
    } catch (error) { from.disabled = false; put(notices, problem("Its attention cannot be shown", error.message)); }
  }

  function take(picture) {
    choose("sample");
    prompt.set(picture.settings.prompt);
    form.load(picture.settings);
    boxes.load(picture.boxes ?? {});
    boxes.own.checked = Boolean(picture.settings.own_pixels);
    speak("The form has the settings of this picture");
  }

  function again(picture) {
    take(picture);
    form.load({ ...picture.settings, seed: Number(picture.settings.seed ?? 0) + counters.sample.count() });
    draw();
  }

  return {
    update(state) {
      const text = JSON.stringify([state.jobs.filter((job) => job.name === run.name), state.jobs.filter((job) => job.kind === "train" && job.state === "running")]);
      if (text !== busy) put(work, jobLines(state, run.name, ["sample", "vary", "explore", "attend"], studio.refresh));
      busy = text;
      const now = state.runs.find((each) => each.name === run.name)?.gallery;
      if (now === version) return;
      version = now;
      shown.renew().catch((error) => { version = null; if (!(error instanceof Away)) put(notices, problem("The gallery cannot be read", error.message)); });
    },
    key(event) { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw(); },
    leave() { shown.close(); },
  };
}

// The places of an exploration: those of the chips to tick, and one's own, a line each.
function placesForm(key, onchange) {
  const kept = remembered(key, { ticked: PLACES.slice(0, 3), own: "" });
  const own = h("textarea", { rows: 2, value: kept.own, placeholder: "in a box" }), keep = () => { kept.own = own.value; remember(key, kept); onchange(); };
  own.addEventListener("input", keep);
  const tick = (place) => (event) => { kept.ticked = PLACES.filter((each) => (each === place ? event.target.checked : kept.ticked.includes(each))); keep(); };
  return { chosen: () => [...new Set([...kept.ticked, ...kept.own.split("\n").map((line) => line.trim()).filter(Boolean)])],
    box: h("fieldset", { class: "stack" }, h("legend", { class: "unseen" }, "Places"), h("div", { class: "row picks" }, PLACES.map((place) => h("label", { class: "row" }, h("input", { type: "checkbox", checked: kept.ticked.includes(place), onchange: tick(place) }), place))), labelled("More places, a line each", own)) };
}
