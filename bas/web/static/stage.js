// Where one paints: an image below a canvas of the window's size, never larger. Pan, zoom, pointers.
import { h } from "./dom.js";

const MOST = 3e6; // pixels of the canvas
const SHARP = 4; // from this zoom on pixels are squares

export class Stage {
  // hooks: begin(x, y), move(x, y), end(), cancel() in pixels of the image; brush(): its diameter; layers(): what to draw
  constructor(name, hooks) {
    this.hooks = hooks;
    this.width = this.height = 1;
    this.scale = 1;
    this.x = this.y = 0;
    this.opacity = 0.5;
    this.image = h("img", { alt: "", draggable: false });
    this.detail = h("img", { alt: "", draggable: false, hidden: true }); // the visible part, where the image came smaller
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.ring = h("div", { class: "ring", "aria-hidden": "true" });
    this.root = h(
      "div",
      { class: "stage", tabIndex: 0, role: "img", "aria-label": name },
      this.image,
      this.detail,
      this.canvas,
      this.ring,
    );
    this.ink = this.canvas.getContext("2d");
    this.pointers = new Map();
    this.panning = this.painting = this.pen = false;
    this.listen();
    this.detail.addEventListener("load", () => {
      this.detail.hidden = false;
    });
    this.watcher = new ResizeObserver(() => this.resize());
    this.watcher.observe(this.root);
  }

  load(source, width, height) {
    Object.assign(this, { width, height });
    this.image.src = source;
    this.image.style.width = `${width}px`;
    this.image.style.height = `${height}px`;
    this.fitted = true;
    this.resize();
  }

  close() {
    clearTimeout(this.resting);
    this.watcher.disconnect();
  }

  // Fetch the visible part once a zoom rests, if the image that is here has too few pixels for it.
  sharpen() {
    clearTimeout(this.resting);
    const { naturalWidth } = this.image,
      { clientWidth: w, clientHeight: t } = this.root,
      { x, y, scale, width, height } = this;
    if (!this.hooks.part || !naturalWidth || naturalWidth >= width || scale * this.ratio <= naturalWidth / width) {
      this.detail.hidden = true;
      return;
    }
    this.resting = setTimeout(() => {
      const box = [-x / scale, -y / scale, (w - x) / scale, (t - y) / scale].map((value, i) =>
        Math.round(Math.min(i % 2 ? height : width, Math.max(0, value))),
      );
      if (box[2] <= box[0] || box[3] <= box[1]) return;
      const [left, top, right, bottom] = box;
      this.detail.hidden = true;
      this.part = box;
      this.detail.style.width = `${right - left}px`;
      this.detail.style.height = `${bottom - top}px`;
      this.detail.src = this.hooks.part(box, Math.ceil(Math.max(w, t) * this.ratio));
      this.placeDetail();
    }, 200);
  }

  placeDetail() {
    if (!this.part) return;
    const [left, top] = this.part;
    this.detail.style.transform = `translate(${this.x + left * this.scale}px, ${this.y + top * this.scale}px) scale(${this.scale})`;
    this.detail.classList.toggle("sharp", this.scale >= SHARP);
  }

  resize() {
    const { clientWidth: w, clientHeight: t } = this.root;
    if (!w || !t) return;
    this.ratio = Math.min(window.devicePixelRatio || 1, Math.sqrt(MOST / (w * t)));
    this.canvas.width = Math.round(w * this.ratio);
    this.canvas.height = Math.round(t * this.ratio);
    if (this.fitted) this.fit();
    else this.place();
  }

  fit() {
    const { clientWidth: w, clientHeight: t } = this.root;
    this.scale = Math.min((w - 16) / this.width, (t - 16) / this.height);
    this.x = (w - this.width * this.scale) / 2;
    this.y = (t - this.height * this.scale) / 2;
    this.fitted = true;
    this.place();
  }

  zoom(factor, x = this.root.clientWidth / 2, y = this.root.clientHeight / 2) {
    const least = 0.2 * Math.min(this.root.clientWidth / this.width, this.root.clientHeight / this.height);
    const scale = Math.min(64, Math.max(Math.min(least, 1), this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.place();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this.place();
  }

  place() {
    const { clientWidth: w, clientHeight: t } = this.root,
      margin = 40; // some of the image stays in sight
    this.x = Math.min(w - margin, Math.max(margin - this.width * this.scale, this.x));
    this.y = Math.min(t - margin, Math.max(margin - this.height * this.scale, this.y));
    this.image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    this.image.classList.toggle("sharp", this.scale >= SHARP);
    this.showRing();
    this.placeDetail();
    this.sharpen();
    this.hooks.zoomed?.(this.scale);
    this.draw();
  }

  toImage(event) {
    const box = this.root.getBoundingClientRect();
    return [(event.clientX - box.left - this.x) / this.scale, (event.clientY - box.top - this.y) / this.scale];
  }

  // Draw the masks: all, or those in a box of the image alone.
  draw(box) {
    const { canvas, ratio, scale } = this;
    if (!canvas.width || !ratio) return;
    let [left, top, right, bottom] = [0, 0, canvas.width, canvas.height];
    if (box) {
      left = Math.max(0, Math.floor((box[0] * scale + this.x) * ratio) - 1);
      top = Math.max(0, Math.floor((box[1] * scale + this.y) * ratio) - 1);
      right = Math.min(right, Math.ceil((box[2] * scale + this.x) * ratio) + 1);
      bottom = Math.min(bottom, Math.ceil((box[3] * scale + this.y) * ratio) + 1);
    }
    if (right <= left || bottom <= top) return;
    const picture = this.ink.createImageData(right - left, bottom - top),
      data = picture.data;
    const columns = new Int32Array(right - left);
    for (let i = 0; i < columns.length; i++) {
      const x = Math.floor(((left + i + 0.5) / ratio - this.x) / scale);
      columns[i] = x >= 0 && x < this.width ? x : -1;
    }
    const layers = this.hooks.layers();
    for (let j = 0; j < bottom - top; j++) {
      const y = Math.floor(((top + j + 0.5) / ratio - this.y) / scale);
      if (y < 0 || y >= this.height) continue;
      const row = y >> 8,
        offset = (y & 255) << 8,
        start = j * columns.length * 4;
      for (const {
        mask,
        colour: [r, g, b],
        strength,
      } of layers) {
        let column = -1,
          tile;
        for (let i = 0; i < columns.length; i++) {
          const x = columns[i];
          if (x < 0) continue;
          if (x >> 8 !== column) tile = mask.get((column = x >> 8), row);
          const value = tile ? tile[offset + (x & 255)] : 0;
          if (!value) continue;
          const at = start + 4 * i,
            alpha = value * strength * this.opacity,
            old = data[at + 3];
          const sum = alpha + old * (1 - alpha / 255),
            share = alpha / sum;
          data[at] += (r - data[at]) * share;
          data[at + 1] += (g - data[at + 1]) * share;
          data[at + 2] += (b - data[at + 2]) * share;
          data[at + 3] = sum;
        }
      }
    }
    this.ink.putImageData(picture, left, top);
  }

  showRing(event) {
    if (event) this.at = [event.clientX, event.clientY];
    const size = this.hooks.brush?.() * this.scale;
    const shown = Boolean(this.at && size) && !this.panning;
    this.ring.hidden = !shown;
    if (!shown) return;
    const box = this.root.getBoundingClientRect();
    const side = `${Math.max(4, size)}px`,
      transform = `translate(${this.at[0] - box.left}px, ${this.at[1] - box.top}px) translate(-50%, -50%)`;
    Object.assign(this.ring.style, { width: side, height: side, transform });
  }

  listen() {
    const { root } = this;
    root.addEventListener("pointerdown", (event) => {
      if (event.button > 1) return;
      event.preventDefault();
      root.focus({ preventScroll: true });
      root.setPointerCapture(event.pointerId);
      if (event.pointerType === "pen") this.pen = true;
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
      const finger = this.pen && event.pointerType === "touch"; // beside a pen, fingers only move
      if (event.button === 1 || this.space || finger) this.panning = true;
      else if (this.pointers.size === 1) {
        this.painting = true;
        this.hooks.begin(...this.toImage(event), event);
      }
      if (this.pointers.size === 2 && this.painting) {
        this.painting = false;
        this.hooks.cancel();
      }
      this.showRing(event);
    });
    root.addEventListener("pointermove", (event) => {
      this.showRing(event);
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      if (this.pointers.size === 2) this.pinch(event, before);
      else if (this.panning) this.pan(event.clientX - before[0], event.clientY - before[1]);
      else if (this.painting) {
        const moved = event.getCoalescedEvents?.() ?? [];
        for (const each of moved.length ? moved : [event]) this.hooks.move(...this.toImage(each));
      }
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      root.addEventListener(kind, (event) => {
        this.pointers.delete(event.pointerId);
        if (this.painting) kind === "pointerup" ? this.hooks.end() : this.hooks.cancel();
        this.painting = false;
        if (!this.pointers.size) this.panning = false;
      });
    }
    root.addEventListener("pointerleave", () => {
      this.at = null;
      this.showRing();
    });
    root.addEventListener("contextmenu", (event) => event.preventDefault());
    root.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const box = root.getBoundingClientRect();
        if (event.shiftKey) this.pan(-event.deltaY - event.deltaX, 0);
        else this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
      },
      { passive: false },
    );
    root.addEventListener("keydown", (event) => {
      if (event.key !== " ") return;
      this.space = true;
      event.preventDefault();
    });
    for (const kind of ["keyup", "blur"]) root.addEventListener(kind, () => (this.space = false));
  }

  pinch(event, before) {
    const [, other] = [...this.pointers].find(([id]) => id !== event.pointerId);
    const apart = (x, y) => Math.hypot(x - other[0], y - other[1]) || 1;
    const box = this.root.getBoundingClientRect();
    const [x, y] = [(event.clientX + other[0]) / 2 - box.left, (event.clientY + other[1]) / 2 - box.top];
    this.zoom(apart(event.clientX, event.clientY) / apart(...before), x, y);
    this.pan((event.clientX - before[0]) / 2, (event.clientY - before[1]) / 2);
  }
}

// Undo and redo of squares, up to a number of bytes.
export class History {
  constructor() {
    Object.assign(this, { steps: [], at: 0 });
  }

  add(mask, saved) {
    this.steps.length = this.at;
    this.steps.push({ mask, saved });
    let size = this.steps.reduce((sum, step) => sum + 65536 * step.saved.size, 0);
    while (size > 64e6 && this.steps.length > 1) size -= 65536 * this.steps.shift().saved.size;
    this.at = this.steps.length;
  }

  // One step back or forth. Returns its mask and the squares that changed, null where there is none.
  go(back) {
    const step = this.steps[back ? this.at - 1 : this.at];
    if (!step) return null;
    this.at += back ? -1 : 1;
    step.saved = step.mask.swap(step.saved);
    return { mask: step.mask, keys: [...step.saved.keys()] };
  }

  forget(mask) {
    const kept = (step) => step.mask !== mask;
    this.at = this.steps.slice(0, this.at).filter(kept).length;
    this.steps = this.steps.filter(kept);
  }
}
