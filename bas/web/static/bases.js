// The choice of a base model: the chosen one first, the others in a fold, and how one is fetched.
import { send } from "./api.js";
import { stop } from "./app.js";
import { button, bytes, duration, h, problem, progress, put, quiet, speak } from "./dom.js";

// choose: called with the name of another base
export function baseChoice(about, studio, notices, choose) {
  const rest = h("div", {}),
    others = h("details", { open: matchMedia("(min-width: 48rem)").matches }, h("summary", {}, "Other base models"), rest),
    box = h("fieldset", {});

  function draw(base) {
    const options = (mine) => about.bases.filter((each) => (each.name === base) === mine).map((each) => option(each, base));
    put(box, h("legend", {}, "1 · Base model"), options(true), others);
    put(rest, options(false));
  }

  function option(each, base) {
    const { here } = each,
      job = here ? null : studio.state.jobs.find((one) => one.kind === "download" && one.name === each.name);
    return h(
      "div",
      { class: `option ${here ? "" : "off"}` },
      h(
        "label",
        {},
        h("input", {
          type: "radio",
          name: "base",
          value: each.name,
          checked: each.name === base,
          disabled: !here,
          onchange: () => choose(each.name),
        }),
        h(
          "span",
          {},
          h("strong", {}, each.title),
          each.name === "mini" && h("small", {}, "knows no photographs: to try the method in minutes"),
          h("small", { class: "quiet" }, here ? each.license : `not here yet · about ${bytes(each.bytes)} · ${each.license}`),
        ),
      ),
      !here && fetching(each, job),
    );
  }

  // A base model that is not here: fetch it, how far that is, or why it could not be fetched.
  function fetching(each, job) {
    const alive = ["waiting", "running"].includes(job?.state),
      at = job?.progress;
    if (alive) {
      return h(
        "div",
        { class: "row" },
        progress(at?.done ?? 0, at?.total ?? 1, `Fetching ${each.title}`),
        h(
          "span",
          { class: "number" },
          at
            ? `${bytes(at.done)} of ${bytes(at.total)}${at.left ? `, ${duration(at.left)} left` : ""}`
            : job.state === "waiting"
              ? "waiting"
              : "asking for it …",
        ),
        button("Stop", () => stop(job, "now"), { "aria-label": `Stop fetching ${each.title}` }),
      );
    }
    return [
      job &&
        ["failed", "refused", "lost"].includes(job.state) &&
        problem("It was not fetched", job.line || "It ended abruptly: killed, or the machine was restarted."),
      job?.state === "stopped" && quiet("Stopped. Fetched files are kept."),
      h(
        "p",
        {},
        button(job ? "Download again" : "Download", () => fetchBase(each.name), { "aria-label": `Download ${each.title}` }),
        h("small", { class: "quiet" }, " from huggingface.co"),
      ),
    ];
  }

  async function fetchBase(wanted) {
    put(notices);
    try {
      await send("POST", "jobs", { kind: "download", base: wanted });
      speak("It is being fetched");
      await studio.refresh();
    } catch (error) {
      put(notices, problem("It cannot be fetched", error.message));
    }
  }

  return { box, draw };
}
