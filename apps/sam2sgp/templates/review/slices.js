// Slices of an image and of its label in the browser: asked for a few at a time, forgotten when there are too many.
// A label's slices that were painted are never forgotten.

import { voxels } from "./server.js";

/** Slices that come with one request, if the server allows as many, and bytes of an image that are kept. */
const AT_ONCE = 16;
const MOST_BYTES = 192 * 2 ** 20;
/** Numbers of runs, three for each, and slices that one request may bring; more go in several. */
const MOST_IN_A_REQUEST = 60_000;
const MOST_SLICES_IN_A_REQUEST = 4096;

/**
 * Little-endian numbers, as every machine that runs a browser has them.
 * @param {ArrayBuffer} buffer @param {number} bytes of a number @returns {Uint8Array | Uint16Array}
 */
function numbers(buffer, bytes) {
  return bytes === 1 ? new Uint8Array(buffer) : new Uint16Array(buffer);
}

/** Slices by number, fetched in blocks. */
class Blocks {
  /**
   * @param {number} depth number of slices. @param {number} pixels values in a slice. @param {number} bytes of a value.
   * @param {number} perRequest slices that one request may bring.
   * @param {(first: number, count: number) => Promise<ArrayBuffer>} fetchBlock
   */
  constructor(depth, pixels, bytes, perRequest, fetchBlock) {
    this.depth = depth;
    this.pixels = pixels;
    this.bytes = bytes;
    this.size = Math.max(1, Math.min(perRequest, AT_ONCE));
    this.fetchBlock = fetchBlock;
    /** @type {Map<number, Uint8Array | Uint16Array>} in the order of use. */
    this.blocks = new Map();
    /** @type {Map<number, Promise<void>>} */
    this.coming = new Map();
  }

  /** @param {number} number @returns {Uint8Array | Uint16Array | null} null where it is not here. */
  get(number) {
    const place = Math.floor(number / this.size);
    const block = this.blocks.get(place);
    if (!block) return null;
    this.blocks.delete(place);
    this.blocks.set(place, block);
    const start = (number - place * this.size) * this.pixels;
    return block.subarray(start, start + this.pixels);
  }

  /** Have a slice come. @param {number} number @returns {Promise<void>} */
  bring(number) {
    const place = Math.floor(number / this.size);
    if (number < 0 || number >= this.depth || this.blocks.has(place)) return Promise.resolve();
    const coming = this.coming.get(place);
    if (coming) return coming;
    const first = place * this.size;
    const count = Math.min(this.size, this.depth - first);
    const promise = this.fetchBlock(first, count)
      .then((buffer) => {
        this.blocks.set(place, numbers(buffer, this.bytes));
        this.forget();
      })
      .finally(() => this.coming.delete(place));
    this.coming.set(place, promise);
    return promise;
  }

  forget() {
    const most = Math.max(3, Math.floor(MOST_BYTES / (this.size * this.pixels * this.bytes)));
    for (const place of this.blocks.keys()) {
      if (this.blocks.size <= most) break;
      this.blocks.delete(place);
    }
  }
}

/** An image's slices. */
export class ImageSlices {
  /** @param {import("./state.js").Case} shown */
  constructor(shown) {
    const [depth, height, width] = shown.shape;
    const query = { image: shown.image, seen: shown.image_seen };
    this.blocks = new Blocks(depth, height * width * shown.channels, shown.bytes, shown.per_request, (first, count) =>
      voxels("slices", { ...query, first, count }),
    );
  }

  /** @param {number} number */
  get(number) {
    return this.blocks.get(number);
  }

  /** Have a slice come, and then those around it. @param {number} number */
  async bring(number) {
    await this.blocks.bring(number);
    const { size } = this.blocks;
    for (const near of [number + size / 2, number - size / 2]) this.blocks.bring(Math.floor(near)).catch(() => {});
  }
}

/** @typedef {{slice: number, index: Uint32Array, before: Uint16Array, after: Uint16Array}} Change of one slice. */

/** A label's slices, as they came and as they are painted. */
export class LabelSlices {
  /** @param {import("./state.js").Case} shown */
  constructor(shown) {
    const [depth, height, width] = shown.shape;
    this.depth = depth;
    this.height = height;
    this.width = width;
    const query = { image: shown.image, label_tag: shown.label_tag, seen: shown.seen };
    const bytes = shown.label_bytes;
    this.blocks = new Blocks(depth, height * width, bytes, shown.labels_per_request, (first, count) =>
      shown.label_tag
        ? voxels("labels", { ...query, first, count })
        : Promise.resolve(new ArrayBuffer(count * height * width * bytes)),
    );
    /** @type {Map<number, {base: Uint16Array, now: Uint16Array, change: Change | null}>} slices that were painted. */
    this.painted = new Map();
  }

  /** Class values of a slice as they are now; not to be written to. @param {number} number */
  get(number) {
    return this.painted.get(number)?.now ?? this.blocks.get(number);
  }

  /** Whether all of several slices have come. @param {number} first @param {number} last */
  has(first, last) {
    for (let number = Math.max(first, 0); number <= Math.min(last, this.depth - 1); number++) {
      if (!this.get(number)) return false;
    }
    return true;
  }

  /** @param {number} number */
  async bring(number) {
    if (!this.painted.has(number)) await this.blocks.bring(number);
    const { size } = this.blocks;
    for (const near of [number + size / 2, number - size / 2]) this.blocks.bring(Math.floor(near)).catch(() => {});
  }

  /** Have all of several slices come. @param {number} first @param {number} last */
  async bringAll(first, last) {
    for (let number = Math.max(first, 0); number <= Math.min(last, this.depth - 1); number++) {
      if (!this.painted.has(number)) await this.blocks.bring(number);
    }
  }

  /** A slice to paint on, or null where it has not come. @param {number} number */
  writable(number) {
    const found = this.painted.get(number);
    if (found) {
      found.change = null;
      return found.now;
    }
    const base = this.blocks.get(number);
    if (!base) return null;
    const kept = { base: Uint16Array.from(base), now: Uint16Array.from(base), change: null };
    this.painted.set(number, kept);
    return kept.now;
  }

  /** What differs from the label as it came. @returns {Change[]} */
  changes() {
    return [...this.painted]
      .map(([slice, kept]) => (kept.change ??= difference(slice, kept.base, kept.now)))
      .filter(({ index }) => index.length)
      .sort((one, other) => one.slice - other.slice);
  }

  get changed() {
    return this.changes().length > 0;
  }

  /** Put changes of another state of the label on top of this one. @param {Change[]} changes */
  async paintOver(changes) {
    for (const { slice, index, after } of changes) {
      await this.blocks.bring(slice);
      const now = this.writable(slice);
      index.forEach((place, number) => (now[place] = after[number]));
    }
  }
}

/** @param {number} slice @param {Uint16Array} before @param {Uint16Array} after @returns {Change} */
export function difference(slice, before, after) {
  const index = [];
  for (let place = 0; place < before.length; place++) if (before[place] !== after[place]) index.push(place);
  return {
    slice,
    index: Uint32Array.from(index),
    before: Uint16Array.from(index, (place) => before[place]),
    after: Uint16Array.from(index, (place) => after[place]),
  };
}

/**
 * Changes as the server takes them: for each slice runs of start, length and value.
 * @param {Change[]} changes
 */
export function runsOf(changes) {
  return changes.map(({ slice, index, after }) => {
    const runs = [];
    let start = 0;
    for (let place = 1; place <= index.length; place++) {
      if (place === index.length || index[place] !== index[place - 1] + 1 || after[place] !== after[start]) {
        runs.push(index[start], place - start, after[start]);
        start = place;
      }
    }
    return { slice, runs };
  });
}

/** Such changes in pieces that the server takes in one request each. @param {{slice: number, runs: number[]}[]} changes */
export function pieces(changes) {
  const found = [[]];
  let size = 0;
  const parts = changes.flatMap(({ slice, runs }) =>
    Array.from({ length: Math.ceil(runs.length / MOST_IN_A_REQUEST) }, (_, part) => ({
      slice,
      runs: runs.slice(part * MOST_IN_A_REQUEST, (part + 1) * MOST_IN_A_REQUEST),
    })),
  );
  for (const change of parts) {
    if (size + change.runs.length > MOST_IN_A_REQUEST || found.at(-1).length === MOST_SLICES_IN_A_REQUEST) {
      found.push([]);
      size = 0;
    }
    found.at(-1).push(change);
    size += change.runs.length;
  }
  return found;
}
