// The patch grid over the image: the map of what is chosen, a frame around it, the path of the route.
let drawn = { values: null, scale: null, box: null, number: -1 }; // also for tests
const photos = new Map();

function photo(source) {
  if (!source) return null;
  if (!photos.has(source)) {
    const made = new Image();
    made.onload = () => drawPatches();
    made.src = source;
    photos.set(source, made);
  }
  const found = photos.get(source);
  return found.complete && found.naturalWidth ? found : null;
}

// The picture of the image; of the mean, where that has none, the first there is.
const photoOf = () => store().photos[state.image] ?? Object.values(store().photos)[0];

// Tokens as the matrices number them: patches, then class tokens and registers (cells -1, -2, ...).
function tokensOf(its, cells) {
  const count = cellsOf(its);
  return cells.map((cell) => (cell >= 0 ? cell : count - 1 - cell)).filter((token) => token < its.tokens);
}

async function values(its, cells, asked = wanted()) {
  const found = await matrix(asked.number, its.tokens);
  return signed(folded(found, tokensOf(its, cells), state.direction).slice(0, cellsOf(its)), state.sign);
}

let turn = 0;
async function drawPatches() {
  const own = ++turn;
  const its = layer();
  const asked = wanted();
  const map = await values(its, state.cells, asked);
  if (own !== turn) return; // something else has been asked for since
  byId('patches-notice').textContent = asked.notice;
  byId('patches-title').textContent = caption(its) + of(asked);
  const canvas = byId('patches');
  const [rows, columns] = its.grid;
  const size = Math.max(1, Math.floor(Math.min(canvas.parentElement.clientWidth / columns, 480 / rows)));
  canvas.style.width = size * columns + 'px';
  const context = prepared(canvas, size * rows);
  const box = { size, width: size * columns, height: size * rows };
  const below = photo(photoOf());
  const opacity = below ? state.opacity : 1;
  if (below) context.drawImage(below, 0, 0, box.width, box.height);
  const scale = scaleOf(map, state.palette);
  const gap = map.length <= 300 ? 1 : 0;
  map.forEach((value, cell) => {
    context.fillStyle = colourOf(value, scale, opacity);
    context.fillRect(cell % columns * size, Math.floor(cell / columns) * size, size - gap, size - gap);
  });
  frame(context, its, size);
  if (state.path && its.orders.length) path(context, its, size);
  drawn = { values: Array.from(map), scale, box, number: asked.number };
  const unit = state.sign === 'signed' ? 'attention' : state.sign + ' attention';
  const end = (value, beyond) => element('span', (beyond ? (value > 0 ? '≥ ' : '≤ ') : '') + number(value));
  byId('bar').replaceChildren(
    element('span', unit), end(scale.low, scale.low < 0), ramp(scale.colours), end(scale.high, Math.max(...map) > scale.high));
  describe(its, map);
}

function caption(its) {
  const patches = state.cells.filter((cell) => cell >= 0);
  const rest = state.cells.length - patches.length;
  const columns = its.grid[1];
  let who = 'patches';
  let many = true;
  if (patches.length === 1 && !rest) {
    [who, many] = [`patch (${Math.floor(patches[0] / columns)}, ${patches[0] % columns})`, false];
  } else if (patches.length) who = `${patches.length} patches`;
  else if (rest) [who, many] = ['the class token', false];
  const verb = state.direction === 'row' ? (many ? 'look' : 'looks') : (many ? 'are seen from' : 'is seen from');
  return `Where ${who} ${verb}${many ? ', on average' : ''}`;
}

function of(asked) {
  const route = asked.route < 0 ? '' : `, route ${asked.route + 1}`;
  const count = store().images.length;
  if (asked.what !== 'mean') return `, ${image()[0]}${route}`;
  return count === 1 ? route : `, average of ${count} images${route}`;
}

function frame(context, its, size) {
  const [rows, columns] = its.grid;
  const inside = new Set(state.cells.filter((cell) => cell >= 0));
  const at = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns && inside.has(row * columns + column);
  const wide = Math.min(Math.max(0.08 * size, 1.5), 3);
  for (const [colour, width] of [['white', wide + 2.5], [about.ink, wide]]) {
    context.beginPath();
    for (const cell of inside) {
      const [row, column] = [Math.floor(cell / columns), cell % columns];
      const [x, y] = [column * size, row * size];
      if (!at(row - 1, column)) segment(context, x, y, x + size, y);
      if (!at(row + 1, column)) segment(context, x, y + size, x + size, y + size);
      if (!at(row, column - 1)) segment(context, x, y, x, y + size);
      if (!at(row, column + 1)) segment(context, x + size, y, x + size, y + size);
    }
    [context.strokeStyle, context.lineWidth, context.lineCap] = [colour, width, 'square'];
    context.stroke();
  }
}

function segment(context, x0, y0, x1, y1) {
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
}

// The patches that the route, of a sum the first one, visits; step by step.
function steps(its) {
  const count = cellsOf(its);
  const route = Math.max(Math.min(state.route, its.routes - 1), 0);
  return (its.orders[route] || []).filter((cell) => cell >= 0 && cell < count);
}

function path(context, its, size) {
  const visited = steps(its);
  const shown = visited.slice(0, state.step || visited.length);
  const columns = its.grid[1];
  const at = shown.map((cell) => [(cell % columns + 0.5) * size, (Math.floor(cell / columns) + 0.5) * size]);
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
  const [first, last] = [at[0], at[at.length - 1]];
  symbol(context, ...first, Math.min(size * 0.62, 16), { colour: css(about.palettes.path[0]), shape: 0 });
  symbol(context, ...last, Math.min(size * 0.62, 16), {
    colour: css(mixed(about.palettes.path, (at.length - 1) / Math.max(visited.length - 1, 1))), shape: 1,
  });
}

const where = (cell, columns) => (cell >= 0 ? `(${Math.floor(cell / columns)}, ${cell % columns})` : 'class token');

function strongest(map, columns, count) {
  const order = Array.from(map.keys()).sort((a, b) => Math.abs(map[b]) - Math.abs(map[a]));
  return order.slice(0, count).map((cell) => `${where(cell, columns)} ${number(map[cell])}`).join(', ');
}

// When each route visits a cell, e.g. "3rd and 14th of 16 in routes 1-2".
function visits(its, cell) {
  const each = its.orders.map((_, route) => ordinal(ranks(its, route)[cell]));
  const last = each.pop();
  const listed = each.length ? `${each.join(', ')} and ${last}` : last;
  return `${listed} of ${its.orders[0].length.toLocaleString('en')}${each.length ? ` in routes 1-${its.orders.length}` : ''}`;
}

function ordinal(step) {
  if (step === undefined) return 'never';
  const ending = [11, 12, 13].includes(step % 100) ? 'th' : ['th', 'st', 'nd', 'rd'][step % 10] ?? 'th';
  return step.toLocaleString('en') + ending;
}

// The card, and the same for screen readers.
function describe(its, map) {
  const columns = its.grid[1];
  const strong = strongest(map, columns, 5);
  const items = [];
  if (state.cells.length === 1 && state.cells[0] >= 0) {
    const [cell] = state.cells;
    items.push(['patch', `row ${Math.floor(cell / columns)}, column ${cell % columns}`]);
    if (its.orders.length) items.push(['visited', visits(its, cell)]);
  }
  items.push([state.direction === 'row' ? 'strongest sources' : 'strongest readers', strong]);
  byId('card').replaceChildren(...items.flatMap(([name, text]) => [element('dt', name), element('dd', text)]));
  const text = byId('patches-title').textContent + '. Strongest: ' + strong;
  if (byId('spoken').textContent !== text) byId('spoken').textContent = text;
}
