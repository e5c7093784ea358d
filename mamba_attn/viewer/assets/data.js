// What the page shows: numbers from the server, or from the page itself if it is frozen. Both answer alike.
export const about = JSON.parse(document.getElementById('about').textContent);
export const live = about.live;
const KEPT = 800; // answers that are remembered
const MATRICES = 24; // that stay unpacked
const NEAREST = 6; // points most alike, as the server counts them
const kept = new Map();
const unpacked = new Map();

export const byId = (id) => document.getElementById(id);
export const cellsOf = (its) => its.grid[0] * its.grid[1];
export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// An answer of the server; without one, the banner says so until there is one again.
export async function ask(path, options, kind = 'json') {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    byId('banner').textContent = 'The explorer does not answer. Is it still running in the terminal? Start it again, then reload this page.';
    byId('banner').hidden = false;
    return { error: 'The explorer does not answer.' };
  }
  byId('banner').hidden = true;
  return reply.ok ? reply[kind]() : { error: await reply.text() };
}
const post = (path, given) => ask(path, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(given) });

// An answer with its numbers as an array, remembered unless it failed or is still on its way.
function keep(key, reply) {
  for (const name of ['map', 'xy']) if (typeof reply[name] === 'string') reply[name] = new Float32Array(bytes(reply[name]).buffer);
  if (!reply.error && !reply.job) kept.set(key, reply);
  for (const old of kept.keys()) if (kept.size > KEPT && old !== key) kept.delete(old);
  return reply;
}

// Maps of queries: {map} each, on the query's own grid, or {error}. All that are not remembered are asked for at once.
export async function maps(queries) {
  const keys = queries.map((query) => JSON.stringify(query));
  const found = new Map(keys.map((key) => [key, kept.get(key)]));
  const missing = [...found.keys()].filter((key) => !found.get(key));
  const wanted = missing.map((key) => queries[keys.indexOf(key)]);
  const reply = !missing.length ? [] : live ? await post('api/maps', { queries: wanted }) : await Promise.all(wanted.map(folded));
  missing.forEach((key, at) => found.set(key, keep(key, reply.error ? reply : reply[at])));
  return keys.map((key) => found.get(key));
}

// Points of a pane: {xy}, {job} that is computing them, or {error}.
export async function points(pane) {
  const key = JSON.stringify(pane);
  return kept.get(key) ?? keep(key, live ? await post('api/points', pane) : held(pane));
}

// The points most alike to one of them: {numbers}, or {error}.
export async function neighbours(pane, point) {
  const key = `alike ${point} ${JSON.stringify(pane)}`;
  return kept.get(key) ?? keep(key, await (live ? post('api/neighbours', { ...pane, point }) : nearestRows(pane, point)));
}
export const job = (number, method = 'GET') => ask(`api/jobs/${number}`, { method });
export const has = (pane) => (live ? post('api/has', pane) : Promise.resolve({ error: 'needs the running explorer' }));

export function picture(store, image, small) {
  if (about.stores[store].images[image][5]) return undefined; // a text
  if (live) return `api/picture?store=${store}&image=${image}${small ? '&small=1' : ''}`;
  const { photos, small: all } = about.stores[store];
  return small ? all[image] ?? photos[image] : photos[image] ?? all[image];
}

// The rest is for a frozen page: matrices of 16-bit numbers, with the scale of each row.
const layerIn = ({ store, layer }) => about.stores[store].layers.find((one) => one.number === layer);
const routeIn = ({ route }, its) => (route < 0 || its.routes < 2 ? 'sum' : route);

// A matrix as a function of the token of a line and of another token; lines are rows or columns. null: not on the page.
async function linesOf(query, what) {
  const its = layerIn(query);
  const [number, { tokens }] = [its.matrices[`${what}/${routeIn(query, its)}`], its];
  if (number === undefined) return null;
  if (!unpacked.has(number)) {
    const stream = new Blob([bytes(byId('matrix-' + number).textContent)]).stream().pipeThrough(new DecompressionStream('deflate'));
    const raw = new Uint8Array(await new Response(stream).arrayBuffer());
    const [upper, lower] = [4 * tokens, 4 * tokens + tokens * tokens];
    const found = Int16Array.from({ length: tokens * tokens }, (_, at) => (raw[upper + at] << 8) | raw[lower + at]);
    unpacked.set(number, { scales: new Float32Array(raw.slice(0, upper).buffer), numbers: found });
    if (unpacked.size > MATRICES) unpacked.delete(unpacked.keys().next().value);
  }
  const { scales, numbers } = unpacked.get(number);
  const entry = (row, column) => numbers[row * tokens + column] * scales[row];
  return query.direction === 'row' ? entry : (token, other) => entry(other, token);
}

// The mean of some tokens' rows, or columns; of all tokens if none are given.
async function folded(query) {
  const [its, { images }] = [layerIn(query), about.stores[query.store]];
  if (query.gate || query.skip) return { error: 'Gate and D need the model: mamba-attn explore shows them.' };
  const entry = await linesOf(query, query.what === 'image' ? query.image : query.what);
  if (!entry) {
    const what = query.what === 'image' ? `${images[query.image][0]}: its matrix is` : query.what === 'mean' ? 'Averages of this scan are' : 'How much images differ is';
    return { error: `${what} not on this page: mamba-attn explore shows it.` };
  }
  const cells = runs(query.cells).map((cell) => (cell >= 0 ? cell : cellsOf(its) - 1 - cell)).filter((token) => token < its.tokens);
  const some = cells.length ? cells : [...Array(its.tokens).keys()];
  return { map: Float32Array.from({ length: cellsOf(its) }, (_, other) => some.reduce((sum, token) => sum + entry(token, other), 0) / some.length) };
}

async function nearestRows(query, point) {
  const its = layerIn(query);
  const entry = query.mode === 'blocks' ? null : await linesOf(query, 'mean');
  if (!entry) return { error: 'not on this page' };
  const others = [...Array(its.tokens).keys()];
  const away = others.slice(0, cellsOf(its)).map((token) => others.reduce((sum, other) => sum + (entry(token, other) - entry(point, other)) ** 2, 0));
  return { numbers: [...away.keys()].filter((token) => token !== point).sort((a, b) => away[a] - away[b]).slice(0, NEAREST) };
}

function held(query) {
  const its = layerIn(query);
  const key = query.mode === 'blocks' ? `stage${its.stage}` : `${query.layer}/${routeIn(query, its)}/${query.direction}`;
  const text = about.stores[query.store].points[`${key}/${query.method}`];
  if (!text) return { error: 'These points are not on this page: mamba-attn explore computes them.' };
  const raw = new Uint16Array(bytes(text).buffer);
  return { xy: Float32Array.from(raw, (_, at) => raw[(at % 2) * raw.length / 2 + (at >> 1)]) };
}

// Numbers as runs: 3, 4, 5, 9 are "3:5,9".
export function asRuns(numbers) {
  const found = [];
  for (const number of numbers) {
    const last = found[found.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else found.push([number, number]);
  }
  return found.map(([from, to]) => (from === to ? String(from) : `${from}:${to}`)).join(',');
}

export function runs(text) {
  const found = [];
  for (const run of text ? text.split(',') : []) {
    const match = /^(-?\d{1,7})(?::(-?\d{1,7}))?$/.exec(run);
    if (!match) throw new Error(`"${run.slice(0, 20)}" is not a number`);
    const [from, to] = [Number(match[1]), Number(match[2] ?? match[1])];
    if (to - from >= 65536 - found.length) throw new Error('too many patches are selected');
    for (let number = from; number <= to; number++) found.push(number);
  }
  return found;
}
