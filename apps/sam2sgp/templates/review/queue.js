// The list of images: only the rows that can be seen exist, and only the parts of it that were looked at are fetched.

import { json } from "./server.js";

/**
 * @typedef {object} Entry
 * @property {string} image
 * @property {string} tag
 * @property {string} state
 * @property {number | null} confidence
 * @property {boolean} unlike
 * @property {string[]} absent
 * @property {string[]} classes
 * @property {string | null} user
 * @property {number | null} time
 */

const ROW = 54;
const PART = 100;
const MARKS = { predicted: "Predicted", draft: "Draft", unlabelled: "No label", approved: "Approved", removed: "Removed" };

export class Queue {
  /**
   * @param {HTMLElement} list a listbox. @param {HTMLFormElement} filters
   * @param {(image: string) => void} choose @param {(error: Error) => void} say
   */
  constructor(list, filters, choose, say) {
    this.list = list;
    this.filters = filters;
    this.choose = choose;
    this.say = say;
    this.space = document.createElement("div");
    this.space.className = "space";
    list.append(this.space);
    /** @type {Map<number, Entry[]>} */
    this.parts = new Map();
    /** @type {Map<number, Promise<void>>} */
    this.coming = new Map();
    this.total = 0;
    this.turn = 0;
    /** @type {string | null} */
    this.image = null;
    this.place = -1;
    /** Images that couldn't be opened: steps go past them. @type {Set<string>} */
    this.unreadable = new Set();
    this.counts = {};
    this.onCounts = () => {};
    this.onRole = () => {};
    list.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(list);
    list.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) choose(row.dataset.image);
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
      if (!step) return;
      event.preventDefault();
      this.step(step);
    });
    filters.addEventListener("submit", (event) => event.preventDefault());
    let pause;
    filters.addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(() => this.refresh(true), 200);
    });
  }

  get query() {
    const { show, order, name, of_class } = Object.fromEntries(new FormData(this.filters));
    return { show, order, name, of_class };
  }

  /**
   * Ask for the list as it is now. Done when it is here: the newest one, where it was asked for again meanwhile.
   * @param {boolean} [toTop] whether it begins at its top.
   * @returns {Promise<void>}
   */
  refresh(toTop = false) {
    this.asked = this.ask(toTop);
    return this.asked;
  }

  /** @param {boolean} toTop */
  async ask(toTop) {
    const turn = ++this.turn;
    const first = toTop ? 0 : Math.floor(Math.max(this.place, 0) / PART) * PART;
    try {
      const find = this.image ? { find: this.image } : {};
      const answer = await json("queue", { ...this.query, first, count: PART, ...find });
      if (turn !== this.turn) {
        await this.asked;
        return;
      }
      this.resize(answer.total);
      this.parts = new Map([[first / PART, answer.entries]]);
      this.coming.clear();
      this.place = answer.place ?? -1;
      this.counts = answer.counts;
      this.classes = answer.classes;
      this.onCounts(answer);
      this.onRole(answer.not_offered ?? {});
      if (toTop) this.list.scrollTop = 0;
      this.draw();
    } catch (error) {
      this.say(error);
    }
  }

  /** Take over how long the list is by now. @param {number} total */
  resize(total) {
    // What was the last part goes on where the list has grown: it is asked for again.
    if (total > this.total) this.parts.delete(Math.floor(this.total / PART));
    this.total = total;
    this.space.style.height = `${total * ROW}px`;
  }

  /** @param {number} place @returns {Entry | undefined} */
  at(place) {
    return this.parts.get(Math.floor(place / PART))?.[place % PART];
  }

  /**
   * The entry at a place, once its part of the list has come, with which the list is drawn again. Undefined where the
   * list has no such place any more, or where the part didn't come: that is said, and it is asked for at the next call.
   * @param {number} place @returns {Promise<Entry | undefined>}
   */
  async fetched(place) {
    if (place < 0 || place >= this.total) return undefined;
    const part = Math.floor(place / PART);
    if (!this.parts.has(part)) {
      if (!this.coming.has(part)) {
        const { turn } = this;
        const asked = json("queue", { ...this.query, first: part * PART, count: PART })
          .then(({ entries, total }) => {
            if (turn !== this.turn) return;
            this.resize(total);
            this.parts.set(part, entries);
            this.draw();
          })
          .catch((error) => this.say(error))
          .finally(() => this.coming.delete(part));
        this.coming.set(part, asked);
      }
      await this.coming.get(part);
    }
    return this.at(place);
  }

  /** The entry after the one that is looked at, or before it, but for those that couldn't be opened. @param {number} by */
  async neighbour(by) {
    let place = Math.max(0, Math.min(this.total - 1, this.place + by));
    if (place === this.place) return undefined;
    let entry = await this.fetched(place);
    while (entry && this.unreadable.has(entry.image)) {
      place += Math.sign(by);
      entry = await this.fetched(place);
    }
    return entry;
  }

  /** @param {string} image that couldn't be opened. */
  markUnreadable(image) {
    this.unreadable.add(image);
    this.draw();
  }

  /** @param {number} by */
  async step(by) {
    const entry = await this.neighbour(by);
    if (entry) this.choose(entry.image);
  }

  /** Mark what is looked at, and have it in view. @param {string} image */
  mark(image) {
    this.image = image;
    this.unreadable.delete(image);
    const rows = [...this.parts].flatMap(([part, entries]) => entries.map((entry, number) => [entry.image, part * PART + number]));
    const found = rows.find(([name]) => name === image);
    this.place = found ? found[1] : -1;
    if (this.place >= 0) {
      const top = this.place * ROW;
      if (top < this.list.scrollTop) this.list.scrollTop = top;
      const lowest = top + ROW - this.list.clientHeight;
      if (lowest > this.list.scrollTop) this.list.scrollTop = lowest;
    }
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 2);
    const last = Math.min(this.total - 1, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 2);
    const rows = [];
    for (let place = first; place <= last; place++) {
      const entry = this.at(place);
      // Draws once more when it comes. Until then it is asked for again only where the list is scrolled or refreshed.
      if (!entry) this.fetched(place);
      rows.push(this.row(place, entry));
    }
    this.space.replaceChildren(...rows);
    const isIn = this.place >= first && this.place <= last;
    if (isIn) this.list.setAttribute("aria-activedescendant", `row-${this.place}`);
    else this.list.removeAttribute("aria-activedescendant");
    this.list.dataset.total = String(this.total);
  }

  /** @param {number} place @param {Entry} [entry] */
  row(place, entry) {
    const row = document.createElement("div");
    row.className = "row";
    row.id = `row-${place}`;
    row.style.top = `${place * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-setsize", String(this.total));
    row.setAttribute("aria-posinset", String(place + 1));
    row.setAttribute("aria-selected", String(entry?.image === this.image));
    if (!entry) return row;
    row.dataset.image = entry.image;
    row.dataset.state = entry.state;
    const add = (parent, kind, name, text) => {
      const made = document.createElement(kind);
      made.className = name;
      made.textContent = text;
      parent.append(made);
      return made;
    };
    add(row, "b", "name", entry.image).title = entry.image;
    const line = add(row, "span", "line", "");
    add(line, "span", `state ${entry.state}`, MARKS[entry.state]);
    if (entry.confidence !== null && entry.state !== "approved") {
      add(line, "span", "sure", `${Math.round(100 * entry.confidence)} % sure`);
    }
    if (this.unreadable.has(entry.image)) add(line, "span", "warn", "⚠ can't be opened");
    if (entry.unlike) add(line, "span", "warn", "⚠ unlike support");
    if (entry.absent.length) add(line, "span", "warn", `⚠ ${entry.absent.join(", ")} absent?`);
    if (entry.user && entry.state !== "predicted") add(line, "span", "who", entry.user);
    return row;
  }
}
