// Elements, notices and small words. Nothing here writes markup: every text is a text node.

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("aria-")) {
      element.setAttribute(name, String(value));
      continue;
    } // "false" is a value there
    if (value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "style") for (const [key, part] of Object.entries(value)) element.style.setProperty(key, part);
    else if (name in element && name !== "list" && name !== "form") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  return put(element, children);
}

export function put(element, ...children) {
  element.replaceChildren(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const quiet = (...children) => h("p", { class: "quiet" }, children);
export const warning = (text, bad) => h("p", { class: `warning ${bad ? "bad" : ""}` }, text);

let said = "";
export function speak(text) {
  // for screen readers, once
  if (text === said) return;
  said = text;
  document.getElementById("spoken").textContent = text;
}

export const button = (text, onclick, properties = {}) => h("button", { type: "button", onclick, ...properties }, text);
export const link = (text, href, properties = {}) => h("a", { href, ...properties }, text);

// A card that stays where the mistake was made: what, why, and what to do.
export function problem(title, message, ...actions) {
  return h(
    "div",
    { class: "card bad", role: "alert" },
    h("strong", {}, title),
    message && h("p", {}, message),
    actions.length ? h("p", { class: "row" }, actions) : null,
  );
}

// A room without what it is about: what is missing, and the way to it.
export function emptyRoom(main, title, missing, advice, next = link("To Home", "#/home", { class: "button main" })) {
  put(main, h("h1", {}, title), h("div", { class: "empty" }, h("p", { class: "large" }, missing), h("p", {}, advice), next));
  return {};
}

// What was deleted, with the way back.
export function deleted(what, restore) {
  const line = h(
    "div",
    { class: "card row", role: "status" },
    `${what} is in the trash.`,
    button(
      "Restore",
      async () => {
        try {
          await restore();
          line.remove();
        } catch (error) {
          line.replaceWith(problem(`${what} cannot be restored`, error.message));
        }
      },
      { "aria-label": `Restore ${what}` },
    ),
  );
  return line;
}

export function labelled(text, control, hint) {
  return h("label", { class: "field" }, h("span", {}, text), control, hint && h("small", { class: "quiet" }, hint));
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
export const percent = (share) => `${(100 * share).toFixed(1)} %`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const whole = Math.round(seconds),
    minutes = Math.floor(whole / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes}:${String(whole % 60).padStart(2, "0")} min` : `${whole} s`;
}

export function bytes(size) {
  for (const unit of ["bytes", "kB", "MB", "GB"]) {
    if (size < 1000) return `${unit === "bytes" ? size : size.toFixed(1)} ${unit}`;
    size /= 1000;
  }
  return `${size.toFixed(1)} TB`;
}

export function remembered(key, fallback) {
  // a field that a reload keeps
  try {
    return JSON.parse(localStorage.getItem(`bas ${key}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function remember(key, value) {
  try {
    localStorage.setItem(`bas ${key}`, JSON.stringify(value));
  } catch {
    /* a full or forbidden store: the page works without */
  }
}

export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = h("textarea", { class: "unseen", value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const before = from.textContent;
  from.textContent = "Copied";
  setTimeout(() => {
    from.textContent = before;
  }, 1500);
}

export const progress = (done, total, name) =>
  h("progress", { max: total || 1, value: Math.min(done, total || 1), "aria-label": name });

export const linesOf = (text) =>
  text
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);

// The three numbers of a colour such as "#e69f00".
export const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
