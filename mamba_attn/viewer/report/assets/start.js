// Gestures and keys, and the first picture.
function gestures(canvas, view, drag, click, hover) {
  let from = null;
  let corners = [];
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener('pointerdown', (event) => {
    if (event.button) return;
    from = at(event);
    corners = [from];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    const to = at(event);
    if (!from) return hover(to, event);
    byId('tip').hidden = true;
    corners.push(to);
    redraw(view);
    outline(canvas, shape(view, from, to, corners));
  });
  const done = (event) => {
    if (!from) return;
    const to = at(event);
    const far = Math.max(...corners.map(([x, y]) => Math.hypot(x - from[0], y - from[1])), 0);
    const area = shape(view, from, to, corners);
    const start = from;
    from = null;
    if (event.type === 'pointercancel') return redraw(view);
    if (far < 5) click(start);
    else drag(area);
    redraw(view);
  };
  canvas.addEventListener('pointerup', done);
  canvas.addEventListener('pointercancel', done);
  canvas.addEventListener('pointerleave', () => { byId('tip').hidden = true; });
}

const redraw = (view) => (view === 'points' ? drawPoints() : drawPatches());
const shape = (view, from, to, corners) => (tools[view] === 'lasso' ? corners
  : [from, [to[0], from[1]], to, [from[0], to[1]]]);

function outline(canvas, corners) {
  const draw = () => {
    const context = canvas.getContext('2d');
    context.beginPath();
    corners.forEach(([x, y], at) => context[at ? 'lineTo' : 'moveTo'](x, y));
    context.closePath();
    context.fillStyle = '#0072b218';
    context.fill();
    for (const [colour, width] of [['white', 3], [about.ink, 1.5]]) {
      [context.strokeStyle, context.lineWidth] = [colour, width];
      context.stroke();
    }
  };
  if (canvas.id === 'points') draw();
  else drawPatches().then(draw);
}

// Whether a point lies in a polygon: a ray to the right crosses an odd number of edges.
function within([x, y], corners) {
  let odd = false;
  corners.forEach(([x0, y0], at) => {
    const [x1, y1] = corners[(at + 1) % corners.length];
    if ((y0 > y) !== (y1 > y) && x < (x1 - x0) * (y - y0) / (y1 - y0) + x0) odd = !odd;
  });
  return odd;
}

function cellAt([x, y]) {
  const [rows, columns] = layer().grid;
  const [row, column] = [Math.floor(y / drawn.box.size), Math.floor(x / drawn.box.size)];
  return row >= 0 && row < rows && column >= 0 && column < columns ? row * columns + column : -1;
}

// Cells that a box cuts, or whose centres lie in a lasso.
function cellsIn(corners) {
  const [rows, columns] = layer().grid;
  const { size } = drawn.box;
  const span = (axis) => [Math.min, Math.max].map((end) => Math.floor(end(...corners.map((corner) => corner[axis])) / size));
  const [[left, right], [top, bottom]] = [span(0), span(1)];
  return Array.from({ length: rows * columns }, (_, cell) => cell).filter((cell) => {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    if (tools.patches === 'box') return column >= left && column <= right && row >= top && row <= bottom;
    return within([(column + 0.5) * size, (row + 0.5) * size], corners);
  });
}

function tip(event, text, map, its) {
  const box = byId('tip');
  byId('tip-text').textContent = text;
  const canvas = byId('tip-map');
  canvas.hidden = !map;
  if (map) {
    const [rows, columns] = its.grid;
    [canvas.width, canvas.height] = [columns, rows];
    canvas.style.width = 96 * columns / Math.max(rows, columns) + 'px';
    canvas.style.height = 96 * rows / Math.max(rows, columns) + 'px';
    const scale = scaleOf(map, state.palette);
    const context = canvas.getContext('2d');
    map.forEach((value, cell) => {
      context.fillStyle = colourOf(value, scale, 1);
      context.fillRect(cell % columns, Math.floor(cell / columns), 1, 1);
    });
  }
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = Math.max(4, Math.min(event.clientX + 16, window.innerWidth - width - 8)) + 'px';
  box.style.top = Math.max(4, event.clientY + 18 + height > window.innerHeight ? event.clientY - height - 10 : event.clientY + 18) + 'px';
}

let pointed = 0;
async function aboutCell(cell, event, extra = '') {
  const own = ++pointed;
  const its = layer();
  const map = await values(its, [cell]);
  if (own !== pointed) return;
  const columns = its.grid[1];
  const lines = [`patch ${where(cell, columns)}${extra}`, its.orders.length && `visited ${visits(its, cell)}`,
    `${state.direction === 'row' ? 'takes from' : 'gives to'} ${strongest(map, columns, 3)}`];
  tip(event, lines.filter(Boolean).join('\n'), map, its);
}

function hide() {
  pointed++;
  byId('tip').hidden = true;
}

gestures(byId('points'), 'points',
  (area) => choosePoints(scatter.at.flatMap((point, at) => (within(point, area) ? [at] : [])), true),
  (place) => choosePoints([pointAt(...place)].filter((at) => at >= 0), false),
  (place, event) => {
    const at = pointAt(...place);
    if (at < 0) return hide();
    if (!scatter.found.pairs) return aboutCell(at, event);
    const [block, one] = scatter.found.pairs[at];
    const [key, given, predicted] = store().images[one];
    return tip(event, [`block ${store().blocks[block]}`, key, given && `class ${given}`, predicted && `predicted ${predicted}`].filter(Boolean).join('\n'));
  });
gestures(byId('patches'), 'patches',
  (area) => { const cells = cellsIn(area); if (cells.length) change({ cells }); },
  (place) => { const cell = cellAt(place); if (cell >= 0) change({ cells: [cell] }); },
  (place, event) => {
    const cell = drawn.box ? cellAt(place) : -1;
    return cell < 0 ? hide() : aboutCell(cell, event, `: ${number(drawn.values[cell])}`);
  });

function moved(down, right) {
  if (state.mode === 'blocks' && document.activeElement === byId('points')) {
    const blocks = store().stages[layer().stage].filter((one) => store().layers.some((its) => its.number === one));
    const block = blocks[Math.min(Math.max(blocks.indexOf(layer().number) + down, 0), blocks.length - 1)];
    return openPair(block, Math.min(Math.max(state.image + right, 0), store().images.length - 1));
  }
  const [rows, columns] = layer().grid;
  const patches = state.cells.filter((cell) => cell >= 0);
  if (!patches.length) return change({ cells: [Math.floor(rows / 2) * columns + Math.floor(columns / 2)] });
  const cell = patches[Math.floor(patches.length / 2)];
  const row = Math.min(Math.max(Math.floor(cell / columns) + down, 0), rows - 1);
  return change({ cells: [row * columns + Math.min(Math.max(cell % columns + right, 0), columns - 1)] });
}

const cycle = (name, among) => change({ [name]: among[(among.indexOf(state[name]) + 1) % among.length] });
const KEYS = {
  ArrowUp: () => moved(-1, 0), ArrowDown: () => moved(1, 0), ArrowLeft: () => moved(0, -1), ArrowRight: () => moved(0, 1),
  Escape: () => change({ cells: [], pairs: [] }), r: () => cycle('direction', ['row', 'column']),
  m: () => cycle('what', ['mean', 'image']), v: () => cycle('mode', ['blocks', 'patches']),
  s: () => cycle('sign', ['signed', 'positive', 'absolute']), p: () => change({ path: !state.path }),
  '[': () => change({ layer: Math.max(state.layer - 1, 0) }),
  ']': () => change({ layer: Math.min(state.layer + 1, store().layers.length - 1) }),
  '-': () => change({ path: true, step: Math.max((state.step || steps(layer()).length) - 1, 1) }),
  '+': () => change({ path: true, step: Math.min(state.step + 1, steps(layer()).length) }),
  '?': () => byId('open-keys').click(),
};
document.addEventListener('keydown', (event) => {
  const control = event.target.closest('input, select');
  if (event.ctrlKey || event.metaKey || event.altKey || (control && event.key.startsWith('Arrow'))) return;
  if (event.target.closest('select')) return;
  const digit = /^[0-9]$/.test(event.key) && Number(event.key) <= layer().routes;
  const act = KEYS[event.key] || (digit && (() => change({ route: Number(event.key) - 1 })));
  if (!act) return;
  event.preventDefault();
  act();
});

for (const place of document.querySelectorAll('.tools')) {
  for (const tool of ['box', 'lasso']) {
    const button = element('button', tool, { 'aria-pressed': tools[place.dataset.view] === tool, title: `drag a ${tool}` });
    button.addEventListener('click', () => {
      tools[place.dataset.view] = tool;
      for (const other of place.children) other.setAttribute('aria-pressed', other === button);
    });
    place.append(button);
  }
}
for (const name of ['keys', 'notes']) {
  byId('open-' + name).addEventListener('click', (event) => {
    byId(name).hidden = !byId(name).hidden;
    event.currentTarget.setAttribute('aria-expanded', !byId(name).hidden);
  });
}
byId('all').addEventListener('click', () => change({ cells: [], pairs: [] }));
byId('class').addEventListener('click', () => change({ cells: [-1] }));
let wait = 0;
window.addEventListener('resize', () => { clearTimeout(wait); wait = setTimeout(show, 60); });
if (typeof DecompressionStream === 'undefined') {
  byId('message').textContent = 'This browser cannot unpack the numbers of this page; use one from 2023 or later.';
} else {
  state.image = firstImage();
  show();
}
window.report = { state, get drawn() { return drawn; }, get scatter() { return scatter; }, lit: () => litPoints(scatter.found), change };
