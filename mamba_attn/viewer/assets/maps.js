// The maps of what is selected: of the open block, large, on one scale; of every block, as a film strip.
import { about, asRuns, byId, maps, picture } from './data.js';
import { css, element, mixed, paint, prepared, ramp, scaleOf, shown, strengths, tile, topOf } from './colours.js';
import { alike } from './points.js';
import { cellsOn, change, classImages, layerOf, pane, routeOf, state, storeOf, wordsOf } from './state.js';
import { block, caption, gridOf, models, noun, number, place, steps, strongest, titled, unit, verdict, visits, who } from './words.js';

const STRIP = 8; // blocks of the strip that are asked for at once: a gesture does not wait for more
let drawn = []; // per map: its slot, layer, values, scale, canvas
let turn = 0;
const photos = new Map();
const tools = { map: 'box' };

// The maps that are shown: of one pane up to three; of two panes one each, and their difference.
function slots() {
  const found = state.panes.map((its) => ({ pane: its, what: TRIPLES[its.show]?.[0] ?? its.show }));
  if (found.length === 2) return layerOf(state.panes[0]).grid.join() === layerOf(state.panes[1]).grid.join() ? [...found, { pane: state.panes[0], what: 'apart' }] : found;
  return TRIPLES[pane().show]?.map((what) => ({ pane: pane(), what })) ?? found;
}
const TRIPLES = { all: ['image', 'mean', 'difference'], classes: ['class', 'other', 'versus'] }; // the third is the first minus the second

function query(its, what, layer = layerOf(its), cells = cellsOn(layer)) {
  const { store, direction, gate, skip } = its;
  const route = layer.routes > routeOf(its) ? routeOf(its) : -1;
  return { store, layer: layer.number, route, direction, what, image: what === 'image' ? its.image : 0, gate, skip, cells: asRuns(cells) };
}

// What a map is made of: means over queries, added or subtracted.
function parts(its, what, ...rest) {
  const less = (first, second) => [...first, ...second.map(([queries, sign]) => [queries, -sign])];
  if (what === 'apart') return less(...slots().slice(0, 2).map((slot) => parts(slot.pane, slot.what)));
  if (what === 'difference') return less(parts(its, 'image', ...rest), parts(its, 'mean', ...rest));
  if (what === 'versus') return less(parts(its, 'class', ...rest), parts(its, 'other', ...rest));
  if (what === 'class' || (what === 'other' && its.other)) return [[classImages(its, what).map((image) => query({ ...its, image }, 'image', ...rest)), 1]];
  return [[[query(its, what === 'other' ? 'mean' : what, ...rest)], 1]];
}

// The values of several maps as they are shown, or {error}; asked for together. A difference is that of what is shown.
async function values(all) {
  const replies = await maps(all.flat().flatMap(([queries]) => queries));
  return all.map((its) => {
    const means = its.map(([queries]) => {
      const own = replies.splice(0, queries.length);
      const wrong = own.find((one) => one.error) ?? (own.length ? null : { error: 'No photo of this class is stored in full.' });
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
    slot, its: layerOf(slot.pane), ...found[at], canvas: box.children[at].querySelector('canvas'),
    scale: found[at].error ? null : scaleOf(found[at].values, top, slot.what),
  }));
  drawn.forEach((one, at) => {
    const [title, words] = titled(one.slot);
    const [bold, rest] = box.children[at].querySelectorAll('b, span');
    [bold.textContent, rest.textContent] = [state.panes.length > 1 && at < 2 ? ['AB'[at], models(one.slot.pane), block(one.its), title].filter(Boolean).join(' · ') : title, one.error ?? words];
    const words_ = wordsOf(one.slot.pane);
    [one.canvas.hidden, one.canvas.nextSibling.hidden] = [Boolean(words_), !words_];
    (words_ ? one.canvas.nextSibling : one.canvas).setAttribute('aria-label', `${title}: ${caption(one.slot.pane)}. ${one.error ?? 'Strongest: ' + strongest(one.values, one.its, 3)}`);
    box.children[at].classList.toggle('failed', Boolean(one.error));
  });
  repaint();
  byId('caption').textContent = caption(pane());
  byId('bars').replaceChildren(element('span', unit(drawn[0].slot.what), { class: 'unit' }), ...bars(), lock(top));
  describe();
  setTimeout(() => { if (own === turn) drawStrip(own); }, 60);
}

function figure(at) {
  const canvas = element('canvas', undefined, { class: 'map', tabindex: '0', role: 'application', 'aria-describedby': 'spoken' });
  gestures(canvas, () => tools.map, {
    click: (to, add) => choose(at, cellsIn(at, [to, to], true), add),
    drag: (corners, add) => choose(at, cellsIn(at, corners, tools.map === 'box'), add),
    hover: (to) => { const [cell] = to ? cellsIn(at, [to, to], true) : []; return cell === undefined ? describe() : peek(cell, drawn[at]); },
    redraw: repaint,
  });
  const line = element('div', undefined, { class: 'tokens', tabindex: '0', role: 'application', 'aria-describedby': 'spoken' });
  const tokenOf = (event) => event.target.closest('[data-cell]')?.dataset.cell;
  line.addEventListener('click', (event) => { if (tokenOf(event)) choose(at, [Number(tokenOf(event))], event.shiftKey); });
  line.addEventListener('pointerover', (event) => { if (tokenOf(event)) peek(Number(tokenOf(event)), drawn[at]); });
  line.addEventListener('pointerleave', () => describe());
  return element('figure', undefined, {}, canvas, line, element('figcaption', undefined, {}, element('b'), element('span')));
}

function bars() {
  const all = drawn.flatMap(({ scale }) => scale ?? []);
  const halved = state.palette === 'orange' && all.some((one) => one.signed); // the scale without a sign is its upper half
  const beyond = all.some((one) => one.beyond);
  const kinds = all.filter((one, at) => (one.signed || !halved) && all.findIndex((other) => other.signed === one.signed) === at);
  return kinds.map(({ low, high, colours }) => element('span', undefined, { class: 'control' },
    element('span', (low < 0 && beyond ? '≤ ' : '') + number(low), { class: 'end low' }), ramp(colours), element('span', (beyond ? '≥ ' : '') + number(high), { class: 'end' })));
}

function lock(top) {
  const made = element('label', undefined, { class: 'control' }, element('input', undefined, { type: 'checkbox', id: 'lock' }), element('span', `${drawn.length > 1 ? 'one scale for all; ' : ''}keep it`));
  made.firstChild.checked = state.lock > 0;
  made.firstChild.addEventListener('change', (event) => change({ lock: event.target.checked ? top : 0 }));
  return made;
}

// Draw again what is there: after a resize, while dragging, when a photo has arrived.
export function repaint() {
  for (const one of drawn) {
    const { canvas, its, slot } = one;
    const [rows, columns] = its.grid;
    if (canvas.hidden) {
      if (!one.error) line(one, canvas.nextSibling, wordsOf(slot.pane));
      continue;
    }
    const context = prepared(canvas, canvas.clientWidth * rows / columns);
    const [width, height] = [canvas.clientWidth, canvas.clientWidth * rows / columns];
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
    if (one.size >= 12) lines(context, rows, columns, one.size);
    if (its.slices) lines(context, rows / its.slices[1], its.slices[0], columns / its.slices[0] * one.size, its.slices[1] * one.size, paint('card'), 3);
    frame(context, its, one.size, cellsOn(its));
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

function lines(context, rows, columns, wide, high = wide, colour = '#ffffff38', width = 1) {
  context.beginPath();
  for (let row = 1; row < rows; row++) segment(context, 0, row * high, columns * wide, row * high);
  for (let column = 1; column < columns; column++) segment(context, column * wide, 0, column * wide, rows * high);
  [context.strokeStyle, context.lineWidth] = [colour, width];
  context.stroke();
}

// A text: its tokens, coloured; the selected ones have a frame.
function line(one, box, words) {
  if (box.children.length !== words.length || box.textContent !== words.join('')) {
    box.replaceChildren(...words.map((word, cell) => element('span', word, { 'data-cell': cell })));
  }
  const chosen = new Set(cellsOn(one.its));
  [...box.children].forEach((token, cell) => {
    const colour = mixed(one.scale.colours, (one.values[cell] - one.scale.low) / (one.scale.high - one.scale.low));
    token.style.background = css(colour);
    token.style.color = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140 ? '#111' : '#fff';
    token.className = chosen.has(cell) ? 'chosen' : '';
  });
}

function segment(context, x0, y0, x1, y1) {
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
}

// A frame around the selected patches.
function frame(context, its, size, cells) {
  const columns = its.grid[1];
  const inside = new Set(cells.filter((cell) => cell >= 0));
  const wide = Math.min(Math.max(0.08 * size, 1.5), 3);
  for (const [colour, width] of [['white', wide + 2.5], ['#111', wide]]) {
    context.beginPath();
    for (const cell of inside) {
      const [row, column] = [Math.floor(cell / columns), cell % columns];
      const [x, y] = [column * size, row * size];
      if (!inside.has(cell - columns)) segment(context, x, y, x + size, y);
      if (!inside.has(cell + columns)) segment(context, x, y + size, x + size, y + size);
      if (!column || !inside.has(cell - 1)) segment(context, x, y, x, y + size);
      if (column === columns - 1 || !inside.has(cell + 1)) segment(context, x + size, y, x + size, y + size);
    }
    [context.strokeStyle, context.lineWidth, context.lineCap] = [colour, width, 'square'];
    context.stroke();
  }
}

function path(context, its, size, visited) {
  const columns = its.grid[1];
  const at = visited.slice(0, state.step || visited.length).map((cell) => [(cell % columns + 0.5) * size, (Math.floor(cell / columns) + 0.5) * size]);
  const wide = Math.min(Math.max(size * 0.1, 1.2), 3);
  context.lineCap = 'round';
  for (const halo of [true, false]) {
    at.slice(1).forEach((to, step) => {
      context.beginPath();
      segment(context, ...at[step], ...to);
      context.strokeStyle = halo ? 'white' : css(mixed(about.palettes.path, step / Math.max(visited.length - 1, 1)));
      context.lineWidth = halo ? wide + 2 : wide;
      context.stroke();
    });
  }
  const mark = Math.min(size * 0.6, 14) / 2;
  context.fillStyle = css(about.palettes.path[0]);
  context.beginPath();
  context.arc(...at[0], mark, 0, 7);
  context.fill();
  context.fillStyle = css(mixed(about.palettes.path, (at.length - 1) / Math.max(visited.length - 1, 1)));
  context.fillRect(at[at.length - 1][0] - mark, at[at.length - 1][1] - mark, 2 * mark, 2 * mark);
}

// Cells that a box cuts, or whose centres lie in a lasso.
function cellsIn(at, corners, box) {
  const { its, size } = drawn[at];
  const [rows, columns] = its.grid;
  const span = (axis) => [Math.min, Math.max].map((end) => Math.floor(end(...corners.map((corner) => corner[axis])) / size));
  const [[left, right], [top, bottom]] = [span(0), span(1)];
  return Array.from({ length: rows * columns }, (_, cell) => cell).filter((cell) => {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    if (box) return column >= left && column <= right && row >= top && row <= bottom;
    return within([(column + 0.5) * size, (row + 0.5) * size], corners);
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

export function within([x, y], corners) {
  let odd = false;
  corners.forEach(([x0, y0], at) => {
    const [x1, y1] = corners[(at + 1) % corners.length];
    if ((y0 > y) !== (y1 > y) && x < (x1 - x0) * (y - y0) / (y1 - y0) + x0) odd = !odd;
  });
  return odd;
}

// Press, drag, release on a canvas: a click, an area, or what is under the pointer.
export function gestures(canvas, tool, { click, drag, hover, redraw, move }) {
  let corners = null;
  const at = (event) => [event.clientX - canvas.getBoundingClientRect().left, event.clientY - canvas.getBoundingClientRect().top];
  const area = () => {
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
    outline(canvas.getContext('2d'), area());
  });
  canvas.addEventListener('pointerup', (event) => {
    if (!corners) return;
    const [far, shape, start] = [Math.max(...corners.map(([x, y]) => Math.hypot(x - corners[0][0], y - corners[0][1]))), area(), corners[0]];
    corners = null;
    if (far >= 5) redraw();
    if (far < 5) click(start, event.shiftKey);
    else if (tool() !== 'move') drag(shape, event.shiftKey);
  });
  canvas.addEventListener('pointercancel', () => { corners = null; redraw(); });
  canvas.addEventListener('pointerleave', () => hover(null));
}

function outline(context, corners) {
  context.beginPath();
  corners.forEach(([x, y], at) => context[at ? 'lineTo' : 'moveTo'](x, y));
  context.closePath();
  context.fillStyle = '#0072b226';
  context.fill();
  for (const [colour, width] of [['white', 3], ['#111', 1.5]]) {
    [context.strokeStyle, context.lineWidth] = [colour, width];
    context.stroke();
  }
}

const facts = (items) => byId('card').replaceChildren(...items.filter(([, text]) => text).flatMap(([name, text]) => [element('dt', name), element('dd', text)]));

// The card of what is selected, and the same for screen readers.
export function describe() {
  peeked++;
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
  const own = peeked;
  alike(one.slot.pane).then((found) => { if (own === peeked && found) byId('card').append(element('dt', 'most alike'), found); });
  const text = `${byId('caption').textContent}. Strongest: ${strong}`;
  if (byId('spoken').textContent !== text) byId('spoken').textContent = text;
}

// The card of what is under the pointer, with its own map.
let peeked = 0;
export async function peek(cell, one = drawn[0]) {
  const own = ++peeked;
  const { its, slot } = one;
  const [found] = await values([slot.what === 'apart' ? parts(slot.pane, 'image', its, [cell]) : parts(slot.pane, slot.what, its, [cell])]);
  if (own !== peeked || found.error) return;
  const canvas = byId('peek');
  [canvas.height, canvas.width] = its.grid;
  canvas.hidden = false;
  canvas.getContext('2d').drawImage(tile(found.values, its.grid, scaleOf(found.values, state.lock || topOf([found.values]), slot.what)), 0, 0);
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
  facts([['under the pointer', block({ stage: stages[layer], block: blocks[layer] })], ['photo', images[image][0]], ['class', verdict(images[image])]]);
}

async function drawStrip(own) {
  const its = pane();
  const { layers } = storeOf(its);
  const box = byId('strip');
  box.classList.toggle('lines', Boolean(wordsOf(its)));
  box.style.setProperty('--thumb', state.large ? '160px' : '62px');
  if (box.dataset.store !== String(its.store)) {
    box.dataset.store = its.store;
    box.replaceChildren(...layers.map((layer) => {
      const made = element('button', undefined, { title: `open ${block(layer)}: ${layer.name}` }, element('canvas', undefined, { 'aria-hidden': 'true' }), element('span', block(layer)), element('span', gridOf(layer)));
      made.addEventListener('click', () => change({}, { layer: layer.number }));
      return made;
    }));
  }
  layers.forEach((layer, at) => box.children[at].setAttribute('aria-pressed', layer === layerOf(its)));
  const what = TRIPLES[its.show]?.[0] ?? its.show;
  for (let start = 0; start < layers.length; start += STRIP) {
    const some = layers.slice(start, start + STRIP);
    let found = await values(some.map((layer) => parts(its, what, layer)));
    if (what !== 'mean' && found.every((one) => one.error)) found = await values(some.map((layer) => parts(its, 'mean', layer)));
    if (own !== turn) return;
    some.forEach((layer, at) => {
      const canvas = box.children[start + at].querySelector('canvas');
      const [rows, columns] = layer.grid;
      const size = Math.max(1, wordsOf(its) ? 8 : Math.round((state.large ? 320 : 124) / Math.max(rows, columns)));
      [canvas.width, canvas.height] = [columns * size, rows * size];
      if (found[at].error) return;
      const context = canvas.getContext('2d');
      context.imageSmoothingEnabled = false;
      context.drawImage(tile(found[at].values, layer.grid, scaleOf(found[at].values, state.lock || topOf([found[at].values]), what)), 0, 0, canvas.width, canvas.height);
      frame(context, layer, size, cellsOn(layer));
      strips.set(layer.name, { values: found[at].values, canvas, its: layer });
    });
  }
}
export const strips = new Map(); // for saving: the maps of the strip
export const shownMaps = () => drawn;
export const mapTools = tools;

// How unusual each photo is at the selection: the distance between its map and the usual one.
export async function unusual(its, images) {
  const layer = layerOf(its);
  const found = await maps([query(its, 'mean', layer), ...images.map((image) => query({ ...its, image }, 'image', layer))]);
  if (found.some((one) => one.error)) return new Map();
  return new Map(images.map((image, at) => [image, Math.hypot(...found[at + 1].map.map((value, cell) => value - found[0].map[cell]))]));
}
