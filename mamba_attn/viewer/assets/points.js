// The points: a block's patches (Mode 2 of the paper), a stage's blocks over images (Mode 1), patches of every block.
import { about, byId, cellsOf, clamp, job, neighbours, points } from './data.js';
import { area, css, element, kindColour, mixed, paint, prepared, ramp, stroked } from './colours.js';
import { aboutPair, describe, gestures, peek, select, shownMaps, thumbnails, within } from './maps.js';
import { cellsOn, change, layerOf, pane, right, routeOf, spot, state, storeOf, wordsOf } from './state.js';
import { METHODS, block, item, models, noun, place, ranks, short } from './words.js';

const [FAINT, NEXT] = [0.15, 0.6]; // opacity of points outside the selection; next to a single one
const MANY_KINDS = 14;
const MANY = 200; // pixels of a small plot
const REACH = 14; // pixels from the pointer to a point
const USUAL = { tsne: 'usually 2 to 20 s', umap: 'usually 5 to 30 s; the first one compiles, up to a minute more' };
const views = []; // one per pane
export const pointTools = { points: 'lasso' };
let every = 0;

// What the server is asked for; the same whatever block of a stage is open, if the points are its blocks.
function asked(its, layer = layerOf(its)) {
  const { store, method, first, direction } = its;
  if (its.mode !== 'blocks') return { mode: 'patches', store, layer: layer.number, route: routeOf(its, layer), direction, method, first };
  return { mode: 'blocks', store, layer: storeOf(its).layers.find((one) => one.stage === layer.stage).number, method, first };
}

// Numbers of layer and image of every point of a stage.
function pairsOf(its) {
  const { stages, featured } = storeOf(its);
  return stages.flatMap((stage, layer) => (stage === layerOf(its).stage ? Array.from({ length: featured }, (_, image) => [layer, image]) : []));
}

export function drawPoints() {
  const box = byId('plots');
  while (views.length > state.panes.length) views.pop().root.remove();
  while (views.length < state.panes.length) {
    const made = view(views.length);
    views.push(made);
    box.append(made.root);
  }
  views.forEach(refresh);
}

function view(at) {
  const canvas = element('canvas', { class: 'plot', tabindex: '0', role: 'application', 'aria-describedby': 'spoken' });
  const box = (class_) => element('div', { class: class_ });
  const made = { at, canvas, heading: element('h2'), legend: box('legend'), notice: element('p', { class: 'notice', role: 'status' }), many: box('plots'), xy: null, key: '', zoom: [1, 0, 0], places: [], backdrop: null };
  made.root = element('div', {}, made.heading, canvas, made.many, made.legend, made.notice);
  gestures(canvas, () => pointTools.points, {
    click: (to, add) => pick(made, [nearest(made, to)].filter((one) => one >= 0), add, true),
    drag: (corners, add) => {
      const inside = within(corners);
      pick(made, made.places.flatMap((place, one) => (inside(place) ? [one] : [])), add, false);
    },
    hover: (to) => {
      const one = to ? nearest(made, to) : -1;
      if (one < 0) return describe();
      const its = state.panes[at];
      return its.mode === 'blocks' ? aboutPair(its, pairsOf(its)[one]) : peek(one, shownMaps().find((map) => map.slot.pane === its));
    },
    redraw: () => paintPoints(made),
    move: ([x, y]) => { made.zoom = [made.zoom[0], made.zoom[1] + x, made.zoom[2] + y]; paintPoints(made); },
  });
  return made;
}

function headed(own) {
  const its = layerOf(own);
  const many = new Set(storeOf(own).stages).size > 1;
  const words = {
    blocks: `${many ? `Stage ${its.stage}: every` : 'Every'} dot is one block on one of ${storeOf(own).featured} ${item(true)}`,
    every: `Every block: its ${noun(true)} as dots`,
    patches: `${block(its).replace(/^./, (letter) => letter.toUpperCase())}: every dot is one ${noun()}`,
  }[own.mode];
  return [models(own), words].filter(Boolean).join('. ');
}

async function refresh(its) {
  const own = state.panes[its.at];
  const many = own.mode === 'every';
  [its.canvas.hidden, its.many.hidden, its.heading.textContent] = [many, !many, headed(own)];
  if (many) return smallMultiples(its, own);
  const wanted = asked(own);
  const key = JSON.stringify(wanted);
  if (its.key !== key) {
    its.waiting = key;
    const found = await settled(wanted, its, () => its.waiting !== key);
    if (its.waiting !== key || !found) return undefined;
    Object.assign(its, { xy: found.error ? null : found.xy, key: found.error ? '' : key, zoom: [1, 0, 0] });
    its.notice.replaceChildren(found.error ?? '');
  }
  return paintPoints(its);
}

// Points, after the job that computes them; the old ones stay, faint, while words say what is going on.
async function settled(wanted, its, stale) {
  const waiting = (...words) => { its.notice.replaceChildren(...words); its.canvas.style.opacity = 0.35; };
  const late = setTimeout(() => { if (!stale()) waiting('Placing the points …'); }, 500);
  let found = await points(wanted);
  clearTimeout(late);
  let left = 0;
  while (found.job && !stale()) {
    const [number, now] = [found.job, await job(found.job)];
    const news = now.left < left; // some of a job's points are there before the others
    left = now.left;
    if (now.state === 'done' || news) found = await points(wanted);
    else if (now.state === 'cancelled') found = { error: 'Cancelled. Choose another layout, or the same again.' };
    else if (now.state !== 'running') found = { error: now.error };
    else {
      if (!its.notice.querySelector('button')) {
        waiting(element('span'), ' ', element('button', { onclick: () => job(number, 'DELETE') }, 'Cancel'));
      }
      its.notice.firstChild.textContent = `${now.what}: ${Math.floor(now.seconds)} s (${USUAL[wanted.method]})`;
      await new Promise((wake) => { setTimeout(wake, 400); });
    }
  }
  its.canvas.style.opacity = 1;
  if (found.xy) its.notice.replaceChildren();
  return found.job ? null : found;
}

function paintPoints(its) {
  const { canvas, xy } = its;
  const own = state.panes[its.at];
  if (canvas.hidden) return;
  const height = Math.min(420, Math.max(240, canvas.clientWidth * 0.86));
  const context = prepared(canvas, height);
  const width = canvas.clientWidth;
  its.places = [];
  const pairs = own.mode === 'blocks' ? pairsOf(own) : null;
  const count = pairs ? pairs.length : cellsOf(layerOf(own));
  canvas.setAttribute('aria-label', `${its.heading.textContent}. Arrow keys choose a point.`);
  if (!xy || xy.length !== 2 * count) {
    its.backdrop = null;
    return its.legend.replaceChildren();
  }
  context.font = '12px system-ui, sans-serif';
  context.fillStyle = paint('soft');
  context.fillText(`${METHODS[own.method]} 1 →`, 4, height - 5);
  context.fillText(`↑ ${METHODS[own.method]} 2`, 4, 14);
  const { picture, places, looks } = backdrop(its, own, pairs, width, height);
  its.places = places;
  const lit = litPoints(its.at);
  context.globalAlpha = !lit.length ? 1 : lit.length === 1 ? NEXT : FAINT;
  if (picture.width && picture.height) context.drawImage(picture, 0, 0, width, height); // a frame may not be laid out yet
  context.globalAlpha = 1;
  for (const at of lit) {
    context.globalAlpha = looks[at].hidden ? FAINT : 1;
    symbol(context, ...places[at], 1.25 * looks[at].size, looks[at]);
  }
  context.globalAlpha = 1;
  if (!pairs && lit.length === 1) ring(context, ...places[lit[0]], 1.25 * looks[lit[0]].size + 5);
  pairs?.forEach(([layer, image], at) => { // the open block
    if (layer === own.layer) ring(context, ...places[at], looks[at].size + (image === own.image ? 6 : 0), image === own.image ? 1 : 0.5);
  });
}

// All points as if none were chosen, kept while only the choice changes: drawing thousands takes longer than a frame.
function backdrop(its, own, pairs, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const key = JSON.stringify([its.key, its.zoom, width, height, ratio, own.colour, own.layer, routeOf(own), state.search, state.verdict, paint('soft')]);
  if (its.backdrop?.key === key) return its.backdrop;
  its.legend.replaceChildren();
  const [places, looks] = [placed(its.xy, width, height, 24, its.zoom), pairs ? looksOfPairs(pairs, own, its.legend) : looksOfPatches(own, its.legend)];
  const picture = new OffscreenCanvas(its.canvas.width, its.canvas.height);
  const context = picture.getContext('2d');
  context.scale(ratio, ratio);
  places.forEach((place, at) => {
    context.globalAlpha = looks[at].hidden ? FAINT : 1;
    symbol(context, ...place, looks[at].size, looks[at]);
  });
  its.backdrop = { key, picture, places, looks };
  return its.backdrop;
}

function placed(xy, width, height, margin, [scale, dx, dy] = [1, 0, 0]) {
  const axes = [0, 1].map((axis) => xy.filter((_, at) => at % 2 === axis));
  const [u, v] = axes.map((all) => {
    const [low, high] = [all.reduce((a, b) => Math.min(a, b), Infinity), all.reduce((a, b) => Math.max(a, b), -Infinity)];
    return all.map((value) => (value - low) / (high - low || 1) - 0.5);
  });
  return Array.from(u, (_, at) => [width / 2 + u[at] * (width - 2 * margin) * scale + dx, height / 2 - v[at] * (height - 2 * margin) * scale + dy]);
}

// A symbol by itself, for a legend.
function mark(size, look) {
  const made = element('canvas', { width: 28, height: 28, style: 'width:14px;height:14px' });
  symbol(made.getContext('2d'), 14, 14, size, look);
  return made;
}

function looksOfPatches(own, legend) {
  const its = layerOf(own);
  const route = Math.max(routeOf(own), 0);
  const rank = own.colour === 'rank' ? ranks(its, route) : [];
  const cells = [...Array(cellsOf(its)).keys()];
  const kinds = { row: (cell) => spot(cell, its)[1], rank: (cell) => rank[cell] ?? 0, column: (cell) => spot(cell, its)[2] };
  const bySize = own.colour === 'row' ? 'column' : 'row'; // as in arXiv 2502.20764: the colour is the column, the size is the row
  const [values, sizes] = [cells.map(kinds[own.colour] ?? kinds.column), cells.map(kinds[bySize])];
  const [high, largest] = [Math.max(...values, 1), Math.max(...sizes, 1)];
  if (legend) {
    const named = own.colour === 'rank' ? `step in scan ${route + 1}` : wordsOf(own) ? 'place in the text' : own.colour;
    const dot = (size) => mark(2 * size, { colour: paint('soft'), shape: 0 });
    const entries = [`colour: ${named}`, own.colour === 'rank' ? '1' : '0', ramp(about.palettes.cividis), String(high)];
    if (its.grid[0] > 1) entries.push(`size: ${bySize}`, '0', dot(5), dot(12), String(largest));
    legend.append(...entries.map((one) => (typeof one === 'string' ? element('span', {}, one) : one)));
  }
  const scale = cells.length > 1500 ? 0.6 : cells.length > 500 ? 0.75 : 1;
  return cells.map((cell) => ({ colour: css(mixed(about.palettes.cividis, values[cell] / high)), size: scale * (5 + 8 * sizes[cell] / largest), shape: 0 }));
}

function looksOfPairs(all, own, legend) {
  const { images, blocks } = storeOf(own);
  const named = all.map(([layer, image]) => ({ class: images[image][1] ?? 'not known', predicted: images[image][2] ?? 'not known' }[own.colour] ?? `block ${blocks[layer]}`));
  const kinds = [...new Set(named)];
  const looks = kinds.map((_, shape) => ({ colour: kindColour(shape, kinds.length), shape }));
  kinds.slice(0, MANY_KINDS).forEach((kind, at) => legend.append(element('span', { class: 'kind' }, mark(20, looks[at]), element('span', {}, kind))));
  if (kinds.length > MANY_KINDS) legend.append(element('span', {}, `and ${kinds.length - MANY_KINDS} more`));
  const size = all.length <= 400 ? 10 : 7;
  return named.map((kind, point) => ({ ...looks[kinds.indexOf(kind)], size, hidden: !passes(images[all[point][1]]) }));
}

// Whether an image passes the filter of the list.
export function passes(image) {
  const text = state.search.trim().toLowerCase();
  if (text && !image.slice(0, 3).some((one) => String(one ?? '').toLowerCase().includes(text))) return false;
  return state.verdict === 'all' || right(image) === (state.verdict === 'right');
}

// A circle, square, diamond, triangles or a cross: colours alone do not tell kinds apart for everyone.
const SHAPES = [
  null, [[-1, -1], [1, -1], [1, 1], [-1, 1]], [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]], [[0, -1.2], [1.15, 0.9], [-1.15, 0.9]], [[0, 1.2], [1.15, -0.9], [-1.15, -0.9]],
  [[-1.2, -0.4], [-0.4, -0.4], [-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4]],
];
const circle = (x, y, radius) => { const made = new Path2D(); made.arc(x, y, radius, 0, 2 * Math.PI); return made; };
const ring = (context, x, y, size, wide = 1) => stroked(context, circle(x, y, size / 2 + 1), 2 * wide, 2 * wide);

function symbol(context, x, y, size, { colour, shape }) {
  const corners = SHAPES[shape % SHAPES.length]?.map(([dx, dy]) => [x + 0.45 * size * dx, y + 0.45 * size * dy]);
  const its = corners ? area(corners) : circle(x, y, size / 2);
  context.fillStyle = colour;
  context.fill(its);
  if (size < 4) return;
  [context.lineWidth, context.strokeStyle] = [0.8, 'white'];
  context.stroke(its);
}

// Numbers of the points that the selection means.
export function litPoints(at) {
  const own = state.panes[at];
  if (own.mode !== 'blocks') return cellsOn(layerOf(own)).filter((cell) => cell >= 0);
  const chosen = new Set(state.pairs.map(String));
  return pairsOf(own).flatMap((pair, point) => (chosen.has(String(pair)) ? [point] : []));
}

function nearest(its, [x, y]) {
  let [best, least] = [-1, REACH];
  its.places.forEach(([px, py], at) => {
    const away = Math.hypot(px - x, py - y);
    if (away <= least) [best, least] = [at, away];
  });
  return best;
}

// Points become the selection; of blocks, the clicked one opens, or the first of an area unless one of it is open.
function pick(its, numbers, add, click) {
  const own = state.panes[its.at];
  if (!numbers.length) return undefined;
  state.active = its.at;
  if (own.mode !== 'blocks') return select(numbers, layerOf(own), add);
  const picked = numbers.map((at) => pairsOf(own)[at]);
  const names = new Set(picked.map(String));
  const others = state.pairs.filter((pair) => !names.has(String(pair)));
  if (add) return change({ pairs: click && others.length < state.pairs.length ? others : [...others, ...picked] });
  const open = picked.some(([layer, image]) => layer === own.layer && image === own.image);
  return change({ pairs: picked }, open && !click ? {} : { layer: picked[0][0], image: picked[0][1] });
}

// The points most alike to the chosen one, by all numbers and not by their place on the screen; as buttons.
export async function alike(own) {
  const lit = litPoints(state.panes.indexOf(own));
  if (lit.length !== 1) return null;
  const pairs = own.mode === 'blocks' ? pairsOf(own) : null; // of now: the next gesture does not wait for the answer
  const layer = layerOf(own);
  const found = await neighbours(asked(own), lit[0]);
  if (!found.numbers?.length) return null;
  const { images, blocks } = storeOf(own);
  const made = (text, numbers) => element('button', { class: 'small', onclick: () => pick({ at: state.panes.indexOf(own) }, numbers, false, true) }, text);
  return element('dd', { class: 'buttons' }, ...found.numbers.map((at) => made(pairs ? `block ${blocks[pairs[at][0]]}, ${short(images[pairs[at][1]][0])}` : place(at, layer), [at])), made('select these', [...lit, ...found.numbers]));
}

// Arrow keys in the points: the next block, or the next image.
export function step(down, across) {
  const own = pane();
  const blocks = storeOf(own).layers.filter((one) => one.stage === layerOf(own).stage);
  const layer = blocks[clamp(blocks.indexOf(layerOf(own)) + down, 0, blocks.length - 1)].number;
  const image = clamp(own.image + across, 0, storeOf(own).featured - 1);
  return change({ pairs: [[layer, image]] }, { layer, image });
}

export function zoom(factor) {
  for (const its of views) {
    its.zoom = factor ? [its.zoom[0] * factor, its.zoom[1] * factor, its.zoom[2] * factor] : [1, 0, 0];
    paintPoints(its);
  }
}

// Figure 5 of the paper: the patches of every block, small; one block after the other.
async function smallMultiples(its, own) {
  const turn = ++every;
  const { layers } = storeOf(own);
  [its.key, its.backdrop] = ['', null]; // the legend is another's
  its.many.replaceChildren(...thumbnails(layers, (layer) => change({}, { layer: layer.number, mode: 'patches' }), { width: MANY, height: MANY }));
  layers.forEach((layer, at) => its.many.children[at].setAttribute('aria-pressed', layer === layerOf(own)));
  its.legend.replaceChildren();
  looksOfPatches(own, its.legend);
  for (const [at, layer] of layers.entries()) {
    const found = await settled(asked(own, layer), its, () => turn !== every);
    if (turn !== every || !found) return;
    if (found.error) {
      its.notice.textContent = found.error;
      continue;
    }
    const context = its.many.children[at].firstChild.getContext('2d');
    const [looks, places] = [looksOfPatches({ ...own, layer: layer.number }, null), placed(found.xy, MANY, MANY, 16)];
    const chosen = new Set(cellsOn(layer));
    places.forEach((place, cell) => symbol(context, ...place, looks[cell].size * (chosen.has(cell) ? 1.6 : 1), looks[cell]));
    for (const cell of chosen) if (chosen.size === 1 && cell >= 0) ring(context, ...places[cell], looks[cell].size + 8);
  }
}
export const plotted = () => views;
