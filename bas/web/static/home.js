// Home: bring photographs; scenes and runs.
import { address, get, send, thumbOf, upload } from "./api.js";
import { button, deleted, duration, h, link, plural, problem, progress, put, quiet } from "./dom.js";
import { filesIn, packed, together } from "./folders.js";
import { queue } from "./queue.js";

export const STATES = {
  done: "done",
  running: "training",
  waiting: "in the queue",
  stopped: "stopped",
  failed: "failed",
  refused: "refused",
  lost: "ended without a word",
  unfinished: "unfinished",
  elsewhere: "training in a terminal",
  damaged: "damaged",
  foreign: "asked for elsewhere, not started here",
};

export async function open(main, _rest, studio) {
  const notices = h("div", { class: "stack" }),
    scenes = h("div", { class: "cards" }),
    runs = h("div", { class: "cards" }),
    unnamed = h("div"),
    work = queue(studio);
  const rows = h("ul", { class: "files" }),
    bin = h("details", { id: "trash", ontoggle: listTrash }, h("summary", {}, "Trash"), rows);
  const files = h("input", {
    type: "file",
    accept: "image/*,.heic,.heif,.tif,.tiff",
    multiple: true,
    class: "unseen",
    tabIndex: -1,
    "aria-hidden": "true",
    id: "files",
    onchange: () => {
      bring([...files.files]);
      files.value = "";
    },
  });
  const drop = h(
    "section",
    { class: "drop", "aria-label": "Bring photographs" },
    h("p", { class: "large" }, "Drop a photograph here"),
    h(
      "p",
      { class: "row centre" },
      button("Choose a photograph", () => files.click(), { class: "main", id: "choose" }),
      button("Try the playroom", example, { title: "A scene that comes with bas, with its masks painted" }),
    ),
    quiet(
      "or paste one. One photograph that shows the concepts you want to learn is enough. Or drop a scene's folder, or its files.",
    ),
    files,
  );
  put(
    main,
    h("h1", {}, "Home"),
    drop,
    notices,
    work.sections,
    h("h2", {}, "Scenes"),
    scenes,
    h("h2", {}, "Runs"),
    runs,
    unnamed,
    bin,
  );
  for (const place of [scenes, runs]) put(place, quiet("Looking …"));

  const left = new AbortController();
  for (const [kind, act] of Object.entries({ dragenter: over, dragover: over, dragleave: out, drop: dropped, paste: pasted }))
    (act === pasted ? window : main).addEventListener(kind, act, { signal: left.signal });
  function over(event) {
    event.preventDefault();
    drop.classList.add("over");
  }
  function out(event) {
    if (!main.contains(event.relatedTarget)) drop.classList.remove("over");
  }
  function dropped(event) {
    event.preventDefault();
    drop.classList.remove("over");
    const items = [...event.dataTransfer.items].filter(({ kind }) => kind === "file");
    bring(items.map((item) => [item.webkitGetAsEntry()].find((entry) => entry?.isDirectory) ?? item.getAsFile()));
  }
  function pasted(event) {
    const found = [...(event.clipboardData?.files ?? [])];
    if (found.length) bring(found);
  }

  // list: photographs, folders of scenes, or the files of one scene
  async function bring(list) {
    const named = (pattern) => list.some(({ name }) => pattern.test(name));
    if (named(/^img\.\w+$/i) && named(/^mask.*\.|^scene\.json$/i)) list = [{ name: "scene", files: list }];
    let made = null;
    for (const each of list) {
      const bar = h("p", { class: "row" }, `Reading ${each.name} …`),
        line = h("div", { class: "card" }, bar);
      notices.append(line);
      try {
        const body = each.files ? packed(await together(each.files)) : each.isDirectory ? packed(await filesIn(each)) : each;
        made = await upload(body, each.name.replace(/\.[^.]*$/, ""), (done, total) =>
          put(bar, `Bringing ${each.name} `, progress(done, total, each.name)),
        );
        line.remove();
      } catch (error) {
        line.replaceWith(
          problem(
            `${each.name} cannot be used`,
            error.message,
            button("Close", (event) => event.target.closest(".card").remove()),
          ),
        );
      }
    }
    if (made && list.length === 1) studio.go("masks", made.name);
    else studio.refresh();
  }

  async function example() {
    try {
      const made = await send("POST", "example");
      studio.go("masks", made.name);
    } catch (error) {
      notices.append(problem("The playroom cannot be opened", error.message));
    }
  }

  async function remove(kind, name) {
    try {
      const { trash } = await send("DELETE", address(`${kind}s`, name));
      notices.append(deleted(`The ${kind} ${name}`, () => restore(trash)));
      studio.refresh();
      listTrash();
    } catch (error) {
      notices.append(problem(`${name} cannot be deleted`, error.message));
    }
  }

  async function restore(trash) {
    await send("POST", address("trash", trash));
    studio.refresh();
    listTrash();
  }

  async function listTrash() {
    if (!bin.open) return;
    try {
      const found = await get("trash");
      put(
        rows,
        found.length
          ? found.map(({ name, was }) =>
              h(
                "li",
                { class: "row" },
                was,
                button(
                  "Restore",
                  () => restore(name).catch((error) => notices.append(problem(`${was} cannot be restored`, error.message))),
                  { "aria-label": `Restore ${was}` },
                ),
              ),
            )
          : h("li", { class: "quiet" }, "Nothing is in the trash."),
      );
    } catch (error) {
      put(rows, h("li", {}, error.message));
    }
  }

  const picture = (src, to) =>
    link([h("img", { src, alt: "", loading: "lazy" })], to, { class: "picture", tabIndex: -1, "aria-hidden": "true" });
  const deleting = (kind, name) => button("Delete", () => remove(kind, name), { class: "plain", "aria-label": `Delete ${name}` });

  function sceneCard(scene) {
    const to = encodeURIComponent(scene.name);
    if (scene.problem) {
      return h("article", { class: "card bad" }, h("h3", {}, scene.name), h("p", {}, scene.problem), deleting("scene", scene.name));
    }
    const ready = scene.concepts > 0 && scene.painted === scene.concepts;
    const state = ready
      ? `${plural(scene.concepts, "concept")}, ready to train`
      : scene.concepts
        ? `${scene.painted} of ${scene.concepts} painted`
        : "nothing painted yet";
    return h(
      "article",
      { class: "card scene" },
      picture(`api/scenes/${to}/view?side=320&v=${scene.version}`, `#/masks/${to}`),
      h("h3", {}, scene.name),
      h("p", { class: ready ? "good" : "quiet" }, state),
      h(
        "p",
        { class: "row" },
        link(ready ? "Train" : "Paint", `#/${ready ? "train" : "masks"}/${to}`, {
          class: "button main",
          "aria-label": `${ready ? "Train" : "Paint"} ${scene.name}`,
        }),
        ready && link("Masks", `#/masks/${to}`, { class: "button", "aria-label": `Masks of ${scene.name}` }),
        deleting("scene", scene.name),
      ),
    );
  }

  function runCard(run) {
    const to = encodeURIComponent(run.name),
      busy = ["running", "waiting", "elsewhere"].includes(run.state),
      done = run.state === "done",
      room = `#/${done ? "draw" : "watch"}/${to}`;
    const left = run.progress?.left;
    return h(
      "article",
      { class: `card run ${["failed", "lost", "refused", "damaged"].includes(run.state) ? "bad" : ""}` },
      run.cover && picture(thumbOf(run.name, run.cover), room),
      h("h3", {}, run.name),
      busy
        ? [
            progress(run.done, run.total, `Training of ${run.name}`),
            h("p", { class: "number" }, `${run.done}/${run.total ?? "?"}${left ? `, ${duration(left)} left` : ""}`),
          ]
        : h(
            "p",
            { class: done ? "good" : "quiet" },
            STATES[run.state] +
              (done ? `, ${plural(run.pictures, "image")} · ` : run.total ? ` after ${run.done} of ${run.total} steps` : ""),
            done && link("its training", `#/watch/${to}`, { "aria-label": `its training: ${run.name}` }),
          ),
      run.problem && h("p", {}, run.problem),
      h(
        "p",
        { class: "row" },
        link(done ? "Draw" : "Watch", room, {
          class: "button main",
          "aria-label": `${done ? "Draw with" : "Watch"} ${run.name}`,
        }),
        done && link("Take away", `#/runs/${to}`, { class: "button", "aria-label": `Take away ${run.name}` }),
        !busy && deleting("run", run.name),
      ),
    );
  }

  return {
    update(state) {
      work.update(state);
      put(
        scenes,
        state.scenes.length
          ? state.scenes.map(sceneCard)
          : quiet("No scene yet. A scene is a photograph with a mask for each concept."),
      );
      put(unnamed, state.unnamed && problem("Folders that are not shown", state.unnamed));
      put(runs, state.runs.length ? state.runs.map(runCard) : quiet("No run yet. Training on a scene makes a run."));
    },
    leave: () => left.abort(),
  };
}
