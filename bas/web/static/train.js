// Train: base, settings, what it takes, start.
import { Away, address, get, send } from "./api.js";
import { baseChoice } from "./bases.js";
import { button, copy, duration, emptyRoom, h, linesOf, link, problem, put, remember, remembered, speak, warning } from "./dom.js";

export async function open(main, [name], studio) {
  if (!name) return emptyRoom(main, "Train", "A training needs a scene", "Bring a photograph and paint a mask for each concept.");
  const key = `settings ${name}`;
  let base = remembered("base", "mini"),
    fields = [],
    values = remembered(key, {}),
    asked = 0,
    timer = null,
    memory = null,
    plan = null;
  const about = await get("about");
  if (!about.bases.some((each) => each.name === base && each.here)) base = "mini";
  const first = h("div", { class: "form" }),
    more = h("div", { class: "form" }),
    facts = h("div", {}),
    notices = h("div", { class: "stack" }),
    bases = baseChoice(about, studio, notices, choose),
    changed = h("p", { class: "quiet" });
  const search = h("input", { type: "search", placeholder: "Search in all settings", "aria-label": "Search in all settings" });
  const all = h("details", {}, h("summary", {}, "All settings"), search, more);
  const start = button("Start training", begin, { class: "main large", id: "start", disabled: true }),
    reason = h("p", { class: "quiet", id: "reason" });
  start.setAttribute("aria-describedby", "reason");
  search.addEventListener("input", filter);

  put(
    main,
    h("h1", {}, `Train ${name}`),
    notices,
    h(
      "div",
      { class: "columns three" },
      h("section", {}, bases.box),
      h("section", {}, h("h2", {}, "2 · Settings"), first, changed, all),
      h("section", { class: "plan" }, h("h2", {}, "3 · What it takes"), facts, start, reason),
    ),
  );

  async function choose(chosen) {
    base = chosen;
    remember("base", base);
    await load();
    renew();
  }

  // The form: its defaults are those of the base, and of the settings that bring others with them.
  async function load(given = values) {
    try {
      ({ train: fields, memory } = await get(`settings?${new URLSearchParams({ base, ...given })}`));
    } catch (error) {
      if (given) return load(null);
      throw error;
    }
    const { id } = document.activeElement;
    drawForm();
    if (id) document.getElementById(id)?.focus({ preventScroll: true });
  }

  function drawForm() {
    put(first, fields.filter((field) => field.first).map(row));
    put(more, fields.filter((field) => !field.first).map(row));
    showChanged();
  }

  function row(field) {
    const id = `set-${field.name}`,
      value = field.name in values ? values[field.name] : field.default;
    let control;
    if (field.kind === "bool") control = h("input", { id, type: "checkbox", checked: Boolean(value) });
    else if (field.kind === "choice") {
      control = h(
        "select",
        { id },
        field.optional && h("option", { value: "", selected: value === null }, "default"),
        field.choices.map((each) => h("option", { value: each, selected: each === value }, each)),
      );
    } else if (field.kind === "list") control = h("textarea", { id, rows: 3, value: value.join("\n") });
    else {
      const number = field.kind === "int" || field.kind === "float";
      control = h("input", {
        id,
        type: number ? "number" : "text",
        step: field.kind === "int" ? 1 : "any",
        min: field.least,
        max: field.most,
        placeholder: field.optional ? (EMPTY[field.name] ?? "default") : "",
        value: value ?? "",
      });
    }
    control.addEventListener(field.kind === "bool" || field.kind === "choice" ? "change" : "input", () => set(field, control));
    if (field.layer) control.addEventListener("change", () => load());
    control.setAttribute("aria-describedby", `${id}-help`);
    return h(
      "div",
      { class: `setting ${field.kind}`, "data-search": `${field.name} ${field.help}`.toLowerCase(), "data-name": field.name },
      h("label", { for: id }, label(field.name)),
      control,
      h(
        "small",
        { id: `${id}-help`, class: "quiet" },
        SHORT[field.name] ?? field.help,
        field.name === "card" && here(),
        " ",
        h("code", {}, field.flag),
      ),
      h("small", { class: "error", role: "alert" }),
    );
  }

  const here = () =>
    memory ? `. Your card has ${Math.round(memory / 2 ** 30)} GB.` : ". No graphics card is here: the processor trains.";

  function set(field, control) {
    const text = control.value.trim();
    let value = text;
    if (field.kind === "bool") value = control.checked;
    else if (field.kind === "int" || field.kind === "float") value = text === "" ? null : Number(text);
    else if (field.kind === "list") value = linesOf(text);
    else if (text === "") value = null;
    if (JSON.stringify(value) === JSON.stringify(field.default) || (value === null && !field.optional)) delete values[field.name];
    else values[field.name] = value;
    remember(key, values);
    showChanged();
    renew();
  }

  function showChanged() {
    const known = new Set(fields.map((field) => field.name)),
      names = Object.keys(values).filter((each) => known.has(each));
    for (const each of Object.keys(values)) if (!known.has(each)) delete values[each];
    put(
      changed,
      names.length
        ? [
            `Changed: ${names.map(label).join(", ")} `,
            button(
              "Reset",
              () => {
                values = {};
                remember(key, values);
                load();
                renew();
              },
              { class: "plain" },
            ),
          ]
        : "As suits this base model.",
    );
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const each of more.children) each.hidden = !words.every((word) => each.dataset.search.includes(word));
  }

  const request = () => ({ scene: name, base, settings: values });

  function renew() {
    start.disabled = true;
    reason.textContent = "Counting what it takes …";
    facts.setAttribute("aria-busy", "true");
    clearTimeout(timer);
    timer = setTimeout(count, 400);
  }

  async function count() {
    const mine = ++asked;
    for (const each of main.querySelectorAll(".setting .error")) each.textContent = "";
    try {
      plan = await send("POST", "plan", request());
      if (mine !== asked) return;
      drawPlan();
    } catch (error) {
      if (mine !== asked) return;
      put(facts);
      plan = null;
      if (error instanceof Away) {
        timer = setTimeout(count, 1500);
        return;
      }
      reason.textContent = "";
      const at = fields.find((field) => error.message.includes(`--${field.name} `) || error.message.startsWith(field.flag));
      const field = at && main.querySelector(`[data-name="${at.name}"] .error`);
      if (field) field.textContent = error.message;
      const masks = /mask|photograph|image|concept|scene/.test(error.message);
      put(
        facts,
        problem(
          "This cannot be trained yet",
          error.message,
          masks && link("To the masks", `#/${address("masks", name)}`, { class: "button" }),
        ),
      );
    }
    facts.removeAttribute("aria-busy");
  }

  function drawPlan() {
    const shown = plan.facts,
      steps = shown.steps ?? {};
    const size = (text) => String(text).split(" = ")[0];
    put(
      facts,
      h(
        "dl",
        { class: "facts" },
        h("dt", {}, "Learns"),
        h("dd", {}, shown.handles),
        Object.entries(steps).map(([phase, text]) => [h("dt", {}, phaseName(phase)), h("dd", {}, `${text.split(",")[0]} steps`)]),
        h("dt", {}, "Time"),
        h("dd", { id: "time" }, timeOf(plan.measured, shown.time ?? {})),
        h("dt", {}, "Memory"),
        h("dd", {}, Object.values(shown.memory).map(size).at(-1)),
        h("dt", {}, "Disk"),
        h("dd", {}, shown.disk),
        h("dt", {}, "Runs on"),
        h("dd", {}, shown.device.replace(", mixed precision no", "")),
        h("dt", {}, "Becomes"),
        h("dd", {}, `the run ${plan.run}`),
      ),
      plan.warnings.map((line) => warning(line)),
      h(
        "details",
        {},
        h("summary", {}, "The command"),
        h("pre", {}, plan.command),
        button("Copy", (event) => copy(plan.command, event.target)),
      ),
    );
    const problemLine = !plan.here
      ? "This base model is not on this machine yet."
      : !plan.enough
        ? "There is too little space on the disk."
        : "";
    start.disabled = Boolean(problemLine);
    const busy = studio.state.jobs.some((job) => ["running", "waiting"].includes(job.state));
    reason.textContent = problemLine || (busy ? "A job is at work: this training starts after it." : "");
  }

  // What was measured on this machine; without that, what is counted, and what is missing in it.
  function timeOf(measured, counted) {
    if (measured) return `about ${duration(measured.seconds)}, as measured here in the run ${measured.run}`;
    const parts = Object.values(counted).map((text) => text.replace("at least ", ""));
    const unit = parts.some((text) => text.split(":").length > 2) ? "hours, minutes, seconds" : "minutes, seconds";
    return [
      "not measured here yet: the first run to its end tells",
      h(
        "small",
        { class: "quiet" },
        `Its arithmetic alone takes ${parts.join(" + ")} (${unit}). Memory, previews and saving can take many times as long.`,
      ),
    ];
  }

  async function begin() {
    if (start.disabled) return;
    start.disabled = true;
    reason.textContent = "Starting …";
    try {
      const job = await send("POST", "jobs", { kind: "train", ...request() });
      speak("Training has started");
      await studio.refresh();
      studio.go("watch", job.name);
    } catch (error) {
      reason.textContent = "";
      put(notices, problem("The training has not started", error.message));
      start.disabled = false;
    }
  }

  await choose(base);
  let fetched = null;
  return {
    async update(state) {
      const mine = state.jobs.filter((job) => job.kind === "download"),
        text = JSON.stringify(mine.map(({ id, state: now, progress: at }) => [id, now, at]));
      if (text === fetched) return;
      fetched = text;
      if (mine.some((job) => job.state === "done" && !about.bases.find((each) => each.name === job.name)?.here))
        about.bases = (await get("about")).bases;
      bases.draw(base);
    },
    key(event) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) begin();
    },
    leave() {
      clearTimeout(timer);
    },
  };
}

const SHORT = {
  // where the help of the command says more than one needs at first
  card: "Fits the training into this memory. any: changes nothing",
  phase1_train_steps: "The handles alone are trained",
  phase2_train_steps: "The model is trained as well",
  seed: "Another seed gives another run",
  close_ups: "Also trains on close-ups of the concepts",
  background_handle: "Also learns what no mask covers, as bg for <bg>",
  img_log_steps: "Images while it trains; 0 for none",
  class_prompt: "Prompts of the class images, one a line",
};
const EMPTY = { background_handle: "none" }; // what a field without a value means, where that is no default
const NAMES = {
  card: "Memory of the graphics card",
  phase1_train_steps: "Steps of phase 1",
  phase2_train_steps: "Steps of phase 2",
  seed: "Seed",
  close_ups: "Close-ups, for small concepts",
  background_handle: "Handle of the background",
  img_log_steps: "Steps between previews",
};
export const label = (name) => NAMES[name] ?? name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase());
export const phaseName = (name) => ({ phase1: "Phase 1, the handles", phase2: "Phase 2, the model too" })[name] ?? name;
