// What the losses see of each mask: its cells on the latent grid and on the grid of the attention maps.
import { h, rgb } from "./dom.js";

// found: the answer of a check; concepts: of the scene, with their colours
export function gridsOf(found, concepts) {
  return found.concepts.map((concept) => {
    const colour = rgb(concepts.find((each) => each.handle === concept.handle)?.colour ?? "#888888");
    const [look, place] = [concept.latent, concept.attention].map((lines) => `${lines[0].length}×${lines.length} cells`);
    return h(
      "figure",
      {},
      ["latent", "attention"].map((kind) => drawn(concept[kind], colour, `${concept.handle} on the ${kind} grid`)),
      h("figcaption", {}, `${concept.handle}: ${look} for its look, ${place} for its place`),
    );
  });
}

// One grid as an image. lines: a digit from 0 to 9 for each cell
function drawn(lines, colour, label) {
  const canvas = h("canvas", { width: lines[0].length, height: lines.length, role: "img", "aria-label": label });
  const ink = canvas.getContext("2d"),
    picture = ink.createImageData(canvas.width, canvas.height);
  [...lines.join("")].forEach((digit, i) => picture.data.set([...colour, Number(digit) * 28], 4 * i));
  ink.putImageData(picture, 0, 0);
  return canvas;
}
