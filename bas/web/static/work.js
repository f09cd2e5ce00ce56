// What the jobs of a run say in the rooms that started them.
import { send } from "./api.js";
import { stop } from "./app.js";
import { button, duration, h, problem, put, quiet, warning } from "./dom.js";

// What the jobs of some kinds say for a run: their progress, what they wait for, their warnings, or why the last has ended.
export function jobLines(state, run, kinds, refresh) {
  const mine = state.jobs.filter((job) => job.name === run && kinds.includes(job.kind)),
    busy = mine.filter((job) => ["waiting", "running"].includes(job.state)).reverse();
  const lines = busy.slice(0, 3).map((job) => (job.state === "running" ? atWork(job) : waits(job, state, refresh)));
  if (busy.length > 3) lines.push(quiet(`${busy.length - 3} more wait.`));
  const [latest] = mine,
    warnings = (latest?.asked?.warnings ?? []).map((line) => warning(line));
  if (!busy.length && latest && !["done", "stopped"].includes(latest.state))
    lines.push(problem("The last one has failed", latest.line || "It ended abruptly: killed, or out of memory."));
  return [...lines, ...warnings];
}

function atWork(job) {
  const at = job.progress;
  return h(
    "div",
    { class: "card live", role: "status" },
    h(
      "p",
      { class: "row" },
      h("span", {}, job.stopping ? "Stopping …" : at ? "At work" : "Loading the model …"),
      at &&
        h(
          "span",
          { class: "quiet number" },
          `${at.name.replace(/:$/, "")} ${at.done}/${at.total}${at.left ? `, ${duration(at.left)} left` : ""}`,
        ),
    ),
    h("progress", at ? { max: at.total, value: at.done, "aria-label": "Steps" } : { "aria-label": "Loading" }),
  );
}

function waits(job, state, refresh) {
  const training = state.jobs.find((each) => each.kind === "train" && each.state === "running"),
    said = h("div", {});
  const cancel = button("Do not draw it", () => stop(job, "save"), { class: "plain" });
  if (!training) return h("div", { class: "card live row", role: "status" }, "Waits for the job at work.", cancel);
  const at = state.runs.find((each) => each.name === training.name);
  if (training.stopping) {
    const resumes = (each) => each.asked?.resume && each.name === training.name && each.state === "waiting";
    const then = state.jobs.some(resumes) ? ", and the training goes on" : "";
    const line = `The training of ${training.name} is being saved. Then this is drawn${then}.`;
    return h("div", { class: "card live row", role: "status" }, line, cancel);
  }
  const step = at?.total ? `, at step ${at.done} of ${at.total}` : "";
  const pause = async (event) => {
    event.target.disabled = true;
    try {
      await send("POST", "jobs", { kind: "pause", job: training.id });
      await refresh();
    } catch (error) {
      event.target.disabled = false;
      put(said, problem("The training is not paused", error.message));
    }
  };
  return h(
    "div",
    { class: "card live", role: "status" },
    h("p", {}, `Waits for the training of ${training.name}${step}: one job runs at a time.`),
    h(
      "p",
      { class: "row" },
      button("Pause it, draw, go on", pause, {
        id: "pause",
        title: "Saves the training at its step, draws, and continues it by itself: the result is the same to the bit",
      }),
      cancel,
    ),
    said,
  );
}
