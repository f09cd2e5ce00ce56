// The choice of a finished run, for the rooms that need one.
import { address } from "./api.js";
import { emptyRoom, h, link } from "./dom.js";

export const finished = (studio, name) => studio.state.runs.find((run) => run.name === name && run.state === "done");

export function chooseRun(room, name, studio) {
  const done = studio.state.runs.filter((run) => run.state === "done");
  return h(
    "label",
    { class: "row" },
    h("span", {}, "Run"),
    h(
      "select",
      { id: "run", onchange: (event) => studio.go(room, event.target.value) },
      done.map((run) => h("option", { value: run.name, selected: run.name === name }, run.name)),
    ),
  );
}

// What a room says that needs a finished run.
export function withoutRun(main, title, name, studio) {
  const run = studio.state.runs.find((each) => each.name === name),
    live = run && ["running", "waiting", "elsewhere"].includes(run.state);
  return emptyRoom(
    main,
    title,
    run ? `${name} is not trained to its end yet` : name ? `There is no run ${name}` : "Nothing is trained yet",
    live
      ? "Until then its previews show each concept: its weights are complete only at the end."
      : run
        ? "Continue its training: it goes on where it was stopped."
        : "Train a scene first; on the miniature that takes minutes.",
    run ? link("Watch it", `#/${address("watch", name)}`, { class: "button main" }) : undefined,
  );
}
