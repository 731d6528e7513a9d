// What tools do to a class map of one slice (rows of `width` pixels), and undoing it. No drawing, no events.

import { difference } from "./slices.js";

/** @typedef {import("./slices.js").LabelSlices} LabelSlices */
/** @typedef {import("./slices.js").Change} Change */

/** Strokes that can be undone. */
const MOST_STROKES = 200;

/**
 * Pixels of a disc, each once, as [row, first column, last column].
 * @param {number} x centre, in pixels from the left edge. @param {number} y likewise from above.
 * @param {number} radius in columns. @param {number} stretch height of a pixel by its width.
 * @param {number} height @param {number} width
 * @returns {number[][]}
 */
export function disc(x, y, radius, stretch, height, width) {
  const rows = [];
  const reach = radius / stretch;
  const own = Math.floor(y);
  for (let row = Math.max(0, Math.floor(y - reach)); row <= Math.min(height - 1, Math.floor(y + reach)); row++) {
    const above = (row + 0.5 - y) * stretch;
    const half = Math.sqrt(Math.max(0, radius * radius - above * above));
    let first = Math.ceil(x - half - 0.5);
    let last = Math.floor(x + half - 0.5);
    if (row === own && first > last) first = last = Math.floor(x);
    if (above * above > radius * radius && row !== own) continue;
    first = Math.max(0, first);
    last = Math.min(width - 1, last);
    if (first <= last) rows.push([row, first, last]);
  }
  return rows;
}

/** One stroke: what it touches is noted, so that it can be undone as a whole. */
export class Stroke {
  /**
   * @param {LabelSlices} labels
   * @param {number} value that is painted; 0 erases.
   * @param {Set<number>} locked class values that stay as they are.
   */
  constructor(labels, value, locked) {
    this.labels = labels;
    this.value = value;
    this.locked = locked;
    /** @type {Map<number, Uint16Array>} */
    this.before = new Map();
  }

  /** @param {number} slice @returns {Uint16Array | null} null where the slice has not come. */
  on(slice) {
    const now = this.labels.writable(slice);
    if (now && !this.before.has(slice)) this.before.set(slice, now.slice());
    return now;
  }

  /**
   * @param {number} slice @param {number[][]} rows as of `disc`.
   * @returns {boolean} false where the slice has not come, and so nothing was painted.
   */
  paint(slice, rows) {
    const now = this.on(slice);
    if (!now) return false;
    const { width } = this.labels;
    for (const [row, first, last] of rows) {
      for (let place = row * width + first; place <= row * width + last; place++) {
        if (!this.locked.has(now[place])) now[place] = this.value;
      }
    }
    return true;
  }

  /** @param {number} slice @param {Iterable<number>} places */
  set(slice, places) {
    const now = this.on(slice);
    if (!now) return;
    for (const place of places) if (!this.locked.has(now[place])) now[place] = this.value;
  }

  /** @returns {Change[]} */
  changes() {
    return [...this.before]
      .map(([slice, before]) => difference(slice, before, this.labels.get(slice)))
      .filter(({ index }) => index.length);
  }

  /** Have all as it was. */
  cancel() {
    for (const [slice, before] of this.before) this.labels.writable(slice)?.set(before);
    this.before.clear();
  }
}

/** Strokes that were made, to be undone and made again. */
export class Strokes {
  constructor() {
    /** @type {Change[][]} */
    this.done = [];
    /** @type {Change[][]} */
    this.undone = [];
  }

  /** @param {Change[]} changes */
  add(changes) {
    if (!changes.length) return;
    this.done.push(changes);
    this.undone = [];
    if (this.done.length > MOST_STROKES) this.done.shift();
  }

  /** @param {LabelSlices} labels @returns {Change[] | null} what changed. */
  undo(labels) {
    const changes = this.done.pop();
    if (!changes) return null;
    this.undone.push(changes);
    return apply(labels, changes.map(({ slice, index, before, after }) => ({ slice, index, before: after, after: before })));
  }

  /** @param {LabelSlices} labels @returns {Change[] | null} */
  redo(labels) {
    const changes = this.undone.pop();
    if (!changes) return null;
    this.done.push(changes);
    return apply(labels, changes);
  }
}

/** @param {LabelSlices} labels @param {Change[]} changes */
function apply(labels, changes) {
  for (const { slice, index, after } of changes) {
    const now = labels.writable(slice);
    index.forEach((place, number) => (now[place] = after[number]));
  }
  return changes;
}

/**
 * Pixels of the same value that hang together with one of them, by their edges.
 * @param {ArrayLike<number>} map @param {number} width @param {number} place
 * @returns {{places: number[], isClosed: boolean}} `isClosed`: none of them lies at the edge of the slice.
 */
export function region(map, width, place) {
  const value = map[place];
  const height = map.length / width;
  const seen = new Uint8Array(map.length);
  const places = [place];
  seen[place] = 1;
  let isClosed = true;
  for (let number = 0; number < places.length; number++) {
    const at = places[number];
    const column = at % width;
    const row = (at - column) / width;
    if (row === 0 || column === 0 || row === height - 1 || column === width - 1) isClosed = false;
    const near = [column > 0 && at - 1, column < width - 1 && at + 1, row > 0 && at - width, row < height - 1 && at + width];
    for (const next of near) {
      if (next !== false && !seen[next] && map[next] === value) {
        seen[next] = 1;
        places.push(next);
      }
    }
  }
  return { places, isClosed };
}

/**
 * Background that a class encloses.
 * @param {ArrayLike<number>} map @param {number} width @param {number} value of the class.
 * @returns {number[]}
 */
export function holes(map, width, value) {
  const height = map.length / width;
  // 0: not looked at, 1: the class, 2: outside.
  const marks = new Uint8Array(map.length);
  for (let place = 0; place < map.length; place++) if (map[place] === value) marks[place] = 1;
  const stack = [];
  const push = (place) => {
    if (!marks[place]) {
      marks[place] = 2;
      stack.push(place);
    }
  };
  for (let column = 0; column < width; column++) [column, (height - 1) * width + column].forEach(push);
  for (let row = 0; row < height; row++) [row * width, row * width + width - 1].forEach(push);
  while (stack.length) {
    const at = stack.pop();
    const column = at % width;
    if (column > 0) push(at - 1);
    if (column < width - 1) push(at + 1);
    if (at >= width) push(at - width);
    if (at < map.length - width) push(at + width);
  }
  const found = [];
  for (let place = 0; place < map.length; place++) if (!marks[place] && map[place] === 0) found.push(place);
  return found;
}
