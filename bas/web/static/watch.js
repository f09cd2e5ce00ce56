// Watch: one run while it trains and afterwards: progress, curves, previews, stop and go on.
import { Away, address, fileOf, get, send } from "./api.js";
import { stop } from "./app.js";
import { curve } from "./curves.js";
import { button, copy, duration, h, link, problem, progress, put, quiet, speak } from "./dom.js";
import { STATES } from "./home.js";
import { phaseName } from "./train.js";

export async function open(main, [name], studio) {
  const head = h("div", { class: "stack" }),
    curves = h("div", { class: "curves" }),
    shots = h("div", { class: "shots" });
  const slider = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Step of the preview" });
  const newest = h("input", { type: "checkbox", checked: true }),
    at = h("output", { class: "number" });
  const bar = h(
    "div",
    { class: "row", hidden: true },
    h("span", {}, "Step"),
    slider,
    at,
    h("label", { class: "row" }, newest, "newest"),
  );
  const log = h("pre", { class: "log", tabIndex: 0, role: "region", "aria-label": "What it printed" }),
    details = h("details", {}, h("summary", {}, "What it printed"), log);
  let previews = [],
    masks = [],
    drawn = "",
    seen = "",
    run = null,
    asked = 0,
    stepSaid = -1;
  put(
    main,
    h("h1", {}, name),
    head,
    h("section", {}, h("h2", {}, "Previews"), bar, shots),
    h("section", {}, h("h2", {}, "Losses"), curves),
    details,
  );
  slider.addEventListener("input", () => {
    newest.checked = false;
    show();
  });
  newest.addEventListener("change", () => {
    if (newest.checked) slider.value = previews.length - 1;
    show();
  });
  details.addEventListener("toggle", readLog);

  const job = () => studio.state.jobs.find((each) => each.id === run?.job);

  async function readLog() {
    if (!details.open || !run?.job) return;
    const found = await get(`${address("jobs", run.job)}/log`);
    log.textContent = `$ ${found.command}\n${found.text}`;
  }

  async function resume() {
    try {
      await send("POST", "jobs", { kind: "resume", run: name });
      speak("The training goes on");
      await studio.refresh();
    } catch (error) {
      head.append(problem("The training cannot go on", error.message));
    }
  }

  function drawHead() {
    const { state, done, total, phase } = run,
      live = ["running", "waiting", "elsewhere"].includes(state);
    const stage = run.progress,
      line = job()?.line ?? run.line,
      parts = [];
    if (live) {
      const where =
        stage && !stage.name.startsWith("phase") ? stage.name.replace(/:$/, "") : phase ? phaseName(phase) : "getting ready";
      const rate = stage?.name.startsWith("phase") && stage.left ? stage : null;
      const rest = rate
        ? rate.left + ((total - done - (rate.total - rate.done)) * rate.left) / Math.max(1, rate.total - rate.done)
        : null;
      parts.push(
        h(
          "div",
          { class: "card live" },
          h(
            "p",
            { class: "row" },
            h("strong", { class: "large number" }, `${done}/${total ?? "?"}`),
            h("span", {}, state === "waiting" ? "waits in the queue" : where),
            rest && h("span", { class: "quiet number" }, `about ${duration(rest)} left`),
          ),
          progress(done, total, `Training of ${name}`),
          stage && !stage.name.startsWith("phase") && progress(stage.done, stage.total, stage.name),
          state === "elsewhere"
            ? quiet("A terminal trains this run: stop it there.")
            : h(
                "p",
                { class: "row" },
                button(run.stopping ? "Stopping …" : "Save and stop", () => stop(job(), "save"), {
                  id: "stop",
                  disabled: Boolean(run.stopping) || !job(),
                }),
                button("Stop now", () => stop(job(), "now"), {
                  class: "plain",
                  disabled: !job(),
                  title: "Without saving: goes on from the last checkpoint",
                }),
              ),
          studio.state.runs.some((each) => each.state === "done") &&
            quiet(
              "To draw with another run meanwhile, ask for it in ",
              link("Draw", "#/draw"),
              ": this training can pause for that and go on.",
            ),
        ),
      );
      if (Math.floor((10 * done) / (total || 1)) !== stepSaid) speak(`${done} of ${total} steps`);
      stepSaid = Math.floor((10 * done) / (total || 1));
    } else if (state === "done") {
      parts.push(
        h(
          "div",
          { class: "card good-card" },
          h("p", {}, h("strong", {}, "It is trained. "), `${run.handles.join(", ")} can be drawn now.`),
          h(
            "p",
            { class: "row" },
            link("Next: Draw", `#/${address("draw", name)}`, { class: "button main" }),
            link("Take away", `#/${address("runs", name)}`, { class: "button" }),
            run.report && link("The report", fileOf(name, "report.html"), { class: "button", download: `${name}.html` }),
          ),
        ),
      );
    } else {
      const text =
        {
          stopped: `It was stopped after step ${done} of ${total ?? "?"}.`,
          lost: "It ended abruptly: killed, or the machine was restarted.",
          failed: "It has failed.",
          refused: done ? "It was not continued." : "It has not started.",
          unfinished: `It is unfinished, after step ${done} of ${total ?? "?"}.`,
          damaged: "Its files are damaged.",
          foreign: "It came from elsewhere: Home shows the command that would go on with it, and asks.",
        }[state] ?? STATES[state];
      const begun = state !== "refused" || done > 0,
        again = begun && state !== "damaged" && state !== "foreign";
      parts.push(
        h(
          "div",
          { class: `card ${state === "stopped" || state === "unfinished" ? "" : "bad"}`, role: "status" },
          h("strong", {}, text),
          line && h("p", {}, line),
          run.problem && h("p", {}, run.problem),
          h(
            "p",
            { class: "row" },
            again && button("Continue", resume, { class: "main", id: "continue" }),
            !begun && link("To Home", "#/home", { class: "button" }),
            run.scene && link("Change settings", `#/${address("train", run.scene)}`, { class: "button" }),
            line &&
              button("Copy details", async (event) =>
                copy(`${line}\n${(await get(`${address("jobs", run.job)}/log`)).text}`, event.target),
              ),
          ),
        ),
      );
    }
    put(head, parts);
  }

  async function drawFiles() {
    const mine = ++asked;
    const [found, metrics] = await Promise.all([get(address("runs", name)), get(`${address("runs", name)}/metrics`)]);
    if (mine !== asked) return; // a later answer came first
    ({ previews, masks } = found);
    bar.hidden = previews.length < 2;
    slider.max = Math.max(0, previews.length - 1);
    if (newest.checked) slider.value = slider.max;
    show();
    put(
      curves,
      metrics.curves.length
        ? metrics.curves.map((each) => curve(each, metrics.steps, metrics.starts, run.total))
        : quiet("They come with the first steps."),
    );
  }

  function show() {
    const preview = previews[slider.value];
    if (!preview)
      return put(
        shots,
        quiet(
          run?.state === "done"
            ? "This run has no previews."
            : "The first preview comes after some steps: each handle as it is drawn, and where it looks.",
        ),
      );
    at.textContent = preview.step;
    const key = `${preview.step} ${preview.files.length}`;
    if (key === seen) return;
    seen = key;
    put(
      shots,
      [...(run.handles ?? []).keys(), "all"].map((place) => {
        const files = [`sample-${place}`, `attention-${place}`]
          .map((each) => preview.files.find((file) => file.endsWith(`/${each}.png`)))
          .filter(Boolean);
        if (files.length > 1 && masks[place]) files.push(masks[place]);
        const title = place === "all" ? "all together" : run.handles[place];
        return files.length
          ? h(
              "figure",
              {},
              h(
                "div",
                { class: "row" },
                files.map((file, i) =>
                  h("img", {
                    src: fileOf(name, file),
                    alt: [`${title} at step ${preview.step}`, `where ${title} looks`, `the mask of ${title}`][i],
                  }),
                ),
              ),
              h("figcaption", {}, title),
            )
          : null;
      }),
    );
  }

  return {
    async update(state) {
      run = state.runs.find((each) => each.name === name);
      if (!run)
        return put(
          head,
          problem("This run is not here", "It may have been deleted.", link("To Home", "#/home", { class: "button" })),
        );
      drawHead();
      const key = `${run.done} ${run.state} ${run.cover}`;
      if (key === drawn || run.total === null) return;
      drawn = key;
      try {
        await drawFiles();
        readLog();
      } catch (error) {
        if (!(error instanceof Away)) console.warn(error.message);
        drawn = "";
      }
    },
  };
}
