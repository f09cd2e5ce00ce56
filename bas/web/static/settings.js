// The settings of drawing and editing, each remembered for its run.
import { h, remember, remembered } from "./dom.js";

const NAMES = {
  seed: "Seed",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  sampler: "Sampler",
  negative_prompt: "Not in it",
  separate: "Keep handles apart",
  guidance_rescale: "Guidance rescale",
  eta: "Eta",
  steps_offset: "Steps offset",
  batch_size: "At once",
  height: "Height",
  width: "Width",
  blending_start_percentage: "Image to keep",
};

// Settings that would change nothing beside the others, with the reason.
function idle(values) {
  const off = values.guidance_scale !== undefined && values.guidance_scale <= 1 && "a guidance of 1 or less turns it off";
  return {
    eta: (values.sampler ?? "ddim") !== "ddim" && "only the sampler ddim has it",
    negative_prompt: off,
    guidance_rescale: off,
  };
}

// The settings of drawing. values: what differs from the defaults; sent: of those what has an effect
export function settingsForm(fields, key, shown) {
  const values = remembered(key, {}),
    rows = fields.map(row);
  function row(field) {
    const id = `draw-${field.name}`,
      says = h("small", { class: "quiet" }, field.help);
    const control =
      field.kind === "bool"
        ? h("input", { id, type: "checkbox" })
        : field.kind === "choice"
          ? h(
              "select",
              { id },
              field.choices.map((each) => h("option", { value: each }, each)),
            )
          : h("input", {
              id,
              type: field.kind === "str" ? "text" : "number",
              step: field.kind === "int" ? 1 : "any",
              min: field.least,
              max: field.most,
              placeholder: field.optional ? "default" : "",
            });
    control.addEventListener("input", () => {
      const text = String(control.value).trim();
      set(
        field,
        field.kind === "bool"
          ? control.checked
          : field.kind === "str" || field.kind === "choice"
            ? text
            : text === ""
              ? null
              : Number(text),
      );
      mark();
    });
    return {
      field,
      control,
      says,
      box: h("div", { class: `setting ${field.kind}` }, h("label", { for: id }, NAMES[field.name] ?? field.name), control, says),
    };
  }
  function set(field, value) {
    if (value === null || value === undefined || value === field.default) delete values[field.name];
    else values[field.name] = value;
    remember(key, values);
  }
  function fill() {
    for (const { field, control } of rows)
      if (field.kind === "bool") control.checked = values[field.name] ?? field.default;
      else control.value = values[field.name] ?? field.default ?? "";
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
  return {
    values,
    sent: () => Object.fromEntries(Object.entries(values).filter(([name]) => !idle(values)[name])),
    box: [
      h("div", { class: "form short" }, part(true)),
      h("details", {}, h("summary", {}, "More settings"), h("div", { class: "form" }, part(false))),
    ],
    load(made) {
      for (const { field } of rows) set(field, made[field.name]);
      fill();
    },
  };
}

// How many: a number that each kind of drawing remembers for itself.
export function counter(key, text, usual) {
  const field = h("input", { id: "draw-num_images", type: "number", min: 1, step: 1, value: remembered(key, usual) });
  field.addEventListener("input", () => remember(key, count()));
  const count = () => Math.max(1, Math.round(Number(field.value)) || 1);
  return { count, field, box: h("div", { class: "setting" }, h("label", { for: field.id }, text), field) };
}
