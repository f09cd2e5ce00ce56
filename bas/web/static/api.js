// Requests to the server this page came from, and to nothing else.

export class Refused extends Error {
  constructor(status, body) {
    super(body.message || `the server answered ${status}`);
    Object.assign(this, { status, code: body.code, field: body.field });
  }
}

export class Away extends Error {} // the server does not answer

const band = () => document.getElementById("band");

export async function ask(method, path, { body, version, raw, keepalive } = {}) {
  const headers = {};
  if (method !== "GET") headers["Content-Type"] = raw ? "application/octet-stream" : "application/json";
  if (version) headers["If-Match"] = version;
  let answer;
  try {
    answer = await fetch(`api/${path}`, {
      method,
      headers,
      keepalive,
      body: method === "GET" ? undefined : (raw ?? JSON.stringify(body ?? {})),
    });
  } catch {
    band().hidden = false;
    throw new Away("bas studio does not answer");
  }
  band().hidden = true;
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

export const get = async (path) => (await ask("GET", path)).json();
export const send = async (method, path, body, more = {}) => (await ask(method, path, { body, ...more })).json();
export const address = (...parts) => parts.map(encodeURIComponent).join("/");
export const fileOf = (run, file) => `api/runs/${address(run)}/file/${address(...file.split("/"))}`;
export const thumbOf = (run, file, version = "") =>
  `api/runs/${address(run)}/thumb/${address(...file.split("/"))}${version ? `?v=${version}` : ""}`;

export function upload(file, name, onprogress) {
  // fetch tells nothing of how far an upload is
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", `api/scenes?name=${encodeURIComponent(name)}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", (event) => onprogress(event.loaded, event.total));
    request.responseType = "json";
    request.addEventListener("load", () => {
      if (request.status === 200) done(request.response);
      else failed(new Refused(request.status, request.response ?? {}));
    });
    request.addEventListener("error", () => failed(new Away("bas studio does not answer, or the file is too large")));
    request.send(file);
  });
}
