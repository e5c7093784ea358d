// What is shown, in words.
import { cellsOf } from './data.js';
import { cellsOn, classImages, classOf, imageOf, layerOf, right, routeOf, sides, spot, state, storeOf, wordsOf } from './state.js';

export const METHODS = { pca: 'PCA', tsne: 't-SNE', umap: 'UMAP' };
export const number = (value) => (value === 0 ? '0' : Math.abs(value) >= 0.001 && Math.abs(value) < 1000
  ? String(Number(value.toPrecision(3))) : value.toExponential(1));
export const short = (key) => key.split('/').pop();
export const block = (its, one = storeOf()) => (new Set(one.stages).size > 1 ? `stage ${its.stage}, ` : '') + `block ${its.block}`;

export const noun = (many) => (wordsOf() ? 'token' : 'patch') + (many ? (wordsOf() ? 's' : 'es') : '');
// What the model was run on, one or many.
export const item = (many) => (wordsOf() ? 'text' : layerOf().slices ? 'volume' : 'photo') + (many ? 's' : '');
export const single = () => (storeOf().collected < 2 ? `there is one ${item()}: nothing to compare it with` : '');

// The model of a pane, where the panes show several.
export const models = (its) => (state.panes.some((one) => one.store !== its.store) ? storeOf(its).name : '');
export const gridOf = (its) => (wordsOf() ? `${its.grid[1]} tokens` : sides(its).slice(its.slices ? 0 : 1).join(' × '));

export function who(its) {
  const cells = cellsOn(its);
  const patches = cells.filter((cell) => cell >= 0);
  if (!cells.length) return [noun(true), true];
  if (!patches.length) return cells[0] === -1 && its.classes ? ['the class token', false] : ['the extra tokens', true];
  return patches.length === 1 && cells.length === 1 ? [`${noun()} ${place(patches[0], its)}`, false] : [`${patches.length} ${noun(true)}`, true];
}

export function caption(its) {
  const [name, many] = who(layerOf(its));
  const verb = its.direction === 'row' ? (many ? 'take from' : 'takes from') : (many ? 'give to' : 'gives to');
  const route = routeOf(its);
  return `What ${name} ${verb}${many ? ', on average' : ''} · ${block(layerOf(its))}${route < 0 ? '' : ` · scan ${route + 1}`}`;
}

export function place(cell, its) {
  if (cell < 0) return 'class token';
  return wordsOf() ? `${cell} “${wordsOf()[cell]}”` : `(${spot(cell, its).slice(its.slices ? 0 : 1).join(', ')})`;
}

export function verdict(image) {
  const [, label, predicted] = image;
  const ok = right(image);
  if (predicted === null) return label ?? '';
  if (ok === null) return `predicted ${predicted}`;
  return ok ? `${label} ✓` : `${predicted} ✗ is ${label}`;
}

// A photo's name, and the verdict where there is one: a model without classes has none.
export const answered = (image, name = image[0]) => [name, verdict(image)].filter(Boolean).join(': ');

export function unit(what) {
  if (what === 'spread') return 'standard deviation';
  const kind = { signed: 'attention', positive: 'positive attention', absolute: 'strength of attention' }[state.sign];
  return kind + { none: '', largest: ' / maximum', range: ', 0 to 1', sum: ' / sum' }[state.normalise] + (state.log ? ', decades' : '');
}

// The title of a map, and the words under it.
export function titled({ pane: its, what }) {
  const { collected } = storeOf(its);
  const ofClass = (which) => {
    const [name, count] = [classOf(its, which), classImages(its, which).length];
    if (!name) return ['Usual', `mean of ${collected} ${item(true)}`];
    return [name, count === 1 ? `the one ${item()} of this class` : `mean of ${count} ${item(true)} of this class`];
  };
  const own = item() === 'photo' ? 'image' : item();
  const bare = item() === 'photo' ? ', drawn without a photo' : '';
  return {
    image: [`This ${own}`, wordsOf(its) && collected < 2 ? '' : answered(imageOf(its), short(imageOf(its)[0]))],
    mean: [collected > 1 ? 'Usual' : `The one ${own}`, `mean of ${collected} ${item(collected > 1)}${bare}`],
    difference: ['What is special here', `this ${own} minus the usual`],
    spread: ['How much it varies', `standard deviation over ${collected} ${item(true)}`],
    class: ofClass('class'),
    other: ofClass('other'),
    versus: [`${ofClass('class')[0]} minus ${classOf(its, 'other') || 'usual'}`, 'the left map minus the middle one'],
    apart: ['Left minus right', 'what the two panes differ in'],
  }[what];
}

export function strongest(map, its, count) {
  const order = Array.from(map.keys()).sort((a, b) => Math.abs(map[b]) - Math.abs(map[a]));
  return order.slice(0, count).map((cell) => `${place(cell, its)} ${number(map[cell])}`).join(', ');
}

// At which step a scan visits each cell, from 1.
export function ranks(its, route) {
  const found = [];
  (its.orders[route] ?? []).forEach((cell, step) => { if (cell >= 0) found[cell] = step + 1; });
  return found;
}

// The patches that a scan, of all scans the first one, visits, in its order.
export function steps(its, route) {
  return (its.orders[Math.max(route, 0)] ?? []).filter((cell) => cell >= 0 && cell < cellsOf(its));
}

// When each scan visits a cell, e.g. "3rd and 14th of 16 in scans 1-2".
export function visits(its, cell) {
  const each = its.orders.map((_, route) => ordinal(ranks(its, route)[cell]));
  const last = each.pop();
  const listed = each.length ? `${each.join(', ')} and ${last}` : last;
  return `${listed} of ${its.orders[0].length.toLocaleString('en')}${each.length ? ` in scans 1-${its.orders.length}` : ''}`;
}

function ordinal(step) {
  if (step === undefined) return 'never';
  const ending = [11, 12, 13].includes(step % 100) ? 'th' : ['th', 'st', 'nd', 'rd'][step % 10] ?? 'th';
  return step.toLocaleString('en') + ending;
}

// A scan's direction as an arrow, if most of its steps go one way.
export function arrow(its, route) {
  const path = steps(its, route);
  const counts = new Map();
  path.slice(1).forEach((cell, at) => {
    const [down, across] = [Math.floor(cell / its.grid[1]) - Math.floor(path[at] / its.grid[1]), cell % its.grid[1] - path[at] % its.grid[1]];
    const way = down && across ? '' : down ? (down > 0 ? '↓' : '↑') : across > 0 ? '→' : '←';
    counts.set(way, (counts.get(way) ?? 0) + 1);
  });
  const found = [...counts].find(([way, count]) => way && count > 0.6 * path.length);
  return found ? found[0] : `${route + 1}`;
}
