// The images of a run with their settings. Of thousands, only the rows near the window are in the page.
import { address, fileOf, get, send, thumbOf } from "./api.js";
import { button, deleted, h, link, plural, problem, put, quiet, speak } from "./dom.js";

const MARGIN = 400; // pixels above and below the window that are ready to be seen

// A grid of `count` square cells, as a list. make: the element of the i-th cell
export function windowed(make) {
  const list = h("ul", { class: "gallery" }),
    alive = new Map();
  let count = 0;
  function measure() {
    const tracks = getComputedStyle(list).gridTemplateColumns.split(" "),
      gap = parseFloat(getComputedStyle(list).columnGap) || 0;
    return { columns: tracks.length, pitch: parseFloat(tracks[0]) + gap };
  }
  function lay() {
    const { columns, pitch } = measure(),
      top = list.getBoundingClientRect().top;
    if (!(pitch > 0)) return;
    const rows = Math.ceil(count / columns),
      row = (y) => Math.min(rows, Math.max(0, Math.floor((y - top) / pitch)));
    const first = row(-MARGIN),
      last = Math.min(rows, row(innerHeight + MARGIN) + 1),
      from = first * columns,
      to = Math.min(count, last * columns);
    for (const [i, cell] of alive)
      if (i < from || i >= to) {
        cell.remove();
        alive.delete(i);
      }
    for (let i = to - 1, next = null; i >= from; i--) {
      if (!alive.has(i)) {
        alive.set(i, make(i));
        list.insertBefore(alive.get(i), next);
      }
      next = alive.get(i);
    }
    list.style.setProperty("padding-top", `${first * pitch}px`);
    list.style.setProperty("padding-bottom", `${Math.max(0, rows - last) * pitch}px`);
  }
  const seen = new ResizeObserver(lay),
    options = { capture: true, passive: true };
  seen.observe(list);
  addEventListener("scroll", lay, options);
  return {
    list,
    lay,
    watch: (element) => seen.observe(element),
    columns: () => measure().columns,
    show(number) {
      for (const cell of alive.values()) cell.remove();
      alive.clear();
      count = number;
      lay();
    },
    reach(i) {
      // scroll to a cell and return it
      const { columns, pitch } = measure();
      if (!alive.has(i))
        scrollerOf(list).scrollTop += list.getBoundingClientRect().top + Math.floor(i / columns) * pitch - innerHeight / 2;
      lay();
      alive.get(i)?.scrollIntoView({ block: "nearest" });
      return alive.get(i);
    },
    close() {
      seen.disconnect();
      removeEventListener("scroll", lay, options);
    },
  };
}

function scrollerOf(element) {
  for (let each = element; each; each = each.parentElement)
    if (each.scrollHeight > each.clientHeight && /auto|scroll/.test(getComputedStyle(each).overflowY)) return each;
  return document.scrollingElement;
}

const sheet = ({ file }) => file.endsWith("/grid.png");
export const titleOf = (picture) =>
  picture.settings.prompt ?? picture.settings.prompts?.join(", ") ?? (sheet(picture) ? "All in one grid" : picture.file);

// view: what is shown for the chosen image, of its row and its element
export function gallery(run, folder, actions, view = (_picture, image) => image) {
  const detail = h("div", { class: "detail" }),
    gone = h("div", {}),
    only = h("input", { type: "checkbox", onchange: () => show() }),
    total = h("span", { class: "quiet number" });
  const bar = h("p", { class: "row", hidden: true }, total, h("label", { class: "row" }, only, "favourites only"));
  const grid = windowed((i) => shot(pictures[i], i));
  let all = [],
    pictures = [],
    chosen = null,
    asked = 0;
  grid.watch(detail);
  async function renew() {
    const mine = ++asked,
      found = (await get(`${address("runs", run.name)}/pictures`))[folder];
    if (mine !== asked) return; // a later answer came first
    if (JSON.stringify(found) === JSON.stringify(all)) return;
    const fresh = found.length > all.length;
    all = found;
    show(fresh);
  }
  function show(fresh) {
    pictures = only.checked ? all.filter((each) => each.star) : all;
    bar.hidden = all.length < 2;
    total.textContent = plural(pictures.length, "image");
    const had = grid.list.contains(document.activeElement) && document.activeElement.dataset.file;
    if (!pictures.length) {
      chosen = null;
      put(
        detail,
        quiet(all.length ? "No favourite yet: mark one with ☆." : "Images appear here, each with the settings that made it."),
      );
    } else
      choose(
        (!fresh && pictures.find((each) => each.file === chosen?.file)) || pictures.find((each) => !sheet(each)) || pictures[0],
      );
    grid.show(pictures.length);
    if (had) grid.list.querySelector(`[data-file="${CSS.escape(had)}"]`)?.focus({ preventScroll: true });
  }
  function shot(picture, i) {
    const { settings, star, file, v } = picture;
    return h(
      "li",
      { "aria-setsize": pictures.length, "aria-posinset": i + 1 },
      button(
        [
          h("img", { src: thumbOf(run.name, file, v), alt: "", decoding: "async" }),
          star ? h("span", { class: "star", "aria-hidden": "true" }, "★") : null,
        ],
        () => {
          choose(picture);
          detail.scrollIntoView({ block: "nearest" });
        },
        {
          class: "shot",
          "data-file": file,
          "aria-current": file === chosen?.file,
          "aria-label": `${titleOf(picture)}${settings.seed === undefined ? "" : `, seed ${settings.seed}`}${star ? ", favourite" : ""}`,
        },
      ),
    );
  }
  function choose(picture) {
    const same = JSON.stringify(picture) === JSON.stringify(chosen);
    chosen = picture;
    for (const each of grid.list.querySelectorAll(".shot")) each.setAttribute("aria-current", each.dataset.file === picture.file);
    if (same && detail.querySelector("figure")) return;
    const { settings } = picture,
      src = `${fileOf(run.name, picture.file)}?v=${picture.v}`,
      image = h("img", { class: sheet(picture) && "sheet", src, alt: titleOf(picture) });
    const facts = [
      settings.seed !== undefined && `seed ${settings.seed}`,
      settings.num_inference_steps && `${settings.num_inference_steps} steps`,
      settings.sampler,
      settings.guidance_scale !== undefined && `guidance ${settings.guidance_scale}`,
      settings.negative_prompt && `not: ${settings.negative_prompt}`,
      settings.separate && "handles kept apart",
      settings.layout && "with boxes",
      settings.size?.join("×"),
    ];
    const at = [...detail.querySelectorAll("a, button")].indexOf(document.activeElement);
    put(
      detail,
      h(
        "figure",
        { class: "chosen" },
        view(picture, image),
        h(
          "figcaption",
          {},
          h("p", {}, titleOf(picture)),
          h("p", { class: "quiet number" }, facts.filter(Boolean).join(" · ")),
          h(
            "p",
            { class: "row" },
            actions(picture),
            button(picture.star ? "★ Favourite" : "☆ Favourite", () => mark(picture), { "aria-pressed": picture.star }),
            link("Download", `${fileOf(run.name, picture.file)}?download=1`, {
              class: "button",
              download: picture.file
                .split("/")
                .slice(picture.file.split("/").length > 2 ? 1 : -1)
                .join("-"),
            }),
            button("Delete", () => remove(picture), { class: "plain" }),
          ),
          looks(run, picture),
        ),
      ),
    );
    if (at >= 0) detail.querySelectorAll("a, button")[at]?.focus({ preventScroll: true });
  }
  const mark = (picture) =>
    change("marked", picture, "PATCH", { star: !picture.star }, () => speak(picture.star ? "No favourite any more" : "Favourite"));
  const remove = (picture) =>
    change("deleted", picture, "DELETE", {}, ({ trash }) => {
      const i = pictures.indexOf(picture);
      chosen = pictures[i + 1] ?? pictures[i - 1] ?? null;
      return deleted("The image", async () => {
        await send("POST", address("trash", trash));
        await renew();
      });
    });
  // Change an image on the disk, and say above it what has become of it: then() gives a card, or nothing.
  async function change(what, { file }, method, body, then) {
    try {
      put(gone, then(await send(method, `${address("runs", run.name)}/pictures`, { file, ...body })));
    } catch (error) {
      put(gone, problem(`The image was not ${what}`, error.message));
    }
    await renew().catch(() => {});
  }
  function press(i) {
    const cell = pictures[i] && grid.reach(i);
    cell?.firstChild.focus({ preventScroll: true });
    cell?.firstChild.click();
  }
  grid.list.addEventListener("keydown", (event) => {
    const i = pictures.findIndex((each) => each.file === document.activeElement.dataset.file),
      across = grid.columns();
    const to = {
      ArrowRight: i + 1,
      ArrowLeft: i - 1,
      ArrowDown: i + across,
      ArrowUp: i - across,
      Home: 0,
      End: pictures.length - 1,
    }[event.key];
    if (event.key === "Delete" && i >= 0) remove(pictures[i]);
    else if (pictures[to]) {
      event.preventDefault();
      press(to);
    }
  });
  return { box: [gone, detail, h("div", { class: "roll" }, bar, grid.list)], renew, close: grid.close };
}

// Where the handles or words of an image looked while it was drawn.
function looks(run, picture) {
  if (!picture.maps.length) return null;
  return h(
    "div",
    { class: "shots looks", role: "group", "aria-label": "Where each looked" },
    picture.maps.map(({ name, file }) =>
      h("figure", {}, h("img", { src: fileOf(run.name, file), alt: `Where ${name} looked` }), h("figcaption", {}, name)),
    ),
  );
}
