// The concepts of a scene as this page has them, and the way to the server: whatever differs from what is saved is sent, one
// change after the other. What fails differs still, so it is what is tried again.
import { Away, ask, get, send } from "./api.js";
import { button, problem, put } from "./dom.js";
import { Mask } from "./tiles.js";

const AFTER = 6e4; // bytes of a request that a browser sends to its end although the page is closed

const rows = (concepts) => concepts.map(({ from, handle, word }) => ({ from, handle, word }));

// notices: where problems stand; say(text, bad); named(): names are saved; done(): all is; reopen(): the room anew;
// merging(change): change() lets the concepts become others
export async function saver(base, notices, { say, named, done, reopen, merging }) {
  let scene = await get(base),
    pending = false,
    stale = false,
    timer = null,
    chain = Promise.resolve();
  const concepts = await read(scene);

  // from: the concept's place in what is saved; squares: keys of those that are not saved yet
  function read({ concepts }) {
    return Promise.all(
      concepts.map(async ({ from, handle, word }) => {
        const answer = await ask("GET", `${base}/masks/${from}`);
        return { from, handle, word, mask: await Mask.unpack(await answer.arrayBuffer()), squares: new Set() };
      }),
    );
  }

  function add() {
    let number = 0;
    while (concepts.some(({ handle }) => handle === `<asset${number}>`)) number++;
    const mask = new Mask(scene.width, scene.height);
    concepts.push({ from: null, handle: `<asset${number}>`, word: null, mask, squares: new Set() });
  }

  function touch() {
    pending = true;
    window.onbeforeunload = (event) => event.preventDefault();
    say("saving …");
    return save();
  }

  function settle() {
    pending = false;
    window.onbeforeunload = null;
  }

  function save() {
    clearTimeout(timer);
    return (chain = chain.then(work));
  }

  async function work() {
    if (!pending) return;
    try {
      while (pending) {
        const painted = concepts.find(({ squares }) => squares.size);
        if (JSON.stringify(rows(concepts)) !== JSON.stringify(rows(scene.concepts))) await sendNames();
        else if (painted) await sendSquares(painted);
        else settle();
      }
      put(notices);
      done();
    } catch (error) {
      failed(error);
    }
  }

  async function sendNames() {
    const sent = [...concepts],
      wanted = rows(sent);
    scene = await send("PATCH", base, { concepts: wanted }, { version: scene.version, keepalive: true });
    sent.forEach((concept, from) => {
      concept.from = from;
      for (const key of ["handle", "word"]) if (concept[key] === wanted[from][key]) concept[key] = scene.concepts[from][key];
    });
    named();
  }

  async function sendSquares({ mask, squares, from }) {
    const keys = [...squares];
    squares.clear();
    try {
      const raw = await mask.pack(keys);
      const more = { raw, version: scene.version, keepalive: raw.length < AFTER };
      scene = await (await ask("PATCH", `${base}/masks/${from}`, more)).json();
    } catch (error) {
      keys.forEach((key) => squares.add(key));
      throw error;
    }
  }

  function failed(error) {
    const away = error instanceof Away;
    say(away ? `not saved: ${error.message}` : "not saved", true);
    stale = error.status === 412;
    if (away) timer = setTimeout(save, 1500);
    else
      put(
        notices,
        stale
          ? problem(
              "This scene was changed elsewhere",
              "Another page or program has saved it since.",
              button("Show what is there", () => reopen(settle()), { class: "main" }),
              button("Keep mine", keep),
            )
          : problem("The masks are not saved", error.message, button("Try again", save)),
      );
  }

  // An error on the way is met again, and said, by the save that follows.
  function keep() {
    chain = chain.then(merge).catch(() => {});
    return save();
  }

  // What is there, with what was changed here and is not saved. A concept is known by the handle that was saved last.
  async function merge() {
    const there = await get(base),
      theirs = await read(there),
      before = scene.concepts;
    merging(() => {
      const kept = concepts.filter((mine) => {
        const old = before[mine.from] ?? {},
          other = theirs.find(({ handle }) => handle === old.handle),
          same = mine.word === old.word;
        if (other) {
          other.mask.swap(new Map([...mine.squares].map((key) => [key, mine.mask.tiles.get(key)])));
          return Object.assign(mine, { from: other.from, mask: other.mask, word: same ? other.word : mine.word });
        }
        // gone there: what was changed here stays, as a new concept
        if (!mine.squares.size && same && mine.handle === old.handle) return false;
        return Object.assign(mine, { from: null, squares: new Set(mine.mask.tiles.keys()) });
      });
      const added = theirs.filter(({ handle }) => !before.some((each) => each.handle === handle));
      concepts.splice(0, Infinity, ...kept, ...added);
      scene = there;
    });
  }

  // What the server does not answer to is tried again while the page stands.
  async function leave() {
    await save();
    if (!pending || !stale) return;
    if (confirm(`${scene.name} was changed elsewhere: your last changes are not saved. Keep them?`)) await keep();
    else settle();
  }

  return { concepts, add, touch, leave, scene: () => scene };
}
