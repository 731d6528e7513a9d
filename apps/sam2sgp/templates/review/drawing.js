// The picture: an image's slice with its window, the label over it, zoom and pan, and what stands around it.

/** @typedef {import("./state.js").State} State */

const LARGEST_ZOOM = 64;
const FONT = "13px system-ui, sans-serif";

/**
 * Bytes of grey for each stored number.
 * @param {import("./state.js").Case} shown @param {number[]} window
 */
export function greys(shown, window) {
  const table = new Uint8Array(shown.bytes === 1 ? 256 : 65536);
  const [low, high] = window;
  const width = Math.max(high - low, 1e-9);
  for (let stored = 0; stored < table.length; stored++) {
    const value = shown.slope * stored + shown.intercept;
    table[stored] = Math.max(0, Math.min(255, Math.round((255 * (value - low)) / width)));
  }
  return table;
}

/** A path along the edges of a class's pixels, in pixels. @param {ArrayLike<number>} map */
function outline(map, width, height, value) {
  const path = new Path2D();
  // Runs of edges become one line each.
  for (let row = 0; row <= height; row++) {
    let start = -1;
    for (let column = 0; column <= width; column++) {
      const above = row > 0 && column < width && map[(row - 1) * width + column] === value;
      const below = row < height && column < width && map[row * width + column] === value;
      if (above !== below && start < 0) start = column;
      if (above === below && start >= 0) {
        path.moveTo(start, row);
        path.lineTo(column, row);
        start = -1;
      }
    }
  }
  for (let column = 0; column <= width; column++) {
    let start = -1;
    for (let row = 0; row <= height; row++) {
      const left = column > 0 && row < height && map[row * width + column - 1] === value;
      const right = column < width && row < height && map[row * width + column] === value;
      if (left !== right && start < 0) start = row;
      if (left === right && start >= 0) {
        path.moveTo(column, start);
        path.lineTo(column, row);
        start = -1;
      }
    }
  }
  return path;
}

export class Picture {
  /** @param {HTMLCanvasElement} canvas @param {State} state */
  constructor(canvas, state) {
    this.canvas = canvas;
    this.state = state;
    this.context = canvas.getContext("2d");
    this.grey = document.createElement("canvas");
    this.colour = document.createElement("canvas");
    this.zoom = 1;
    this.offset = [0, 0];
    /** @type {{x: number, y: number} | null} of the pointer, in pixels of the image. */
    this.pointer = null;
    this.isFitted = true;
    this.waiting = false;
    this.drawn = {};
    new ResizeObserver(() => this.resize()).observe(canvas);
    state.addEventListener("case", () => {
      this.drawn = {};
      this.fit();
    });
    state.addEventListener("view", () => this.later());
    state.addEventListener("label", () => {
      this.drawn.label = null;
      this.later();
    });
  }

  /** Height of a pixel by its width. */
  get stretch() {
    const spacing = this.state.open?.case.spacing;
    return spacing ? spacing[1] / spacing[2] : 1;
  }

  /** Take the size that the canvas has by now, and draw at once: its pixels are gone, and would be black for a frame. */
  resize() {
    const box = this.canvas.getBoundingClientRect();
    this.canvas.width = Math.max(1, Math.round(box.width * devicePixelRatio));
    this.canvas.height = Math.max(1, Math.round(box.height * devicePixelRatio));
    if (this.isFitted) this.fit();
    this.draw();
  }

  /** Show all of the slice. */
  fit() {
    if (!this.state.open) return;
    const [, height, width] = this.state.open.case.shape;
    const { width: across, height: down } = this.canvas;
    const tall = height * this.stretch;
    this.zoom = Math.min((across * 0.98) / width, (down * 0.94) / tall);
    this.offset = [(across - width * this.zoom) / 2, (down - tall * this.zoom) / 2];
    this.isFitted = true;
    this.later();
  }

  /** Zoom about a place of the canvas. @param {number} factor @param {number} [x] @param {number} [y] */
  zoomBy(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const zoom = Math.max(0.05, Math.min(LARGEST_ZOOM * devicePixelRatio, this.zoom * factor));
    const by = zoom / this.zoom;
    this.offset = [x - (x - this.offset[0]) * by, y - (y - this.offset[1]) * by];
    this.zoom = zoom;
    this.isFitted = false;
    this.later();
  }

  /** @param {number} x @param {number} y of the canvas. */
  panBy(x, y) {
    this.offset = [this.offset[0] + x, this.offset[1] + y];
    this.isFitted = false;
    this.later();
  }

  /** Where an event is: pixels of the canvas, and of the image. @param {{clientX: number, clientY: number}} event */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const across = (event.clientX - box.left) * devicePixelRatio;
    const down = (event.clientY - box.top) * devicePixelRatio;
    return {
      across,
      down,
      x: (across - this.offset[0]) / this.zoom,
      y: (down - this.offset[1]) / this.zoom / this.stretch,
    };
  }

  /** Draw before the next frame. */
  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const { context, canvas, state } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const { open } = state;
    if (!open) return;
    const values = open.image.get(open.slice);
    const map = open.labels.get(open.slice);
    // For scripts that drive the page: what is on it, and where.
    canvas.dataset.drawn = values && map ? `${open.case.image}/${open.slice}` : "";
    canvas.dataset.view = JSON.stringify([this.zoom, this.stretch, ...this.offset]);
    if (values) {
      this.drawImage(values);
      context.setTransform(this.zoom, 0, 0, this.zoom * this.stretch, ...this.offset);
      context.imageSmoothingEnabled = this.zoom < 12 * devicePixelRatio;
      context.imageSmoothingQuality = "high";
      context.drawImage(this.grey, 0, 0);
    }
    if (values && map && state.overlay) this.drawLabel(map);
    this.drawWords(Boolean(values && map));
    this.drawBrush();
  }

  /** The slice with its window, on a canvas of its own. @param {Uint8Array | Uint16Array} values */
  drawImage(values) {
    const { open, window } = this.state;
    const key = `${open.case.image}/${open.slice}/${window}`;
    if (this.drawn.image === key) return;
    const [, height, width] = open.case.shape;
    Object.assign(this.grey, { width, height });
    const context = this.grey.getContext("2d");
    const picture = context.createImageData(width, height);
    const { data } = picture;
    const table = greys(open.case, window);
    if (open.case.channels === 3) {
      for (let from = 0, to = 0; from < values.length; from += 3, to += 4) {
        data[to] = table[values[from]];
        data[to + 1] = table[values[from + 1]];
        data[to + 2] = table[values[from + 2]];
        data[to + 3] = 255;
      }
    } else {
      const words = new Uint32Array(data.buffer);
      for (let place = 0; place < values.length; place++) words[place] = 0xff000000 | (table[values[place]] * 0x010101);
    }
    context.putImageData(picture, 0, 0);
    this.drawn.image = key;
  }

  /** @param {Uint8Array | Uint16Array} map */
  drawLabel(map) {
    const { open, hidden, opacity, active } = this.state;
    const { context } = this;
    const [, height, width] = open.case.shape;
    // The class that is being painted may be new on this slice.
    const isHere = (value) => value === active || open.counts.get(value)?.[open.slice] > 0;
    const shown = open.case.classes.filter(({ value }) => !hidden.has(value) && isHere(value));
    const key = `${open.case.image}/${open.slice}/${shown.map(({ value }) => value)}`;
    if (this.drawn.label !== key) {
      Object.assign(this.colour, { width, height });
      const picture = this.colour.getContext("2d").createImageData(width, height);
      const words = new Uint32Array(picture.data.buffer);
      const colours = new Map(shown.map(({ value, colour: [r, g, b] }) => [value, (0xff000000 | (b << 16) | (g << 8) | r) >>> 0]));
      for (let place = 0; place < map.length; place++) if (map[place]) words[place] = colours.get(map[place]) ?? 0;
      this.colour.getContext("2d").putImageData(picture, 0, 0);
      this.drawn.outlines = shown.map(({ value, colour }) => [colour, outline(map, width, height, value)]);
      this.drawn.label = key;
    }
    context.globalAlpha = opacity;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.colour, 0, 0);
    context.globalAlpha = 1;
    const matrix = new DOMMatrix([this.zoom, 0, 0, this.zoom * this.stretch, ...this.offset]);
    context.setTransform(1, 0, 0, 1, 0, 0);
    for (const [colour, path] of this.drawn.outlines) {
      const line = new Path2D();
      line.addPath(path, matrix);
      context.lineWidth = 1.6 * devicePixelRatio;
      context.strokeStyle = `rgb(${colour})`;
      context.stroke(line);
    }
  }

  /** What a radiologist looks for around a picture: directions, size, window, place in the volume. */
  drawWords(isHere) {
    const { context, canvas, state } = this;
    const { open, window } = state;
    const { edges, spacing, shape, plane } = open.case;
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    const [across, down] = [canvas.width / devicePixelRatio, canvas.height / devicePixelRatio];
    context.font = FONT;
    context.textBaseline = "middle";
    const write = (text, x, y, align = "left", colour = "#dfe5ea") => {
      context.textAlign = align;
      context.lineWidth = 3;
      context.strokeStyle = "#000c";
      context.strokeText(text, x, y);
      context.fillStyle = colour;
      context.fillText(text, x, y);
    };
    const place = shape[0] > 1 ? `${plane ?? "slice"} ${open.slice + 1} / ${shape[0]}` : `${shape[2]} × ${shape[1]}`;
    write(place, 10, 16);
    const rounded = (value) => (Math.abs(value) >= 100 ? Math.round(value) : Number(value.toPrecision(3)));
    write(`W ${rounded(window[1] - window[0])}  L ${rounded((window[1] + window[0]) / 2)}`, 10, down - 16);
    write(`${Math.round((100 * this.zoom) / devicePixelRatio)} %`, across - 10, 16, "right");
    if (!isHere) write("Loading …", across / 2, down / 2, "center", "#ffd479");
    if (edges) {
      write(edges[0], 10, down / 2);
      write(edges[1], across - 10, down / 2, "right");
      write(edges[2], across / 2, 16, "center");
      write(edges[3], across / 2, down - 16, "center");
    }
    if (spacing) {
      const perMm = this.zoom / devicePixelRatio / spacing[2];
      const length = [1, 2, 5, 10, 20, 50, 100, 200].filter((mm) => mm * perMm <= across / 4).pop();
      if (length) {
        const x = across - 14 - length * perMm;
        context.fillStyle = "#dfe5ea";
        context.fillRect(x, down - 10, length * perMm, 2);
        write(`${length} mm`, across - 14, down - 22, "right");
      }
    }
  }

  /** The brush's own outline. */
  drawBrush() {
    const { context, state, pointer } = this;
    if (!pointer || !["brush", "eraser"].includes(state.tool)) return;
    const colour = state.tool === "brush" ? state.open.classOf(state.active)?.colour : [255, 255, 255];
    const radius = (state.size / 2) * this.zoom;
    context.setTransform(1, 0, 0, 1, 0, 0);
    for (const [style, width] of [["#000", 3], [`rgb(${colour ?? [255, 255, 255]})`, 1.5]]) {
      context.strokeStyle = style;
      context.lineWidth = width * devicePixelRatio;
      context.beginPath();
      const x = this.offset[0] + pointer.x * this.zoom;
      const y = this.offset[1] + pointer.y * this.zoom * this.stretch;
      context.ellipse(x, y, Math.max(radius, 1), Math.max(radius, 1), 0, 0, 7);
      context.stroke();
    }
  }
}
