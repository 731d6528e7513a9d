// What stands beside the picture: classes, what the model said and by what it was guided, and what was done before.

import { json } from "./server.js";

/** @typedef {import("./state.js").State} State */

const ACTIONS = {
  approve: "approved",
  correct: "corrected, as draft",
  "remove label": "removed",
  "add image": "image added",
};

/** What labels are called by their tags. */
const TAGS = { original: "prediction", final: "approved" };

/** @param {string} kind @param {string} [name] @param {string} [text] */
export function element(kind, name = "", text = "") {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** @param {number[]} colour */
function swatch(colour) {
  const made = element("span", "swatch");
  made.style.background = `rgb(${colour})`;
  made.setAttribute("aria-hidden", "true");
  return made;
}

export class Panel {
  /**
   * @param {HTMLElement} panel @param {State} state
   * @param {{bringBack: (version: string) => void, show: (tag: string) => void}} page
   */
  constructor(panel, state, page) {
    this.state = state;
    this.page = page;
    this.parts = Object.fromEntries([...panel.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    this.parts.classes.addEventListener("change", (event) => this.change(event.target));
    this.parts.add.addEventListener("submit", (event) => {
      event.preventDefault();
      this.add();
    });
    state.addEventListener("case", () => this.draw());
    state.addEventListener("view", () => this.mark());
    state.addEventListener("label", () => this.count());
  }

  draw() {
    this.drawMarks();
    this.drawClasses();
    this.drawSupport();
    this.drawHistory();
  }

  drawMarks() {
    const { case: shown } = this.state.open;
    const { marks, title, labels } = this.parts;
    title.textContent = shown.image;
    const lines = [];
    const { prediction } = shown;
    const warn = (text) => lines.push(element("li", "warn", text));
    if (shown.of_another_image) {
      warn("⚠ This label was made of another image, which had this name before. Segment this one (G), or correct the label on it.");
    }
    if (prediction?.unlike_support) warn("⚠ This image is unlike every image of the support set: check the result with care.");
    if (prediction?.maybe_absent.length) {
      warn(`⚠ Less sign of ${prediction.maybe_absent.join(", ")} than in any approved image: may be absent.`);
    }
    const told = (text) => /^There is less sign of|^It is unlike/.test(text);
    for (const text of prediction?.warnings ?? []) if (!told(text)) warn(`⚠ ${text}`);
    marks.replaceChildren(...lines);
    const tags = Object.keys(shown.labels);
    labels.replaceChildren(
      ...(tags.length ? [element("span", "", "Label: ")] : [element("span", "", "No label yet: paint one, or press G to segment the image by the approved labels.")]),
      ...tags.map((tag) => {
        const button = element("button", tag === shown.label_tag ? "tag shown" : "tag", TAGS[tag] ?? tag);
        button.type = "button";
        button.setAttribute("aria-pressed", String(tag === shown.label_tag));
        button.addEventListener("click", () => tag !== shown.label_tag && this.page.show(tag));
        return button;
      }),
    );
  }

  drawClasses() {
    const { case: shown } = this.state.open;
    const confidence = shown.prediction?.confidence ?? {};
    const rows = shown.classes.map(({ value, name, colour }) => {
      const row = element("li", "class");
      row.dataset.value = String(value);
      const seen = element("input");
      Object.assign(seen, { type: "checkbox", name: "seen", value: String(value), checked: !this.state.hidden.has(value) });
      seen.setAttribute("aria-label", `Show ${name}`);
      const choice = element("label", "choice");
      const active = element("input");
      Object.assign(active, { type: "radio", name: "active", value: String(value), checked: value === this.state.active });
      active.setAttribute("aria-label", `Paint ${name}`);
      choice.append(active, swatch(colour), element("span", "value", String(value)), element("span", "name", name));
      const sure = confidence[name];
      const numbers = element("span", "numbers");
      numbers.append(element("span", "voxels"));
      if (name in confidence) {
        const text = typeof sure === "number" ? `${Math.round(100 * sure)} % sure` : "not found";
        numbers.append(element("span", typeof sure === "number" && sure < 0.6 ? "sure low" : "sure", text));
      }
      row.append(seen, choice, numbers);
      return row;
    });
    this.parts.classes.replaceChildren(...rows);
    this.count();
  }

  /** How much there is of each class. */
  count() {
    const { open } = this.state;
    if (!open) return;
    const { spacing } = open.case;
    const litres = spacing ? (spacing[0] * spacing[1] * spacing[2]) / 1000 : 0;
    for (const row of this.parts.classes.children) {
      const counts = open.counts.get(Number(row.dataset.value)) ?? [];
      const sum = counts.reduce((total, count) => total + count, 0);
      const size = litres && open.depth > 1 ? `${(sum * litres).toPrecision(3)} mL` : `${sum} px`;
      row.querySelector(".voxels").textContent = sum ? size : "none";
      row.dataset.voxels = String(sum);
    }
  }

  /** Bring the boxes in line with what keys changed. */
  mark() {
    for (const row of this.parts.classes.children) {
      const value = Number(row.dataset.value);
      row.querySelector("[type=checkbox]").checked = !this.state.hidden.has(value);
      row.querySelector("[type=radio]").checked = value === this.state.active;
      row.classList.toggle("active", value === this.state.active);
    }
  }

  /** @param {HTMLInputElement} input */
  change(input) {
    const value = Number(input.value);
    if (input.name === "active") this.state.set({ active: value });
    if (input.name === "seen") this.toggle(value);
  }

  /** @param {number} value */
  toggle(value) {
    const hidden = new Set(this.state.hidden);
    if (!hidden.delete(value)) hidden.add(value);
    this.state.set({ hidden });
    this.state.tell("label");
  }

  /** A class of a new name. */
  add() {
    const { open } = this.state;
    const input = this.parts.add.querySelector("input");
    const name = input.value.trim();
    if (!open || !name) return;
    const known = open.case.classes.find((found) => found.name === name);
    const value = known?.value ?? Math.max(0, ...open.case.classes.map((found) => found.value)) + 1;
    if (!known) {
      open.case.classes.push({ value, name, colour: colourOf(value), counts: null });
      open.counts.set(value, new Array(open.depth).fill(0));
    }
    input.value = "";
    this.state.active = value;
    this.drawClasses();
    this.state.set({ active: value });
  }

  drawSupport() {
    const { prediction } = this.state.open.case;
    const groups = Object.entries(prediction?.support ?? {}).filter(([, items]) => items.length);
    this.parts.support.replaceChildren(
      ...groups.flatMap(([name, items]) => {
        const list = element("ul", "items");
        for (const { item, image, slice, similarity } of items.slice(0, 6)) {
          const entry = element("li");
          const picture = element("img");
          Object.assign(picture, { src: `../item?content=${encodeURIComponent(item)}`, alt: `Support item ${image}, slice ${slice + 1}`, loading: "lazy" });
          picture.width = picture.height = 84;
          entry.append(picture, element("span", "similar", similarity.toFixed(2)), element("span", "from", image));
          entry.title = `${image}, slice ${slice + 1}: similarity ${similarity.toFixed(3)}`;
          list.append(entry);
        }
        return groups.length > 1 ? [element("h4", "", name), list] : [list];
      }),
    );
    if (!groups.length) this.parts.support.append(element("p", "muted", "No prediction, so nothing guided it."));
  }

  async drawHistory() {
    const { open } = this.state;
    const part = this.parts.history;
    try {
      const { events, versions } = await json("history", { image: open.case.image });
      if (open !== this.state.open) return;
      const when = (time) => time.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
      const done = events.map(({ time, user, action, tag }) => {
        const line = element("li");
        line.append(element("span", "when", when(new Date(time))), ` ${ACTIONS[action] ?? action}`);
        if (action === "remove label") line.append(` (${TAGS[tag] ?? tag})`);
        line.append(user ? ` by ${user}` : "");
        return line;
      });
      const earlier = versions.map(({ version, time, tag, user, of_another_image: isOfAnother }) => {
        const line = element("li");
        const words = ` ${TAGS[tag] ?? tag}${user ? ` by ${user}` : ""} `;
        line.append(element("span", "when", when(new Date(1000 * time))), words);
        if (isOfAnother) {
          line.append("(of another image, which had this name before)");
          return line;
        }
        const button = element("button", "", "Bring back");
        button.type = "button";
        button.setAttribute("aria-label", `Bring back the ${TAGS[tag] ?? tag} of ${when(new Date(1000 * time))} as a draft`);
        button.disabled = Boolean(this.state.notOffered.bring_back);
        button.title = this.state.notOffered.bring_back ?? "";
        button.addEventListener("click", () => this.page.bringBack(version));
        line.append(button);
        return line;
      });
      part.replaceChildren(...done, ...(earlier.length ? [element("li", "head", "Earlier states")] : []), ...earlier);
      if (!done.length && !earlier.length) part.append(element("li", "muted", "Nothing yet."));
    } catch (error) {
      part.replaceChildren(element("li", "muted", error.message));
    }
  }
}

/** Of a class that the server has not told of yet. @param {number} value */
function colourOf(value) {
  const palette = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [240, 228, 66], [213, 94, 0], [0, 114, 178]];
  return palette[(value - 1) % palette.length];
}
