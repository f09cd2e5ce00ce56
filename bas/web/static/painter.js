// Brush, eraser, fill, polygon and clicks on a stage: shared by Masks and Edit.
import { button, h, remember, remembered, speak } from "./dom.js";
import { Polygon } from "./polygon.js";
import { History, Stage } from "./stage.js";

const FINGERS = matchMedia("(pointer: coarse)");
const CONCEPT = { brush: "the concept", eraser: "what is not part of it" };
const hintOf = (tool, over) => {
  const touch = FINGERS.matches;
  const moves = touch ? "Two fingers move and zoom." : "The wheel zooms, Space and drag move the image.";
  return {
    // one for each: else the image moves
    brush: `Paint over ${over.brush}. ${moves}`,
    eraser: `Paint over ${over.eraser}. ${moves}`,
    fill: `${touch ? "Tap" : "Click"} inside an outline: its inside is filled.`,
    polygon: touch
      ? "Tap the corners; the first closes. Undo takes a corner back."
      : "Click the corners; the first one or Enter closes, Escape drops. Or arrows and Space.",
    click: touch
      ? "Tap the concept: a mask is proposed."
      : "Click on the concept: a mask is proposed. Enter takes it, Escape drops it.",
  }[tool];
};

export class Painter {
  // target(): the mask painted on and its colour; layers(): all; changed(mask, keys): after each change; click(x, y): of the tool Click;
  // over: what brush and eraser go over, in words
  constructor(name, { target, layers, changed, part, click, over = CONCEPT }) {
    Object.assign(this, { target, changed, click, over, tool: "brush", size: remembered("brush", 45), history: new History() });
    this.hint = h("p", { class: "hint", role: "status" });
    FINGERS.onchange = () => (this.hint.textContent = hintOf(this.tool, over));
    this.stage = new Stage(name, {
      layers,
      part,
      brush: () => (["fill", "polygon", "click"].includes(this.tool) ? 0 : this.diameter()),
      zoomed: (scale) => {
        this.zoomText.textContent = `${Math.round(100 * scale)} %`;
        this.polygon?.draw();
      },
      begin: (x, y, event) => this.begin(x, y, event),
      move: (x, y) => this.move(x, y),
      end: () => this.end(),
      cancel: () => this.cancel(),
    });
    this.zoomText = h("output", { class: "number" });
    this.polygon = new Polygon(this.stage, { closed: (points) => this.fillPolygon(points), changed: () => this.show() });
    const about = {
      fill: ": fills the inside of an outline",
      polygon: ": fills what its corners enclose",
      click: ": proposes a mask of what is there",
    };
    this.tools = Object.entries({
      brush: "Brush",
      eraser: "Eraser",
      fill: "Fill",
      polygon: "Polygon",
      ...(click && { click: "Click" }),
    }).map(([key, text]) =>
      button(text, () => this.choose(key), { "data-tool": key, title: `${text} (${key[0]})${about[key] ?? ""}` }),
    );
    this.range = h("input", { type: "range", min: 0, max: 100, value: this.size, "aria-label": "Size of the brush" });
    this.sizeText = h("output", { class: "number" });
    this.range.addEventListener("input", () => this.resize(Number(this.range.value)));
    this.undoButton = button("Undo", () => this.undo(true), { title: "Undo (Ctrl+Z)" });
    this.redoButton = button("Redo", () => this.undo(false), { title: "Redo (Ctrl+Shift+Z)" });
    this.see = h("input", { type: "range", min: 10, max: 100, value: 50, "aria-label": "How strong the masks are shown" });
    this.see.addEventListener("input", () => {
      this.stage.opacity = this.see.value / 100;
      this.stage.draw();
    });
    this.bar = h(
      "div",
      { class: "tools", role: "toolbar", "aria-label": "Painting" },
      h("div", { class: "group" }, this.tools),
      h("label", { class: "group" }, "Size", this.range, this.sizeText),
      h("div", { class: "group" }, this.undoButton, this.redoButton),
      h(
        "div",
        { class: "group" },
        button("−", () => this.stage.zoom(0.8), { "aria-label": "Zoom out", title: "Zoom out (−)" }),
        this.zoomText,
        button("+", () => this.stage.zoom(1.25), { "aria-label": "Zoom in", title: "Zoom in (+)" }),
        button("Fit", () => this.stage.fit(), { title: "Fit the window (0)" }),
      ),
      h("label", { class: "group wide-only" }, "Masks", this.see),
      this.hint,
    );
    this.choose("brush");
  }

  load(source, width, height) {
    this.stage.load(source, width, height);
    this.resize(this.size);
    this.show();
  }

  diameter() {
    // from 1 pixel to half of the longer side, finer at the small end
    return Math.max(1, Math.round((Math.max(this.stage.width, this.stage.height) / 2) * (this.size / 100) ** 2.5));
  }

  resize(size) {
    this.size = Math.min(100, Math.max(0, size));
    this.range.value = this.size;
    this.sizeText.textContent = `${this.diameter()} px`;
    remember("brush", this.size);
    this.stage.showRing();
  }

  choose(tool) {
    if (tool !== "polygon") this.polygon.drop();
    this.tool = tool;
    this.hint.textContent = hintOf(tool, this.over);
    this.range.disabled = ["fill", "polygon", "click"].includes(tool);
    for (const each of this.tools) each.setAttribute("aria-pressed", each.dataset.tool === tool);
    this.stage.showRing();
  }

  begin(x, y, event) {
    if (this.tool === "click") return this.move(x, y);
    const target = this.target();
    if (!target) return;
    if (this.tool === "polygon") return this.polygon.press(x, y, event);
    this.stroke = { mask: target.mask, saved: new Map(), last: [x, y] };
    if (this.tool === "fill") {
      const box = target.mask.fill(Math.floor(x), Math.floor(y), this.stroke.saved);
      this.stage.draw(box ?? undefined);
    } else this.move(x, y);
  }

  move(x, y) {
    if (this.tool === "click") {
      this.at = [x, y];
      return;
    }
    if (this.tool === "polygon") return this.polygon.drag(x, y);
    if (!this.stroke || this.tool === "fill") return;
    const { mask, saved, last } = this.stroke;
    const box = mask.stroke(...last, x, y, this.diameter() / 2, this.tool === "eraser", saved);
    this.stroke.last = [x, y];
    this.stage.draw(box);
  }

  end() {
    if (this.tool === "polygon") this.polygon.release();
    else if (this.tool === "click") this.click(...this.at);
    else this.finish();
  }

  finish() {
    const { mask, saved } = this.stroke ?? {};
    this.stroke = null;
    if (!saved?.size) return;
    this.history.add(mask, saved);
    this.show();
    this.changed(mask, [...saved.keys()]);
  }

  fillPolygon(points) {
    const target = this.target(),
      saved = new Map();
    if (!target) return;
    this.stage.draw(target.mask.polygon(points, saved));
    this.stroke = { mask: target.mask, saved };
    this.finish();
    speak("The polygon is filled");
  }

  cancel() {
    this.polygon.release(true);
    if (this.stroke) this.stroke.mask.swap(this.stroke.saved);
    this.stroke = null;
    this.stage.draw();
  }

  clear(mask) {
    const saved = new Map();
    mask.clear(saved);
    if (!saved.size) return;
    this.history.add(mask, saved);
    this.show();
    this.stage.draw();
    this.changed(mask, [...saved.keys()]);
  }

  // Let a mask become another, as one step of undo.
  replace(mask, other) {
    const wanted = [...mask.tiles.keys(), ...other.tiles.keys()].map((key) => [key, other.tiles.get(key)]);
    this.stroke = { mask, saved: mask.swap(new Map(wanted)) };
    this.stage.draw();
    this.finish();
  }

  undo(back) {
    if (back && this.polygon.back()) return;
    const step = this.history.go(back);
    if (!step) return;
    this.show();
    this.stage.draw();
    this.changed(step.mask, step.keys);
  }

  show() {
    this.undoButton.disabled = this.history.at === 0 && !this.polygon.points.length;
    this.redoButton.disabled = this.history.at === this.history.steps.length;
  }

  key(event, typing) {
    const control = event.ctrlKey || event.metaKey,
      key = event.key.toLowerCase();
    if (control && !typing && key === "z") this.undo(!event.shiftKey);
    else if (control && !typing && key === "y") this.undo(false);
    else if (control || event.altKey || event.target !== this.stage.root) return false;
    else if (this.tool === "polygon" && this.polygon.key(event)) {
      /* done */
    } else if (key === "p") this.choose("polygon");
    else if (key === "b") this.choose("brush");
    else if (key === "e") this.choose("eraser");
    else if (key === "f") this.choose("fill");
    else if (key === "c" && this.click) this.choose("click");
    else if (key === "x") this.choose(this.tool === "brush" ? "eraser" : "brush");
    else if (key === "[" || key === "]") this.resize(this.size + (key === "[" ? -4 : 4));
    else if (key === "+" || key === "=") this.stage.zoom(1.25);
    else if (key === "-") this.stage.zoom(0.8);
    else if (key === "0") this.stage.fit();
    else if (key === "h") {
      this.stage.canvas.hidden = !this.stage.canvas.hidden;
      speak(this.stage.canvas.hidden ? "Masks are hidden" : "Masks are shown");
    } else if (key.startsWith("arrow"))
      this.stage.pan({ arrowleft: 40, arrowright: -40 }[key] ?? 0, { arrowup: 40, arrowdown: -40 }[key] ?? 0);
    else return false;
    event.preventDefault();
    return true;
  }
}
