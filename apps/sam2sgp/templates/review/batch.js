// Segmenting everything that has no label, while one works on: start, progress, cancel, and what failed.

import { element } from "./panel.js";
import { json, post, remove } from "./server.js";

/**
 * @typedef {object} Told
 * @property {"none" | "starting" | "running" | "done" | "stopped" | "failed"} state
 * @property {string} [reason]
 * @property {number} [total]
 * @property {number} [skipped]
 * @property {number} [done]
 * @property {number} [failed]
 * @property {{image: string, reason: string}[]} [failures]
 * @property {number | null} [seconds_left]
 */

const BUSY = ["starting", "running"];
/** Between two looks at one that runs, and where none does: somebody else may have started one. */
const SOON_MS = 2000;
const LATER_MS = 30_000;
/** Between two looks at the list. */
const LIST_MS = 10_000;

/** @param {number} seconds */
export function lasting(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export class Batch {
  /**
   * @param {HTMLElement} box
   * @param {{say: (text: string, isProblem?: boolean) => void, changed: () => void}} page told when labels have come.
   */
  constructor(box, page) {
    this.page = page;
    this.parts = Object.fromEntries([...box.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    this.box = box;
    this.state = "";
    /** Why this user may not start or stop one; "" where he may. */
    this.refusal = "";
    /** With how many done the list was looked at last, and when. */
    this.listed = { done: 0, at: -Infinity };
    this.parts.start.addEventListener("click", () => this.act(() => post("../../batch/infer/sam2sgp?images=unannotated", {})));
    this.parts.stop.addEventListener("click", () => this.act(() => remove("../../batch/infer")));
    this.look();
  }

  /** @param {string} [refusal] */
  permit(refusal = "") {
    this.refusal = refusal;
    for (const button of [this.parts.start, this.parts.stop]) {
      button.disabled = Boolean(refusal);
      button.title = refusal;
    }
  }

  /** @param {() => Promise<unknown>} act */
  async act(act) {
    this.parts.start.disabled = this.parts.stop.disabled = true;
    try {
      await act();
    } catch (error) {
      this.page.say(error.message, true);
    }
    await this.look();
  }

  /** Ask how it gets on, and again in a while. */
  async look() {
    clearTimeout(this.next);
    try {
      this.draw(await json("batch"));
    } catch (error) {
      this.parts.told.textContent = error.message;
    }
    clearTimeout(this.next);
    this.next = setTimeout(() => this.look(), BUSY.includes(this.state) ? SOON_MS : LATER_MS);
  }

  /** @param {Told} told */
  draw(told) {
    const { start, stop, bar, told: line } = this.parts;
    const isBusy = BUSY.includes(told.state);
    const wasBusy = BUSY.includes(this.state);
    const { total = 0, done = 0, failed = 0 } = told;
    const tried = done + failed;
    start.hidden = isBusy;
    stop.hidden = bar.hidden = !isBusy;
    this.permit(this.refusal);
    start.textContent = told.state === "stopped" && total > tried ? `Go on segmenting (${total - tried} left)` : "Segment all without a label";
    if (told.state === "running") {
      bar.max = Math.max(total, 1);
      bar.value = tried;
    } else bar.removeAttribute("value");
    line.textContent = words(told);
    line.classList.toggle("warn", told.state === "failed");
    this.drawFailures(told);
    if (wasBusy && !isBusy) this.page.say(line.textContent, told.state === "failed");
    if (!this.state) this.listed = { done, at: -Infinity };
    if (done !== this.listed.done && (!isBusy || performance.now() - this.listed.at > LIST_MS)) {
      this.listed = { done, at: performance.now() };
      this.page.changed();
    }
    this.state = told.state;
    this.box.dataset.state = told.state;
  }

  /** @param {Told} told */
  drawFailures({ failed = 0, failures = [] }) {
    const { failures: box } = this.parts;
    box.hidden = !failed;
    box.querySelector("summary").textContent = failed === 1 ? "1 image failed" : `${failed} images failed`;
    const more = failed > failures.length ? [element("li", "muted", `and ${failed - failures.length} more, which the server's log names`)] : [];
    box.querySelector("ul").replaceChildren(
      ...failures.map(({ image, reason }) => {
        const entry = element("li");
        entry.append(element("b", "", image), ` ${reason.replace(`${image}: `, "")}`);
        return entry;
      }),
      ...more,
    );
  }
}

/** @param {Told} told */
function words({ state, reason = "", total = null, done = 0, failed = 0, seconds_left: left = null }) {
  const tried = `${done + failed} of ${total ?? 0}`;
  const without = failed ? `, ${failed} failed` : "";
  switch (state) {
    case "starting":
      return "The batch starts …";
    case "running":
      return `${tried} images${without}${left === null ? "" : `, about ${lasting(left)} left`}`;
    case "done":
      // Its report couldn't be written.
      if (total === null) return "The batch is done. How many images failed, the server's log says.";
      if (!total) return "Nothing to segment: every image has a label or a prediction.";
      return `Batch: ${done} of ${total} images segmented${without}.`;
    case "stopped":
      return total > done + failed ? `The batch was stopped after ${tried} images${without}.` : "The batch was stopped.";
    case "failed":
      return `The batch ended: ${reason}`;
    default:
      return "";
  }
}
