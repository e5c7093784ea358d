// The state of the page: panes, the selection they share, how numbers are shown. It lives in the address.
import { about, asRuns, byId, cellsOf, clamp, runs } from './data.js';

export const CHOICES = {
  mode: ['patches', 'blocks', 'every'], direction: ['row', 'column'], show: ['all', 'image', 'mean', 'difference', 'spread', 'classes'],
  method: ['pca', 'tsne', 'umap'], sign: ['signed', 'positive', 'absolute'], normalise: ['none', 'largest', 'range', 'sum'],
  palette: ['orange', 'viridis', 'cividis'], colour: ['column', 'row', 'rank', 'block', 'class', 'predicted'],
  verdict: ['all', 'right', 'wrong'], order: ['stored', 'unusual'],
};
const COLOURS = { patches: ['column', 'row', 'rank'], blocks: ['block', 'class', 'predicted'], every: ['column', 'row'] };
const PANE = {
  store: 0, layer: 0, route: -1, image: 0, mode: 'patches', direction: 'row', show: 'all', gate: false, skip: false,
  method: 'pca', first: true, colour: 'column', one: '', other: '',
};
const SHARED = {
  active: 0, sign: 'absolute', normalise: 'none', log: false, palette: 'orange', opacity: 0.85, path: false, step: 0, lock: 0,
  search: '', verdict: 'all', order: 'stored', large: false, start: 0,
};
export const state = { ...SHARED, panes: [{ ...PANE }], cells: [], grid: [1, 1], pairs: [] };

export const pane = (at = state.active) => state.panes[Math.min(at, state.panes.length - 1)];
export const storeOf = (its = pane()) => about.stores[its.store];
export const layerOf = (its = pane()) => storeOf(its).layers.find((one) => one.number === its.layer) ?? storeOf(its).layers[0];
export const imageOf = (its = pane()) => storeOf(its).images[its.image];
export const wordsOf = (its = pane()) => imageOf(its)[5]; // of a text
export const routeOf = (its = pane(), { routes } = layerOf(its)) => (its.route < routes && routes > 1 ? its.route : -1);
export const coloursOf = (its, { grid, orders } = layerOf(its)) => COLOURS[its.mode].filter((one) => !(one === 'rank' && !orders.length) && !(one === 'row' && grid[0] < 2));
export const right = ([, , , correct]) => correct;

// Slice, row and column of a cell; the slices of a volume lie on a sheet, some side by side.
export function spot(cell, { grid, slices }) {
  const [row, column] = [Math.floor(cell / grid[1]), cell % grid[1]];
  if (!slices) return [0, row, column];
  const [across, high] = slices;
  const wide = grid[1] / across;
  return [Math.floor(row / high) * across + Math.floor(column / wide), row % high, column % wide];
}
export const sides = ({ grid, slices }) => (slices ? [grid[0] / slices[1] * slices[0], slices[1], grid[1] / slices[0]] : [1, ...grid]);
export function cellAt([slice, row, column], { grid, slices }) {
  const [across, high] = slices ?? [1, grid[0]];
  return (Math.floor(slice / across) * high + row) * grid[1] + (slice % across) * (grid[1] / across) + column;
}

// Photos of a class that have matrices: of the pane's "class", or the "other"; no name is the class of the open photo.
export const classOf = (its, what) => (what === 'class' ? its.one || imageOf(its)[1] : its.other);
export function classImages(its, what) {
  const { images } = storeOf(its);
  const all = images.flatMap(([, label], at) => (label !== null && label === classOf(its, what) ? [at] : []));
  const kept = all.filter((at) => (about.live ? images[at][4] : at in storeOf(its).photos)).slice(0, 60);
  return kept.length || !about.live ? kept : all.slice(0, 8); // the model runs on each
}

// The selected cells on another grid over the same image: those at the same places.
export function cellsOn(its = layerOf()) {
  const [from, to] = [storeOf().layers.find((one) => one.grid.join() === state.grid.join()) ?? { grid: state.grid }, its];
  const rest = state.cells.filter((cell) => cell < 0 && -cell <= its.rest);
  const chosen = state.cells.filter((cell) => cell >= 0);
  if (from.grid.join() === to.grid.join()) return [...chosen, ...rest];
  const moved = (cell, here, there) => {
    const [old, own] = [sides(here), sides(there)];
    return cellAt(spot(cell, here).map((at, axis) => Math.floor((at + 0.5) * own[axis] / old[axis])), there);
  };
  const inside = new Set(chosen);
  const there = new Set();
  for (let cell = 0; chosen.length && cell < cellsOf(its); cell++) if (inside.has(moved(cell, to, from))) there.add(cell);
  for (const cell of chosen) there.add(moved(cell, from, to)); // larger cells may miss every centre above
  return [...[...there].sort((a, b) => a - b), ...rest];
}

// A late block with a grid that is worth looking at, a patch in its middle, a photo that the model gets right.
export function beginning(store = 0) {
  const its = about.stores[store];
  const late = its.layers.findLast((layer) => cellsOf(layer) >= 36) ?? its.layers[its.layers.length - 1];
  const fit = (one, at) => (about.live ? one[4] : at in its.photos);
  const image = Math.max(its.images.findIndex((one, at) => fit(one, at) && right(one) !== false), its.images.findIndex(fit), 0);
  const show = its.images.length > 1 ? 'all' : 'image';
  const cell = its.images[image][5] ? cellsOf(late) - 1 : cellAt(sides(late).map((side) => side >> 1), late); // of a text the last token
  return { ...SHARED, panes: [{ ...PANE, store, layer: late.number, image, show }], cells: [cell], grid: late.grid, pairs: [] };
}

// Every field of a state: its name in an address, where that of a second pane begins with "b.", whose it is, its own name.
function fields(all) {
  const named = (own, usual, prefix = '') => Object.keys(usual).map((name) => [prefix + name, own, name]);
  return [...named(all, SHARED), ...all.panes.flatMap((its, at) => named(its, PANE, at ? 'b.' : ''))];
}

// The state as the part of an address behind its #: what differs from the beginning.
export function written() {
  const plain = beginning();
  const found = new URLSearchParams();
  for (const [key, own, name] of fields(state)) if (own[name] !== (own === state ? plain : plain.panes[0])[name]) found.set(key, String(own[name]));
  if (state.panes.length > 1) found.set('b', '1');
  const cells = ({ grid, cells: all }) => `${grid.join('x')}/${asRuns(all)}`;
  if (cells(state) !== cells(plain)) found.set('cells', cells(state));
  const layers = [...new Set(state.pairs.map(([layer]) => layer))];
  const images = (layer) => asRuns(state.pairs.filter((one) => one[0] === layer).map((one) => one[1]));
  if (layers.length) found.set('points', layers.map((layer) => `${layer}/${images(layer)}`).join(';'));
  return found.toString().replaceAll('%2C', ',').replaceAll('%3A', ':').replaceAll('%2F', '/').replaceAll('%3B', ';');
}

// A field of an address; throws where it cannot be read.
function read(name, value) {
  const usual = { ...SHARED, ...PANE }[name];
  const wrong = new Error(`${name} is not "${value.slice(0, 20)}"`);
  if (CHOICES[name] ? !CHOICES[name].includes(value) : typeof usual === 'boolean' && !['true', 'false'].includes(value)) throw wrong;
  if (typeof usual === 'boolean') return value === 'true';
  if (typeof usual === 'string') return value.slice(0, 100);
  const number = value.trim() === '' ? NaN : Number(value);
  const fits = ['opacity', 'lock'].includes(name) ? Number.isFinite(number) : Number.isInteger(number) && number >= -1 && number < 1e6;
  if (!fits) throw wrong;
  return number;
}

// The state of an address; throws where it cannot be read.
function parsed(text) {
  const given = new URLSearchParams(text);
  const found = beginning();
  if (given.has('b')) found.panes.push({ ...found.panes[0] });
  for (const [key, own, name] of fields(found)) if (given.has(key)) own[name] = read(name, given.get(key));
  if (given.has('cells')) {
    const match = /^(\d{1,4})x(\d{1,4})\/(.*)$/.exec(given.get('cells'));
    if (!match || !Number(match[1]) || !Number(match[2])) throw new Error('the selected patches are damaged');
    found.grid = [Number(match[1]), Number(match[2])];
    found.cells = runs(match[3]);
    if (found.cells.some((cell) => cell < -64 || cell >= cellsOf(found))) throw new Error('a patch lies outside its grid');
  }
  found.pairs = (given.get('points') ?? '').split(';').filter(Boolean).flatMap((part) => {
    const [layer, images] = part.split('/');
    return runs(images ?? '').map((image) => [runs(layer)[0], image]);
  });
  return found;
}

// Only what there is: a link may come from another store.
function settle() {
  state.panes = state.panes.slice(0, 2);
  state.active = clamp(state.active, 0, state.panes.length - 1);
  for (const its of state.panes) {
    its.store = clamp(its.store, 0, about.stores.length - 1);
    const { layers, images } = storeOf(its);
    if (!layers.some((one) => one.number === its.layer)) its.layer = (layers.findLast((one) => one.number <= its.layer) ?? layers[layers.length - 1]).number;
    its.image = clamp(its.image, 0, images.length - 1);
    if (!coloursOf(its).includes(its.colour)) [its.colour] = coloursOf(its);
  }
  state.opacity = clamp(state.opacity, 0, 1);
  state.lock = Math.max(state.lock, 0);
  state.step = clamp(state.step, 0, layerOf().orders[0]?.length ?? 0);
}

const RESCALING = ['sign', 'normalise', 'log']; // a scale that was kept does not fit any more
let draw = () => {};
let last = { at: -Infinity, kind: '' };
export const onChange = (function_) => { draw = function_; };

// One gesture: the state changes, the address follows, the page is drawn. Quick repeats of the same are one entry for Back.
export function change(changes, its = {}) {
  Object.assign(state, { start: 0 }, RESCALING.some((name) => name in changes) ? { lock: 0 } : {}, changes);
  Object.assign(pane(), its);
  settle();
  const now = { at: performance.now(), kind: Object.keys({ ...changes, ...its }).join() };
  remember(now.kind === last.kind && now.at - last.at < 250 ? 'replaceState' : 'pushState');
  last = now;
  return draw();
}

export function remember(how) {
  const text = written();
  if (how === 'pushState' && text === location.hash.slice(1)) return;
  try {
    history[how](null, '', '#' + text);
  } catch { /* a frame of a notebook has no address */ }
}

export function open(text) {
  let found = beginning();
  byId('message').textContent = '';
  try {
    if (/[?&]state=/.test(location.search) && !text) throw new Error('it is of an older version');
    found = parsed(text);
  } catch (error) {
    byId('message').textContent = `This link is damaged or incomplete (${error.message}); showing the start.`;
  }
  Object.assign(state, found);
  settle();
  return draw();
}
