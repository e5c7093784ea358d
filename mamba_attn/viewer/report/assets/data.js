// What the page holds: stores, matrices that are unpacked when they are first needed, points.
const about = JSON.parse(document.getElementById('about').textContent);
const MATRICES = 24; // that stay unpacked
const unpacked = new Map();

function bytes(text) {
  const raw = atob(text);
  const result = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) result[at] = raw.charCodeAt(at);
  return result;
}

// A matrix: 16-bit numbers, and the scale of each row.
async function matrix(number, tokens) {
  if (unpacked.has(number)) return unpacked.get(number);
  const text = document.getElementById('matrix-' + number).textContent;
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream('deflate'));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const scales = new Float32Array(raw.slice(0, 4 * tokens).buffer);
  const entries = tokens * tokens;
  const numbers = new Int16Array(entries);
  for (let at = 0; at < entries; at++) numbers[at] = (raw[4 * tokens + at] << 8) | raw[4 * tokens + entries + at];
  const found = { tokens, scales, numbers };
  unpacked.set(number, found);
  if (unpacked.size > MATRICES) unpacked.delete(unpacked.keys().next().value);
  return found;
}

// The mean of some tokens' rows, or columns; of all tokens if none are given.
function folded(its, chosen, direction) {
  const { tokens, scales, numbers } = its;
  const some = chosen.length ? chosen : Array.from({ length: tokens }, (_, token) => token);
  const total = new Float64Array(tokens);
  for (const token of some) {
    for (let other = 0; other < tokens; other++) {
      const row = direction === 'row' ? token : other;
      total[other] += numbers[row * tokens + (direction === 'row' ? other : token)] * scales[row];
    }
  }
  return total.map((value) => value / some.length);
}

function signed(values, sign) {
  if (sign === 'positive') return values.map((value) => Math.max(value, 0));
  return sign === 'absolute' ? values.map(Math.abs) : values;
}

// Points in a box whose longer side is 1.
function places(text) {
  const raw = new Uint16Array(bytes(text).buffer);
  const count = raw.length / 2;
  return Array.from({ length: count }, (_, at) => [raw[at] / 65535, raw[count + at] / 65535]);
}

const store = () => about.stores[state.store];
const layer = () => store().layers[Math.min(state.layer, store().layers.length - 1)];
const cellsOf = (its) => its.grid[0] * its.grid[1];
const image = () => store().images[state.image];
const label = (its) => 'stage ' + its.stage + ', block ' + its.block;

// Which matrix the controls ask for: its number, and a sentence where another one takes its place.
function wanted() {
  const its = layer();
  const route = state.route < its.routes && its.routes > 1 ? state.route : -1;
  const name = route < 0 ? 'sum' : String(route);
  const what = state.what === 'image' ? String(state.image) : 'mean';
  const key = what + '/' + name;
  if (key in its.matrices) return { number: its.matrices[key], what, route, notice: '' };
  const left = what === 'mean' ? 'Averages of this route are' : image()[0] + ': its matrix is';
  for (const other of [what + '/sum', 'mean/' + name, 'mean/sum']) {
    if (other in its.matrices) {
      const [kind, of] = other.split('/');
      const shown = (kind === 'mean' ? 'the average of all images' : 'the image') + (of === 'sum' && route >= 0 ? ', all routes' : '');
      return {
        number: its.matrices[other], what: kind, route: of === 'sum' ? -1 : route,
        notice: left + ' not in this report; showing ' + shown + ' instead.',
      };
    }
  }
  return null;
}

// The points of the scatterplot, whose they are, and by which method.
function points() {
  const its = layer();
  const methods = [state.method, ...METHODS];
  const routes = state.route >= 0 && state.route < its.routes && its.routes > 1 ? [String(state.route), 'sum'] : ['sum'];
  for (const method of methods) {
    if (state.mode === 'blocks') {
      const text = store().points['stage' + its.stage + '/' + method];
      if (text) return { xy: places(text), method, pairs: pairs(its.stage) };
    } else {
      for (const route of routes) {
        const text = store().points[[its.number, route, state.direction, method].join('/')];
        if (text) return { xy: places(text), method, pairs: null, route };
      }
    }
  }
  return null;
}

// (number of the layer, image) of every point of a stage.
function pairs(stage) {
  const count = store().images.length;
  return store().stages[stage].flatMap((number) => Array.from({ length: count }, (_, one) => [number, one]));
}

// At which step a route visits each token, from 1; undefined where it does not.
function ranks(its, route) {
  const found = [];
  (its.orders[route] || []).forEach((cell, step) => { if (cell >= 0) found[cell] = step + 1; });
  return found;
}

// Chosen patches on another grid over the same image, as the explorer does it.
function onGrid(cells, from, to) {
  const chosen = cells.filter((cell) => cell >= 0);
  const rest = cells.filter((cell) => cell < 0);
  if (from[0] === to[0] && from[1] === to[1]) return cells;
  const inside = new Set(chosen);
  const there = new Set();
  for (let row = 0; row < to[0]; row++) {
    for (let column = 0; column < to[1]; column++) {
      const old = [Math.floor((row + 0.5) * from[0] / to[0]), Math.floor((column + 0.5) * from[1] / to[1])];
      if (inside.has(old[0] * from[1] + old[1])) there.add(row * to[1] + column);
    }
  }
  for (const cell of chosen) {
    const [row, column] = [Math.floor(cell / from[1]), cell % from[1]];
    there.add(Math.floor((row + 0.5) * to[0] / from[0]) * to[1] + Math.floor((column + 0.5) * to[1] / from[1]));
  }
  return [...rest, ...[...there].sort((a, b) => a - b)];
}
