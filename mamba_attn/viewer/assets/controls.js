// The controls: built from what there is, greyed with the reason where they cannot act.
import { about, ask, byId, cellsOf, has, live, picture } from './data.js';
import { element } from './colours.js';
import { drawMaps, mapTools, repaint, unusual } from './maps.js';
import { drawPoints, passes, pointTools, zoom } from './points.js';
import { COLOURS, beginning, change, classOf, layerOf, pane, right, routeOf, state, storeOf, wordsOf } from './state.js';
import { METHODS, answered, arrow, block, caption, gridOf, noun, short, steps, verdict } from './words.js';

const LISTED = 300; // photos in the list; the search finds the others
const able = new Map(); // which layers have a gate and a D, by store

export function build() {
  const held = document.activeElement?.dataset?.name;
  const its = pane();
  byId('title').textContent = `Where does ${storeOf().name} look?`;
  document.title = `${caption(its)} · ${storeOf().name}`;
  byId('lead').replaceChildren(...leadOf(its));
  const text = Boolean(wordsOf(its));
  [byId('starts').hidden, byId('photos').hidden] = [text, text && storeOf().images.length < 2];
  byId('story').textContent = STARTS[state.start - 1]?.[1] ?? '';
  [...byId('starts').querySelectorAll('button')].forEach((one, at) => one.setAttribute('aria-pressed', at + 1 === state.start));
  fill('where', above(its));
  fill('patch', ofPatch(its));
  fill('selecting', selecting(its));
  filters(its);
  list(its);
  if (!byId('plots')) byId('points').append(element('div', undefined, { class: 'bar', id: 'points-bar' }), element('div', undefined, { id: 'plots' }), element('div', undefined, { class: 'bar', id: 'points-tools' }));
  fill('points-bar', ofPoints(its));
  fill('points-tools', its.mode === 'every' ? [] : handling());
  fill('display', more(its));
  document.querySelector('.work').classList.toggle('two', state.panes.length > 1);
  byId('plots').className = state.panes.length > 1 ? 'plots-two' : '';
  if (held) document.querySelector(`[data-name="${held}"]:checked, [data-name="${held}"]:not([type=radio])`)?.focus({ preventScroll: true });
}

// What one sees, and what the colours mean.
function leadOf(its) {
  const first = [`The ${wordsOf(its) ? 'text' : layerOf(its).slices ? 'volume' : 'photo'} is cut into ${noun(true)}. `, element('b', `Click a ${noun()}`), ` to see which other ${noun(true)} it takes information from. `];
  const [orange, blue] = [element('span', 'orange', { class: 'adds' }), element('span', 'blue', { class: 'subtracts' })];
  if (its.show === 'spread') return [...first, 'The deeper the ', orange, ', the more this differs between photos.'];
  if (state.sign === 'signed') return [...first, 'Values in ', orange, ' add, those in ', blue, ' subtract.'];
  return [...first, 'The deeper the ', orange, `, the more it ${its.direction === 'row' ? 'takes' : 'gives'}`, ...(its.show === 'all' ? ['; in the third map ', blue, ' is less than usual.'] : ['.'])];
}
const fill = (id, made) => byId(id).replaceChildren(...made.filter(Boolean));

function above(its) {
  const layer = layerOf(its);
  const known = storeOf().images.map(right).filter((one) => one !== null);
  const [{ collected, top1 }, of] = [storeOf(), storeOf().collected === 1 ? 'photo' : 'photos'];
  const share = known.length ? ` · ${known.filter(Boolean).length} of ${known.length} photos right` : '';
  const scans = [[-1, layer.routes > 1 ? 'all' : 'one', undefined], ...(layer.routes > 1 ? layer.orders.map((_, route) => [route, arrow(layer, route), missing(layer, route)]) : [])];
  return [
    state.panes.length > 1 && choice('active', 'controls of', [[0, 'pane A'], [1, 'pane B']], state.active, (active) => change({ active })),
    about.stores.length > 1 ? menu('store', 'model', about.stores.map((one, at) => [at, named(at)]), its.store, (store) => change({}, { ...beginning(store).panes[0] }))
      : element('b', storeOf().name),
    !wordsOf(its) && element('span', `${top1 === null ? '' : `top-1 ${top1.toFixed(1)} % · `}${collected} ${of}${share}`, { class: 'hint' }),
    element('span', undefined, { class: 'space' }),
    menu('layer', 'block', storeOf().layers.map((one) => [one.number, `${block(one)} · ${gridOf(one)}`]), its.layer, (number) => change({}, { layer: number })),
    layer.orders.length > 0 && !(wordsOf(its) && layer.routes < 2) && choice('route', 'scan direction', scans, routeOf(its), (route) => change({}, { route })),
    !wordsOf(its) && toggle('large', 'large strip', state.large, (large) => change({ large })),
  ];
}

function named(at) {
  const { name, folder } = about.stores[at];
  return about.stores.filter((one) => one.name === name).length > 1 ? `${name} (${folder || at + 1})` : name;
}
const missing = (layer, route) => (live || `mean/${route}` in layer.matrices ? undefined : 'not on this page: mamba-attn explore shows it');

function ofPatch(its) {
  const classes = [...new Set(storeOf().images.map((one) => one[1]))].filter((one) => one !== null).sort();
  const shows = [['all', 'all three'], ['image', 'this photo'], ['mean', 'usual'], ['difference', 'special'], ['spread', 'varies', live || storeOf().layers.some((one) => 'spread/sum' in one.matrices) ? undefined : 'not on this page: mamba-attn explore shows it'],
    ['classes', 'by class', classes.length > 1 ? undefined : 'the classes are not known']];
  const single = storeOf().collected < 2;
  return [
    choice('direction', `a ${noun()}`, [['row', 'takes from'], ['column', 'gives to']], its.direction, (direction) => change({}, { direction })),
    choice('sign', 'values', [['absolute', 'strength'], ['signed', 'with sign'], ['positive', 'positive']], state.sign, (sign) => change({ sign, lock: 0 })),
    !(single && wordsOf(its)) && choice('show', 'show', state.panes.length > 1 ? shows.slice(1) : shows, state.panes.length > 1 && its.show === 'all' ? 'image' : its.show, (show) => change({}, { show }), single ? 'there is one photo: nothing to compare it with' : ''),
    its.show === 'classes' && menu('one', 'class', classes.map((one) => [one, one]), classOf(its, 'class') ?? classes[0], (one) => change({}, { one })),
    its.show === 'classes' && menu('other', 'minus', [['', 'all photos'], ...classes.map((one) => [one, one])], its.other, (other) => change({}, { other })),
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

function filters(its) {
  const { images } = storeOf();
  const box = byId('filters');
  if (!box.children.length) {
    const search = element('input', undefined, { type: 'search', placeholder: 'search', 'aria-label': 'Search photos by name or class', 'data-name': 'search' });
    search.addEventListener('input', () => { state.search = search.value; list(pane()); drawPoints(); });
    search.addEventListener('change', () => change({ search: search.value }));
    box.append(search, element('span', undefined, { id: 'sorting', class: 'bar' }));
  }
  if (document.activeElement !== box.firstChild) box.firstChild.value = state.search;
  const known = images.some((one) => right(one) !== null);
  fill('sorting', [
    menu('verdict', '', [['all', 'all'], ['right', 'right ✓'], ['wrong', 'wrong ✗']], state.verdict, (verdict_) => change({ verdict: verdict_ }), known ? '' : 'the classes are not known', 'Predictions'),
    menu('order', '', [['stored', 'in order'], ['unusual', 'unusual']], state.order, (order) => change({ order }), images.some((one) => one[4]) ? '' : 'no photo is stored in full', 'Order of photos'),
    live && button('add', 'add photo', addPhoto),
  ]);
  return its;
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
  const more_ = found.length - LISTED;
  const key = [its.store, images.length, ...found].join();
  const box = byId('list');
  if (box.dataset.key !== key) { // pictures stay while nothing but the choice changes
    box.dataset.key = key;
    box.replaceChildren(...found.slice(0, LISTED).map((at) => {
      const made = element('button', undefined, { 'data-image': at, title: answered(images[at]) });
      const source = picture(its.store, at, true);
      if (source) made.append(element('img', undefined, { src: source, alt: '', loading: 'lazy' }));
      made.append(element('span', verdict(images[at]) || short(images[at][0])));
      made.addEventListener('click', () => change({}, { image: at, ...(['mean', 'spread'].includes(pane().show) ? { show: 'image' } : {}) }));
      return made;
    }), ...(more_ > 0 ? [element('span', `${more_.toLocaleString('en')} more: search`, { class: 'hint' })] : []),
    ...(found.length ? [] : [element('span', 'no photo fits', { class: 'hint' })]));
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
  const input = element('input', undefined, { type: 'file', accept: 'image/*', hidden: '' });
  input.addEventListener('change', () => { input.remove(); if (input.files[0]) add(input.files[0]); });
  document.body.append(input);
  input.click();
}

function ofPoints(its) {
  const offered = live ? ['pca', 'tsne', 'umap'] : ['pca', 'tsne', 'umap'].filter((method) => Object.keys(storeOf().points).some((key) => key.endsWith('/' + method)));
  const layouts = Object.keys(METHODS).map((method) => [method, METHODS[method], offered.includes(method) ? undefined : `not on this page: mamba-attn report --method ${method} holds it`]);
  return [
    choice('mode', '', [['patches', `${noun(true)} of this block`], ['blocks', 'blocks of this stage', storeOf().collected < 2 ? 'there is one photo: nothing to compare it with' : undefined], ['every', 'every block']], its.mode, (mode) => change({}, { mode }), '', 'compare'),
    choice('method', 'layout', layouts, its.method, (method) => change({}, { method })),
    menu('colour', 'colour', COLOURS[its.mode].filter((one) => one !== 'rank' || layerOf(its).orders.length).map((one) => [one, one]), its.colour, (colour) => change({}, { colour })),
  ];
}

function handling() {
  return [
    choice('tool', 'drag', [['lasso', 'lasso'], ['box', 'box'], ['move', 'move']], pointTools.points, (tool) => { pointTools.points = tool; build(); }),
    element('span', undefined, { class: 'segments' }, button('zoom-in', '+', () => zoom(1.5), '', '+ larger points view'), button('zoom-out', '−', () => zoom(1 / 1.5), '', '− smaller points view'), button('zoom-reset', 'reset', () => zoom(0), '', 'reset points view')),
  ];
}

function more(its) {
  const layer = layerOf(its);
  const length = steps(layer, routeOf(its)).length;
  const known = able.get(its.store)?.[layer.name];
  const why = (name, what) => (!live ? 'needs the model: mamba-attn explore shows it' : !layer.orders.length ? `softmax attention has no ${what}`
    : known && !known[name] ? `the scans of this block have no ${what}` : '');
  const unsigned = state.sign === 'signed' && state.normalise !== 'range' ? 'values with a sign are blue and orange' : '';
  return [
    choice('normalise', 'scale', [['none', 'as it is'], ['largest', 'divide by maximum'], ['sum', 'divide by sum'], ['range', '0 to 1']], state.normalise, (normalise) => change({ normalise, lock: 0 })),
    toggle('log', 'logarithmic', state.log, (log) => change({ log, lock: 0 })),
    toggle('gate', 'with the gate', its.gate, (gate) => change({}, { gate }), why('gate', 'gate')),
    toggle('skip', 'with D', its.skip, (skip) => change({}, { skip }), why('skip', 'D')),
    choice('palette', 'colours', [['orange', 'orange'], ['viridis', 'viridis'], ['cividis', 'cividis']], state.palette, (palette) => change({ palette }), unsigned),
    slider('opacity', `opacity ${state.opacity}`, [0, 1, 0.05]),
    choice('map-tool', 'drag over patches', [['box', 'box'], ['lasso', 'lasso']], mapTools.map, (tool) => { mapTools.map = tool; build(); }),
    toggle('path', 'scan path', state.path, (path) => change({ path }), wordsOf(its) ? 'a text is read from its start' : length ? '' : 'softmax attention has no path'),
    length > 0 && slider('step', state.step ? `first ${state.step} of ${length} steps` : `all ${length} steps`, [0, length, 1], state.path ? '' : 'switch the scan path on'),
    length > 0 && button('play', 'play the path', play),
    toggle('first', 'reduce to 100 dimensions first (PCA)', its.first, (first) => change({}, { first }), its.method === 'pca' ? 'PCA needs no reduction before' : live ? '' : 'this page has one of both'),
    button('png-maps', 'maps as PNG', () => saving.png('maps'), wordsOf(its) ? 'a text is no picture: save the strip' : ''), button('png-points', 'points as PNG', () => saving.png('points')), button('png-strip', 'strip as PNG', () => saving.png('strip')),
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
    state.step = Math.min(Math.max(Math.ceil((now - began) / 3000 * length), 1), length);
    repaint();
    if (state.step < length) requestAnimationFrame(go);
    else change({ step: 0 });
  };
  requestAnimationFrame(go);
}

function control(label, tag, attributes, ...children) {
  return element(tag, undefined, { class: 'control', ...attributes }, ...(label ? [element('span', label, { class: 'label' })] : []), ...children);
}

function choice(name, label, options, value, act, why = '', spoken = label) {
  const row = element('span', undefined, { class: 'segments' });
  for (const [option, text, missing_] of options) {
    const input = element('input', undefined, { type: 'radio', name, value: option, 'data-name': name });
    [input.checked, input.disabled] = [option === value, Boolean(missing_ || why)];
    input.addEventListener('change', () => act(option));
    row.append(element('label', undefined, { title: missing_ || why || undefined }, input, element('span', text)));
  }
  return control(label, 'span', { role: 'radiogroup', 'aria-label': spoken + (why ? ` (${why})` : ''), title: why || undefined }, row);
}

function menu(name, label, options, value, act, why = '', spoken = label) {
  const select = element('select', undefined, { 'data-name': name, 'aria-label': spoken, title: why || undefined });
  for (const [option, text] of options) select.append(element('option', text, { value: option }));
  [select.value, select.disabled] = [String(value), Boolean(why)];
  select.addEventListener('change', () => act(typeof value === 'number' ? Number(select.value) : select.value));
  return control(label, 'label', {}, select);
}

function toggle(name, label, value, act, why = '') {
  const input = element('input', undefined, { type: 'checkbox', 'data-name': name });
  [input.checked, input.disabled] = [value, Boolean(why)];
  input.addEventListener('change', () => act(input.checked));
  return element('label', undefined, { class: 'control', title: why || undefined }, element('span', undefined, {}, input, ' ', label));
}

function slider(name, label, [min, max, step], why = '') {
  const input = element('input', undefined, { type: 'range', min, max, step, value: state[name], 'data-name': name, 'aria-label': name === 'step' ? 'steps of the path, 0 for all' : name });
  input.disabled = Boolean(why);
  input.addEventListener('input', () => { state[name] = Number(input.value); repaint(); }); // no rebuild: the slider would lose the pointer
  input.addEventListener('change', () => change({ [name]: Number(input.value) }));
  return element('label', undefined, { class: 'control', title: why || undefined }, element('span', label, { class: 'label' }), input);
}

export function button(name, label, act, why = '', spoken = undefined) {
  const made = element('button', label, { 'data-name': name, title: why || undefined, 'aria-label': spoken });
  made.disabled = Boolean(why);
  made.addEventListener('click', act);
  return made;
}

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
