// The maps of what is selected: of the open block, large, on one scale; of every block, as a film strip.
import { about, asRuns, byId, clamp, maps, picture } from './data.js';
import { area, css, element, mixed, onScale, paint, pieces, prepared, ramp, scaleOf, shown, strengths, stroked, tile, topOf } from './colours.js';
import { alike } from './points.js';
import { cellsOn, change, classImages, layerOf, pane, routeOf, state, storeOf, wordsOf } from './state.js';
import { block, caption, gridOf, item, models, noun, number, place, steps, strongest, titled, unit, verdict, visits, who } from './words.js';

const STRIP = 8; // blocks of the strip that are asked for at once: a gesture does not wait for more
const TRIPLES = { all: ['image', 'mean', 'difference'], classes: ['class', 'other', 'versus'] };
const LESS = { difference: TRIPLES.all, versus: TRIPLES.classes }; // the first minus the second
let drawn = []; // per map: its slot, layer, values, scale, canvas
let turn = 0;
let peeked = 0;
const photos = new Map();
export const mapTools = { map: 'box' };
export const strips = new Map(); // for saving: the maps of the strip
export const shownMaps = () => drawn;

// The maps that are shown: of one pane up to three; of two panes one each, and their difference.
const mainly = (its) => TRIPLES[its.show]?.[0] ?? its.show;
function slots() {
  const [first, second] = state.panes;
  if (!second) return (TRIPLES[first.show] ?? [first.show]).map((what) => ({ pane: first, what }));
  const found = state.panes.map((its) => ({ pane: its, what: mainly(its) }));
  return layerOf(first).grid.join() === layerOf(second).grid.join() ? [...found, { pane: first, what: 'apart' }] : found;
}

function query(its, what, layer = layerOf(its), cells = cellsOn(layer)) {
  const { store, direction, gate, skip } = its;
  return { store, layer: layer.number, route: routeOf(its, layer), direction, what, image: what === 'image' ? its.image : 0, gate, skip, cells: asRuns(cells) };
}

// What a map is made of: means over queries, added or subtracted.
function parts(its, what, ...rest) {
  const [first, second] = what === 'apart' ? slots().slice(0, 2).map((slot) => parts(slot.pane, slot.what)) : (LESS[what] ?? []).slice(0, 2).map((one) => parts(its, one, ...rest));
  if (second) return [...first, ...second.map(([queries, sign]) => [queries, -sign])];
  if (what === 'class' || (what === 'other' && its.other)) return [[classImages(its, what).map((image) => query({ ...its, image }, 'image', ...rest)), 1]];
  return [[[query(its, what === 'other' ? 'mean' : what, ...rest)], 1]];
}

// The values of several maps as they are shown, or {error}; asked for together. A difference is that of what is shown.
async function values(all) {
  const replies = await maps(all.flat().flatMap(([queries]) => queries));
  return all.map((its) => {
    const means = its.map(([queries]) => {
      const own = replies.splice(0, queries.length);
      const wrong = own.find((one) => one.error) ?? (own.length ? null : { error: `No ${item()} of this class is stored in full.` });
      return wrong ?? strengths(own[0].map.map((_, cell) => own.reduce((sum, one) => sum + one.map[cell], 0) / own.length));
    });
    const wrong = means.find((one) => one.error);
    return wrong ? { error: wrong.error } : { values: shown(means[0].map((_, cell) => means.reduce((sum, one, at) => sum + its[at][1] * one[cell], 0))) };
  });
}

export async function drawMaps() {
  const own = ++turn;
  const all = slots();
  const found = await values(all.map((slot) => parts(slot.pane, slot.what)));
  if (own !== turn) return;
  const top = state.lock || topOf(found.flatMap((one) => (one.error ? [] : [one.values])));
  const box = byId('maps');
  while (box.children.length > all.length) box.lastChild.remove();
  while (box.children.length < all.length) box.append(figure(box.children.length));
  drawn = all.map((slot, at) => ({
    slot, its: layerOf(slot.pane), ...found[at], canvas: box.children[at].querySelector('canvas'), words: wordsOf(slot.pane),
    scale: found[at].error ? null : scaleOf(found[at].values, top, slot.what),
  }));
  drawn.forEach(label);
  repaint();
  byId('caption').textContent = caption(pane());
  byId('bars').replaceChildren(element('span', { class: 'unit' }, unit(drawn[0].slot.what)), ...bars(), lock(top));
  describe();
  setTimeout(() => { if (own === turn) drawStrip(own); }, 60);
}

// The words under a map; a text is a line of tokens in place of the canvas.
function label({ slot, its, error, values: map, canvas, words }, at) {
  const [title, under] = titled(slot);
  const [line, [bold, rest]] = [canvas.nextSibling, canvas.parentElement.querySelectorAll('b, span.under')];
  const which = state.panes.length > 1 && at < 2 ? ['AB'[at], models(slot.pane), block(its)] : [];
  [bold.textContent, rest.textContent] = [[...which, title].filter(Boolean).join(' · '), error ?? under];
  [canvas.hidden, line.hidden] = [Boolean(words), !words];
  (words ? line : canvas).setAttribute('aria-label', `${title}: ${caption(slot.pane)}. ${error ?? 'Strongest: ' + strongest(map, its, 3)}`);
  canvas.parentElement.classList.toggle('failed', Boolean(error));
}

function figure(at) {
  const spoken = { tabindex: '0', role: 'application', 'aria-describedby': 'spoken' };
  const hover = (cell) => (cell === undefined ? describe() : peek(cell, drawn[at]));
  const onToken = (act) => (event) => { if (event.target.dataset.cell) act(Number(event.target.dataset.cell), event.shiftKey); };
  const canvas = element('canvas', { class: 'map', ...spoken });
  const line = element('div', { class: 'tokens', ...spoken, onclick: onToken((cell, add) => choose(at, [cell], add)), onpointerover: onToken(hover), onpointerleave: () => hover() });
  gestures(canvas, () => mapTools.map, {
    click: (to, add) => choose(at, cellsIn(at, [to, to], true), add),
    drag: (corners, add) => choose(at, cellsIn(at, corners, mapTools.map === 'box'), add),
    hover: (to) => hover(to ? cellsIn(at, [to, to], true)[0] : undefined),
    redraw: repaint,
  });
  return element('figure', {}, canvas, line, element('figcaption', {}, element('b'), element('span', { class: 'under' })));
}

function bars() {
  const all = drawn.flatMap(({ scale }) => scale ?? []);
  const halved = state.palette === 'orange' && all.some((one) => one.signed); // the scale without a sign is its upper half
  const beyond = all.some((one) => one.beyond);
  const kinds = all.filter((one, at) => (one.signed || !halved) && all.findIndex((other) => other.signed === one.signed) === at);
  return kinds.map(({ low, high, colours }) => element('span', { class: 'control' },
    element('span', { class: 'end low' }, (low < 0 && beyond ? '≤ ' : '') + number(low)), ramp(colours), element('span', { class: 'end' }, (beyond ? '≥ ' : '') + number(high))));
}

function lock(top) {
  const onchange = ({ target }) => change({ lock: target.checked ? top : 0 });
  const box = element('input', { type: 'checkbox', id: 'lock', checked: state.lock > 0, onchange });
  return element('label', { class: 'control' }, box, element('span', {}, `${drawn.length > 1 ? 'one scale for all; ' : ''}keep it`));
}

// Draw again what is there: after a resize, while dragging, when a photo has arrived.
export function repaint() {
  for (const one of drawn) {
    const { canvas, its, slot, words } = one;
    const [rows, columns] = its.grid;
    if (words) {
      if (!one.error) tokens(one, canvas.nextSibling);
      continue;
    }
    const [width, height] = [canvas.clientWidth, canvas.clientWidth * rows / columns];
    const context = prepared(canvas, height);
    const photo = ['image', 'difference'].includes(slot.what) ? loaded(picture(slot.pane.store, slot.pane.image)) : null;
    one.size = width / columns;
    context.fillStyle = paint('empty');
    context.fillRect(0, 0, width, height);
    if (photo) context.drawImage(photo, 0, 0, width, height);
    if (one.error) continue;
    context.imageSmoothingEnabled = false;
    const opacity = photo ? state.opacity : 1;
    if (one.opacity !== opacity) [one.tile, one.opacity] = [tile(one.values, its.grid, one.scale, opacity), opacity];
    context.drawImage(one.tile, 0, 0, width, height);
    if (one.size >= 12) rules(context, its.grid, [one.size, one.size], '#ffffff38', 1);
    if (its.slices) {
      const [across, high] = its.slices;
      rules(context, [rows / high, across], [high * one.size, columns / across * one.size], paint('card'), 3);
    }
    frame(context, its, cellsOn(its), one.size);
    if (state.path && its.orders.length) path(context, its, one.size, steps(its, routeOf(slot.pane)));
  }
}

function loaded(source) {
  if (!source) return null;
  if (!photos.has(source)) {
    const made = new Image();
    made.onload = repaint;
    made.src = source;
    photos.set(source, made);
  }
  const found = photos.get(source);
  return found.complete && found.naturalWidth ? found : null;
}

// Lines between the cells of a grid.
function rules(context, [rows, columns], [high, wide], colour, width) {
  const inner = (count) => Array.from({ length: count - 1 }, (_, at) => at + 1);
  [context.strokeStyle, context.lineWidth] = [colour, width];
  context.stroke(pieces([...inner(rows).map((row) => [0, row * high, columns * wide, row * high]), ...inner(columns).map((column) => [column * wide, 0, column * wide, rows * high])]));
}

// A text: its tokens, coloured; the selected ones have a frame.
function tokens({ its, values: map, scale, words }, box) {
  if (box.children.length !== words.length || box.textContent !== words.join('')) {
    box.replaceChildren(...words.map((word, cell) => element('span', { 'data-cell': cell }, word)));
  }
  const chosen = new Set(cellsOn(its));
  [...box.children].forEach((token, cell) => {
    const colour = mixed(scale.colours, onScale(map[cell], scale));
    token.style.background = css(colour);
    token.style.color = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140 ? '#111' : '#fff';
    token.className = chosen.has(cell) ? 'chosen' : '';
  });
}

// A frame around the selected patches.
function frame(context, its, cells, wide, high = wide) {
  const columns = its.grid[1];
  const inside = new Set(cells.filter((cell) => cell >= 0));
  const edges = [...inside].flatMap((cell) => {
    const [x, y] = [cell % columns * wide, Math.floor(cell / columns) * high];
    const [left, right] = [cell % columns && inside.has(cell - 1), (cell + 1) % columns && inside.has(cell + 1)];
    const all = [[inside.has(cell - columns), x, y, x + wide, y], [inside.has(cell + columns), x, y + high, x + wide, y + high], [left, x, y, x, y + high], [right, x + wide, y, x + wide, y + high]];
    return all.flatMap(([joined, ...edge]) => (joined ? [] : [edge]));
  });
  context.lineCap = 'square';
  stroked(context, pieces(edges), clamp(0.08 * Math.min(wide, high), 1.5, 3), 2.5);
}

function path(context, its, size, visited) {
  const columns = its.grid[1];
  const at = visited.slice(0, state.step || visited.length).map((cell) => [(cell % columns + 0.5) * size, (Math.floor(cell / columns) + 0.5) * size]);
  const colour = (step) => css(mixed(about.palettes.path, step / Math.max(visited.length - 1, 1)));
  const wide = clamp(size * 0.1, 1.2, 3);
  const lines = at.slice(1).map((to, step) => pieces([[...at[step], ...to]]));
  [context.lineCap, context.lineWidth, context.strokeStyle] = ['round', wide + 2, 'white'];
  lines.forEach((line) => context.stroke(line));
  context.lineWidth = wide;
  lines.forEach((line, step) => { context.strokeStyle = colour(step); context.stroke(line); });
  const mark = Math.min(size * 0.6, 14) / 2;
  context.fillStyle = colour(0);
  context.beginPath();
  context.arc(...at[0], mark, 0, 7);
  context.fill();
  context.fillStyle = colour(at.length - 1);
  context.fillRect(at[at.length - 1][0] - mark, at[at.length - 1][1] - mark, 2 * mark, 2 * mark);
}

// Cells that a box cuts, or whose centres lie in a lasso.
function cellsIn(at, corners, box) {
  const { its, size } = drawn[at];
  const columns = its.grid[1];
  const span = (axis) => [Math.min, Math.max].map((end) => Math.floor(end(...corners.map((corner) => corner[axis])) / size));
  const [[left, right], [top, bottom]] = [span(0), span(1)];
  const inside = within(corners);
  return [...Array(its.grid[0] * columns).keys()].filter((cell) => {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    if (box) return column >= left && column <= right && row >= top && row <= bottom;
    return inside([(column + 0.5) * size, (row + 0.5) * size]);
  });
}

function choose(at, cells, add) {
  if (!cells.length) return;
  state.active = Math.max(state.panes.indexOf(drawn[at].slot.pane), 0);
  select(cells, drawn[at].its, add);
}

// Select cells of a layer's grid; "add" joins them, a single one that is already selected goes.
export function select(cells, its, add = false) {
  const before = cellsOn(its);
  const joined = !add ? cells : cells.length === 1 && before.includes(cells[0]) ? before.filter((cell) => cell !== cells[0]) : [...new Set([...before, ...cells])];
  return change({ cells: joined, grid: its.grid });
}

// Whether places lie in an area.
const plane = new OffscreenCanvas(1, 1).getContext('2d');
export function within(corners) {
  const inside = area(corners);
  return ([x, y]) => plane.isPointInPath(inside, x, y, 'evenodd');
}

// Press, drag, release on a canvas: a click, an area, or what is under the pointer.
export function gestures(canvas, tool, { click, drag, hover, redraw, move }) {
  let corners = null;
  const at = (event) => [event.clientX - canvas.getBoundingClientRect().left, event.clientY - canvas.getBoundingClientRect().top];
  const outline = () => {
    const [from, to] = [corners[0], corners[corners.length - 1]];
    return tool() === 'lasso' ? corners : [from, [to[0], from[1]], to, [from[0], to[1]]];
  };
  canvas.addEventListener('pointerdown', (event) => {
    if (event.button) return;
    corners = [at(event)];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (!corners) return hover(at(event));
    corners.push(at(event));
    if (tool() === 'move') return move(corners[corners.length - 1].map((value, axis) => value - corners[corners.length - 2][axis]));
    redraw();
    const [context, shape] = [canvas.getContext('2d'), area(outline())];
    context.fillStyle = '#0072b226';
    context.fill(shape);
    stroked(context, shape, 1.5, 1.5);
  });
  canvas.addEventListener('pointerup', (event) => {
    if (!corners) return;
    const [far, shape, start] = [Math.max(...corners.map(([x, y]) => Math.hypot(x - corners[0][0], y - corners[0][1]))), outline(), corners[0]];
    corners = null;
    if (far >= 5) redraw();
    if (far < 5) click(start, event.shiftKey);
    else if (tool() !== 'move') drag(shape, event.shiftKey);
  });
  canvas.addEventListener('pointercancel', () => { corners = null; redraw(); });
  canvas.addEventListener('pointerleave', () => hover(null));
}

const facts = (items) => byId('card').replaceChildren(...items.filter(([, text]) => text).flatMap(([name, text]) => [element('dt', {}, name), element('dd', {}, text)]));

// The card of what is selected, and the same for screen readers.
export function describe() {
  const own = ++peeked;
  const one = drawn.find((its) => its.values && its.slot.pane === pane()) ?? drawn[0];
  byId('peek').hidden = true;
  if (!one?.values) return facts([]);
  const strong = strongest(one.values, one.its, 5);
  const cells = cellsOn(one.its);
  facts([
    ['selected', cells.length ? who(one.its)[0] : `nothing: the mean over all ${noun(true)}`],
    ['visited', cells.length === 1 && cells[0] >= 0 && one.its.orders.length ? visits(one.its, cells[0]) : ''],
    [one.slot.what === 'spread' ? 'differs most at' : one.slot.pane.direction === 'row' ? 'strongest sources' : 'strongest readers', strong],
  ]);
  alike(one.slot.pane).then((found) => { if (own === peeked && found) byId('card').append(element('dt', {}, 'most alike'), found); });
  const text = `${byId('caption').textContent}. Strongest: ${strong}`;
  if (byId('spoken').textContent !== text) byId('spoken').textContent = text;
}

// The card of what is under the pointer, with its own map.
export async function peek(cell, one = drawn[0]) {
  const own = ++peeked;
  const { its, slot } = one;
  const [found] = await values([parts(slot.pane, slot.what === 'apart' ? 'image' : slot.what, its, [cell])]);
  if (own !== peeked || found.error) return;
  byId('peek').hidden = false;
  small(byId('peek'), found.values, its, slot.what, 1);
  facts([
    ['under the pointer', `${noun()} ${place(cell, its)}${one.values ? `: ${number(one.values[cell])}` : ''}`],
    ['visited', its.orders.length ? visits(its, cell) : ''],
    [slot.pane.direction === 'row' ? 'takes most from' : 'gives most to', strongest(found.values, its, 5)],
  ]);
}

// The card of a point that is a block on a photo.
export function aboutPair(its, [layer, image]) {
  peeked++;
  byId('peek').hidden = true;
  const { stages, blocks, images } = storeOf(its);
  facts([['under the pointer', block({ stage: stages[layer], block: blocks[layer] })], [item(), images[image][0]], ['class', verdict(images[image])]]);
}

// A map on its own scale, some pixels for each cell; without one the canvas is empty.
function small(canvas, map, its, what, wide, high = wide) {
  const [rows, columns] = its.grid;
  [canvas.width, canvas.height] = [columns * wide, rows * high];
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  if (map) context.drawImage(tile(map, its.grid, scaleOf(map, state.lock || topOf([map]), what)), 0, 0, canvas.width, canvas.height);
  return context;
}

// A button for each layer, with a canvas of its own.
export const thumbnails = (layers, open, size = {}) => layers.map((layer) => element('button', { title: `open ${block(layer)}: ${layer.name}`, onclick: () => open(layer) },
  element('canvas', { 'aria-hidden': 'true', ...size }), element('span', {}, block(layer)), element('span', {}, gridOf(layer))));

async function drawStrip(own) {
  const its = pane();
  const { layers } = storeOf(its);
  const box = byId('strip');
  box.classList.toggle('lines', Boolean(wordsOf(its)));
  box.style.setProperty('--thumb', state.large ? '160px' : '62px');
  if (box.dataset.store !== String(its.store)) {
    box.dataset.store = its.store;
    box.replaceChildren(...thumbnails(layers, (layer) => change({}, { layer: layer.number })));
  }
  layers.forEach((layer, at) => box.children[at].setAttribute('aria-pressed', layer === layerOf(its)));
  const what = mainly(its);
  for (let start = 0; start < layers.length; start += STRIP) {
    const some = layers.slice(start, start + STRIP);
    let found = await values(some.map((layer) => parts(its, what, layer)));
    if (what !== 'mean' && found.every((one) => one.error)) found = await values(some.map((layer) => parts(its, 'mean', layer)));
    if (own !== turn) return;
    found.forEach((one, at) => {
      const [layer, canvas] = [some[at], box.children[start + at].firstChild];
      const wide = wordsOf(its) ? canvas.clientWidth / layer.grid[1] : Math.max(1, Math.round((state.large ? 320 : 124) / Math.max(...layer.grid)));
      const high = wordsOf(its) ? canvas.clientHeight : wide;
      const context = small(canvas, one.values, layer, what, wide, high);
      if (one.error) return;
      frame(context, layer, cellsOn(layer), wide, high);
      strips.set(layer.name, { values: one.values, canvas, its: layer });
    });
  }
}

// How unusual each photo is at the selection: the distance between its map and the usual one.
export async function unusual(its, images) {
  const layer = layerOf(its);
  const found = await maps([query(its, 'mean', layer), ...images.map((image) => query({ ...its, image }, 'image', layer))]);
  if (found.some((one) => one.error)) return new Map();
  return new Map(images.map((image, at) => [image, Math.hypot(...found[at + 1].map.map((value, cell) => value - found[0].map[cell]))]));
}
