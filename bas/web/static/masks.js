// Masks: paint each concept, name it; every stroke is saved.
import { Away, address, get, send } from "./api.js";
import { button, emptyRoom, h, link, percent, put, quiet, remember, remembered, rgb, speak, warning } from "./dom.js";
import { Painter } from "./painter.js";
import { gridsOf } from "./grids.js";
import { proposals } from "./propose.js";
import { saver } from "./saving.js";

const REST = 250; // milliseconds after a save before the masks are checked

export async function open(main, [name], studio) {
  if (!name) return emptyRoom(main, "Masks", "Bring a photograph first", "Then paint over each concept to learn.");
  const models = await get("segmenters");
  let active = 0,
    notes = [],
    waiting = null,
    checked = 0;
  const opened = Date.now(),
    base = address("scenes", name);
  const status = h("span", { class: "saved", role: "status" }),
    notices = h("div", { class: "stack" });
  const list = h("ol", { class: "concepts" }),
    advice = h("div", { class: "stack" }),
    next = h("div", { class: "next" });
  const grids = h("div", { class: "grids" }),
    seen = h("details", {}, h("summary", {}, "What the losses see"), grids);
  const saving = await saver(base, notices, { say, named, done, reopen: studio.open, merging });
  const { concepts, scene } = saving,
    colour = (place) => scene().concepts[place]?.colour ?? "#888888";
  seen.open = remembered("seen", false);
  seen.ontoggle = () => {
    remember("seen", seen.open);
    check();
  };

  const proposal = proposals(name, models, studio, {
    word: () => concepts[active]?.word,
    take: (mask) => {
      if (concepts[active]) painter.replace(concepts[active].mask, mask);
    },
    draw: () => painter.stage.draw(),
  });
  const painter = new Painter(`Photograph ${name}`, {
    target: () => !proposal.mask && concepts[active],
    click: models.sam ? null : proposal.click,
    layers: () =>
      concepts.map(({ mask }, i) => ({
        mask: (i === active && proposal.mask) || mask,
        colour: rgb(colour(i)),
        strength: i === active ? 1 : 0.7,
      })),
    part: (box, side) => `api/${base}/view?box=${box.join(",")}&side=${side}&v=${opened}`,
    changed(mask, keys) {
      if (proposal.mask) proposal.drop();
      const place = concepts.findIndex((concept) => concept.mask === mask);
      if (place < 0) return;
      for (const key of keys) concepts[place].squares.add(key);
      showShare(place);
      saving.touch();
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
  painter.load(`api/${base}/view?v=${opened}`, scene().width, scene().height);
  if (!concepts.length) saving.add();
  drawList();
  await saving.touch();

  function say(text, bad = false) {
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  function named() {
    [...list.children].forEach((item, place) => item.style.setProperty("--colour", colour(place)));
    painter.stage.draw();
  }

  function done() {
    const wrong = concepts.some((concept) => concept.wrong);
    say(wrong ? "not saved: a handle" : "saved ✓", wrong);
    drawNext();
    clearTimeout(waiting);
    waiting = setTimeout(check, REST);
  }

  function merging(change) {
    const chosen = concepts[active];
    painter.cancel();
    for (const { mask } of concepts) painter.history.forget(mask);
    change();
    active = Math.max(0, concepts.indexOf(chosen));
    drawList();
    painter.show();
  }

  function add() {
    saving.add();
    active = concepts.length - 1;
    drawList();
    list.children[active].querySelector("input").focus();
    saving.touch();
  }

  function remove(concept) {
    if (concept.mask.tiles.size && !confirm(`Remove ${concept.handle} with its mask?`)) return;
    painter.history.forget(concept.mask);
    concepts.splice(concepts.indexOf(concept), 1);
    active = Math.max(0, Math.min(active, concepts.length - 1));
    drawList();
    painter.show();
    saving.touch();
  }

  const taken = (concept, handle) => concepts.some((each) => each !== concept && each.handle === handle);

  // A word makes a handle of its letters, without accents, where nobody has chosen another.
  function call(concept, item, text) {
    concept.word = text.trim() || null;
    const plain =
        text
          .normalize("NFD")
          .replace(/\p{M}/gu, "")
          .toLowerCase()
          .match(/[\w-]+/g) ?? [],
      own = plain.join("-").slice(0, 32);
    if (/^<asset\d+>$/.test(concept.handle) && !concept.wrong && /[a-z]/.test(own) && !taken(concept, `<${own}>`))
      rename(concept, item, own);
    else saving.touch();
  }

  function rename(concept, item, text) {
    const wanted = `<${text.trim().replace(/^<|>$/g, "") || concept.handle.slice(1, -1)}>`;
    concept.wrong = !/^<[\w-]{1,32}>$/.test(wanted)
      ? `${wanted}: expected <name> with 1 to 32 letters a-z or A-Z, digits, _ or -`
      : taken(concept, wanted) && `two concepts are called ${wanted}: give one another name`;
    item.querySelector(".error").textContent = concept.wrong || "";
    if (concept.wrong) speak(concept.wrong);
    else {
      concept.handle = wanted;
      item.querySelectorAll("input")[1].value = wanted;
      item.querySelector(".remove").setAttribute("aria-label", `Remove ${wanted}`);
    }
    saving.touch();
  }

  function drawList() {
    put(
      list,
      concepts.map((concept, place) => {
        const item = h("li", { style: { "--colour": colour(place) }, onpointerdown: () => choose(place) });
        concept.wrong = "";
        const field = (value, text, hint, changed) =>
          h("input", {
            value: value ?? "",
            placeholder: hint,
            "aria-label": `${text} of concept ${place + 1}`,
            autocapitalize: "off",
            autocomplete: "off",
            spellcheck: false,
            maxLength: 100,
            onchange: ({ target }) => changed(concept, item, target.value),
            onfocus: () => choose(place),
          });
        put(
          item,
          button(String(place + 1), () => choose(place), {
            class: "number pick",
            "aria-label": `Paint concept ${place + 1}`,
            "aria-pressed": place === active,
          }),
          h("label", {}, h("span", {}, "It is a"), field(concept.word, "Word", "rabbit", call)),
          h("label", {}, h("span", {}, "Handle"), field(concept.handle, "Handle", "<rabbit>", rename)),
          h("span", { class: "share number" }),
          button("Clear", () => painter.clear(concept.mask), {
            class: "plain",
            "aria-label": `Clear the mask of concept ${place + 1}`,
          }),
          button("×", () => remove(concept), { class: "plain remove", title: "Remove", "aria-label": `Remove ${concept.handle}` }),
          h("span", { class: "error", role: "alert" }),
          h("div", { class: "stack notes" }),
        );
        return item;
      }),
    );
    choose(active);
    concepts.forEach((_, place) => showShare(place));
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
    const { mask } = concepts[place];
    list.children[place].querySelector(".share").textContent = mask.tiles.size ? percent(mask.share()) : "not painted";
    nameStage();
  }

  function nameStage() {
    const concept = concepts[active];
    const text = concept
      ? `Mask of ${concept.handle}, ${percent(concept.mask.share())} of the photograph ${name}`
      : `Photograph ${name}`;
    painter.stage.root.setAttribute("aria-label", text);
  }

  function drawNext() {
    const empty = concepts.filter(({ mask }) => !mask.share()).length,
      total = concepts.length;
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
      if (concepts.some(({ mask }) => mask.share()))
        found = await send("POST", "check", { scene: name, base: remembered("base", "mini") });
    } catch (error) {
      if (error instanceof Away) return;
      found.notes = [{ handle: null, text: error.message, bad: true }];
    }
    if (mine !== checked) return;
    notes = found.notes;
    drawNotes();
    if (seen.open) put(grids, gridsOf(found, scene().concepts));
  }

  // Each line of the check stands beside the mask that it is about, or below the list.
  function drawNotes() {
    const about = (concept) => notes.filter(({ handle }) => handle === concept).map(({ text, bad }) => warning(text, bad));
    [...list.children].forEach((item, place) => put(item.querySelector(".notes"), about(concepts[place]?.handle)));
    put(advice, about(null));
  }

  return {
    key(event, typing) {
      if (event.target === painter.stage.root && proposal.key(event)) return;
      if (painter.key(event, typing) || event.target !== painter.stage.root) return;
      if (/^[1-9]$/.test(event.key) && concepts[event.key - 1]) choose(event.key - 1);
    },
    update: proposal.update,
    async leave() {
      proposal.drop();
      clearTimeout(waiting);
      await saving.leave();
      painter.stage.close();
    },
  };
}
