// The queue: what is at work, what waits and in which order, and jobs that came with a folder from elsewhere.
import { address, get, send } from "./api.js";
import { stop } from "./app.js";
import { button, h, problem, progress, put, quiet, speak } from "./dom.js";

const WORK = {
  masks: "Proposing a mask for",
  train: "Training",
  sample: "Drawing with",
  vary: "Varying",
  explore: "Exploring",
  attend: "Reading the attention of",
  edit: "Editing with",
  export: "Exporting",
  download: "Fetching",
};
export const workOf = (job) => `${WORK[job.kind] ?? job.kind} ${job.name}`;
export const waitingJobs = (state) =>
  state.jobs.filter((job) => job.state === "waiting").sort((one, other) => one.place - other.place);

// A section with the queue, and one with jobs from elsewhere; both are hidden while they are empty.
export function queue(studio) {
  const list = h("ol", { class: "queue stack" }),
    cards = h("div", { class: "stack" }),
    notices = h("div", { class: "stack" });
  const lane = h("section", { hidden: true, id: "queue" }, h("h2", {}, "Queue"), list);
  const foreign = h(
    "section",
    { hidden: true, id: "foreign" },
    h("h2", {}, "From elsewhere"),
    quiet("These jobs came with this folder: asked for elsewhere, or before it was moved. None starts by itself."),
    cards,
  );
  let drawn = "";

  async function move(job, up, from) {
    try {
      await send("POST", `${address("jobs", job.id)}/move`, { up });
      await studio.refresh();
      const again = [...list.querySelectorAll(`[data-id="${CSS.escape(job.id)}"] button`)],
        same = again.find((each) => each.textContent === from && !each.disabled);
      (same ?? again.at(-1))?.focus();
      speak(
        `${workOf(job)} is now number ${waitingJobs(studio.state).findIndex((each) => each.id === job.id) + 1} of those that wait`,
      );
    } catch (error) {
      put(notices, problem("The queue has not changed", error.message));
    }
  }

  function row(job, i, waiting) {
    const text = workOf(job),
      at = job.progress;
    return h(
      "li",
      { class: "card row", "data-id": job.id },
      h("strong", {}, text),
      i < 0
        ? [
            at ? progress(at.done, at.total, text) : h("span", { class: "quiet" }, "starting …"),
            button("Stop", () => stop(job, "save"), { "aria-label": `Stop ${text}`, disabled: Boolean(job.stopping) }),
          ]
        : [
            h("span", { class: "spring" }),
            button("Up", () => move(job, true, "Up"), { "aria-label": `Up: ${text}`, disabled: i === 0 }),
            button("Down", () => move(job, false, "Down"), { "aria-label": `Down: ${text}`, disabled: i === waiting.length - 1 }),
            button("Take out", () => stop(job, "save"), { "aria-label": `Take out: ${text}`, class: "plain" }),
          ],
    );
  }

  function card(job) {
    const body = h(
      "div",
      {},
      h(
        "p",
        { class: "row" },
        button("Show the command", show, { class: "main", "aria-label": `Show the command: ${workOf(job)}` }),
        button("Do not start it", () => stop(job, "save"), { class: "plain", "aria-label": `Do not start: ${workOf(job)}` }),
      ),
    );
    async function show() {
      try {
        const { command, words } = await get(`${address("jobs", job.id)}/log`);
        put(
          body,
          h("p", {}, "It would run this command. Start it if you know what it reads and writes."),
          h("pre", { tabIndex: 0 }, command),
          h(
            "p",
            { class: "row" },
            button("Start it here", () => accept(words), { class: "main", "aria-label": `Start here: ${workOf(job)}` }),
            button("Do not start it", () => stop(job, "save"), { class: "plain", "aria-label": `Do not start: ${workOf(job)}` }),
          ),
        );
        body.querySelector("button").focus();
      } catch (error) {
        put(body, problem("It cannot be shown", error.message));
      }
    }
    async function accept(words) {
      try {
        await send("POST", `${address("jobs", job.id)}/accept`, { words });
        await studio.refresh();
      } catch (error) {
        put(body, problem("It has not started", error.message));
      }
    }
    return h("article", { class: "card" }, h("h3", {}, workOf(job)), body);
  }

  return {
    sections: [notices, foreign, lane],
    update(state) {
      const waiting = waitingJobs(state),
        at = state.jobs.filter((job) => job.state === "running"),
        others = state.jobs.filter((job) => job.state === "foreign");
      lane.hidden = !waiting.length;
      foreign.hidden = !others.length;
      put(
        list,
        at.map((job) => row(job, -1)),
        waiting.map((job, i) => row(job, i, waiting)),
      );
      const key = others.map((job) => job.id).join("|");
      if (key !== drawn) put(cards, others.map(card));
      drawn = key;
    },
  };
}
