// A prompt: a field, chips for the handles of a run, and places to click.
import { address } from "./api.js";
import { button, h, labelled, remember, remembered, speak } from "./dom.js";

export const PLACES = [
  "at the beach",
  "in the snow",
  "in the jungle",
  "in the street",
  "on a wooden floor",
  "floating on water",
  "with a mountain in the background",
];
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
export const colourOf = (i) => COLOURS[i % COLOURS.length];

// A learnt concept as it looks in the photograph.
const cutout = (run, i) =>
  h("img", {
    class: "cut",
    src: `api/${address("runs", run.name)}/cutout/${i}`,
    alt: "",
    onerror: ({ target }) => target.remove(),
  });

export function promptField(run, key, start) {
  const field = h("textarea", { rows: 3, value: remembered(key, start), spellcheck: false, id: "prompt" });
  field.addEventListener("input", () => {
    remember(key, field.value);
    field.dispatchEvent(new Event("changed"));
  });
  const insert = (text) => {
    const from = document.activeElement === field ? field.selectionStart : field.value.length,
      to = document.activeElement === field ? field.selectionEnd : from;
    const space = from && !/\s$/.test(field.value.slice(0, from)) ? " " : "";
    field.setRangeText(space + text, from, to, "end");
    field.dispatchEvent(new Event("input"));
    field.focus();
  };
  const strength = (handle, by) => {
    // (<toy>:1.3) in the text is all there is: the field stays the only truth
    const name = handle.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"),
      found = new RegExp(`\\(\\s*${name}\\s*:\\s*([\\d.]+)\\s*\\)|${name}`);
    if (!found.test(field.value)) return insert(handle);
    field.value = field.value.replace(found, (_, weight) => {
      const value = Math.max(0, Math.round(10 * (Number(weight ?? 1) + by)) / 10);
      speak(`${handle} ${value}`);
      return value === 1 ? handle : `(${handle}:${value})`;
    });
    field.dispatchEvent(new Event("input"));
  };
  const held = { onmousedown: (event) => event.preventDefault() }; // the field keeps its cursor
  const chips = h(
    "div",
    { class: "chips" },
    run.handles.map((handle, i) =>
      h(
        "span",
        { class: "group" },
        button([cutout(run, i), handle], () => insert(handle), {
          class: "chip",
          style: { "--colour": colourOf(i) },
          title: `Insert ${handle}${run.words?.[i] ? `, the ${run.words[i]}` : ""}`,
          ...held,
        }),
        button("−", () => strength(handle, -0.1), {
          class: "chip step",
          "aria-label": `${handle} weaker`,
          title: "Weaker",
          ...held,
        }),
        button("+", () => strength(handle, 0.1), {
          class: "chip step",
          "aria-label": `${handle} stronger`,
          title: "Stronger",
          ...held,
        }),
      ),
    ),
  );
  const places = h(
    "div",
    { class: "chips" },
    PLACES.map((place) => button(place, () => stand(place), { class: "chip plain", ...held })),
  );
  function stand(place) {
    const old = PLACES.find((each) => field.value.includes(each)); // an image has one place
    if (!old) return insert(place);
    set(field.value.replace(old, place));
    field.focus();
  }
  const set = (text) => {
    field.value = text;
    field.dispatchEvent(new Event("input"));
  };
  return {
    field,
    insert,
    set,
    box: h(
      "div",
      { class: "stack" },
      labelled("Prompt", field),
      h("div", {}, h("small", { class: "quiet" }, "Insert what was learnt"), chips),
      h("div", {}, h("small", { class: "quiet" }, "and a place"), places),
    ),
  };
}
