// Boxes for handles: where each shall stand.
import { button, h, put, remember, remembered } from "./dom.js";
import { colourOf } from "./prompt.js";

// Boxes for handles: drag on the square to draw, drag a box to move it, its corner to resize; numbers do the same.
export function layout(run, key) {
  const boxes = remembered(key, {}),
    frame = h("div", { class: "frame", role: "group", "aria-label": "Where each handle stands" }),
    list = h("div", { class: "stack" });
  let active = run.handles[0];
  const clamp = (value) => Math.min(1, Math.max(0, value)),
    round = (value) => Math.round(100 * value) / 100;
  const keep = () => {
    remember(key, boxes);
    draw();
  };
  function draw() {
    put(
      frame,
      run.handles
        .filter((handle) => boxes[handle])
        .map((handle) => {
          const [left, top, right, bottom] = boxes[handle],
            i = run.handles.indexOf(handle);
          return h(
            "div",
            {
              class: "box",
              "data-handle": handle,
              style: {
                "--colour": colourOf(i),
                left: `${100 * left}%`,
                top: `${100 * top}%`,
                width: `${100 * (right - left)}%`,
                height: `${100 * (bottom - top)}%`,
              },
            },
            handle,
            h("span", { class: "corner" }),
          );
        }),
    );
    put(
      list,
      run.handles.map((handle, i) => {
        const box = boxes[handle];
        return h(
          "div",
          { class: "row boxrow" },
          button(
            handle,
            () => {
              active = handle;
              draw();
            },
            { class: "chip", "aria-pressed": handle === active, style: { "--colour": colourOf(i) } },
          ),
          box
            ? ["left", "top", "right", "bottom"].map((side, place) =>
                h("input", {
                  type: "number",
                  min: 0,
                  max: 1,
                  step: 0.05,
                  value: box[place],
                  "aria-label": `${side} of ${handle}`,
                  onchange: (event) => {
                    box[place] = clamp(Number(event.target.value));
                    keep();
                  },
                }),
              )
            : h("small", { class: "quiet" }, "no box: drag one on the square"),
          box
            ? button(
                "×",
                () => {
                  delete boxes[handle];
                  keep();
                },
                { class: "plain", "aria-label": `Remove the box of ${handle}` },
              )
            : button(
                "Add",
                () => {
                  boxes[handle] = [0.25, 0.25, 0.75, 0.75];
                  active = handle;
                  keep();
                },
                { "aria-label": `Add a box for ${handle}` },
              ),
        );
      }),
    );
  }
  let drag = null;
  const place = (event) => {
    const area = frame.getBoundingClientRect();
    return [clamp((event.clientX - area.left) / area.width), clamp((event.clientY - area.top) / area.height)];
  };
  frame.addEventListener("pointerdown", (event) => {
    const target = event.target.closest(".box"),
      [x, y] = place(event);
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    if (target) active = target.dataset.handle;
    drag = {
      kind: !target ? "new" : event.target.classList.contains("corner") ? "corner" : "move",
      x,
      y,
      old: [...(boxes[active] ?? [])],
    };
  });
  frame.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [x, y] = place(event),
      { kind, old } = drag;
    if (kind === "new")
      boxes[active] = [Math.min(x, drag.x), Math.min(y, drag.y), Math.max(x, drag.x), Math.max(y, drag.y)].map(round);
    else if (kind === "corner") boxes[active] = [old[0], old[1], Math.max(old[0] + 0.05, x), Math.max(old[1] + 0.05, y)].map(round);
    else {
      const dx = Math.min(1 - old[2], Math.max(-old[0], x - drag.x)),
        dy = Math.min(1 - old[3], Math.max(-old[1], y - drag.y));
      boxes[active] = [old[0] + dx, old[1] + dy, old[2] + dx, old[3] + dy].map(round);
    }
    draw();
  });
  frame.addEventListener("pointerup", () => {
    const box = boxes[active];
    if (drag?.kind === "new" && box && (box[2] - box[0] < 0.05 || box[3] - box[1] < 0.05)) {
      if (drag.old.length) boxes[active] = drag.old;
      else delete boxes[active];
    }
    drag = null;
    keep();
  });
  draw();
  const own = h("input", {
    type: "checkbox",
    checked: remembered(`${key} own`, false),
    onchange: () => remember(`${key} own`, own.checked),
  });
  return {
    own,
    used: (prompt) => Object.fromEntries(Object.entries(boxes).filter(([handle]) => prompt.includes(handle))),
    load(found) {
      for (const handle of run.handles) delete boxes[handle];
      Object.assign(boxes, found);
      keep();
    },
    box: h(
      "details",
      { open: Object.keys(boxes).length > 0 },
      h("summary", {}, "Boxes: say where each stands"),
      h(
        "div",
        { class: "layout" },
        frame,
        list,
        h("label", { class: "row" }, own, "start from the concepts' own pixels in the photograph"),
      ),
    ),
  };
}
