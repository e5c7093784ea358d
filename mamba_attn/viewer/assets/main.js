// Keys, the address, dropped photos; and the first picture.
import { about, byId, clamp, live } from './data.js';
import { STARTS, add, button, compare, drawAll, learn, start } from './controls.js';
import { element } from './colours.js';
import { repaint, select, shownMaps, strips } from './maps.js';
import { drawPoints, litPoints, plotted, step } from './points.js';
import { CHOICES, cellsOn, change, layerOf, onChange, open, pane, remember, routeOf, state, storeOf } from './state.js';
import { steps } from './words.js';

onChange(drawAll);
byId('starts').append(element('span', { class: 'label' }, 'Start with:'), ...STARTS.map(([name], at) => button(`start-${at + 1}`, name, () => start(at))));
byId('open-help').addEventListener('click', () => {
  byId('help').hidden = !byId('help').hidden;
  byId('open-help').setAttribute('aria-expanded', !byId('help').hidden);
});
byId('more').addEventListener('toggle', learn);

function moved(down, across) {
  if (pane().mode === 'blocks' && document.activeElement?.matches('.plot')) return step(down, across);
  const its = layerOf();
  const [rows, columns] = its.grid;
  const patches = cellsOn(its).filter((cell) => cell >= 0);
  const cell = patches[patches.length >> 1] ?? (rows >> 1) * columns + (columns >> 1);
  if (!patches.length) return select([cell], its);
  return select([clamp(Math.floor(cell / columns) + down, 0, rows - 1) * columns + clamp(cell % columns + across, 0, columns - 1)], its);
}

const after = (value, among) => among[(among.indexOf(value) + 1) % among.length];
const cycle = (name) => change({}, { [name]: after(pane()[name], CHOICES[name]) });
const other = (by) => {
  const { layers } = storeOf();
  return change({}, { layer: layers[clamp(layers.indexOf(layerOf()) + by, 0, layers.length - 1)].number });
};
const photo = (by) => change({}, { image: clamp(pane().image + by, 0, storeOf().images.length - 1) });
const walk = (by) => {
  const { length } = steps(layerOf(), routeOf());
  return change({ path: length > 0, step: clamp((state.step || (by < 0 ? length : 0)) + by, 1, length) });
};
const KEYS = {
  ArrowUp: () => moved(-1, 0), ArrowDown: () => moved(1, 0), ArrowLeft: () => moved(0, -1), ArrowRight: () => moved(0, 1),
  Escape: () => change({ cells: [], pairs: [] }), r: () => cycle('direction'), m: () => cycle('show'), v: () => cycle('mode'),
  s: () => change({ sign: after(state.sign, CHOICES.sign) }), p: () => change({ path: !state.path && layerOf().orders.length > 0 }),
  '[': () => other(-1), ']': () => other(1), ',': () => photo(-1), '.': () => photo(1), '-': () => walk(-1), '+': () => walk(1),
  b: compare, l: () => byId('lock')?.click(), u: () => history.back(), '?': () => byId('open-help').click(),
};
document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest('select, input[type=search], input[type=range]')) return;
  if (event.key.startsWith('Arrow') && event.target.closest('input')) return; // radio buttons move with arrows
  const digit = /^[0-9]$/.test(event.key) && Number(event.key) <= layerOf().routes;
  const act = KEYS[event.key] ?? (digit ? () => change({}, { route: Number(event.key) - 1 }) : null);
  if (!act) return;
  event.preventDefault();
  act();
});

if (live) {
  const drop = (on) => document.body.classList.toggle('drop', on);
  addEventListener('dragover', (event) => { event.preventDefault(); drop(true); });
  addEventListener('dragleave', () => drop(false));
  addEventListener('drop', (event) => {
    event.preventDefault();
    drop(false);
    if (event.dataTransfer.files[0]) add(event.dataTransfer.files[0]);
  });
}
let wait = 0;
const again = () => { clearTimeout(wait); wait = setTimeout(() => { repaint(); drawPoints(); }, 60); };
addEventListener('resize', again);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', again);
addEventListener('popstate', () => open(location.hash.slice(1)));
if (typeof DecompressionStream === 'undefined' || typeof OffscreenCanvas === 'undefined') {
  byId('message').textContent = 'This browser is too old for the page; use one from 2023 or later.';
} else {
  open(location.hash.slice(1) || about.start);
  if (about.start && !location.hash.slice(1)) remember('replaceState');
}
window.viewer = { state, change, maps: shownMaps, points: plotted, lit: litPoints, strips, open };
