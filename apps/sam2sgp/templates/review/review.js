// The review page: puts its parts together, and carries out decisions one after the other.

import { Batch } from "./batch.js";
import { Picture } from "./drawing.js";
import { explain, listen } from "./keys.js";
import { Panel, element } from "./panel.js";
import { Progress } from "./progress.js";
import { Queue } from "./queue.js";
import { Segmenting } from "./segmenting.js";
import { Refused, json, post } from "./server.js";
import { pieces, runsOf } from "./slices.js";
import { Open, State } from "./state.js";
import { Tools } from "./tools.js";

const CT_PRESETS = {
  "soft tissue": [-160, 240],
  lung: [-1350, 150],
  bone: [-450, 1350],
  brain: [0, 80],
  liver: [-15, 155],
};

/** Answers that are not the image's fault, so that it is tried again. */
const PASSING = [0, 401, 403, 409, 429, 503, 504];
/** Images that are tried one after the other until one can be opened. */
const MOST_TRIED = 10;

const one = (selector) => document.querySelector(selector);
const state = new State();
const picture = new Picture(one("#picture"), state);
const tools = new Tools(state, picture, { goTo, say, isBusy: () => busy });
const panel = new Panel(one("#panel"), state, { bringBack, show: (tag) => open(state.open.case.image, tag) });
const queue = new Queue(one("#list"), one("#filters"), (image) => open(image), fail);
const progress = new Progress(one("#loop"));
const segmenting = new Segmenting(one("#segmenting"), say);
/** What comes next is fetched while this is looked at. @type {{image: string, coming: Promise<Open>} | null} */
let ahead = null;
/** Whether a decision is being carried out. */
let busy = false;
/** What was chosen meanwhile. @type {{image: string, tag: string} | null} */
let chosen = null;

// Words

/** @param {string} text @param {boolean} [isProblem] */
function say(text, isProblem = false) {
  const message = one("#message");
  message.textContent = text;
  message.classList.toggle("problem", isProblem);
}

/** @param {Error} error */
function fail(error) {
  say(error.message, true);
}

/** Say something that has to be answered. @param {string} text @param {[string, () => void][]} choices */
function demand(text, choices) {
  const box = one("#alert");
  box.querySelector("span").textContent = text;
  box.querySelector(".choices").replaceChildren(
    ...choices.map(([name, run]) => {
      const button = element("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => {
        box.hidden = true;
        one("#picture").focus();
        run();
      });
      return button;
    }),
  );
  box.hidden = false;
}

// Looking

/** @param {string} image @param {string} [tag] @returns {Promise<Open>} */
async function load(image, tag = "") {
  const opened = new Open(await json("case", tag ? { image, label_tag: tag } : { image }));
  await opened.bring(opened.slice);
  return opened;
}

/**
 * Show an image that isn't shown yet; what was painted on the one before is kept as a draft.
 * @param {string} image @param {string} [tag]
 * @param {number} [by] where to go on from one that can't be opened; by default nowhere.
 */
async function open(image, tag = "", by = 0) {
  if (busy) {
    chosen = { image, tag };
    return;
  }
  if (!tag && image === state.open?.case.image) return;
  await alone(async () => {
    if (state.open?.labels.changed) await save("draft");
    if (by) await turnToNext(image, by);
    else await turnTo(image, tag);
  });
}

/**
 * Show an image, or the nearest one after it (`by` 1) or before it (-1) that can be opened.
 * @param {string} image @param {number} by @param {string} [text] to be said before what couldn't be opened.
 * @returns {Promise<boolean>} whether one is shown.
 */
async function turnToNext(image, by, text = "") {
  const problems = [];
  let entry = { image };
  let isOpen = false;
  while (entry && !isOpen && problems.length < MOST_TRIED) {
    try {
      await turnTo(entry.image);
      isOpen = true;
    } catch (error) {
      if (!queue.unreadable.has(entry.image)) throw error;
      problems.push(error.message);
      entry = await queue.neighbour(by);
    }
  }
  if (problems.length) say([text, ...problems].join(" "), true);
  return isOpen;
}

/** @param {string} image @param {string} [tag] */
async function turnTo(image, tag = "") {
  const started = performance.now();
  one("#picture").setAttribute("aria-busy", "true");
  const isAhead = ahead?.image === image && !tag;
  // What failed ahead of time may do now.
  const opened = await (isAhead ? ahead.coming.catch(() => load(image)) : load(image, tag))
    .catch((error) => {
      if (error instanceof Refused && !PASSING.includes(error.status)) queue.markUnreadable(image);
      // Nothing of what is shown was refused.
      throw new Error(`${image} can't be opened: ${error.message}`);
    })
    .finally(() => {
      one("#picture").removeAttribute("aria-busy");
      ahead = null;
    });
  // What was hidden on the image before is not to be approved unseen on this one.
  state.hidden = new Set();
  state.overlay = true;
  show(opened);
  queue.mark(image);
  document.body.dataset.opened = image;
  document.body.dataset.took = String(Math.round(performance.now() - started));
  lookAhead();
}

/** @param {Open} opened @param {number} [slice] */
function show(opened, slice) {
  state.open = opened;
  if (slice !== undefined) opened.slice = slice;
  one("#alert").hidden = true;
  const shown = opened.case;
  state.window = shown.window;
  if (!opened.classOf(state.active)) state.active = shown.classes[0]?.value ?? 1;
  const slider = one("#slice");
  slider.max = String(opened.depth);
  one("#slices").hidden = opened.depth === 1;
  one("#ball-label").hidden = opened.depth === 1;
  const presets = { "as the model sees it": shown.window, "whole range": shown.range, ...(shown.kind === "ct" ? CT_PRESETS : {}) };
  one("#preset").replaceChildren(
    ...Object.entries(presets).map(([name, window]) => new Option(name, window.join())),
    new Option("by hand", ""),
  );
  document.title = `${shown.image} – SAM2-SGP review`;
  state.tell("case");
  state.tell("view");
  state.tell("label");
  goTo(opened.slice);
}

/** Fetch what comes after this image. */
async function lookAhead() {
  const next = await queue.neighbour(1).catch(() => undefined);
  if (!next || ahead?.image === next.image) return;
  ahead = { image: next.image, coming: load(next.image) };
  // Said when it is opened.
  ahead.coming.catch(() => {});
}

/** Take note of labels that a batch has made. */
async function lookAgain() {
  await queue.refresh();
  ahead = null;
  lookAhead();
  const { open: opened } = state;
  const entry = queue.at(queue.place);
  if (!opened || opened.case.label_tag || entry?.image !== opened.case.image || entry.state !== "predicted") return;
  demand("The batch has segmented this image.", [["Show the prediction", () => open(entry.image, entry.tag)]]);
}

/** @param {number} slice */
async function goTo(slice) {
  const { open: opened } = state;
  if (!opened) return;
  opened.slice = Math.max(0, Math.min(opened.depth - 1, slice));
  const slider = one("#slice");
  slider.value = String(opened.slice + 1);
  slider.setAttribute("aria-valuetext", `Slice ${opened.slice + 1} of ${opened.depth}`);
  picture.later();
  const { reach } = tools;
  try {
    await opened.bring(opened.slice);
    if (reach) await opened.labels.bringAll(opened.slice - reach, opened.slice + reach);
  } catch (error) {
    fail(error);
  }
  picture.later();
}

/** The next slice with something on it. @param {number} by */
function jump(by) {
  const { open: opened } = state;
  if (!opened) return;
  const isUsed = (slice) => [...opened.counts].some(([value, counts]) => !state.hidden.has(value) && counts[slice] > 0);
  for (let slice = opened.slice + by; slice >= 0 && slice < opened.depth; slice += by) {
    if (isUsed(slice)) return goTo(slice);
  }
  say("No further slice with a label in this direction.");
}

// Deciding

/** Carry out one thing at a time, and say what went wrong. What is chosen meanwhile is opened afterwards. @param {() => Promise<void>} act */
async function alone(act) {
  if (busy) return;
  tools.finish();
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await act();
  } catch (error) {
    if (error instanceof Refused && error.status === 409 && state.open) conflict(error);
    else fail(error);
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
  const next = chosen;
  chosen = null;
  if (next) await open(next.image, next.tag);
}

/** Somebody else was faster; nothing of what was painted is lost. @param {Refused} error */
function conflict(error) {
  const { open: opened } = state;
  const { image } = opened.case;
  const changes = opened.labels.changes();
  const again = () => alone(() => turnTo(image));
  if (!changes.length) {
    demand(`${error.message}`, [["Load it again", again]]);
    return;
  }
  const onTop = () =>
    alone(async () => {
      const newer = await load(image);
      await newer.labels.paintOver(changes);
      newer.count(changes);
      newer.strokes.add(changes);
      show(newer, opened.slice);
      say("Your changes are on top of the newer label. Look at it, then approve or save it.");
    });
  demand(`${error.message} What you painted is kept here.`, [
    ["Put my changes on the newer label", onTop],
    ["Drop my changes", again],
  ]);
}

/** Whether the user may not do something, which is then said. @param {string} action */
function refuses(action) {
  const reason = state.notOffered[action];
  if (reason) say(reason, true);
  return Boolean(reason);
}

/**
 * Save what was painted. What is too much for one request becomes a draft first.
 * @param {"draft" | "final"} as
 * @returns {Promise<{seen: string, notice?: string}>} the state of the label that was saved, and what has to be known.
 */
async function save(as) {
  const { open: opened } = state;
  const shown = opened.case;
  const parts = pieces(runsOf(opened.labels.changes()));
  let [tag, seen] = [shown.label_tag, shown.seen];
  const states = { ...shown.labels };
  let notice;
  for (const [number, changes] of parts.entries()) {
    const target = number === parts.length - 1 ? as : "draft";
    const answer = await post("correct", {
      image: shown.image,
      image_seen: shown.image_seen,
      shape: shown.shape,
      label_tag: tag,
      seen,
      save_as: target,
      replaces: states[target] ?? "",
      classes: shown.classes.map(({ value, name }) => ({ idx: value, name })),
      changes,
    });
    [tag, seen, notice] = [answer.label_tag, answer.seen, answer.notice];
    states[tag] = seen;
  }
  return { seen, notice };
}

/** Approve what is shown, and go on. @param {boolean} [isNothing] approve that nothing is there. */
function approve(isNothing = false) {
  if (!state.open || refuses("approve")) return;
  alone(async () => {
    const { case: shown, labels } = state.open;
    const { image } = shown;
    if (!shown.label_tag && !labels.changed && !isNothing) {
      say("No label yet: G segments the image, or paint. Shift+A approves that nothing is there.");
      return;
    }
    const next = await queue.neighbour(1);
    let notice;
    if (labels.changed || !shown.label_tag) ({ notice } = await save("final"));
    else if (shown.label_tag !== "final") await post("../approve", { image, label_tag: shown.label_tag, seen: shown.seen });
    await goOn(image, next, notice ? `${image}: ${notice}` : `Approved ${image}.`);
  });
}

function reject() {
  if (!state.open || refuses("reject")) return;
  alone(async () => {
    const { image, label_tag: tag, seen } = state.open.case;
    if (!tag) {
      say("There is no label to reject.");
      return;
    }
    const next = await queue.neighbour(1);
    await post(tag === "final" ? "../remove" : "../reject", { image, label_tag: tag, seen });
    await goOn(image, next, tag === "final" ? `Removed ${image} from the support set.` : `Rejected ${image}.`);
  });
}

/** @param {string} image that was decided about. @param {{image: string} | undefined} next @param {string} text */
async function goOn(image, next, text) {
  say(text);
  const isOpen = next && (await turnToNext(next.image, 1, text));
  if (!isOpen) await turnTo(image);
  queue.refresh().then(lookAhead);
}

function draft() {
  if (!state.open || refuses("draft")) return;
  alone(async () => {
    const { case: shown, labels, slice } = state.open;
    if (!labels.changed) {
      say("Nothing was changed.");
      return;
    }
    await save("draft");
    show(await load(shown.image, "draft"), slice);
    say(`Saved a draft of ${shown.image}.`);
    queue.refresh();
  });
}

function segmentNow() {
  if (!state.open || refuses("segment")) return;
  alone(async () => {
    const { image } = state.open.case;
    if (state.open.labels.changed) await save("draft");
    if (!(await segmenting.run(image))) {
      say(`The segmentation of ${image} was cancelled.`);
      return;
    }
    show(await load(image, "original"));
    say(`Segmented ${image}.`);
    queue.refresh();
  });
}

/** @param {string} version */
function bringBack(version) {
  alone(async () => {
    const { case: shown, labels } = state.open;
    const { image, image_seen } = shown;
    // What was painted becomes an earlier state, too.
    const replaces = labels.changed ? (await save("draft")).seen : (shown.labels.draft ?? "");
    await post("bring_back", { image, version, image_seen, replaces });
    show(await load(image, "draft"));
    say("The earlier label is a draft now; approve it to have it count.");
    queue.refresh();
  });
}

/** @param {number} by */
async function step(by) {
  const next = await queue.neighbour(by);
  if (next) open(next.image, "", by);
  else say(by > 0 ? "This is the last one of the list." : "This is the first one of the list.");
}

// Keys and buttons

const buttons = {
  holes: () => tools.fillHoles(),
  undo: () => tools.again("undo"),
  redo: () => tools.again("redo"),
  fit: () => picture.fit(),
  previous: () => step(-1),
  next: () => step(1),
  segment: segmentNow,
  cancel: () => segmenting.cancel(),
  reject,
  draft,
  approve: () => approve(),
};

function nextPreset() {
  const select = one("#preset");
  const last = select.options.length - 1;
  select.selectedIndex = (select.selectedIndex + 1) % last;
  state.set({ window: select.value.split(",").map(Number) });
}

/** What buttons and tools are for, of what the server may not offer. */
const NEEDS = { segment: "segment", reject: "reject", draft: "draft", approve: "approve", holes: "draft", brush: "draft", eraser: "draft", fill: "draft" };
const setTool = (tool) => (NEEDS[tool] && refuses(NEEDS[tool])) || state.set({ tool });
const commands = [
  { keys: ["A"], once: true, does: "approve and go to the next image", run: () => approve() },
  { keys: ["Shift+A"], once: true, does: "approve that nothing is there", run: () => approve(true) },
  { keys: ["X"], once: true, does: "reject the prediction, or remove an approved label", run: reject },
  { keys: ["D"], once: true, does: "save as a draft", run: draft },
  { keys: ["N", "P"], does: "next or previous image", run: (event) => step(event.key.toLowerCase() === "n" ? 1 : -1) },
  { keys: ["G"], once: true, does: "segment the image now", run: segmentNow },
  { keys: ["Escape"], does: "cancel the segmentation", run: () => segmenting.cancel() },
  { keys: ["ArrowUp", "ArrowDown"], does: "slice by slice", run: (event) => goTo((state.open?.slice ?? 0) + (event.key === "ArrowDown" ? 1 : -1)) },
  { keys: ["PageUp", "PageDown"], does: "ten slices", run: (event) => goTo((state.open?.slice ?? 0) + (event.key === "PageDown" ? 10 : -10)) },
  { keys: ["Home", "End"], does: "first or last slice", run: (event) => goTo(event.key === "Home" ? 0 : Infinity) },
  { keys: [",", "."], does: "previous or next slice with a label", run: (event) => jump(event.key === "." ? 1 : -1) },
  { keys: ["B"], does: "brush", run: () => setTool("brush") },
  { keys: ["E"], does: "eraser", run: () => setTool("eraser") },
  { keys: ["F"], does: "fill a closed area; with Shift, a click removes one", run: () => setTool("fill") },
  { keys: ["V"], does: "move the picture", run: () => setTool("pan") },
  { keys: ["W"], does: "window and level", run: () => setTool("window") },
  { keys: ["[", "]"], does: "smaller or larger brush", run: (event) => tools.resize(event.key === "]" ? 1.25 : 0.8) },
  { keys: ["T"], does: "brush in 3D", run: () => setBall(!state.ball) },
  { keys: ["H"], does: "fill the holes of the class on this slice", run: () => tools.fillHoles() },
  { keys: ["1", "2", "3", "4", "5", "6", "7", "8", "9"], does: "", run: (event) => chooseClass(placeOf(event)) },
  { keys: [1, 2, 3, 4, 5, 6, 7, 8, 9].map((digit) => `Shift+${digit}`), does: "", run: (event) => hideClass(placeOf(event)) },
  { keys: ["1…9"], does: "choose a class", run: () => {} },
  { keys: ["Shift+1…9"], does: "show or hide a class", run: () => {} },
  { keys: ["O"], does: "show or hide the label", run: () => state.set({ overlay: !state.overlay }) },
  { keys: ["L"], does: "next window", run: nextPreset },
  { keys: ["+", "-"], does: "zoom", run: (event) => picture.zoomBy(event.key === "+" ? 1.25 : 0.8) },
  { keys: ["="], does: "", run: () => picture.zoomBy(1.25) },
  { keys: ["0"], does: "show all of the slice", run: () => picture.fit() },
  { keys: ["Space"], does: "hold to move the picture", run: () => (tools.isPanning = true) },
  { keys: ["Ctrl+Z"], does: "undo", run: () => tools.again("undo") },
  { keys: ["Ctrl+Y", "Ctrl+Shift+Z"], does: "redo", run: () => tools.again("redo") },
  { keys: ["/"], does: "look for a name", run: () => one("[name=name]").focus() },
  { keys: ["I"], does: "how the loop gets on", run: () => progress.open() },
  { keys: ["?"], does: "these keys", run: () => one("#keys").showModal() },
];

/** @param {KeyboardEvent} event */
function placeOf(event) {
  return Number(/\d/.exec(event.code ?? event.key)?.[0] ?? event.key) - 1;
}

/** @param {number} place in the list of classes. */
function chooseClass(place) {
  const found = state.open?.case.classes[place];
  if (found) state.set({ active: found.value });
}

/** @param {number} place */
function hideClass(place) {
  const found = state.open?.case.classes[place];
  if (found) panel.toggle(found.value);
}

/** @param {boolean} ball */
function setBall(ball) {
  state.set({ ball });
  goTo(state.open?.slice ?? 0);
}

listen(commands);
explain(one("#keys table"), commands);
one("#loop-open").addEventListener("click", () => progress.open());
one("#help").addEventListener("click", () => one("#keys").showModal());
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.do) buttons[button.dataset.do]();
  if (button?.dataset.tool) setTool(button.dataset.tool);
});
one("#slice").addEventListener("input", (event) => goTo(Number(event.target.value) - 1));
one("#size").addEventListener("input", (event) => tools.setSize(Number(event.target.value)));
one("#ball").addEventListener("change", (event) => setBall(event.target.checked));
one("#opacity").addEventListener("input", (event) => state.set({ opacity: event.target.value / 100 }));
one("#preset").addEventListener("change", (event) => {
  if (event.target.value) state.set({ window: event.target.value.split(",").map(Number) });
});
window.addEventListener("beforeunload", (event) => {
  if (state.open?.labels.changed) event.preventDefault();
});

// Bringing the boxes in line

state.addEventListener("view", () => {
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === state.tool));
  }
  one("#size").value = String(state.size);
  one("#size-told").value = String(state.size);
  one("#ball").checked = state.ball;
  one("#preset").value = [...one("#preset").options].some(({ value }) => value === state.window.join()) ? state.window.join() : "";
  one("#picture").dataset.tool = state.tool;
});

state.addEventListener("label", () => {
  const { open: opened } = state;
  const count = opened?.labels.changes().reduce((sum, { index }) => sum + index.length, 0) ?? 0;
  one("#changed").textContent = count ? `${count} voxels changed` : "";
  drawStrip();
});

/** Where in the volume there is something. */
function drawStrip() {
  const { open: opened } = state;
  const strip = one("#strip");
  if (!opened || opened.depth === 1) return;
  Object.assign(strip, { width: opened.depth, height: 10 });
  const context = strip.getContext("2d");
  const shown = opened.case.classes.filter(({ value }) => !state.hidden.has(value));
  shown.forEach(({ value, colour }, number) => {
    context.fillStyle = `rgb(${colour})`;
    const height = 10 / shown.length;
    (opened.counts.get(value) ?? []).forEach((count, slice) => count > 0 && context.fillRect(slice, number * height, 1, height));
  });
}

queue.onCounts = ({ counts, classes, origins: { unchanged, corrected } }) => {
  const all = Object.values(counts).reduce((sum, count) => sum + count, 0);
  const bar = one("#progress progress");
  bar.max = Math.max(all, 1);
  bar.value = counts.approved;
  const share = unchanged + corrected ? `(predictions: ${unchanged} unchanged, ${corrected} corrected)` : "";
  one("#progress span").textContent = `${counts.approved} of ${all} approved`;
  one("#progress .share").textContent = share;
  const select = one("[name=of_class]");
  const known = [...select.options].map(({ value }) => value);
  for (const name of classes) if (!known.includes(name)) select.append(new Option(name, name));
};

const batch = new Batch(one("#batch"), { say, changed: lookAgain });

queue.onRole = (notOffered) => {
  state.notOffered = notOffered;
  for (const button of document.querySelectorAll("[data-do], [data-tool]")) {
    const reason = notOffered[NEEDS[button.dataset.do ?? button.dataset.tool]];
    button.disabled = Boolean(reason);
    if (reason) button.title = reason;
  }
  batch.permit(notOffered.batch);
  if (notOffered.draft && NEEDS[state.tool]) state.set({ tool: "pan" });
};

await queue.refresh(true);
const first = await queue.fetched(0);
if (first) open(first.image, "", 1);
else say("No image waits. Choose another list on the left.");
