// A polygon on a stage: corners by clicks, taps or keys, until it is closed.
import { speak } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const NEAR = { touch: 24, mouse: 12 }; // pixels of the window in which a click meets the first corner

function shape(name, values) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(values)) element.setAttribute(key, value);
  return element;
}

export class Polygon {
  // closed(points): with its corners in pixels of the image; changed(): after each corner
  constructor(stage, { closed, changed }) {
    Object.assign(this, { stage, closed, changed, points: [], at: null, cross: null, near: NEAR.mouse });
    this.picture = shape("svg", { class: "outline", "aria-hidden": "true" });
    stage.root.append(this.picture);
  }

  press(x, y, event) {
    this.near = NEAR[event?.pointerType] ?? NEAR.mouse;
    this.cross = null;
    this.drag(x, y);
  }

  drag(x, y) {
    this.at = this.inside(x, y);
    this.draw();
  }

  // The corner is where the pointer is lifted, so that it can be moved there; a second finger takes it back.
  release(cancelled = false) {
    const { at } = this;
    this.at = null;
    if (at && !cancelled) this.add(at);
    this.draw();
  }

  inside(x, y) {
    return [Math.min(this.stage.width, Math.max(0, x)), Math.min(this.stage.height, Math.max(0, y))];
  }

  meetsFirst([x, y]) {
    const [first] = this.points;
    return this.points.length > 2 && Math.hypot(x - first[0], y - first[1]) * this.stage.scale <= this.near;
  }

  add(point) {
    if (this.meetsFirst(point)) return this.close();
    this.points.push(point);
    speak(`Corner ${this.points.length}`);
    this.changed();
    this.draw();
  }

  close() {
    if (this.points.length < 3) return speak("A polygon has three corners or more");
    const { points } = this;
    this.drop();
    this.closed(points);
  }

  drop() {
    this.points = [];
    this.at = null;
    this.changed();
    this.draw();
  }

  back() {
    if (!this.points.length) return false;
    this.points.pop();
    this.changed();
    this.draw();
    return true;
  }

  key(event) {
    const { key } = event,
      step = event.shiftKey ? 0.1 : 0.01,
      { width, height } = this.stage;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    if (key === "Enter") this.close();
    else if (key === "Escape") {
      this.drop();
      speak("The polygon is dropped");
    } else if (key === " " && this.cross) this.add(this.cross);
    else if (way) {
      const [x, y] = this.cross ?? [width / 2, height / 2];
      this.cross = this.inside(x + way[0] * step * width, y + way[1] * step * height);
      this.draw();
    } else return false;
    return true;
  }

  draw() {
    const { x, y, scale } = this.stage,
      seen = ([px, py]) => [x + px * scale, y + py * scale];
    const corners = [...this.points, ...(this.at ? [this.at] : [])].map(seen),
      [first] = corners,
      parts = [];
    if (first) {
      const line = corners.map((corner) => corner.join(",")).join(" ");
      for (const kind of ["under", "over"]) parts.push(shape("polyline", { points: line, class: kind }));
      corners.forEach(([cx, cy], i) =>
        parts.push(shape("circle", { cx, cy, r: i ? 3 : 6, class: i ? "corner-dot" : "corner-dot first" })),
      );
    }
    if (this.cross) {
      const [cx, cy] = seen(this.cross),
        d = `M${cx - 10} ${cy}h20M${cx} ${cy - 10}v20`;
      for (const kind of ["under", "over"]) parts.push(shape("path", { d, class: kind }));
    }
    this.picture.replaceChildren(...parts);
  }
}
