"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = data.grid;
const patches = rows * columns, count = data.images.length;
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const svg = (name, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const described = (index) => {
  const { key, label } = data.images[index];
  return label === null ? key : `${key} (${data.labels[label]})`;
};
const choice = { picture: 0, patch: Math.floor(rows / 2) * columns + Math.floor(columns / 2) };

// Tokens are bytes with a scale each: their product times both scales is a cosine.
const kinds = data.kinds.map((kind) => ({
  ...kind,
  tokens: new Int8Array(bytes(kind.tokens).buffer),
  scales: new Float32Array(bytes(kind.scales).buffer),
  cosines: new Float32Array(count * patches),
  cells: [],
}));
const colours = Object.fromEntries(
  Object.entries(data.colours).map(([name, text]) => [name, bytes(text)]));
const patchErrors = bytes(data.patch_errors);

// Magma's way from dark to light; what is far from the patch is left transparent.
const ramp = [[0, 0, 4], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109],
  [252, 253, 191]];
function heat(share, out, at) {
  const place = Math.max(0, Math.min(1, share)) * (ramp.length - 1);
  const low = Math.min(Math.floor(place), ramp.length - 2), part = place - low;
  for (let c = 0; c < 3; c++) {
    out[at + c] = ramp[low][c] + part * (ramp[low + 1][c] - ramp[low][c]);
  }
  out[at + 3] = 70 + 175 * Math.max(0, Math.min(1, share));
}
function paint(canvas, fill) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let patch = 0; patch < patches; patch++) fill(patch, image.data, 4 * patch);
  context.putImageData(image, 0, 0);
}
function place(frame, patch) {
  const row = Math.floor(patch / columns), column = patch % columns;
  Object.assign(frame.style, {
    left: `${100 * column / columns}%`, top: `${100 * row / rows}%`,
    width: `${100 / columns}%`, height: `${100 / rows}%`,
  });
}
function patchAt(event, element) {
  const box = element.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top) / box.height * rows);
  const column = Math.floor((event.clientX - box.left) / box.width * columns);
  const inside = (value, size) => Math.max(0, Math.min(size - 1, value));
  return inside(row, rows) * columns + inside(column, columns);
}

// The two panels: a cell is a grey picture under its similarities.
for (const kind of kinds) {
  const scale = make("canvas", { width: 64, height: 1, "aria-hidden": "true" });
  kind.low = make("span");
  kind.high = make("span", {}, "1");
  const cells = make("div", { class: "cells", tabindex: "0", role: "listbox",
    "aria-label": `Similarities by ${kind.name}; arrow keys change the picture.` });
  kind.box = cells;
  $("panels").append(make("div", { class: "panel" }, make("header", {},
    make("h3", {}, kind.name, make("span", { class: "hint" }, ` ${kind.about}`)),
    make("span", { class: "scale" }, kind.low, scale, kind.high)), cells));
  const context = scale.getContext("2d"), image = context.createImageData(64, 1);
  for (let i = 0; i < 64; i++) heat(i / 63, image.data, 4 * i);
  context.putImageData(image, 0, 0);
  data.images.forEach((picture, index) => {
    const image = make("img", { alt: "", src: picture.thumb, loading: "lazy", draggable: "false" });
    const canvas = make("canvas"), cell = make("div", { class: "cell", role: "option",
      id: `${kind.id}-${index}`, title: described(index), "aria-label": described(index) },
    image, canvas);
    cell.addEventListener("click", (event) => select(index, patchAt(event, cell)));
    cells.append(cell);
    kind.cells.push({ cell, canvas });
  });
  cells.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); move(step); }
  });
  kind.frame = make("span", { class: "frame" });
}
// The same pictures stand side by side, unless each side has an order of its own.
for (const [first, second] of [kinds, [...kinds].reverse()]) {
  first.box.addEventListener("scroll", () => {
    if ($("order").value === "given") second.box.scrollTop = first.box.scrollTop;
  });
}
const smallest = count > 40 ? 76 : count > 16 ? 92 : 120;
document.documentElement.style.setProperty("--cell", `${smallest}px`);

function compare(kind) {
  const { tokens, scales, cosines, dims } = kind, query = choice.picture * patches + choice.patch;
  const from = query * dims;
  for (let token = 0, at = 0; token < cosines.length; token++) {
    let sum = 0;
    for (let i = 0; i < dims; i++, at++) sum += tokens[at] * tokens[from + i];
    cosines[token] = Math.min(1, sum * scales[token] * scales[query]);
  }
  cosines[query] = 1;
  const sorted = Float32Array.from(cosines).sort();
  const low = sorted[Math.floor(sorted.length * 0.05)];
  kind.low.textContent = low.toFixed(2);
  kind.best = data.images.map((_, index) => {
    let best = -1;
    for (let p = index * patches; p < (index + 1) * patches; p++) best = Math.max(best, cosines[p]);
    return best;
  });
  kind.cells.forEach(({ canvas }, index) => paint(canvas, (patch, out, at) =>
    heat((cosines[index * patches + patch] - low) / (1 - low), out, at)));
}
function correlation(first, second) {
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const [a, b] = [mean(first), mean(second)];
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < first.length; i++) {
    ab += (first[i] - a) * (second[i] - b);
    aa += (first[i] - a) ** 2;
    bb += (second[i] - b) ** 2;
  }
  return ab / Math.sqrt(aa * bb || 1);
}
function order() {
  for (const kind of kinds) {
    const indices = data.images.map((_, index) => index);
    if ($("order").value === "similar") indices.sort((a, b) => kind.best[b] - kind.best[a]);
    kind.cells.forEach(({ cell }, index) => { cell.style.order = indices.indexOf(index); });
  }
}
$("order").addEventListener("change", order);

// The large picture and its views.
const views = [["picture", "picture"], ["features", "features"], ["latents", "latents"],
  ["rebuilt", "rebuilt"], ["error", "error"]];
let view = "picture";
for (const [id, name] of views) {
  const button = make("button", { type: "button", "aria-pressed": "false", "data-view": id }, name);
  button.addEventListener("click", () => { view = id; showView(); });
  $("views").append(button);
}
function showView() {
  for (const button of $("views").children) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
  const canvas = $("large-canvas"), first = choice.picture * patches;
  canvas.style.display = view === "picture" ? "none" : "block";
  canvas.style.opacity = "1";
  if (view === "error") {
    paint(canvas, (patch, out, at) => {
      heat(patchErrors[first + patch] / 255, out, at);
      out[at + 3] = 205;
    });
  } else if (view !== "picture") {
    paint(canvas, (patch, out, at) => {
      const from = 3 * (first + patch);
      for (let c = 0; c < 3; c++) out[at + c] = colours[view][from + c];
      out[at + 3] = 255;
    });
  }
}
const large = $("large"), largeFrame = large.querySelector(".frame");
const follow = (event) => select(choice.picture, patchAt(event, large));
large.addEventListener("pointerdown", (event) => {
  large.setPointerCapture(event.pointerId);
  follow(event);
});
large.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
large.addEventListener("keydown", (event) => {
  const row = Math.floor(choice.patch / columns), column = choice.patch % columns;
  const inside = (value, size) => Math.max(0, Math.min(size - 1, value));
  const to = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
    ArrowUp: [row - 1, column], ArrowDown: [row + 1, column] }[event.key];
  if (to) {
    event.preventDefault();
    select(choice.picture, inside(to[0], rows) * columns + inside(to[1], columns));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(SELECT|INPUT)$/.test(event.target.tagName)) return;
  const key = event.key.toLowerCase();
  if (key === "n") move(1);
  if (key === "p") move(-1);
  if (key === "v") {
    view = views[(views.findIndex(([id]) => id === view) + 1) % views.length][0];
    showView();
  }
});

function showNeighbours(kind) {
  const box = $(`near-${kind.id}`);
  box.replaceChildren();
  const own = data.images[choice.picture].label;
  for (const [index, cosine] of kind.neighbours[choice.picture]) {
    const same = own !== null && data.images[index].label === own;
    const button = make("button", { type: "button", title: described(index),
      "aria-label": `${described(index)}, cosine ${cosine}` },
    make("img", { alt: "", src: data.images[index].thumb, ...(same && { class: "same" }) }),
    make("span", {}, cosine.toFixed(2)));
    button.addEventListener("click", () => select(index, choice.patch));
    box.append(button);
  }
}

// The map.
const palette = ["#c2410c", "#1d6fa5", "#3f7d20", "#7b4bb3", "#b8860b", "#0f8b8d", "#c23a75",
  "#6b5b4b", "#5566cc", "#8a9a2b"];
const colourOf = (label) => label === null ? "#8a857c"
  : palette[label] || `hsl(${(label * 137.5) % 360} 55% 48%)`;
let lit = null;
const points = [];
function showMap() {
  const map = data.maps[Number($("map-kind").value)], box = $("map"), pad = 26;
  const pictures = $("map-pictures").checked, size = pictures ? 34 : 7;
  box.replaceChildren();
  points.length = 0;
  $("map-about").textContent = map.about;
  const scaled = (values, length) => {
    const low = Math.min(...values), high = Math.max(...values);
    return values.map((v) => pad + (high > low ? (v - low) / (high - low) : 0.5) *
      (length - 2 * pad));
  };
  const xs = scaled(map.x, 600), ys = scaled(map.y, 420).map((y) => 420 - y);
  data.images.forEach((picture, index) => {
    const colour = colourOf(picture.label);
    const point = svg("g", { class: "point", tabindex: "-1", role: "button",
      "aria-label": described(index) }, svg("title", {}, described(index)));
    if (pictures) {
      point.append(svg("image", { href: picture.thumb, x: xs[index] - size / 2,
        y: ys[index] - size / 2, width: size, height: size, preserveAspectRatio: "none" }));
    }
    point.append(pictures
      ? svg("rect", { x: xs[index] - size / 2, y: ys[index] - size / 2, width: size, height: size,
        fill: "none", stroke: colour, "stroke-width": 2.5, "pointer-events": "all" })
      : svg("circle", { cx: xs[index], cy: ys[index], r: size / 2 + 2, fill: colour,
        stroke: "var(--card)" }));
    point.append(svg("rect", { class: "ring", x: xs[index] - size / 2 - 5,
      y: ys[index] - size / 2 - 5, width: size + 10, height: size + 10, rx: 6, fill: "none",
      stroke: "var(--ink)", "stroke-width": 2.5, visibility: "hidden" }));
    point.addEventListener("click", () => select(index, choice.patch));
    box.append(point);
    points.push(point);
  });
  mark();
}
data.maps.forEach((map, index) => $("map-kind").append(make("option", { value: index }, map.name)));
$("map-kind").addEventListener("change", showMap);
$("map-pictures").checked = count <= 80;
$("map-pictures").addEventListener("change", showMap);
data.labels.forEach((name, label) => {
  const dot = make("i");
  dot.style.background = colourOf(label);
  const button = make("button", { type: "button", "aria-pressed": "false" }, dot, name);
  button.addEventListener("click", () => {
    lit = lit === label ? null : label;
    for (const other of $("legend").children) {
      other.setAttribute("aria-pressed", String(other === button && lit !== null));
    }
    mark();
  });
  $("legend").append(button);
});

// The errors, worst first.
const bars = [];
function showErrors() {
  const box = $("errors"), worst = data.images.map((_, index) => index)
    .sort((a, b) => data.images[b].error - data.images[a].error);
  const top = Math.max(...data.images.map((picture) => picture.error)) || 1;
  const left = 44, bottom = 396, height = 376, width = (600 - left) / count;
  for (const share of [0, 0.5, 1]) {
    const y = bottom - share * height;
    box.append(svg("line", { class: "axis", x1: left, x2: 600, y1: y, y2: y }),
      svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, (share * top).toPrecision(2)));
  }
  worst.forEach((index, rank) => {
    const { error, lost } = data.images[index], tall = Math.max(1.5, error / top * height);
    const bar = svg("rect", { class: "bar", x: left + rank * width + width * 0.08,
      y: bottom - tall, width: width * 0.84, height: tall, rx: Math.min(3, width / 5),
      tabindex: "-1", role: "button", "aria-label": `${described(index)}: ${error}` },
    svg("title", {}, `${described(index)}\n1 − cosine ${error}\nvariance lost ${lost} %`));
    bar.addEventListener("click", () => select(index, choice.patch));
    box.append(bar);
    bars[index] = bar;
  });
  const middle = [...data.images].sort((a, b) => a.error - b.error)[Math.floor(count / 2)].error;
  $("error-about").textContent = `Median ${middle}.`;
}
function mark() {
  points.forEach((point, index) => {
    const chosen = index === choice.picture, { label } = data.images[index];
    point.classList.toggle("faded", lit !== null && label !== lit);
    point.querySelector(".ring").setAttribute("visibility", chosen ? "visible" : "hidden");
    if (chosen) point.parentNode.append(point);
  });
  bars.forEach((bar, index) => bar.classList.toggle("chosen", index === choice.picture));
}

function move(step) { select((choice.picture + step + count) % count, choice.patch); }
function select(picture, patch) {
  const other = picture !== choice.picture || !large.dataset.shown;
  Object.assign(choice, { picture, patch });
  large.dataset.shown = "yes";
  const row = Math.floor(patch / columns) + 1, column = patch % columns + 1;
  const { key, label, thumb, error, lost } = data.images[picture];
  place(largeFrame, patch);
  for (const kind of kinds) {
    compare(kind);
    kind.cells.forEach(({ cell }, index) => {
      cell.classList.toggle("query", index === picture);
      cell.setAttribute("aria-selected", String(index === picture));
    });
    const { cell } = kind.cells[picture];
    place(kind.frame, patch);
    cell.append(kind.frame);
    kind.box.setAttribute("aria-activedescendant", cell.id);
  }
  const agreement = correlation(kinds[0].cosines, kinds[1].cosines);
  $("agreement").textContent = `The two sides correlate by ${agreement.toFixed(2)}.`;
  const error8 = patchErrors[picture * patches + patch] / 255 * data.error_scale;
  $("patch-about").textContent =
    `Patch row ${row}, column ${column}: 1 − cosine of rebuilt features ${error8.toFixed(3)}`;
  if (other) {
    $("picture-title").textContent = key;
    $("picture-about").textContent = `${label === null ? "no label" : data.labels[label]} · ` +
      `picture ${picture + 1} of ${count} · error ${error} · variance lost ${lost} %`;
    $("large-image").src = thumb;
    $("large-image").alt = described(picture);
    showView();
    kinds.forEach(showNeighbours);
    mark();
  }
  order();
  const nearest = kinds.map(({ best, name }) => {
    const others = best.map((value, index) => [index === picture ? -2 : value, index]);
    const [value, index] = others.reduce((a, b) => (b[0] > a[0] ? b : a));
    return `${name}: ${described(index)}, ${value.toFixed(2)}`;
  });
  $("live").textContent = `${key}, patch row ${row}, column ${column}. Most similar picture by ` +
    (count > 1 ? nearest.join("; by ") : "none");
}
showErrors();
showMap();
select(0, choice.patch);
})();
