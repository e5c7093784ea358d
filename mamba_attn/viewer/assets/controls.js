// The controls: built from what there is, greyed with the reason where they cannot act.
import { about, ask, byId, cellsOf, clamp, has, live, picture } from './data.js';
import { element } from './colours.js';
import { drawMaps, mapTools, repaint, unusual } from './maps.js';
import { drawPoints, passes, pointTools, zoom } from './points.js';
import { beginning, change, classOf, coloursOf, layerOf, pane, right, routeOf, state, storeOf, wordsOf } from './state.js';
import { METHODS, answered, arrow, block, caption, gridOf, item, noun, short, single, steps, verdict } from './words.js';

const LISTED = 300; // photos in the list; the search finds the others
const ELSEWHERE = 'not on this page: mamba-attn explore shows it';
const able = new Map(); // which layers have a gate and a D, by store

export function build() {
  const held = document.activeElement?.dataset?.name;
  const its = pane();
  byId('title').textContent = `Where does ${storeOf().name} look?`;
  document.title = `${caption(its)} · ${storeOf().name}`;
  byId('lead').replaceChildren(...leadOf(its));
  const text = Boolean(wordsOf(its));
  [byId('starts').hidden, byId('photos').hidden] = [text, text && storeOf().images.length < 2];
  byId('story').textContent = (STARTS[state.start - 1]?.[1] ?? '').replaceAll('photo', item());
  [...byId('starts').querySelectorAll('button')].forEach((one, at) => {
    one.textContent = STARTS[at][0].replaceAll('photo', item());
    one.setAttribute('aria-pressed', at + 1 === state.start);
  });
  for (const id of ['photos', 'list']) byId(id).setAttribute('aria-label', item(true));
  fill('where', above(its));
  fill('patch', ofPatch(its));
  fill('selecting', selecting(its));
  filters();
  list(its);
  if (!byId('plots')) byId('points').append(element('div', { class: 'bar', id: 'points-bar' }), element('div', { id: 'plots' }), element('div', { class: 'bar', id: 'points-tools' }));
  fill('points-bar', ofPoints(its));
  fill('points-tools', its.mode === 'every' ? [] : handling());
  fill('display', more(its));
  document.querySelector('.work').classList.toggle('two', state.panes.length > 1);
  byId('plots').className = state.panes.length > 1 ? 'plots-two' : '';
  if (held) document.querySelector(`[data-name="${held}"]:checked, [data-name="${held}"]:not([type=radio])`)?.focus({ preventScroll: true });
}

// What one sees, and what the colours mean.
function leadOf(its) {
  const [orange, blue] = [element('span', { class: 'adds' }, 'orange'), element('span', { class: 'subtracts' }, 'blue')];
  const first = [`The ${item()} is cut into ${noun(true)}. `, element('b', {}, `Click a ${noun()}`), ` to see which other ${noun(true)} it takes information from. `];
  if (its.show === 'spread') return [...first, 'The deeper the ', orange, `, the more this differs between ${item(true)}.`];
  if (state.sign === 'signed') return [...first, 'Values in ', orange, ' add, those in ', blue, ' subtract.'];
  return [...first, 'The deeper the ', orange, `, the more it ${its.direction === 'row' ? 'takes' : 'gives'}`, ...(its.show === 'all' ? ['; in the third map ', blue, ' is less than usual.'] : ['.'])];
}
const fill = (id, made) => byId(id).replaceChildren(...made.filter(Boolean));

function above(its) {
  const [layer, { collected, featured, top1, images, layers }, text] = [layerOf(its), storeOf(its), wordsOf(its)];
  const known = images.map(right).filter((one) => one !== null);
  const counted = [top1 !== null && `top-1 ${top1.toFixed(1)} %`, `${collected} ${item(collected > 1)}${featured < collected ? `, ${featured} of them shown` : ''}`, known.length > 0 && `${known.filter(Boolean).length} of ${known.length} ${item(true)} right`];
  const scans = layer.routes > 1 ? [[-1, 'all'], ...layer.orders.map((_, route) => [route, arrow(layer, route), missing(layer, route)])] : [[-1, 'one']];
  return [
    state.panes.length > 1 && choice('active', 'controls of', [[0, 'pane A'], [1, 'pane B']]),
    about.stores.length > 1 ? menu('store', 'model', about.stores.map((one, at) => [at, named(at)]), { act: (store) => change({}, { ...beginning(store).panes[0] }) })
      : element('b', {}, storeOf().name),
    !(text && collected < 2) && element('span', { class: 'hint' }, counted.filter(Boolean).join(' · ')),
    element('span', { class: 'space' }),
    menu('layer', 'block', layers.map((one) => [one.number, `${block(one)} · ${gridOf(one)}`])),
    layer.orders.length > 0 && !(text && layer.routes < 2) && choice('route', 'scan direction', scans, { value: routeOf(its) }),
    !text && toggle('large', 'large strip'),
  ];
}

function named(at) {
  const { name, folder } = about.stores[at];
  return about.stores.filter((one) => one.name === name).length > 1 ? `${name} (${folder || at + 1})` : name;
}
const missing = (layer, route) => (live || `mean/${route}` in layer.matrices ? '' : ELSEWHERE);

function ofPatch(its) {
  const classes = [...new Set(storeOf().images.map((one) => one[1]))].filter((one) => one !== null).sort().map((one) => [one, one]);
  const spread = live || storeOf().layers.some((one) => 'spread/sum' in one.matrices);
  const two = state.panes.length > 1;
  const shows = [['all', 'all three'], ['image', `this ${item()}`], ['mean', 'usual'], ['difference', 'special'], ['spread', 'varies', spread ? '' : ELSEWHERE], ['classes', 'by class', classes.length > 1 ? '' : 'the classes are not known']];
  return [
    choice('direction', `a ${noun()}`, [['row', 'takes from'], ['column', 'gives to']]),
    choice('sign', 'values', [['absolute', 'strength'], ['signed', 'with sign'], ['positive', 'positive']]),
    !(single() && wordsOf(its)) && choice('show', 'show', two ? shows.slice(1) : shows, { value: two && its.show === 'all' ? 'image' : its.show, why: single() }),
    its.show === 'classes' && menu('one', 'class', classes, { value: classOf(its, 'class') ?? classes[0]?.[0] }),
    its.show === 'classes' && menu('other', 'minus', [['', `all ${item(true)}`], ...classes]),
  ];
}

function selecting(its) {
  return [
    button('clear', 'clear selection', () => change({ cells: [], pairs: [] }), state.cells.length || state.pairs.length ? '' : `nothing is selected: the map is the mean over all ${noun(true)}`),
    layerOf(its).classes > 0 && button('class', 'class token', () => change({ cells: [-1], grid: layerOf().grid })),
    button('compare', state.panes.length > 1 ? 'one pane' : 'side by side', compare),
  ];
}

export function compare() {
  const [first, second] = state.panes;
  return change({ panes: second ? [pane()] : [first, { ...first }], active: second ? 0 : 1 });
}

function filters() {
  const { images } = storeOf();
  const box = byId('filters');
  if (!box.children.length) {
    const oninput = ({ target }) => { state.search = target.value; list(pane()); drawPoints(); };
    const onchange = ({ target }) => change({ search: target.value });
    box.append(element('input', { type: 'search', placeholder: 'search', 'data-name': 'search', oninput, onchange }), element('span', { id: 'sorting', class: 'bar' }));
  }
  box.firstChild.setAttribute('aria-label', `Search ${item(true)} by name or class`);
  if (document.activeElement !== box.firstChild) box.firstChild.value = state.search;
  const [known, kept] = [images.some((one) => right(one) !== null), images.some((one) => one[4])];
  fill('sorting', [
    menu('verdict', '', [['all', 'all'], ['right', 'right ✓'], ['wrong', 'wrong ✗']], { why: known ? '' : 'the classes are not known', spoken: 'Predictions' }),
    menu('order', '', [['stored', 'in order'], ['unusual', 'unusual']], { why: kept ? '' : `no ${item()} is stored in full`, spoken: `Order of ${item(true)}` }),
    live && item() === 'photo' && button('add', 'add photo', addPhoto),
  ]);
}

let sorted = 0;
async function list(its) {
  const own = ++sorted;
  const { images } = storeOf(its);
  const chosen = its.mode === 'blocks' && state.pairs.length ? new Set(state.pairs.map(([, image]) => image)) : null;
  let found = images.flatMap((one, at) => (passes(one) && (!chosen || chosen.has(at)) ? [at] : []));
  if (state.order === 'unusual') {
    const far = await unusual(its, found.filter((at) => images[at][4]).slice(0, LISTED));
    if (own !== sorted) return;
    found = found.sort((a, b) => (far.get(b) ?? -1) - (far.get(a) ?? -1));
  }
  const key = [its.store, images.length, ...found].join();
  const box = byId('list');
  if (box.dataset.key !== key) { // pictures stay while nothing but the choice changes
    box.dataset.key = key;
    box.replaceChildren(...found.slice(0, LISTED).map((at) => {
      const source = picture(its.store, at, true);
      const onclick = () => change({}, { image: at, ...(['mean', 'spread'].includes(pane().show) ? { show: 'image' } : {}) });
      return element('button', { 'data-image': at, title: answered(images[at]), onclick },
        source && element('img', { src: source, alt: '', loading: 'lazy' }), element('span', {}, verdict(images[at]) || short(images[at][0])));
    }));
    const rest = found.length ? Math.max(found.length - LISTED, 0) : `no ${item()} fits`;
    if (rest) box.append(element('span', { class: 'hint' }, rest > 0 ? `${rest.toLocaleString('en')} more: search` : rest));
  }
  for (const one of box.querySelectorAll('button')) one.setAttribute('aria-pressed', Number(one.dataset.image) === its.image);
}

// A photo of your own: the model runs on it, and it joins the list.
export async function add(file) {
  const { store } = pane();
  byId('message').textContent = `The model looks at ${file.name} …`;
  const reply = await ask(`api/photo?store=${store}&name=${encodeURIComponent(file.name)}`, { method: 'POST', body: file });
  byId('message').textContent = reply.error ?? '';
  if (reply.error) return;
  about.stores[store].images[reply.image] = reply.entry;
  change({ search: '', verdict: 'all', pairs: [] }, { image: reply.image, show: 'all' });
}

function addPhoto() {
  const onchange = () => { input.remove(); if (input.files[0]) add(input.files[0]); };
  const input = element('input', { type: 'file', accept: 'image/*', hidden: true, onchange });
  document.body.append(input);
  input.click();
}

function ofPoints(its) {
  const held = (method) => live || Object.keys(storeOf().points).some((key) => key.endsWith('/' + method));
  const layouts = Object.entries(METHODS).map(([method, name]) => [method, name, held(method) ? '' : `not on this page: mamba-attn report --method ${method} holds it`]);
  return [
    choice('mode', '', [['patches', `${noun(true)} of this block`], ['blocks', 'blocks of this stage', single()], ['every', 'every block']], { spoken: 'compare' }),
    choice('method', 'layout', layouts),
    menu('colour', 'colour', coloursOf(its).map((one) => [one, one === 'column' && wordsOf(its) ? 'place' : one])),
  ];
}

function handling() {
  const zooms = [['zoom-in', '+', 1.5, '+ larger points view'], ['zoom-out', '−', 1 / 1.5, '− smaller points view'], ['zoom-reset', 'reset', 0, 'reset points view']];
  return [
    choice('tool', 'drag', [['lasso', 'lasso'], ['box', 'box'], ['move', 'move']], { value: pointTools.points, act: (tool) => { pointTools.points = tool; build(); } }),
    element('span', { class: 'segments' }, ...zooms.map(([name, label, factor, spoken]) => button(name, label, () => zoom(factor), '', spoken))),
  ];
}

function more(its) {
  const layer = layerOf(its);
  const length = steps(layer, routeOf(its)).length;
  const known = able.get(its.store)?.[layer.name];
  const why = (name, what) => (!live ? 'needs the model: mamba-attn explore shows it' : !layer.orders.length ? `softmax attention has no ${what}`
    : known && !known[name] ? `the scans of this block have no ${what}` : '');
  const unsigned = state.sign === 'signed' && state.normalise !== 'range' ? 'values with a sign are blue and orange' : '';
  const pathless = wordsOf(its) ? 'a text is read from its start' : length ? '' : 'softmax attention has no path';
  const png = (what, why_) => button(`png-${what}`, `${what} as PNG`, () => saving.png(what), why_);
  return [
    choice('normalise', 'scale', [['none', 'as it is'], ['largest', 'divide by maximum'], ['sum', 'divide by sum'], ['range', '0 to 1']]),
    toggle('log', 'logarithmic'),
    toggle('gate', 'with the gate', why('gate', 'gate')),
    toggle('skip', 'with D', why('skip', 'D')),
    choice('palette', 'colours', [['orange', 'orange'], ['viridis', 'viridis'], ['cividis', 'cividis']], { why: unsigned }),
    slider('opacity', `opacity ${state.opacity}`, [0, 1, 0.05]),
    choice('map-tool', `drag over ${noun(true)}`, [['box', 'box'], ['lasso', 'lasso']], { value: mapTools.map, act: (tool) => { mapTools.map = tool; build(); } }),
    toggle('path', 'scan path', pathless),
    length > 0 && slider('step', state.step ? `first ${state.step} of ${length} steps` : `all ${length} steps`, [0, length, 1], state.path ? '' : 'switch the scan path on'),
    length > 0 && button('play', 'play the path', play, pathless),
    toggle('first', 'reduce to 100 dimensions first (PCA)', its.method === 'pca' ? 'PCA needs no reduction before' : live ? '' : 'this page has one of both'),
    png('maps', wordsOf(its) ? 'a text is no picture: save the strip' : ''),
    png('points'),
    png('strip'),
    button('npz', 'numbers as NPZ', () => saving.npz()),
    button('reset', 'reset view', () => change({ ...beginning(its.store) })),
  ];
}
export const saving = {}; // filled by save.js

// Which layers have a gate and a D is known once the model has run.
export async function learn() {
  const { store, image } = pane();
  if (able.has(store) || !live) return;
  able.set(store, null);
  const reply = await has({ store, image });
  able.set(store, reply.layers ?? null);
  fill('display', more(pane()));
}

let playing = 0;
function play() {
  const length = steps(layerOf(), routeOf()).length;
  const own = ++playing;
  const began = performance.now();
  state.path = true;
  const go = (now) => {
    if (own !== playing) return;
    state.step = clamp(Math.ceil((now - began) / 3000 * length), 1, length);
    repaint();
    if (state.step < length) requestAnimationFrame(go);
    else change({ step: 0 });
  };
  requestAnimationFrame(go);
}

// A field of the open pane, or of the whole page: its value, and how it changes.
const valueOf = (name) => (name in pane() ? pane() : state)[name];
const set = (name) => (value) => (name in pane() ? change({}, { [name]: value }) : change({ [name]: value }));

function control(label, tag, attributes, ...children) {
  return element(tag, { class: 'control', ...attributes }, label && element('span', { class: 'label' }, label), ...children);
}

// Radio buttons in a row; options are [value, words, why it is not offered].
function choice(name, label, options, { value = valueOf(name), act = set(name), why = '', spoken = label } = {}) {
  const row = options.map(([option, text, lacking]) => element('label', { title: lacking || why || undefined },
    element('input', { type: 'radio', name, value: option, 'data-name': name, checked: option === value, disabled: Boolean(lacking || why), onchange: () => act(option) }),
    element('span', {}, text)));
  const spoken_ = spoken + (why ? ` (${why})` : '');
  return control(label, 'span', { role: 'radiogroup', 'aria-label': spoken_, title: why || undefined }, element('span', { class: 'segments' }, ...row));
}

function menu(name, label, options, { value = valueOf(name), act = set(name), why = '', spoken = label } = {}) {
  const onchange = ({ target }) => act(options[target.selectedIndex][0]);
  return control(label, 'label', {}, element('select', { 'data-name': name, 'aria-label': spoken, title: why || undefined, disabled: Boolean(why), onchange },
    ...options.map(([option, text]) => element('option', { value: option, selected: option === value }, text))));
}

function toggle(name, label, why = '') {
  const input = element('input', { type: 'checkbox', 'data-name': name, checked: valueOf(name), disabled: Boolean(why), onchange: ({ target }) => set(name)(target.checked) });
  return control('', 'label', { title: why || undefined }, element('span', {}, input, ' ', label));
}

// While it is dragged nothing is built anew: the slider would lose the pointer.
function slider(name, label, [min, max, step_], why = '') {
  const oninput = ({ target }) => { state[name] = Number(target.value); repaint(); };
  const onchange = ({ target }) => set(name)(Number(target.value));
  const spoken = name === 'step' ? 'steps of the path, 0 for all' : name;
  return control(label, 'label', { title: why || undefined },
    element('input', { type: 'range', min, max, step: step_, value: state[name], 'data-name': name, 'aria-label': spoken, disabled: Boolean(why), oninput, onchange }));
}

export const button = (name, label, onclick, why = '', spoken = undefined) => element('button', { 'data-name': name, title: why || undefined, 'aria-label': spoken, disabled: Boolean(why), onclick }, label);

// Four views to begin with: three figures of arXiv 2502.20764, and what a photo does to them. Name, words, what to show.
export const STARTS = [
  ['1 Blocks of a stage differ (Fig. 3)', 'Every dot is one block of the model on one photo, and dots are close when the block moves information alike. In the paper, the dots of a block form a cluster of their own: blocks differ more than photos do. Is it so here? Click a dot to open it.', () => {
    const { layers } = storeOf();
    const many = (layer) => layers.filter((one) => one.stage === layer.stage).length;
    const best = layers.reduce((a, b) => (many(b) > many(a) ? b : a));
    return [{ pairs: [] }, { mode: 'blocks', colour: 'block', method: 'pca', layer: layers.findLast((one) => one.stage === best.stage).number, show: beginning().panes[0].show }];
  }],
  ['2 Patches of a column look alike (Fig. 4)', 'Every dot is one patch, and dots are close when the patches take from the same places. One colour is one column of the photo, the size is the row. In the paper, a column of the downward scan lies together as an arm. Drag a lasso over dots to see their patches in the photo.', () => {
    const layer = storeOf().layers.find((one) => cellsOf(one) <= 1024) ?? layerOf();
    const down = layer.orders.findIndex((_, route) => arrow(layer, route) === '↓' && !missing(layer, route));
    return [{ pairs: [] }, { mode: 'patches', colour: 'column', method: 'pca', layer: layer.number, route: layer.routes > 1 ? down : -1 }];
  }],
  ['3 Early: neighbours, late: content (Fig. 5)', 'The strip follows one patch through all blocks. In the paper, early ones take from its own row and column, later ones from places that matter in the photo. The dots on the right show the same for all patches of every block. Click a block to open it.', () => [{ ...beginning(pane().store), large: true }, { mode: 'every' }]],
  ['4 What is special about this photo?', 'Left, this photo; in the middle, what the same patch usually takes from, over all photos; right, the difference: what this photo alone does. The photos are ordered by how unusual they are for this patch.', async () => {
    const start = beginning(pane().store);
    const its = start.panes[0];
    const kept = storeOf(its).images.flatMap((one, at) => (one[4] ? [at] : [])).slice(0, LISTED);
    const far = live ? await unusual(its, kept) : new Map();
    const image = [...far].reduce((a, b) => (b[1] > a[1] ? b : a), [its.image, 0])[0];
    return [{ ...start, order: far.size ? 'unusual' : 'stored' }, { image }];
  }],
];

export async function start(at) {
  const [changes, its] = await STARTS[at][2]();
  return change({ ...changes, start: at + 1 }, its);
}
// The maps are asked for first: they are what one waits for.
export const drawAll = () => { const done = drawMaps(); build(); drawPoints(); return done; };
