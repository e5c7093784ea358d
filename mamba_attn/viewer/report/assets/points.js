// The scatterplot: Mode 1, a stage's (block, image) pairs; Mode 2, a block's patches.
const METHODS = ['pca', 'tsne', 'umap'];
const METHOD_NAMES = { pca: 'PCA', tsne: 't-SNE', umap: 'UMAP' };
const COLOURS = { patches: ['column', 'row', 'rank'], blocks: ['block', 'class', 'predicted'] };
const FAINT = 0.12; // opacity of points outside the selection
const MANY_KINDS = 12;
const REACH = 14; // pixels from the pointer to a point
let scatter = { at: [], found: null };

function drawPoints() {
  const found = points();
  const canvas = byId('points');
  const height = Math.min(480, Math.max(300, canvas.clientWidth * 0.8));
  const context = prepared(canvas, height);
  const its = layer();
  byId('points-notice').textContent = found ? '' : 'There are too few points for a plane.';
  byId('points-title').textContent = state.mode === 'blocks'
    ? `Stage ${its.stage}: blocks, ${store().images.length} images`
    : `Stage ${its.stage}, block ${its.block}: ${cellsOf(its)} patches`;
  byId('legend').replaceChildren();
  scatter = { at: [], found };
  if (!found) return;
  const width = canvas.clientWidth;
  const [right, top] = [0, 1].map((axis) => Math.max(...found.xy.map((point) => point[axis]), 1e-9));
  scatter.at = found.xy.map(([x, y]) => [36 + x / right * (width - 60), height - 40 - y / top * (height - 60)]);
  axes(context, width, height, METHOD_NAMES[found.method]);
  const looks = found.pairs ? looksOfPairs(found.pairs) : looksOfPatches();
  const lit = new Set(litPoints(found));
  const order = scatter.at.map((_, at) => at).sort((a, b) => lit.has(a) - lit.has(b)); // those that are lit on top
  for (const at of order) {
    context.globalAlpha = !lit.size || lit.has(at) ? 1 : FAINT;
    const size = looks[at].size * (lit.has(at) ? 1.25 : 1);
    symbol(context, ...scatter.at[at], size, looks[at]);
    if (!found.pairs && lit.size === 1 && lit.has(at)) ring(context, ...scatter.at[at], size + 4);
    if (found.pairs && found.pairs[at][0] === its.number && found.pairs[at][1] === state.image) {
      context.globalAlpha = 1;
      ring(context, ...scatter.at[at], size + 4);
    }
  }
  context.globalAlpha = 1;
}

function axes(context, width, height, name) {
  context.strokeStyle = '#e3e7eb';
  context.strokeRect(20.5, 4.5, width - 25, height - 28);
  context.fillStyle = '#5b6670';
  context.font = '12px system-ui, sans-serif';
  context.textAlign = 'center';
  context.fillText(name + ' 1', width / 2, height - 7);
  context.save();
  context.translate(13, height / 2 - 8);
  context.rotate(-Math.PI / 2);
  context.fillText(name + ' 2', 0, 0);
  context.restore();
}

function looksOfPatches() {
  const its = layer();
  const [rows, columns] = its.grid;
  const cells = Array.from({ length: rows * columns }, (_, cell) => cell);
  const route = Math.max(Math.min(state.route, its.routes - 1), 0);
  const rank = ranks(its, route);
  const kind = state.colour === 'rank' && !its.orders.length ? 'column' : state.colour;
  const values = cells.map((cell) => ({ row: Math.floor(cell / columns), rank: rank[cell] ?? 0 }[kind] ?? cell % columns));
  const high = Math.max(...values, 1);
  // as in arXiv 2502.20764: colour says the column and size the row
  const sizes = cells.map((cell) => (kind === 'row' ? cell % columns : Math.floor(cell / columns)));
  const largest = Math.max(...sizes, 1);
  const named = kind === 'rank' ? `rank in route ${route + 1}` : kind;
  byId('legend').append(
    element('span', named), element('span', kind === 'rank' ? '1' : '0'), ramp(about.palettes.cividis),
    element('span', String(high)), element('span', `size: ${kind === 'row' ? 'column' : 'row'}`));
  const small = cells.length > 500 ? 0.75 : 1;
  return cells.map((cell) => ({
    colour: css(mixed(about.palettes.cividis, values[cell] / high)), size: small * (5 + 8 * sizes[cell] / largest), shape: 0,
  }));
}

function looksOfPairs(all) {
  const named = all.map(([number, one]) => {
    const [, given, predicted] = store().images[one];
    if (state.colour === 'class') return given ?? 'not known';
    return state.colour === 'predicted' ? String(predicted) : 'block ' + store().blocks[number];
  });
  const kinds = [...new Set(named)];
  kinds.slice(0, MANY_KINDS).forEach((kind, at) => {
    const item = element('span', undefined, { class: 'kind' });
    const mark = element('canvas', undefined, { width: 28, height: 28, style: 'width:14px;height:14px' });
    const context = mark.getContext('2d');
    context.scale(2, 2);
    symbol(context, 7, 7, 10, { colour: kindColour(at, kinds.length), shape: at });
    item.append(mark, element('span', kind));
    byId('legend').append(item);
  });
  if (kinds.length > MANY_KINDS) byId('legend').append(element('span', `and ${kinds.length - MANY_KINDS} more`));
  const size = all.length <= 400 ? 10 : 7;
  return named.map((kind) => {
    const at = kinds.indexOf(kind);
    return { colour: kindColour(at, kinds.length), size, shape: at };
  });
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
  context.lineWidth = 0.8;
  context.strokeStyle = 'white';
  context.stroke();
}

function ring(context, x, y, size) {
  for (const [colour, width] of [['white', 4], [about.ink, 2]]) {
    context.beginPath();
    context.arc(x, y, size / 2 + 1, 0, 2 * Math.PI);
    [context.strokeStyle, context.lineWidth] = [colour, width];
    context.stroke();
  }
}

// Numbers of the points that the selection means.
function litPoints(found) {
  if (!found.pairs) return state.cells.filter((cell) => cell >= 0);
  const chosen = new Set(state.pairs.map(String));
  return found.pairs.flatMap((pair, at) => (chosen.has(String(pair)) ? [at] : []));
}

function pointAt(x, y) {
  let best = -1;
  let least = REACH;
  scatter.at.forEach(([px, py], at) => {
    const away = Math.hypot(px - x, py - y);
    if (away <= least) [best, least] = [at, away];
  });
  return best;
}

function choosePoints(numbers, dragged) {
  const { found } = scatter;
  if (!found || !numbers.length) return;
  if (!found.pairs) return change({ cells: numbers });
  const chosen = numbers.map((at) => found.pairs[at]);
  if (dragged) return change({ pairs: chosen });
  return openPair(...chosen[0]);
}

// A block and an image: in the patch view, if its matrix is there.
function openPair(number, one) {
  const at = store().layers.findIndex((its) => its.number === number);
  if (at < 0) return change({ pairs: [[number, one]] });
  return change({ pairs: [[number, one]], layer: at, image: one, what: 'image' });
}
