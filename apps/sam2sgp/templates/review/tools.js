// Mouse, pen and fingers on the picture: paint, erase, fill, window, pan and zoom.

import { Stroke, disc, holes, region } from "./painting.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./drawing.js").Picture} Picture */

/** Pixels that a wheel or trackpad turns for one slice. */
const WHEEL_STEP = 40;
const LARGEST_BRUSH = 200;
const LOADING = "Slices that this paints on are still loading: paint again in a moment.";

/** Distance of slices, in columns. @param {import("./state.js").Case} shown */
function apart({ spacing }) {
  return spacing ? spacing[0] / spacing[2] : 1;
}

export class Tools {
  /**
   * @param {State} state @param {Picture} picture
   * @param {{goTo: (slice: number) => void, say: (text: string) => void, isBusy: () => boolean}} page
   */
  constructor(state, picture, page) {
    this.state = state;
    this.picture = picture;
    this.page = page;
    /** @type {Map<number, {clientX: number, clientY: number}>} pointers that are down. */
    this.down = new Map();
    /** @type {{kind: string, stroke?: Stroke, last: {x: number, y: number, clientX: number, clientY: number}} | null} */
    this.action = null;
    this.turned = 0;
    this.isPanning = false;
    const { canvas } = picture;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.end(event));
    canvas.addEventListener("pointerleave", () => {
      picture.pointer = null;
      picture.later();
    });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.turn(event), { passive: false });
    document.addEventListener("keyup", (event) => {
      if (event.key === " ") this.isPanning = false;
    });
  }

  /** Class values that stay as they are: those that are not shown. */
  get locked() {
    return this.state.hidden;
  }

  /** Slices that brush and eraser reach before and after the one that is looked at. */
  get reach() {
    const { open, size, ball } = this.state;
    return open && ball ? Math.floor(size / 2 / apart(open.case)) : 0;
  }

  /** @param {PointerEvent} event */
  begin(event) {
    if (!this.state.open) return;
    event.preventDefault();
    this.picture.canvas.focus({ preventScroll: true });
    this.picture.canvas.setPointerCapture(event.pointerId);
    this.down.set(event.pointerId, event);
    if (this.down.size === 2) {
      // Two fingers zoom and pan; what the first one began is taken back.
      this.action?.stroke?.cancel();
      this.state.tell("label");
      this.action = { kind: "pinch", last: event };
      return;
    }
    if (this.down.size > 2) return;
    const kind = this.kindOf(event);
    if (["brush", "eraser", "fill"].includes(kind) && !this.mayChange()) return;
    const last = { ...this.picture.place(event), clientX: event.clientX, clientY: event.clientY };
    this.action = { kind, last };
    if (kind === "brush" || kind === "eraser") {
      if (!this.isHere(this.reach) || !this.canPaint()) {
        this.action = null;
        return;
      }
      this.action.stroke = new Stroke(this.state.open.labels, kind === "brush" ? this.state.active : 0, this.locked);
      this.paint(last, last);
    }
    if (kind === "fill") this.fill(last, event.shiftKey);
  }

  /** What a pointer does. @param {PointerEvent} event */
  kindOf(event) {
    if (event.button === 1 || this.isPanning) return "pan";
    if (event.button === 2) return "window";
    return this.state.tool;
  }

  /**
   * Whether the label may be changed now: what is painted while a decision is carried out would be in no label, nor
   * would be what somebody paints who may not save it.
   */
  mayChange() {
    const refusal = this.state.notOffered.draft || (this.page.isBusy() && "Wait until this is done, then paint.");
    if (refusal) this.page.say(refusal);
    return !refusal;
  }

  /** Whether the slices to be painted on have come; else says so. @param {number} [reach] slices before and after. */
  isHere(reach = 0) {
    const { open } = this.state;
    if (open.labels.has(open.slice - reach, open.slice + reach)) return true;
    this.page.say(LOADING);
    this.page.goTo(open.slice);
    return false;
  }

  /** Whether the class may be painted; else says why not. */
  canPaint() {
    const { open, tool, active, hidden } = this.state;
    if (tool !== "eraser" && hidden.has(active)) {
      this.page.say(`Class ${active} is hidden, and hidden classes stay as they are: show it first.`);
      return false;
    }
    if (tool !== "eraser" && !open.classOf(active)) {
      this.page.say("Choose a class first, or add one.");
      return false;
    }
    return true;
  }

  /** @param {PointerEvent} event */
  move(event) {
    const { open } = this.state;
    if (!open) return;
    const place = this.picture.place(event);
    this.picture.pointer = place;
    this.page.point?.(place);
    this.picture.later();
    if (!this.action || !this.down.has(event.pointerId)) return;
    if (this.action.kind === "pinch") {
      this.pinch(event);
      return;
    }
    const { kind, last } = this.action;
    const [across, down] = [event.clientX - last.clientX, event.clientY - last.clientY];
    if (kind === "pan") this.picture.panBy(across * devicePixelRatio, down * devicePixelRatio);
    if (kind === "window") this.shiftWindow(across, down);
    if (this.action.stroke) {
      // Fast strokes come as several places in one event.
      const events = event.getCoalescedEvents?.() ?? [];
      let from = last;
      for (const step of events.length ? events : [event]) {
        const to = this.picture.place(step);
        this.paint(from, to);
        from = to;
      }
    }
    this.action.last = { ...place, clientX: event.clientX, clientY: event.clientY };
  }

  /** @param {PointerEvent} event */
  pinch(event) {
    const other = [...this.down.entries()].find(([id]) => id !== event.pointerId)?.[1];
    const before = this.down.get(event.pointerId);
    this.down.set(event.pointerId, event);
    if (!other || !before) return;
    const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
    const middle = (one) => ({ clientX: (one.clientX + other.clientX) / 2, clientY: (one.clientY + other.clientY) / 2 });
    const [from, to] = [this.picture.place(middle(before)), this.picture.place(middle(event))];
    this.picture.panBy(to.across - from.across, to.down - from.down);
    this.picture.zoomBy(distance(event) / Math.max(distance(before), 1), to.across, to.down);
  }

  /** @param {PointerEvent} event */
  end(event) {
    this.down.delete(event.pointerId);
    if (this.action?.kind === "pinch" && this.down.size) return;
    if (event.type === "pointercancel" && this.action?.stroke) {
      this.action.stroke.cancel();
      this.action = null;
      this.state.tell("label");
    }
    this.finish();
  }

  /** End what the pointer does; of a stroke, what was painted so far stays. */
  finish() {
    const stroke = this.action?.stroke;
    this.action = null;
    if (stroke) this.keep(stroke);
  }

  /** A stroke is done. @param {Stroke} stroke */
  keep(stroke) {
    const { open } = this.state;
    const changes = stroke.changes();
    open.strokes.add(changes);
    open.count(changes);
    this.state.tell("label");
  }

  /** Paint from one place to another. */
  paint(from, to) {
    const { open, size } = this.state;
    const { stroke } = this.action;
    const { reach } = this;
    const [depth, height, width] = open.case.shape;
    const { stretch } = this.picture;
    const between = apart(open.case);
    const radius = size / 2;
    const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / Math.max(0.5, radius / 2)));
    for (let step = 0; step <= steps; step++) {
      const x = from.x + ((to.x - from.x) * step) / steps;
      const y = from.y + ((to.y - from.y) * step) / steps;
      for (let by = -reach; by <= reach; by++) {
        const slice = open.slice + by;
        if (slice < 0 || slice >= depth) continue;
        const there = Math.sqrt(Math.max(0, radius * radius - (by * between) ** 2));
        // The slice may be another one than that on which the stroke began.
        if (!stroke.paint(slice, disc(x, y, there, stretch, height, width))) this.page.say(LOADING);
      }
    }
    this.picture.drawn.label = null;
    this.picture.later();
  }

  /** Fill the region under a pointer. @param {{x: number, y: number}} place @param {boolean} remove it instead. */
  fill(place, remove) {
    const { open, active } = this.state;
    const [, height, width] = open.case.shape;
    const [column, row] = [Math.floor(place.x), Math.floor(place.y)];
    if (column < 0 || row < 0 || column >= width || row >= height || !this.isHere() || (!remove && !this.canPaint())) return;
    const map = open.labels.get(open.slice);
    const found = region(map, width, row * width + column);
    const isBackground = map[row * width + column] === 0;
    if (isBackground && (remove || !found.isClosed)) {
      this.page.say(remove ? "There is nothing to remove here." : "This area isn't closed: paint its outline first.");
      return;
    }
    this.atOnce(remove ? 0 : active, (stroke) => stroke.set(open.slice, found.places));
  }

  /** Fill what the active class encloses on this slice. */
  fillHoles() {
    const { open, active } = this.state;
    if (!open || !this.mayChange() || !this.isHere() || !this.canPaint()) return;
    const found = holes(open.labels.get(open.slice), open.case.shape[2], active);
    if (found.length) this.atOnce(active, (stroke) => stroke.set(open.slice, found));
    this.page.say(found.length ? `${found.length} pixels of holes filled.` : "There are no holes on this slice.");
  }

  /** @param {number} value @param {(stroke: Stroke) => void} change */
  atOnce(value, change) {
    const stroke = new Stroke(this.state.open.labels, value, this.locked);
    change(stroke);
    this.keep(stroke);
  }

  /** @param {"undo" | "redo"} way */
  again(way) {
    const { open } = this.state;
    if (!this.mayChange()) return;
    const changes = open?.strokes[way](open.labels);
    if (!changes) {
      this.page.say(way === "undo" ? "Nothing to undo." : "Nothing to redo.");
      return;
    }
    open.count(changes);
    if (!changes.some(({ slice }) => slice === open.slice)) this.page.goTo(changes[0].slice);
    this.state.tell("label");
  }

  /** @param {number} size of brush and eraser. */
  setSize(size) {
    this.state.set({ size: Math.max(1, Math.min(LARGEST_BRUSH, size)) });
    // A ball of another size reaches other slices.
    if (this.state.open) this.page.goTo(this.state.open.slice);
  }

  /** @param {number} by factor. */
  resize(by) {
    const { size } = this.state;
    const next = Math.max(1, Math.min(LARGEST_BRUSH, Math.round(size * by)));
    this.setSize(next === size ? size + Math.sign(by - 1) : next);
  }

  /** Across: width, down: level, as in other viewers. */
  shiftWindow(across, down) {
    const { open, window } = this.state;
    const [low, high] = open.case.range;
    const step = Math.max((high - low) / 1000, (window[1] - window[0]) / 300);
    const width = Math.max(step, window[1] - window[0] + across * step);
    const level = (window[0] + window[1]) / 2 + down * step;
    this.state.set({ window: [level - width / 2, level + width / 2] });
  }

  /** @param {WheelEvent} event */
  turn(event) {
    const { open } = this.state;
    if (!open) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey || open.depth === 1) {
      const { across, down } = this.picture.place(event);
      this.picture.zoomBy(Math.exp(-event.deltaY / 400), across, down);
      return;
    }
    this.turned += event.deltaMode ? event.deltaY * WHEEL_STEP : Math.max(-WHEEL_STEP, Math.min(WHEEL_STEP, event.deltaY));
    const steps = Math.trunc(this.turned / WHEEL_STEP);
    this.turned -= steps * WHEEL_STEP;
    if (steps) this.page.goTo(open.slice + steps);
  }
}
