// A mask as squares of 256x256 bytes; a square that is not there is empty. No DOM: Node tests it.

export const SIDE = 256;
const AREA = SIDE * SIDE;

export class Mask {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.across = Math.ceil(width / SIDE);
    this.tiles = new Map();
    this.sums = new Map();
  }

  get(column, row) {
    return this.tiles.get(row * this.across + column);
  }

  share() {
    let sum = 0;
    for (const key of this.tiles.keys()) {
      if (!this.sums.has(key)) {
        let part = 0;
        for (const value of this.tiles.get(key)) part += value;
        this.sums.set(key, part);
      }
      sum += this.sums.get(key);
    }
    return sum / (255 * this.width * this.height);
  }

  // The square to write to. `before` keeps what it was, once, for undo.
  writable(column, row, before) {
    const key = row * this.across + column;
    let tile = this.tiles.get(key);
    if (!before.has(key)) {
      before.set(key, tile);
      tile = tile ? tile.slice() : new Uint8Array(AREA);
      this.tiles.set(key, tile);
    }
    this.sums.delete(key);
    return tile;
  }

  // A round brush from one point to another. Pixel (x, y) has its centre at x + 0.5, y + 0.5.
  stroke(x0, y0, x1, y1, radius, erase, before) {
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - radius - 1));
    const bottom = Math.min(this.height - 1, Math.ceil(Math.max(y0, y1) + radius + 1));
    for (let y = top; y <= bottom; y++) {
      const outer = span(x0, y0, x1, y1, radius + 0.5, y + 0.5);
      if (!outer) continue;
      const inner = span(x0, y0, x1, y1, radius - 0.5, y + 0.5) || [Infinity, -Infinity];
      const from = Math.max(0, Math.floor(outer[0])),
        to = Math.min(this.width - 1, Math.ceil(outer[1]));
      for (let x = from; x <= to;) {
        // square by square: edges pixel by pixel, the inside at once
        const column = x >> 8,
          start = column << 8,
          last = Math.min(to, start + 255);
        const first = Math.max(x, Math.ceil(inner[0] - 0.5)),
          end = Math.min(last, Math.floor(inner[1] - 0.5));
        const tile = this.writable(column, y >> 8, before),
          offset = ((y & 255) << 8) - start;
        if (first <= end) tile.fill(erase ? 0 : 255, offset + first, offset + end + 1);
        for (; x <= last; x++) {
          if (x === first && first <= end) x = end + 1;
          if (x > last) break;
          const value = Math.round(255 * Math.min(1, Math.max(0, radius + 0.5 - distance(x0, y0, x1, y1, x + 0.5, y + 0.5))));
          const at = offset + x;
          tile[at] = erase ? Math.min(tile[at], 255 - value) : Math.max(tile[at], value);
        }
      }
    }
    return [Math.min(x0, x1) - radius - 1, top, Math.max(x0, x1) + radius + 1, bottom + 1];
  }

  value(x, y) {
    const tile = this.get(x >> 8, y >> 8);
    return tile ? tile[((y & 255) << 8) + (x & 255)] : 0;
  }

  // Fill what an outline encloses around a point, up to the edge of the image. Returns the box, or null on the mask.
  fill(x, y, before) {
    const { width, height } = this,
      box = [x, y, x + 1, y + 1];
    if (x < 0 || y < 0 || x >= width || y >= height || this.value(x, y) > 127) return null;
    const stack = [[x, y]];
    while (stack.length) {
      const [seed, line] = stack.pop();
      if (this.value(seed, line) > 127) continue;
      let left = seed,
        right = seed;
      while (left > 0 && this.value(left - 1, line) <= 127) left--;
      while (right < width - 1 && this.value(right + 1, line) <= 127) right++;
      for (let i = left; i <= right; i++) {
        this.writable(i >> 8, line >> 8, before)[((line & 255) << 8) + (i & 255)] = 255;
      }
      box[0] = Math.min(box[0], left);
      box[2] = Math.max(box[2], right + 1);
      box[1] = Math.min(box[1], line);
      box[3] = Math.max(box[3], line + 1);
      for (const next of [line - 1, line + 1]) {
        if (next < 0 || next >= height) continue;
        for (let i = left, open = false; i <= right; i++) {
          const free = this.value(i, next) <= 127;
          if (free && !open) stack.push([i, next]);
          open = free;
        }
      }
    }
    return box;
  }

  // Fill the pixels whose centre lies in a polygon, by the even-odd rule. Returns its box.
  polygon(points, before) {
    const ys = points.map(([, y]) => y),
      xs = points.map(([x]) => x),
      { width, height } = this;
    const top = Math.max(0, Math.floor(Math.min(...ys))),
      bottom = Math.min(height - 1, Math.ceil(Math.max(...ys)));
    for (let y = top; y <= bottom; y++) {
      const line = y + 0.5,
        cuts = [];
      points.forEach(([x1, y1], i) => {
        const [x0, y0] = points.at(i - 1);
        if (y0 <= line !== y1 <= line) cuts.push(x0 + ((line - y0) * (x1 - x0)) / (y1 - y0));
      });
      cuts.sort((one, other) => one - other);
      for (let i = 0; i + 1 < cuts.length; i += 2) {
        const from = Math.max(0, Math.ceil(cuts[i] - 0.5)),
          to = Math.min(width, Math.ceil(cuts[i + 1] - 0.5));
        for (let x = from; x < to;) {
          const start = x & ~255,
            end = Math.min(to, start + 256),
            row = ((y & 255) << 8) - start;
          this.writable(x >> 8, y >> 8, before).fill(255, row + x, row + end);
          x = end;
        }
      }
    }
    return [Math.min(...xs), top, Math.max(...xs), bottom + 1];
  }

  clear(before) {
    for (const [key, tile] of this.tiles) if (!before.has(key)) before.set(key, tile);
    this.tiles.clear();
    this.sums.clear();
  }

  // Put squares back and return what they replace: the way of undo and redo alike.
  swap(saved) {
    const replaced = new Map();
    for (const [key, tile] of saved) {
      replaced.set(key, this.tiles.get(key));
      if (tile) this.tiles.set(key, tile);
      else this.tiles.delete(key);
      this.sums.delete(key);
    }
    return replaced;
  }

  async pack(keys) {
    const parts = [],
      head = new DataView(new ArrayBuffer(16));
    new Uint8Array(head.buffer).set([66, 84, 49, 0]);
    [this.width, this.height, keys.length].forEach((value, i) => head.setUint32(4 + 4 * i, value, true));
    parts.push(head.buffer);
    for (const key of keys) {
      const tile = this.tiles.get(key);
      const data = tile ? await through(tile, new CompressionStream("deflate-raw")) : new Uint8Array(0);
      const row = new DataView(new ArrayBuffer(8));
      row.setUint16(0, key % this.across, true);
      row.setUint16(2, Math.floor(key / this.across), true);
      row.setUint32(4, data.length, true);
      parts.push(row.buffer, data);
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  }

  static async unpack(buffer) {
    const view = new DataView(buffer),
      mask = new Mask(view.getUint32(4, true), view.getUint32(8, true));
    let at = 16;
    for (let i = view.getUint32(12, true); i > 0; i--) {
      const key = view.getUint16(at + 2, true) * mask.across + view.getUint16(at, true),
        length = view.getUint32(at + 4, true);
      at += 8;
      const data = new Uint8Array(buffer, at, length);
      mask.tiles.set(
        key,
        length === 1 ? new Uint8Array(AREA).fill(255) : await through(data, new DecompressionStream("deflate-raw")),
      );
      at += length;
    }
    return mask;
  }
}

async function through(data, stream) {
  return new Uint8Array(await new Response(new Blob([data]).stream().pipeThrough(stream)).arrayBuffer());
}

function distance(x0, y0, x1, y1, x, y) {
  const dx = x1 - x0,
    dy = y1 - y0,
    length = dx * dx + dy * dy;
  const along = length ? Math.min(1, Math.max(0, ((x - x0) * dx + (y - y0) * dy) / length)) : 0;
  return Math.hypot(x - x0 - along * dx, y - y0 - along * dy);
}

// Where a horizontal line at y is within `radius` of a stretch: an interval, as the shape is convex. Null if nowhere.
function span(x0, y0, x1, y1, radius, y) {
  if (radius <= 0) return null;
  let low = Infinity,
    high = -Infinity;
  for (const [cx, cy] of [
    [x0, y0],
    [x1, y1],
  ]) {
    const reach = radius * radius - (y - cy) * (y - cy);
    if (reach >= 0) {
      low = Math.min(low, cx - Math.sqrt(reach));
      high = Math.max(high, cx + Math.sqrt(reach));
    }
  }
  const dx = x1 - x0,
    dy = y1 - y0,
    length = Math.hypot(dx, dy);
  if (length > 0 && dy !== 0) {
    // the band between the two circles
    const middle = x0 + ((y - y0) * dx) / dy,
      half = Math.abs((radius * length) / dy);
    let from = middle - half,
      to = middle + half;
    const ends = [0, length * length].map((limit) => (dx ? x0 + (limit - (y - y0) * dy) / dx : null));
    if (dx) {
      from = Math.max(from, Math.min(...ends));
      to = Math.min(to, Math.max(...ends));
    } else if ((y - y0) * dy < 0 || (y - y0) * dy > length * length) to = -Infinity;
    if (from <= to) {
      low = Math.min(low, from);
      high = Math.max(high, to);
    }
  } else if (length > 0 && Math.abs(y - y0) <= radius) {
    low = Math.min(low, x0, x1);
    high = Math.max(high, x0, x1);
  }
  return low <= high ? [low, high] : null;
}
