// The points: a block's patches (Mode 2 of the paper), a stage's blocks over images (Mode 1), patches of every block.
import { about, byId, cellsOf, job, neighbours, points } from './data.js';
import { css, element, kindColour, mixed, paint, prepared, ramp } from './colours.js';
import { aboutPair, describe, gestures, peek, select, shownMaps, within } from './maps.js';
import { cellsOn, change, layerOf, pane, right, routeOf, spot, state, storeOf, wordsOf } from './state.js';
import { METHODS, block, models, noun, place, ranks, short } from './words.js';

const [FAINT, NEXT] = [0.15, 0.6]; // opacity of points outside the selection; next to a single one
const MANY_KINDS = 14;
const REACH = 14; // pixels from the pointer to a point
const USUAL = { tsne: 'usually 2 to 20 s', umap: 'usually 5 to 30 s; the first one compiles, up to a minute more' };
const views = []; // one per pane
export const pointTools = { points: 'lasso' };
let every = 0;

const asked = (its, layer = layerOf(its)) => {
  const { store, method, first, direction } = its;
  if (its.mode === 'blocks') { // the same points whatever block of the stage is open
    const { stage } = layer;
    return { mode: 'blocks', store, layer: storeOf(its).layers.find((one) => one.stage === stage).number, method, first };
  }
  return { mode: 'patches', store, layer: layer.number, route: layer.routes > routeOf(its) ? routeOf(its) : -1, direction, method, first };
};

// Numbers of layer and image of every point of a stage.
function pairsOf(its) {
  const { stages, collected } = storeOf(its);
  return stages.flatMap((stage, layer) => (stage === layerOf(its).stage ? Array.from({ length: collected }, (_, image) => [layer, image]) : []));
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
  const canvas = element('canvas', undefined, { class: 'plot', tabindex: '0', role: 'application', 'aria-describedby': 'spoken' });
  const made = { at, canvas, heading: element('h2'), legend: element('div', undefined, { class: 'legend' }), notice: element('p', undefined, { class: 'notice', role: 'status' }), many: element('div', undefined, { class: 'plots' }), xy: null, key: '', zoom: [1, 0, 0], places: [] };
  made.root = element('div', undefined, {}, made.heading, canvas, made.many, made.legend, made.notice);
  gestures(canvas, () => pointTools.points, {
    click: (to, add) => pick(made, [nearest(made, to)].filter((one) => one >= 0), add, true),
    drag: (corners, add) => pick(made, made.places.flatMap((place, one) => (within(place, corners) ? [one] : [])), add, false),
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

async function refresh(its) {
  const own = state.panes[its.at];
  const many = own.mode === 'every';
  [its.canvas.hidden, its.many.hidden] = [many, !many];
  its.heading.textContent = own.mode === 'blocks' ? `${new Set(storeOf(own).stages).size > 1 ? `Stage ${layerOf(own).stage}: every` : 'Every'} dot is one block on one of ${storeOf(own).collected} photos`
    : many ? `Every block: its ${noun(true)} as dots` : `${block(layerOf(own)).replace(/^./, (letter) => letter.toUpperCase())}: every dot is one ${noun()}`;
  if (models(own)) its.heading.textContent = `${models(own)}. ${its.heading.textContent}`;
  if (many) return smallMultiples(its, own);
  const wanted = asked(own);
  const key = JSON.stringify(wanted);
  if (its.key !== key) {
    its.waiting = key;
    const found = await settled(wanted, its, () => its.waiting !== key);
    if (its.waiting !== key || !found) return undefined;
    Object.assign(its, { xy: found.error ? null : found.xy, key: found.error ? '' : key, kind: own.mode, zoom: [1, 0, 0] });
    its.notice.replaceChildren(found.error ?? '');
  }
  return paintPoints(its);
}

// Points, after the job that computes them; the old ones stay, faint, while words say what is going on.
async function settled(wanted, its, stale) {
  const late = setTimeout(() => { if (!stale()) { its.notice.replaceChildren('Placing the points …'); its.canvas.style.opacity = 0.35; } }, 500);
  let found = await points(wanted);
  clearTimeout(late);
  let left = 0;
  while (found.job && !stale()) {
    const now = await job(found.job);

    const news = now.left < left; // some of a job's points are there before the others
    left = now.left;
    if (now.state === 'done' || news) found = await points(wanted);
    else if (now.state !== 'running') return { error: now.state === 'cancelled' ? 'Cancelled. Choose another layout, or the same again.' : now.error };
    else {
      const number = found.job;
      its.canvas.style.opacity = 0.35;
      if (!its.notice.querySelector('button')) {
        const stop = element('button', 'Cancel');
        stop.addEventListener('click', () => job(number, 'DELETE'));
        its.notice.replaceChildren(element('span'), ' ', stop);
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
  its.legend.replaceChildren();
  its.places = [];
  const pairs = own.mode === 'blocks' ? pairsOf(own) : null;
  const count = pairs ? pairs.length : cellsOf(layerOf(own));
  canvas.setAttribute('aria-label', `${its.heading.textContent}. Arrow keys choose a point.`);
  if (!xy || xy.length !== 2 * count) return;
  context.font = '12px system-ui, sans-serif';
  context.fillStyle = paint('soft');
  context.fillText(`${METHODS[own.method]} 1 →`, 4, height - 5);
  context.fillText(`↑ ${METHODS[own.method]} 2`, 4, 14);
  its.places = placed(xy, width, height, 24, its.zoom);
  const looks = pairs ? looksOfPairs(pairs, own, its.legend) : looksOfPatches(own, its.legend);
  const lit = new Set(litPoints(its.at));
  const order = its.places.map((_, at) => at).sort((a, b) => lit.has(a) - lit.has(b)); // those that are lit on top
  for (const at of order) {
    context.globalAlpha = looks[at].hidden ? FAINT : !lit.size || lit.has(at) ? 1 : lit.size === 1 ? NEXT : FAINT;
    const size = looks[at].size * (lit.has(at) ? 1.25 : 1);
    symbol(context, ...its.places[at], size, looks[at]);
    context.globalAlpha = 1;
    const open = pairs && pairs[at][0] === own.layer && pairs[at][1] === own.image;
    if (open || (!pairs && lit.size === 1 && lit.has(at))) ring(context, ...its.places[at], size + 5);
    else if (pairs && pairs[at][0] === own.layer) ring(context, ...its.places[at], size, 0.5); // the open block
  }
  context.globalAlpha = 1;
}

function placed(xy, width, height, margin, [scale, dx, dy] = [1, 0, 0]) {
  const axes = [0, 1].map((axis) => xy.filter((_, at) => at % 2 === axis));
  const [low, high] = [axes.map((all) => all.reduce((a, b) => Math.min(a, b), Infinity)), axes.map((all) => all.reduce((a, b) => Math.max(a, b), -Infinity))];
  const [w, h] = [width / 2, height / 2];
  return Array.from(axes[0], (x, at) => {
    const [u, v] = [(x - low[0]) / (high[0] - low[0] || 1), (axes[1][at] - low[1]) / (high[1] - low[1] || 1)];
    return [w + (margin + u * (width - 2 * margin) - w) * scale + dx, h + (height - margin - v * (height - 2 * margin) - h) * scale + dy];
  });
}

function looksOfPatches(own, legend) {
  const its = layerOf(own);
  const [rows, columns] = its.grid;
  const route = Math.max(routeOf(own), 0);
  const rank = own.colour === 'rank' ? ranks(its, route) : [];
  const cells = Array.from({ length: rows * columns }, (_, cell) => cell);
  const kinds = { row: (cell) => spot(cell, its)[1], rank: (cell) => rank[cell] ?? 0, column: (cell) => spot(cell, its)[2] };
  const values = cells.map(kinds[own.colour] ?? kinds.column);
  const high = Math.max(...values, 1);
  // as in arXiv 2502.20764: the colour is the column, the size is the row
  const sizes = cells.map(own.colour === 'row' ? kinds.column : kinds.row);
  const largest = Math.max(...sizes, 1);
  if (legend) {
    const dot = (size) => { const made = element('canvas', undefined, { width: 28, height: 28, style: 'width:14px;height:14px' }); symbol(made.getContext('2d'), 14, 14, 2 * size, { colour: paint('soft'), shape: 0 }); return made; };
    const named = own.colour === 'rank' ? `step in scan ${route + 1}` : wordsOf(own) ? 'place in the text' : own.colour;
    legend.append(element('span', `colour: ${named}`), element('span', own.colour === 'rank' ? '1' : '0'), ramp(about.palettes.cividis), element('span', String(high)));
    if (rows > 1) legend.append(element('span', `size: ${own.colour === 'row' ? 'column' : 'row'}`), element('span', '0'), dot(5), dot(12), element('span', String(largest)));
  }
  const small = cells.length > 1500 ? 0.6 : cells.length > 500 ? 0.75 : 1;
  return cells.map((cell) => ({ colour: css(mixed(about.palettes.cividis, values[cell] / high)), size: small * (5 + 8 * sizes[cell] / largest), shape: 0 }));
}

function looksOfPairs(all, own, legend) {
  const { images, blocks } = storeOf(own);
  const named = all.map(([layer, image]) => ({ class: images[image][1] ?? 'not known', predicted: images[image][2] ?? 'not known' }[own.colour] ?? `block ${blocks[layer]}`));
  const kinds = [...new Set(named)];
  kinds.slice(0, MANY_KINDS).forEach((kind, at) => {
    const mark = element('canvas', undefined, { width: 28, height: 28, style: 'width:14px;height:14px' });
    symbol(mark.getContext('2d'), 14, 14, 20, { colour: kindColour(at, kinds.length), shape: at });
    legend.append(element('span', undefined, { class: 'kind' }, mark, element('span', kind)));
  });
  if (kinds.length > MANY_KINDS) legend.append(element('span', `and ${kinds.length - MANY_KINDS} more`));
  const size = all.length <= 400 ? 10 : 7;
  return named.map((kind, point) => ({ colour: kindColour(kinds.indexOf(kind), kinds.length), size, shape: kinds.indexOf(kind), hidden: !passes(images[all[point][1]]) }));
}

// Whether an image passes the filter of the list.
export function passes(image) {
  const text = state.search.trim().toLowerCase();
  if (text && !image.slice(0, 3).some((one) => String(one ?? '').toLowerCase().includes(text))) return false;
  return state.verdict === 'all' || right(image) === (state.verdict === 'right');
}

// A circle, square, diamond, triangle or cross: colours alone do not tell kinds apart for everyone.
function symbol(context, x, y, size, { colour, shape }) {
  const half = size / 2;
  const corners = {
    1: [[-1, -1], [1, -1], [1, 1], [-1, 1]], 2: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
    3: [[0, -1.2], [1.15, 0.9], [-1.15, 0.9]], 4: [[0, 1.2], [1.15, -0.9], [-1.15, -0.9]],
    5: [[-1.2, -0.4], [-0.4, -0.4], [-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4],
      [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4]],
  }[shape % 6];
  context.beginPath();
  if (corners) corners.forEach(([dx, dy], at) => context[at ? 'lineTo' : 'moveTo'](x + 0.9 * half * dx, y + 0.9 * half * dy));
  else context.arc(x, y, half, 0, 2 * Math.PI);
  context.closePath();
  context.fillStyle = colour;
  context.fill();
  if (size < 4) return;
  [context.lineWidth, context.strokeStyle] = [0.8, 'white'];
  context.stroke();
}

function ring(context, x, y, size, wide = 1) {
  for (const [colour, width] of [['white', 4], ['#111', 2]]) {
    context.beginPath();
    context.arc(x, y, size / 2 + 1, 0, 2 * Math.PI);
    [context.strokeStyle, context.lineWidth] = [colour, width * wide];
    context.stroke();
  }
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
  let chosen = numbers.map((at) => pairsOf(own)[at]);
  if (add) {
    const names = new Set(chosen.map(String));
    const same = click && state.pairs.some((pair) => names.has(String(pair)));
    chosen = same ? state.pairs.filter((pair) => !names.has(String(pair))) : [...state.pairs.filter((pair) => !names.has(String(pair))), ...chosen];
  }
  const open = chosen.some(([layer, image]) => layer === own.layer && image === own.image);
  const [first] = chosen;
  if (!first || add || (open && !click)) return change({ pairs: chosen });
  return change({ pairs: chosen }, { layer: first[0], image: first[1] });
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
  const made = (text, numbers) => {
    const one = element('button', text, { class: 'small' });
    one.addEventListener('click', () => pick({ at: state.panes.indexOf(own) }, numbers, false, true));
    return one;
  };
  return element('dd', undefined, { class: 'buttons' }, ...found.numbers.map((at) => made(pairs ? `block ${blocks[pairs[at][0]]}, ${short(images[pairs[at][1]][0])}` : place(at, layer), [at])), made('select these', [...lit, ...found.numbers]));
}

// Arrow keys in the points: the next block, or the next image.
export function step(down, across) {
  const own = pane();
  const blocks = storeOf(own).layers.filter((one) => one.stage === layerOf(own).stage);
  const layer = blocks[Math.min(Math.max(blocks.indexOf(layerOf(own)) + down, 0), blocks.length - 1)].number;
  const image = Math.min(Math.max(own.image + across, 0), storeOf(own).collected - 1);
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
  const lit = (layer) => new Set(cellsOn(layer));
  its.key = '';
  its.many.replaceChildren(...layers.map((layer) => {
    const made = element('button', undefined, { title: `open ${block(layer)}`, 'aria-pressed': layer === layerOf(own) }, element('canvas', undefined, { width: 200, height: 200, 'aria-hidden': 'true' }), element('span', block(layer)));
    made.addEventListener('click', () => change({}, { layer: layer.number, mode: 'patches' }));
    return made;
  }));
  its.legend.replaceChildren();
  looksOfPatches(own, its.legend);
  for (const [at, layer] of layers.entries()) {
    const found = await settled(asked(own, layer), its, () => turn !== every);
    if (turn !== every || !found) return;
    if (found.error) {
      its.notice.textContent = found.error;
      continue;
    }
    const context = its.many.children[at].querySelector('canvas').getContext('2d');
    const looks = looksOfPatches({ ...own, layer: layer.number }, null);
    const chosen = lit(layer);
    placed(found.xy, 200, 200, 16).forEach((place, cell) => symbol(context, ...place, looks[cell].size * (chosen.has(cell) ? 1.6 : 1), looks[cell]));
    for (const cell of chosen) if (chosen.size === 1 && cell >= 0) ring(context, ...placed(found.xy, 200, 200, 16)[cell], looks[cell].size + 8);
  }
}
export const plotted = () => views;
