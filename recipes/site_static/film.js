// Explorers without a kernel: controls that choose among pictures drawn ahead (quantlab/explorers/film.py).
// <div class="film" data-film="path without ending"> holds the first picture and its numbers; the controls come here.
"use strict";

const KEPT = 40; // decoded pictures of one film
const AHEAD = 4; // steps of the moved control that are decoded before they are asked for
const PACE = 150; // milliseconds between the steps of "play"

class Film {
  constructor(box, index, bytes) {
    this.box = box;
    this.index = index;
    this.bytes = bytes;
    this.start = index.controls.map((control) => control.start);
    this.place = [...this.start];
    this.states = new Map(index.states.map((row) => [row.slice(0, -2).join(), row]));
    this.decoded = new Map(); // number of a picture -> promise, then bitmap; the oldest first
    this.last = Math.max(0, index.controls.findIndex((control) => control.kind === "slider"));
    this.build();
  }

  build() {
    this.canvas = make("canvas", { width: this.index.size[0], height: this.index.size[1] });
    const image = this.box.querySelector("img");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", image.alt);
    this.context = this.canvas.getContext("2d");
    this.numbers = this.box.querySelector(".numbers");
    this.numbers.setAttribute("aria-live", "polite");
    const row = make("div", { className: "controls" });
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "controls");
    this.inputs = this.index.controls.map((control, i) => this.control(row, control, i));
    const buttons = row.appendChild(make("span", { className: "buttons" }));
    this.playing = button(buttons, "play", () => (this.timer ? this.stop() : this.play()));
    button(buttons, "reset", () => this.reset());
    this.box.addEventListener("pointerdown", (event) => event.target !== this.playing && this.stop());
    this.box.addEventListener("keydown", (event) => event.target !== this.playing && this.stop());
    this.show().then(() => {
      image.replaceWith(this.canvas);
      this.box.prepend(row);
      this.box.classList.add("live");
      new ResizeObserver(() => this.resized()).observe(this.canvas.parentElement);
    });
  }

  control(row, { label, kind, stops }, i) {
    const holder = row.appendChild(make("label", { className: kind }));
    holder.append(make("span", { textContent: label }));
    const input = make(kind === "choice" ? "select" : "input");
    if (kind === "choice") stops.forEach((text, at) => input.append(new Option(text, at)));
    else if (kind === "tick") input.type = "checkbox";
    else Object.assign(input, { type: "range", min: 0, max: stops.length - 1, step: 1 });
    holder.append(input);
    const shown = kind === "slider" ? holder.appendChild(make("output")) : null;
    input.addEventListener(kind === "slider" ? "input" : "change", () => {
      this.last = i;
      this.move(i, kind === "tick" ? Number(input.checked) : Number(input.value));
    });
    const set = (at) => {
      if (kind === "tick") input.checked = stops[at] === "on";
      else input.value = at;
      if (shown) {
        shown.textContent = stops[at];
        input.setAttribute("aria-valuetext", stops[at]);
      }
    };
    if (stops.length < 2) input.disabled = true;
    return { set, input };
  }

  // The state with control i at this stop that is nearest to where the others stand; of two, the one whose sliders do.
  move(i, at) {
    const wanted = this.place.map((old, k) => (k === i ? at : old));
    this.place = this.states.has(wanted.join()) ? wanted : this.nearest(wanted, i);
    return this.show();
  }

  nearest(wanted, i) {
    const cost = (row) => wanted.reduce((sum, place, k) => {
      const { kind, stops } = this.index.controls[k];
      if (kind === "slider") return sum + Math.abs(row[k] - place) / stops.length;
      return sum + (row[k] === place ? 0 : 0.001);
    }, 0);
    const rows = this.index.states.filter((row) => row[i] === wanted[i]);
    return rows.reduce((best, row) => (cost(row) < cost(best) ? row : best)).slice(0, -2);
  }

  async show() {
    const row = this.states.get(this.place.join());
    const [picture, text] = row.slice(-2);
    this.inputs.forEach((control, i) => control.set(this.place[i]));
    this.numbers.textContent = this.index.texts[text];
    this.wanted = picture;
    const parts = [this.bitmap(0), this.bitmap(picture)];
    if (parts.some((part) => part instanceof Promise)) {
      const ready = await Promise.all(parts);
      if (this.wanted === picture) this.paint(ready);
    } else this.paint(parts);
    this.lookAhead();
  }

  paint(parts) {
    parts.forEach((part) => this.context.drawImage(part, 0, 0));
  }

  bitmap(picture) {
    if (this.decoded.has(picture)) return this.decoded.get(picture);
    const ends = this.index.ends;
    const blob = new Blob([this.bytes.subarray(picture ? ends[picture - 1] : 0, ends[picture])], { type: "image/webp" });
    const coming = createImageBitmap(blob).then((bitmap) => {
      this.decoded.set(picture, bitmap);
      return bitmap;
    });
    this.decoded.set(picture, coming);
    for (const [old, bitmap] of this.decoded) {
      if (this.decoded.size <= KEPT) break;
      if (old && old !== this.wanted && !(bitmap instanceof Promise)) this.decoded.delete(old);
    }
    return coming;
  }

  lookAhead() {
    this.place.forEach((at, i) => {
      const reach = i === this.last ? AHEAD : 1;
      for (let step = -reach; step <= reach; step++) {
        const row = this.states.get(this.place.map((old, k) => (k === i ? at + step : old)).join());
        if (row) this.bitmap(row.at(-2));
      }
    });
  }

  play() {
    const count = this.index.controls[this.last].stops.length;
    this.playing.textContent = "stop";
    this.timer = setInterval(() => this.move(this.last, (this.place[this.last] + 1) % count), PACE);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.playing.textContent = "play";
  }

  reset() {
    this.stop();
    this.place = [...this.start];
    this.show();
  }

  // On a narrow screen the picture is wider than its frame, which keys, too, can then move.
  resized() {
    const frame = this.canvas.parentElement;
    if (frame.scrollWidth > frame.clientWidth) frame.tabIndex = 0;
    else frame.removeAttribute("tabindex");
    this.keepRoom();
  }

  // As much room as the longest text needs, so that nothing below moves.
  keepRoom() {
    const longest = this.index.texts.reduce((a, b) => (b.length > a.length ? b : a));
    const now = this.numbers.textContent;
    this.numbers.style.minHeight = "";
    this.numbers.textContent = longest;
    this.numbers.style.minHeight = `${this.numbers.offsetHeight}px`;
    this.numbers.textContent = now;
  }
}

function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function button(row, text, act) {
  const made = row.appendChild(make("button", { type: "button", textContent: text }));
  made.addEventListener("click", act);
  return made;
}

async function load(box) {
  const path = box.dataset.film;
  const [index, bytes] = await Promise.all([
    fetch(`${path}.json`).then((answer) => answer.json()),
    fetch(`${path}.bin`).then((answer) => answer.arrayBuffer()),
  ]);
  new Film(box, index, new Uint8Array(bytes));
}

document.addEventListener("DOMContentLoaded", () => {
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      near.unobserve(entry.target);
      load(entry.target);
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".film").forEach((box) => near.observe(box));
  document.querySelectorAll("pre").forEach((code) => { code.tabIndex = 0; }); // so that keys can scroll it
});
