// Runs: take one away, compare several.
import { address, fileOf, get, send } from "./api.js";
import { curve } from "./curves.js";
import { button, bytes, copy, h, link, problem, put, quiet, warning } from "./dom.js";
import { STATES } from "./home.js";
import { label } from "./train.js";
import { jobLines } from "./work.js";

const TITLES = { single: "One file", kohya: "LoRA for ComfyUI, A1111, InvokeAI", peft: "LoRA for diffusers" };
const TINTS = ["--mark", "--second", "--third", "--quiet", "--bad", "--good"];

export async function open(main, [name], studio) {
  const away = h("section", { class: "stack" }),
    table = h("div", { class: "stack" }),
    picked = new Set(),
    list = h("fieldset", { class: "row picks" });
  put(main, h("h1", {}, "Runs"), away, h("section", { class: "stack" }, h("h2", {}, "Compare"), list, table));
  put(away, quiet("Looking …"));
  let drawn = "",
    listed = "",
    asked = 0;

  async function drawAway(state) {
    const run = state.runs.find((each) => each.name === name);
    if (!run)
      return put(
        away,
        quiet(
          name
            ? `There is no run ${name}: choose another one on Home.`
            : state.runs.length
              ? "No run is trained to its end yet. Then it can be taken away."
              : "No run yet. Training on a scene makes a run.",
        ),
        h("p", {}, link("To Home", "#/home", { class: "button main" })),
      );
    if (run.state !== "done")
      return put(
        away,
        h("h2", {}, `Take ${name} away`),
        quiet(`It is ${STATES[run.state]}: a run is taken away when it is trained to its end.`),
        link("Watch", `#/${address("watch", name)}`, { class: "button main" }),
      );
    const mine = ++asked,
      exports = await get(`${address("runs", name)}/exports`),
      to = `api/${address("runs", name)}/zip?what=`;
    if (mine !== asked) return; // a later answer came first
    const whole = run.train === "full" || run.train === "cross_attention";
    put(
      away,
      h("h2", {}, `Take ${name} away`),
      h("p", {}, link("How it was trained", `#/${address("watch", name)}`)),
      jobLines(state, name, ["export"], studio.refresh),
      h(
        "div",
        { class: "cards" },
        h(
          "article",
          { class: "card" },
          h("h3", {}, whole ? "The model as a folder" : "The run as a folder"),
          quiet(whole ? "bas and diffusers open it as it is, with its handles." : "bas opens it where its base model is."),
          h("p", {}, link("Download .zip", `${to}run`, { class: "button main", download: `${name}.zip` })),
        ),
        exports.map((each) =>
          h(
            "article",
            { class: "card" },
            h("h3", {}, TITLES[each.form]),
            quiet(each.about),
            each.problem
              ? quiet(`Not for this run: ${each.problem}`)
              : each.files.length
                ? [
                    h(
                      "ul",
                      { class: "files" },
                      each.files.map((file) =>
                        h(
                          "li",
                          {},
                          link(file.file.split("/").at(-1), `${fileOf(name, file.file)}?download=1`, {
                            download: file.file.split("/").at(-1),
                          }),
                          ` ${bytes(file.bytes)}`,
                        ),
                      ),
                    ),
                    h(
                      "p",
                      {},
                      link("Download all, .zip", `${to}${each.form}`, {
                        class: "button main",
                        download: `${name}-${each.form}.zip`,
                      }),
                    ),
                    each.needs.map((line) => warning(line)),
                    each.uses.length
                      ? h(
                          "details",
                          { open: true },
                          h("summary", {}, "What to type there"),
                          each.uses.map(({ program, line }) =>
                            h(
                              "p",
                              { class: "row" },
                              h("code", {}, `${program}: ${line}`),
                              button("Copy", (event) => copy(line, event.target)),
                            ),
                          ),
                        )
                      : null,
                  ]
                : h(
                    "p",
                    {},
                    button("Make it", () => make(each.form), { "aria-label": `Make: ${TITLES[each.form]}` }),
                  ),
          ),
        ),
        h(
          "article",
          { class: "card" },
          h("h3", {}, "The scene"),
          quiet("Photograph and masks, as in training."),
          h("p", {}, link("Download .zip", `${to}scene`, { class: "button", download: `${name}-scene.zip` })),
        ),
        run.report &&
          h(
            "article",
            { class: "card" },
            h("h3", {}, "The report"),
            quiet("One page with previews, losses and settings, to read without bas."),
            h(
              "p",
              {},
              link("Download .html", `${fileOf(name, "report.html")}?download=1`, { class: "button", download: `${name}.html` }),
            ),
          ),
      ),
    );
  }

  async function make(form) {
    try {
      await send("POST", "jobs", { kind: "export", run: name, form });
      drawn = "";
      await studio.refresh();
    } catch (error) {
      away.append(problem("This cannot be made", error.message));
    }
  }

  async function compare() {
    if (picked.size < 2)
      return put(table, quiet(studio.state.runs.length < 2 ? "Two runs are needed to compare." : "Tick two or more runs."));
    try {
      const found = await get(`compare?runs=${encodeURIComponent([...picked].join("|"))}`);
      const curves = [...new Set(found.metrics.flatMap((each) => each.curves.map((one) => one.name)))];
      const last = Math.max(...found.metrics.map((each) => each.steps.at(-1) ?? 0)),
        ofName = (curveName) => found.metrics.map((each) => each.curves.find((one) => one.name === curveName));
      put(
        table,
        found.differs.length
          ? h(
              "div",
              { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Settings that differ" },
              h(
                "table",
                {},
                h("caption", {}, "Settings that differ"),
                h(
                  "thead",
                  {},
                  h(
                    "tr",
                    {},
                    h("th", { scope: "col" }, "Setting"),
                    found.runs.map((run) => h("th", { scope: "col" }, run)),
                  ),
                ),
                h(
                  "tbody",
                  {},
                  found.differs.map((row) =>
                    h(
                      "tr",
                      {},
                      h("th", { scope: "row" }, label(row.name)),
                      row.values.map((value) => h("td", {}, value)),
                    ),
                  ),
                ),
              ),
            )
          : h("p", {}, "All settings are the same."),
        h(
          "div",
          { class: "beside" },
          found.runs.map((run, i) =>
            h(
              "section",
              {},
              h("h3", {}, run),
              h(
                "div",
                { class: "shots" },
                (found.previews[i].at(-1)?.files ?? [])
                  .filter((file) => file.includes("/sample-"))
                  .map((file) => h("img", { src: fileOf(run, file), alt: `${file.split("/").at(-1)} of ${run}` })),
              ),
              curves.map((each) => {
                const { steps, starts } = found.metrics[i],
                  all = ofName(each),
                  one = all[i];
                return one
                  ? curve(
                      one,
                      steps,
                      starts,
                      last,
                      TINTS[i],
                      all.flatMap((c) => c?.values ?? []),
                    )
                  : null;
              }),
            ),
          ),
        ),
      );
    } catch (error) {
      put(table, problem("These cannot be compared", error.message));
    }
  }

  return {
    update(state) {
      const text = JSON.stringify([
        state.runs.find((run) => run.name === name),
        state.jobs.filter((job) => job.name === name && job.kind === "export"),
      ]);
      if (text !== drawn) {
        drawn = text;
        drawAway(state).catch((error) => put(away, problem("This run cannot be read", error.message)));
      }
      const names = state.runs.filter((run) => run.handles).map((run) => run.name),
        key = names.join("|");
      if (key === listed) return;
      listed = key;
      for (const each of picked) if (!names.includes(each)) picked.delete(each);
      put(
        list,
        h("legend", { class: "unseen" }, "Runs to compare"),
        names.map((each) =>
          h(
            "label",
            { class: "row" },
            h("input", {
              type: "checkbox",
              checked: picked.has(each),
              onchange: (event) => {
                event.target.checked ? picked.add(each) : picked.delete(each);
                compare();
              },
            }),
            each,
          ),
        ),
      );
      compare();
    },
  };
}
