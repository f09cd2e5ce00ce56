// Masks: paint each concept, name it; every stroke is saved.
import { Away, Refused, address, ask, get, send } from "./api.js";
import { button, emptyRoom, h, link, percent, problem, put, quiet, remember, remembered, rgb, speak, warning } from "./dom.js";
import { Painter } from "./painter.js";
import { gridsOf } from "./grids.js";
import { proposals } from "./propose.js";
import { Mask } from "./tiles.js";

const REST = 250; // milliseconds after a stroke before it is sent

export async function open(main, [name], studio) {
  if (!name) return emptyRoom(main, "Masks", "Bring a photograph first", "Then paint over each thing that you want to learn.");
  const models = await get("segmenters");
  let scene = await get(address("scenes", name)),
    active = 0,
    masks = [],
    chain = Promise.resolve(),
    notes = [],
    waiting = null,
    checked = 0;
  const opened = Date.now(),
    dirty = new Map(); // mask -> keys of squares that are not saved yet
  const base = address("scenes", name);
  const status = h("span", { class: "saved", role: "status" }),
    notices = h("div", { class: "stack" });
  const list = h("ol", { class: "concepts" }),
    advice = h("div", { class: "stack" }),
    next = h("div", { class: "next" });
  const grids = h("div", { class: "grids" }),
    seen = h("details", {}, h("summary", {}, "What the losses see"), grids);
  seen.open = remembered("seen", false);
  seen.addEventListener("toggle", () => {
    remember("seen", seen.open);
    check();
  });

  const proposal = proposals(name, models, studio, {
    word: () => scene.concepts[active]?.word,
    take: (mask) => {
      if (masks[active]) painter.replace(masks[active], mask);
    },
    draw: () => painter.stage.draw(),
  });
  const painter = new Painter(`Photograph ${name}`, {
    target: () => !proposal.mask && masks[active] && { mask: masks[active] },
    click: models.sam ? null : proposal.click,
    layers: () =>
      masks.map((mask, i) => ({
        mask: (i === active && proposal.mask) || mask,
        colour: rgb(scene.concepts[i]?.colour ?? "#888888"),
        strength: i === active ? 1 : 0.7,
      })),
    part: (box, side) => `api/${base}/view?box=${box.join(",")}&side=${side}&v=${opened}`,
    changed(mask, keys) {
      if (proposal.mask) proposal.drop();
      const place = masks.indexOf(mask);
      if (place < 0) return;
      for (const key of keys) (dirty.get(mask) ?? dirty.set(mask, new Set()).get(mask)).add(key);
      showShare(place);
      say("saving …");
      clearTimeout(waiting);
      waiting = setTimeout(save, REST);
    },
  });

  put(
    main,
    h(
      "div",
      { class: "masks" },
      h("div", { class: "paint" }, h("header", { class: "row" }, h("h1", {}, name), status), painter.bar, painter.stage.root),
      h(
        "aside",
        { "aria-label": "Concepts" },
        notices,
        h("h2", {}, "Concepts"),
        quiet("Choose a concept, paint over it in the photograph, and say in a word what it is."),
        list,
        h("p", { class: "row" }, button("Add a concept", add, { id: "add" })),
        proposal.status,
        proposal.box,
        advice,
        seen,
        next,
      ),
    ),
  );
  painter.load(`api/${base}/view?v=${opened}`, scene.width, scene.height);
  await loadMasks();
  if (!scene.concepts.length) await change(() => [{ from: null, handle: "<asset0>", word: null }]);
  drawList();
  say("saved ✓");
  check();

  function say(text, bad = false) {
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  async function loadMasks() {
    masks = await Promise.all(
      scene.concepts.map(async (_, i) => Mask.unpack(await (await ask("GET", `${base}/masks/${i}`)).arrayBuffer())),
    );
    painter.stage.draw();
  }

  // Everything that changes the scene goes through one chain, in order, each with the version that the last one left.
  function inOrder(work) {
    chain = chain.then(work, work);
    return chain;
  }

  function save() {
    return inOrder(async () => {
      for (const [mask, keys] of dirty) {
        const place = masks.indexOf(mask),
          sent = [...keys];
        if (place < 0) {
          dirty.delete(mask);
          continue;
        }
        dirty.delete(mask);
        try {
          const raw = await mask.pack(sent);
          scene = await (await ask("PATCH", `${base}/masks/${place}`, { raw, version: scene.version })).json();
        } catch (error) {
          const again = dirty.get(mask) ?? dirty.set(mask, new Set()).get(mask);
          sent.forEach((key) => again.add(key));
          return failed(error);
        }
      }
      say("saved ✓");
      drawNext();
      check();
    });
  }

  function failed(error) {
    if (error instanceof Away) {
      say("not saved: bas studio does not answer", true);
      clearTimeout(waiting);
      waiting = setTimeout(save, 1500);
    } else if (error instanceof Refused && error.status === 412) {
      say("not saved", true);
      put(
        notices,
        problem(
          "This scene was changed elsewhere",
          "Another page or program has saved it since.",
          button(
            "Show what is there",
            () => {
              dirty.clear();
              studio.open();
            },
            { class: "main" },
          ),
          button("Keep mine", async () => {
            put(notices);
            scene.version = (await get(address("scenes", name))).version;
            save();
          }),
        ),
      );
    } else {
      say("not saved", true);
      put(
        notices,
        problem(
          "The masks are not saved",
          error.message,
          button("Try again", () => {
            put(notices);
            save();
          }),
        ),
      );
    }
  }

  // Names, order, new and removed concepts. make(): the rows as the server takes them, from what is saved by then
  function change(make) {
    return inOrder(async () => {
      const rows = make();
      scene = await send("PATCH", base, { concepts: rows }, { version: scene.version });
      const before = masks;
      masks = rows.map((row) => (row.from === null ? new Mask(scene.width, scene.height) : before[row.from]));
      painter.stage.draw();
      say("saved ✓");
      drawNext();
      check();
    });
  }

  const rows = () => scene.concepts.map(({ handle, word }, i) => ({ from: i, handle, word }));

  async function add() {
    await save();
    let number = 0;
    while (scene.concepts.some(({ handle }) => handle === `<asset${number}>`)) number++;
    try {
      await change(() => [...rows(), { from: null, handle: `<asset${number}>`, word: null }]);
      active = scene.concepts.length - 1;
      drawList();
      list.querySelectorAll("li")[active].querySelector("input").focus();
    } catch (error) {
      failed(error);
    }
  }

  async function removeAt(place) {
    if (masks[place].tiles.size && !confirm(`Remove ${scene.concepts[place].handle} with its mask?`)) return;
    await save();
    painter.history.forget(masks[place]);
    try {
      await change(() => rows().filter((_, i) => i !== place));
      active = Math.max(0, Math.min(active, scene.concepts.length - 1));
      drawList();
      painter.show();
      painter.stage.draw();
    } catch (error) {
      failed(error);
    }
  }

  async function rename(place, item) {
    const [word, handle] = [...item.querySelectorAll("input")].map((field) => field.value.trim()),
      now = scene.concepts[place];
    let wanted = handle || now.handle;
    if (!wanted.startsWith("<")) wanted = `<${wanted}>`;
    const untouched = /^<asset\d+>$/.test(now.handle) && wanted === now.handle,
      own = `<${word.toLowerCase().replace(/[^\w-]+/g, "-")}>`;
    if (untouched && word && word !== now.word && !scene.concepts.some((other) => other.handle === own)) wanted = own;
    if (wanted === now.handle && (word || null) === now.word) return;
    const error = item.querySelector(".error");
    try {
      await change(() => rows().map((row, i) => (i === place ? { ...row, handle: wanted, word: word || null } : row)));
      error.textContent = "";
      item.querySelectorAll("input")[1].value = wanted;
      item.querySelector(".remove").setAttribute("aria-label", `Remove ${wanted}`);
    } catch (problem) {
      if (problem instanceof Refused && problem.status === 422) {
        error.textContent = problem.message;
        speak(problem.message);
      } else failed(problem);
    }
  }

  function drawList() {
    put(
      list,
      scene.concepts.map((concept, place) => {
        const item = h("li", { style: { "--colour": concept.colour } });
        const field = (value, text, hint) => {
          const input = h("input", {
            value: value ?? "",
            placeholder: hint,
            "aria-label": `${text} of concept ${place + 1}`,
            autocapitalize: "off",
            autocomplete: "off",
            spellcheck: false,
          });
          input.addEventListener("change", () => rename(place, item));
          input.addEventListener("focus", () => choose(place));
          return input;
        };
        put(
          item,
          button(String(place + 1), () => choose(place), {
            class: "number pick",
            "aria-label": `Paint concept ${place + 1}`,
            "aria-pressed": place === active,
          }),
          h("label", {}, h("span", {}, "It is a"), field(concept.word, "Word", "rabbit")),
          h("label", {}, h("span", {}, "Handle"), field(concept.handle, "Handle", "<rabbit>")),
          h("span", { class: "share number" }),
          button("Clear", () => painter.clear(masks[place]), {
            class: "plain",
            "aria-label": `Clear the mask of concept ${place + 1}`,
          }),
          button("×", () => removeAt(place), { class: "plain remove", title: "Remove", "aria-label": `Remove ${concept.handle}` }),
          h("span", { class: "error", role: "alert" }),
          h("div", { class: "stack notes" }),
        );
        item.addEventListener("pointerdown", () => choose(place));
        return item;
      }),
    );
    choose(active);
    scene.concepts.forEach((_, place) => showShare(place));
    drawNotes();
    drawNext();
  }

  function choose(place) {
    active = place;
    [...list.children].forEach((item, i) => {
      item.classList.toggle("active", i === place);
      item.querySelector(".pick").setAttribute("aria-pressed", i === place);
    });
    painter.stage.draw();
    nameStage();
  }

  function showShare(place) {
    const item = list.children[place];
    if (item) item.querySelector(".share").textContent = masks[place].tiles.size ? percent(masks[place].share()) : "not painted";
    nameStage();
  }

  function nameStage() {
    const concept = scene.concepts[active];
    const text = concept
      ? `Mask of ${concept.handle}, ${percent(masks[active]?.share() ?? 0)} of the photograph ${name}`
      : `Photograph ${name}`;
    painter.stage.root.setAttribute("aria-label", text);
  }

  function drawNext() {
    const empty = masks.filter((mask) => !mask.share()).length,
      total = masks.length;
    const ready = total > 0 && !empty;
    put(
      next,
      ready
        ? [
            h("p", { class: "good" }, `${total === 1 ? "The concept is" : `All ${total} concepts are`} painted.`),
            link("Next: Train", `#/${address("train", name)}`, { class: "button main" }),
          ]
        : quiet(
            total
              ? `Paint ${empty === 1 ? "the concept that has" : `the ${empty} concepts that have`} no mask yet; then comes training.`
              : "Add a concept.",
          ),
    );
  }

  async function check() {
    const mine = ++checked;
    let found = { concepts: [], notes: [] };
    try {
      if (masks.some((mask) => mask.share()))
        found = await send("POST", "check", { scene: name, base: remembered("base", "mini") });
    } catch (error) {
      if (error instanceof Away) return;
      found.notes = [{ handle: null, text: error.message, bad: true }];
    }
    if (mine !== checked) return;
    notes = found.notes;
    drawNotes();
    if (seen.open) put(grids, gridsOf(found, scene.concepts));
  }

  // Each line of the check stands beside the mask that it is about, or below the list.
  function drawNotes() {
    const about = (concept) => notes.filter(({ handle }) => handle === concept).map(({ text, bad }) => warning(text, bad));
    [...list.children].forEach((item, place) => put(item.querySelector(".notes"), about(scene.concepts[place]?.handle)));
    put(advice, about(null));
  }

  return {
    key(event, typing) {
      if (event.target === painter.stage.root && proposal.key(event)) return;
      if (painter.key(event, typing) || event.target !== painter.stage.root) return;
      if (/^[1-9]$/.test(event.key) && masks[event.key - 1]) choose(event.key - 1);
    },
    update: proposal.update,
    async leave() {
      proposal.drop();
      clearTimeout(waiting);
      if (dirty.size) await save();
      painter.stage.close();
    },
  };
}
