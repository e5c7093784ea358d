// The controls: built from what there is, and the change of what is shown.
const PLAIN = {
  store: 0, layer: 0, route: -1, mode: 'patches', direction: 'row', what: 'mean', image: 0, sign: 'signed', method: 'pca',
  colour: 'column', palette: 'viridis', opacity: 0.9, path: false, step: 0, cells: [], pairs: [],
};
const state = { ...PLAIN };
const tools = { points: 'lasso', patches: 'box' };

function change(changes) {
  const before = layer();
  const other = 'store' in changes && changes.store !== state.store;
  Object.assign(state, changes);
  if (other) Object.assign(state, { layer: 0, image: firstImage(), pairs: [] });
  const its = layer();
  state.cells = onGrid(state.cells, before.grid, its.grid);
  if (!COLOURS[state.mode].includes(state.colour)) [state.colour] = COLOURS[state.mode];
  if (state.route >= its.routes || its.routes < 2) state.route = -1;
  state.step = Math.min(state.step, steps(its).length);
  show();
}

const firstImage = () => Number(Object.keys(store().photos)[0] ?? 0);

function show() {
  hide();
  // controls are rebuilt, so focus goes back to the one that had it
  const held = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.name : undefined;
  build();
  if (held) {
    const again = document.querySelector(`#controls [data-name="${held}"]:checked, #controls [data-name="${held}"]:not([type=radio])`);
    if (again) again.focus({ preventScroll: true });
  }
  strip();
  byId('class').hidden = layer().classes === 0;
  byId('model').textContent = `${store().name} · ${store().images.length} image${store().images.length === 1 ? '' : 's'}`;
  drawPoints();
  return drawPatches();
}

function build() {
  const its = layer();
  const routes = [[-1, 'sum'], ...(its.routes > 1 ? its.orders.map((_, route) => [route, String(route + 1), !(`mean/${route}` in its.matrices)]) : [])];
  const images = Object.keys(store().photos).map((one) => [Number(one), store().images[one][0]]);
  if (!images.some(([one]) => one === state.image)) images.push([state.image, image()[0]]);
  const methods = METHODS.filter((method) => Object.keys(store().points).some((key) => key.endsWith('/' + method)));
  const kept = images.some(([one]) => its.matrices[one + '/sum'] !== undefined);
  const path = steps(its).length;
  byId('controls').replaceChildren(...[
    about.stores.length > 1 && list('store', 'model', about.stores.map((one, at) => [at, `${at + 1}: ${one.name}`])),
    list('layer', 'block', store().layers.map((one, at) => [at, `stage ${one.stage} · block ${one.block} · ${one.grid.join(' x ')}`])),
    routes.length > 1 && choice('route', 'route', routes),
    choice('mode', 'compare', [['blocks', 'blocks of this stage'], ['patches', 'patches of this block']]),
    choice('direction', 'a patch', [['row', 'takes from'], ['column', 'gives to']]),
    kept && choice('what', 'show', [['mean', 'average of all images'], ['image', 'this image']]),
    list('image', 'image', images),
    choice('sign', 'values', [['signed', 'signed'], ['positive', 'positive'], ['absolute', 'absolute']]),
    methods.length > 1 && choice('method', 'reduction', methods.map((one) => [one, METHOD_NAMES[one]])),
    list('colour', 'colour of points', COLOURS[state.mode].filter((one) => one !== 'rank' || its.orders.length).map((one) => [one, one])),
    choice('palette', 'map', [['viridis', 'viridis'], ['cividis', 'cividis']]),
    slider('opacity', 'opacity', 0, 1, 0.05),
    path && check('path', 'scan path'),
    path && state.path && slider('step', state.step ? `step ${state.step} of ${path}` : `all ${path} steps`, 0, path, 1),
  ].filter(Boolean));
}

function group(text) {
  const made = element('div', undefined, { class: 'control', role: 'radiogroup', 'aria-label': text });
  made.append(element('span', text, { class: 'label' }));
  return made;
}

function list(name, text, options) {
  const made = element('label', undefined, { class: 'control' });
  const select = element('select', undefined, { 'data-name': name });
  for (const [value, shown] of options) select.append(element('option', shown, { value }));
  select.value = String(state[name]);
  select.addEventListener('change', () => change({ [name]: typeof state[name] === 'number' ? Number(select.value) : select.value }));
  made.append(element('span', text, { class: 'label' }), select);
  return made;
}

function choice(name, text, options) {
  const made = group(text);
  const row = element('div', undefined, { class: 'segments' });
  for (const [value, shown, missing] of options) {
    const one = element('label');
    const input = element('input', undefined, { type: 'radio', name, value, 'data-name': name });
    input.checked = state[name] === value;
    input.disabled = Boolean(missing);
    input.addEventListener('change', () => change({ [name]: value }));
    one.append(input, element('span', shown));
    row.append(one);
  }
  made.append(row);
  return made;
}

function slider(name, text, min, max, step) {
  const made = element('label', undefined, { class: 'control' });
  const input = element('input', undefined, { type: 'range', min, max, step, value: state[name], 'data-name': name });
  const shown = element('span', text, { class: 'label' });
  input.addEventListener('input', () => { // no rebuild while it is dragged: the slider would lose the pointer
    state[name] = Number(input.value);
    if (name === 'step') shown.textContent = state.step ? `step ${state.step} of ${max}` : `all ${max} steps`;
    drawPatches();
  });
  made.append(shown, input);
  return made;
}

function check(name, text) {
  const made = element('label', undefined, { class: 'check' });
  const input = element('input', undefined, { type: 'checkbox', 'data-name': name });
  input.checked = state[name];
  input.addEventListener('change', () => change({ [name]: input.checked }));
  made.append(input, element('span', text));
  return made;
}

// Small pictures of the images that are chosen among the points.
function strip() {
  const chosen = state.mode === 'blocks' ? [...new Set(state.pairs.map(([, one]) => one))].slice(0, 60) : [];
  byId('strip').replaceChildren(...chosen.map((one) => {
    const [key, given] = store().images[one];
    const button = element('button', undefined, { 'aria-pressed': one === state.image, title: key });
    if (store().small[one]) button.append(element('img', undefined, { src: store().small[one], alt: '' }));
    button.append(element('span', given ?? key));
    button.addEventListener('click', () => change({ image: one, what: 'image' }));
    return button;
  }));
}
