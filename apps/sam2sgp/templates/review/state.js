// What the page shows and how: the one place that all parts of it look at.

import { ImageSlices, LabelSlices } from "./slices.js";
import { Strokes } from "./painting.js";

/**
 * @typedef {{value: number, name: string, colour: number[], counts: number[] | null}} LabelClass
 * @typedef {{item: string, image: string, slice: number, similarity: number, slices: number}} SupportItem
 * @typedef {object} Prediction
 * @property {Record<string, number | null>} confidence by class.
 * @property {Record<string, SupportItem[]>} support by class.
 * @property {boolean} unlike_support
 * @property {string[]} maybe_absent
 * @property {string[]} warnings
 * @property {string | null} weights
 */

/**
 * An image and one of its labels as `GET case` tells them.
 * @typedef {object} Case
 * @property {string} image
 * @property {string} state
 * @property {string | null} user
 * @property {number | null} time
 * @property {string} image_seen
 * @property {number[]} shape slices, rows, columns.
 * @property {number[] | null} spacing of slices, rows, columns, in mm.
 * @property {string | null} plane
 * @property {string | null} edges letters at the left, right, upper and lower edge.
 * @property {number} channels
 * @property {number} bytes
 * @property {number} per_request
 * @property {number} slope
 * @property {number} intercept
 * @property {number[]} range
 * @property {number[]} window
 * @property {string} kind
 * @property {string} label_tag
 * @property {string} seen
 * @property {number} label_bytes
 * @property {number} labels_per_request
 * @property {boolean} of_another_image whether the label was made of an image that had this name before.
 * @property {Record<string, string>} labels states by tag.
 * @property {LabelClass[]} classes
 * @property {Prediction | null} prediction
 */

/** An image that is looked at, with its slices and what was painted. */
export class Open {
  /** @param {Case} shown */
  constructor(shown) {
    this.case = shown;
    this.image = new ImageSlices(shown);
    this.labels = new LabelSlices(shown);
    this.strokes = new Strokes();
    const depth = shown.shape[0];
    /** @type {Map<number, number[]>} voxels of each class in each slice, by class value. */
    this.counts = new Map(shown.classes.map(({ value, counts }) => [value, counts ?? new Array(depth).fill(0)]));
    this.slice = this.fullest();
  }

  get depth() {
    return this.case.shape[0];
  }

  /** The slice that shows most of all classes; the middle one where there is nothing. */
  fullest() {
    const sums = new Array(this.depth).fill(0);
    for (const counts of this.counts.values()) counts.forEach((count, slice) => (sums[slice] += count));
    const most = Math.max(...sums);
    return most ? sums.indexOf(most) : Math.floor(this.depth / 2);
  }

  /** Count what a stroke changed. @param {import("./slices.js").Change[]} changes */
  count(changes) {
    for (const { slice, before, after } of changes) {
      for (const [values, sign] of [[before, -1], [after, 1]]) {
        for (const value of values) {
          if (!value) continue;
          if (!this.counts.has(value)) this.counts.set(value, new Array(this.depth).fill(0));
          this.counts.get(value)[slice] += sign;
        }
      }
    }
  }

  /** Have everything come that is needed to look at a slice. @param {number} slice */
  bring(slice) {
    return Promise.all([this.image.bring(slice), this.labels.bring(slice)]);
  }

  /** @param {number} value @returns {LabelClass | undefined} */
  classOf(value) {
    return this.case.classes.find((known) => known.value === value);
  }
}

export class State extends EventTarget {
  constructor() {
    super();
    /** @type {Open | null} */
    this.open = null;
    this.tool = "brush";
    /** @type {Record<string, string>} what the user may not do, and why. */
    this.notOffered = {};
    /** Diameter of brush and eraser, in pixels. */
    this.size = 8;
    /** Whether brush and eraser are balls that reach into other slices. */
    this.ball = false;
    this.opacity = 0.35;
    this.overlay = true;
    /** @type {number} class value that is painted. */
    this.active = 1;
    /** @type {Set<number>} class values that are not shown, and so not painted over. */
    this.hidden = new Set();
    /** @type {number[]} lowest and highest value that are told apart. */
    this.window = [0, 1];
  }

  /** Change something and tell everybody. @param {Partial<State>} changes */
  set(changes) {
    Object.assign(this, changes);
    this.tell("view");
  }

  /** @param {"case" | "view" | "label"} what another image, how it is shown, or its label. */
  tell(what) {
    this.dispatchEvent(new Event(what));
  }
}
