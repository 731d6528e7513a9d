// How the loop gets on: Dice as labels come, as a curve and as tables, and whether there are enough labels.

import { element } from "./panel.js";
import { json } from "./server.js";

/** Of work, before a pace is told. */
const LEAST_HOURS = 1 / 12;

/**
 * @typedef {{first: number, last: number, dice: number}} Shown of labels in the order of approval.
 * @typedef {{time: string, labels: number, images: number, dice: number, low: number, high: number, weights: string}} LeftOut
 * @typedef {object} Told
 * @property {number} labels
 * @property {Shown[]} shown
 * @property {LeftOut[]} left_out
 * @property {[number, number] | null} measured
 * @property {{all: number, of: number, latest: number, of_latest: number}} unchanged
 * @property {number | null} per_hour
 * @property {number | null} per_hour_latest
 * @property {number} hours
 * @property {string} verdict
 * @property {string} enough
 * @property {{text: string} | null} adaptation
 */

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [640, 260, 40, 12, 26, 40];
/** Predictions over which the line of what was shown is the mean. */
const SMOOTH = 10;
const AGAIN_MS = 3000;

/** @param {string} kind @param {Record<string, string | number>} attributes @param {string} [text] */
function drawn(kind, attributes, text) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

/** @param {number} value */
const two = (value) => value.toFixed(2);

/** @param {number[]} values */
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

export class Progress {
  /** @param {HTMLDialogElement} dialog */
  constructor(dialog) {
    this.dialog = dialog;
    this.turn = 0;
    this.parts = Object.fromEntries([...dialog.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
  }

  /** Show it, and keep it up to date for as long as it is open. */
  async open() {
    if (this.dialog.open) return;
    this.dialog.showModal();
    const turn = ++this.turn;
    while (this.dialog.open && turn === this.turn) {
      try {
        this.draw(await json("progress"));
      } catch (error) {
        this.parts.verdict.textContent = error.message;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }

  /** @param {Told} told */
  draw(told) {
    const { verdict, facts, measured } = this.parts;
    verdict.textContent = told.enough;
    verdict.dataset.kind = told.verdict;
    this.drawCurve(told);
    facts.replaceChildren(...this.facts(told).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
    measured.textContent = told.measured ? `Measuring with the labels as they are: ${told.measured[0]} of ${told.measured[1]} images.` : "";
    this.fill("shown", told.shown.map(({ first, last, dice }) => [first === last ? `${first}` : `${first} to ${last}`, two(dice)]));
    this.fill(
      "left_out",
      told.left_out.map(({ labels, dice, low, high, images, time, weights }) => [
        `${labels}`, two(dice), `${two(low)} to ${two(high)}`, `${images}`, weights, new Date(time).toLocaleDateString(),
      ]),
    );
    this.dialog.dataset.shown = String(told.shown.length);
    this.dialog.dataset.leftOut = String(told.left_out.length);
  }

  /** @param {Told} told @returns {[string, string][]} */
  facts({ labels, unchanged, per_hour: pace, per_hour_latest: latest, hours, adaptation }) {
    const share = (count, of) => (of ? `${Math.round((100 * count) / of)} % (${count} of ${of})` : "none yet");
    const recent = unchanged.of > unchanged.of_latest ? `; of the last ${unchanged.of_latest}: ${share(unchanged.latest, unchanged.of_latest)}` : "";
    const isKnown = pace !== null && hours >= LEAST_HOURS;
    const fast = !isKnown ? "not known yet" : `${Math.round(pace)} (${hours < 0.1 ? `${Math.round(60 * hours)} min` : `${hours.toFixed(1)} h`} of work)`;
    const now = isKnown && latest !== null && Math.round(latest) !== Math.round(pace) ? `; at last ${Math.round(latest)}` : "";
    return [
      ["Approved labels", `${labels}`],
      ["Predictions approved unchanged", share(unchanged.all, unchanged.of) + recent],
      ["Labels per hour", fast + now],
      ...(adaptation ? [["Adaptation", adaptation.text]] : []),
    ];
  }

  /** @param {string} name @param {string[][]} rows */
  fill(name, rows) {
    const table = this.dialog.querySelector(`table[data-of=${name}]`);
    table.hidden = !rows.length;
    table.tBodies[0].replaceChildren(
      ...rows.map(([head, ...cells]) => {
        const row = element("tr");
        const first = element("th", "", head);
        first.scope = "row";
        row.append(first, ...cells.map((text) => element("td", "", text)));
        return row;
      }),
    );
  }

  /** @param {Told} told */
  drawCurve({ shown, left_out: leftOut }) {
    const { curve } = this.parts;
    const most = Math.max(shown.at(-1)?.last ?? 0, ...leftOut.map(({ labels }) => labels), 10);
    const x = (labels) => LEFT + (labels / most) * (WIDTH - LEFT - RIGHT);
    const y = (dice) => TOP + (1 - dice) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (const dice of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
      parts.push(drawn("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(dice), y2: y(dice) }));
      parts.push(drawn("text", { class: "tick", x: LEFT - 6, y: y(dice) + 4, "text-anchor": "end" }, dice.toFixed(1)));
    }
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((width) => most / width <= 10) ?? most;
    for (let labels = 0; labels <= most; labels += step) {
      parts.push(drawn("text", { class: "tick", x: x(labels), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, `${labels}`));
    }
    parts.push(drawn("text", { class: "tick", x: (LEFT + WIDTH) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "labels"));
    parts.push(drawn("text", { class: "tick", x: LEFT - 6, y: 12, "text-anchor": "end" }, "Dice"));
    const line = (name, points) => drawn("polyline", { class: name, points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") });
    for (const { last, dice } of shown) parts.push(drawn("circle", { class: "shown", cx: x(last), cy: y(dice), r: 3 }));
    const smooth = shown.map(({ last }, place) => [last, mean(shown.slice(Math.max(0, place + 1 - SMOOTH), place + 1).map(({ dice }) => dice))]);
    parts.push(line("shown", smooth));
    for (const { labels, dice, low, high } of leftOut) {
      parts.push(drawn("line", { class: "left-out", x1: x(labels), x2: x(labels), y1: y(low), y2: y(high) }));
      parts.push(drawn("rect", { class: "left-out", x: x(labels) - 3.5, y: y(dice) - 3.5, width: 7, height: 7 }));
    }
    parts.push(line("left-out", leftOut.map(({ labels, dice }) => [labels, dice])));
    const words = [
      smooth.length ? `predictions as shown: at last ${two(smooth.at(-1)[1])}` : "",
      leftOut.length ? `labelled images left out: at last ${two(leftOut.at(-1).dice)} with ${leftOut.at(-1).labels} labels` : "",
    ].filter(Boolean);
    curve.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    curve.setAttribute("aria-label", `Dice as labels come; ${words.join("; ") || "nothing measured yet"}. The tables below have the numbers.`);
    curve.replaceChildren(...parts);
  }
}
