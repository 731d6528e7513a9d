// One image that is being segmented: how far it is, how long it still takes, and its end before that.

import { lasting } from "./batch.js";
import { json, segment } from "./server.js";

/** Between two looks; what is done sooner shows no bar. */
const LOOK_MS = 1000;

export class Segmenting {
  /** @param {HTMLElement} box with a bar. @param {(text: string) => void} say */
  constructor(box, say) {
    this.box = box;
    this.bar = box.querySelector("progress");
    this.say = say;
    /** @type {AbortController | null} */
    this.ending = null;
  }

  /** @param {string} image @returns {Promise<boolean>} whether it is segmented; it isn't where the user cancelled it. */
  async run(image) {
    const ending = (this.ending = new AbortController());
    const started = performance.now();
    this.say(`Segmenting ${image} …`);
    this.bar.removeAttribute("value");
    const looking = setInterval(() => this.look(image, started, ending.signal), LOOK_MS);
    try {
      await segment(image, ending.signal);
      return true;
    } catch (error) {
      if (ending.signal.aborted) return false;
      throw error;
    } finally {
      // From here on nothing that was asked before is shown.
      ending.abort();
      clearInterval(looking);
      this.ending = null;
      this.box.hidden = true;
    }
  }

  cancel() {
    this.ending?.abort();
  }

  /** @param {string} image @param {number} started @param {AbortSignal} signal */
  async look(image, started, signal) {
    this.box.hidden = false;
    // Only the segmentation itself says what goes wrong.
    const { done, total } = await json("segmenting", { image }).catch(() => ({ done: 0, total: 0 }));
    if (signal.aborted || !done) return;
    [this.bar.max, this.bar.value] = [total, done];
    const left = ((performance.now() - started) / 1000) * (total / done - 1);
    this.say(`Segmenting ${image}: ${Math.floor((100 * done) / total)} %, about ${lasting(left)} left`);
  }
}
