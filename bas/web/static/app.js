// The frame: rooms by address, the state of the server, the strip of work, keys.
import { Away, address, get, send } from "./api.js";
import { button, duration, h, link, problem, progress, put, quiet, speak } from "./dom.js";
import { workOf } from "./queue.js";

const ROOMS = {
  home: { title: "Home", load: () => import("./home.js") },
  masks: { title: "Masks", load: () => import("./masks.js") },
  train: { title: "Train", load: () => import("./train.js") },
  watch: { title: "Watch", load: () => import("./watch.js"), in: "train" },
  draw: { title: "Draw", load: () => import("./draw.js") },
  edit: { title: "Edit", load: () => import("./edit.js") },
  runs: { title: "Runs", load: () => import("./runs.js") },
};
const main = document.getElementById("main"),
  rail = document.getElementById("rail"),
  strip = document.getElementById("strip");
const studio = { state: null, go, refresh, open };
let room = null,
  shown = 0,
  timer = null,
  last = "";

const parts = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
export function go(...place) {
  location.hash = `#/${address(...place)}`;
}

async function open() {
  const mine = ++shown,
    [name, ...rest] = parts(),
    key = ROOMS[name] ? name : "home";
  await room?.leave?.();
  if (mine !== shown) return;
  room = null;
  drawRail(key);
  put(main, h("h1", {}, ROOMS[key].title), quiet("Loading …"));
  document.title = `${rest[0] ? `${rest[0]} · ` : ""}${ROOMS[key].title} · bas studio`;
  document.body.dataset.room = key;
  try {
    const module = await ROOMS[key].load();
    while (!studio.state && key !== "home") {
      await refresh();
      if (!studio.state) await new Promise((later) => setTimeout(later, 500));
    }
    const opened = await module.open(main, rest, studio);
    if (mine !== shown) return opened?.leave?.();
    room = opened;
    last = "";
    if (studio.state) room?.update?.(studio.state);
  } catch (error) {
    if (mine !== shown) return;
    put(
      main,
      h("h1", {}, ROOMS[key].title),
      problem("This room cannot be opened", error.message, button("Try again", open), link("Home", "#/home")),
    );
  }
}

// The place that each room is about: kept when one goes from one room to the next.
function about(kind) {
  const [name, first] = parts(),
    scenes = studio.state?.scenes ?? [],
    runs = studio.state?.runs ?? [];
  if (kind === "scene") return ["masks", "train"].includes(name) && first ? first : scenes[0]?.name;
  return ["watch", "draw", "edit", "runs"].includes(name) && first ? first : runs.find((run) => run.state === "done")?.name;
}

const toRoom = (room, of) => `#/${of ? address(room, of) : room}`;

function drawRail(current) {
  const place = { masks: "scene", train: "scene", draw: "run", edit: "run", runs: "run" };
  put(
    rail,
    h(
      "ul",
      {},
      Object.entries(ROOMS)
        .filter(([, each]) => !each.in)
        .map(([key, each], i) => {
          return h(
            "li",
            {},
            link(each.title, toRoom(key, place[key] && about(place[key])), {
              "aria-current": key === (ROOMS[current].in ?? current) ? "page" : null,
              class: `to-${key}`,
              title: `${each.title} (Alt+${i + 1})`,
            }),
          );
        }),
    ),
  );
}

async function refresh() {
  clearTimeout(timer);
  let alive = false;
  try {
    studio.state = await get("state");
    alive = studio.state.jobs.some((job) => ["waiting", "running"].includes(job.state));
    const text = JSON.stringify(studio.state);
    if (text !== last) {
      last = text;
      drawStrip();
      drawRail(ROOMS[parts()[0]] ? parts()[0] : "home");
      room?.update?.(studio.state);
    }
  } catch (error) {
    if (!(error instanceof Away)) console.error(error);
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, alive ? 700 : 2500);
}

function drawStrip() {
  const busy = studio.state.jobs.filter((job) => ["waiting", "running"].includes(job.state));
  const job = busy.find((each) => each.state === "running") ?? busy.at(-1);
  strip.hidden = !job;
  if (!job) return;
  const { name, done, total, left } = job.progress ?? {};
  const text = workOf(job);
  const how = job.stopping
    ? "stopping …"
    : job.state === "waiting"
      ? "waiting"
      : name
        ? `${name.replace(/:$/, "")} ${done}/${total}`
        : "starting …";
  put(
    strip,
    h("span", { class: "dot", "aria-hidden": "true" }),
    link(
      text,
      job.kind === "download"
        ? toRoom("train", about("scene"))
        : toRoom({ train: "watch", masks: "masks", edit: "edit", export: "runs" }[job.kind] ?? "draw", job.name),
    ),
    name ? progress(done, total, text) : null,
    h("span", { class: "number" }, how),
    left ? h("span", { class: "quiet number" }, `${duration(left)} left`) : null,
    busy.length > 1 ? link(`${busy.length - 1} more in the queue`, "#/home") : null,
    h("span", { class: "spring" }),
    button("Stop", () => stop(job, "save"), { "aria-label": `Stop ${text}`, disabled: Boolean(job.stopping) }),
  );
}

export async function stop(job, how) {
  try {
    await send("POST", `${address("jobs", job.id)}/stop`, { how });
    speak("Stopping");
  } catch (error) {
    speak(error.message);
  }
  refresh();
}

function help() {
  const rows = [
    ["Alt+1 … 6", "rooms"],
    ["b e f p c", "brush, eraser, fill, polygon, click"],
    ["x", "brush ⇄ eraser"],
    ["[ ]", "size of the brush"],
    ["1 … 9", "concept"],
    ["Enter, Esc", "take, drop a proposal"],
    ["Ctrl+Z, Ctrl+Shift+Z", "undo, redo"],
    ["+ − 0", "zoom, fit"],
    ["h", "hide the masks"],
    ["Space + drag", "move the image"],
    ["Ctrl+Enter", "start, draw, edit"],
    ["?", "this list"],
  ];
  const dialog = h(
    "dialog",
    { "aria-label": "Keys" },
    h("h2", {}, "Keys"),
    h(
      "dl",
      { class: "keys" },
      rows.map(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)]),
    ),
    quiet("Letters work on the image: click it, or reach it with Tab."),
    button("Close", () => dialog.close(), { class: "main" }),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

addEventListener("hashchange", () => {
  open();
  main.focus({ preventScroll: true });
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select");
  const keys = Object.keys(ROOMS).filter((key) => !ROOMS[key].in);
  if (event.altKey && /^[1-9]$/.test(event.key) && keys[event.key - 1]) {
    event.preventDefault();
    rail.querySelectorAll("a")[event.key - 1].click();
  } else if (event.key === "?" && !typing) help();
  else room?.key?.(event, Boolean(typing));
});
drawRail("home");
open();
refresh();
