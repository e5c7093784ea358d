// What the page shows: numbers from the server, or from the page itself if it is frozen. Both answer alike.
export const about = JSON.parse(document.getElementById('about').textContent);
export const live = about.live;
const KEPT = 800; // maps that are remembered
const MATRICES = 24; // that stay unpacked
const NEAREST = 6; // points most alike, as the server counts them
const kept = new Map();
const unpacked = new Map();

export const byId = (id) => document.getElementById(id);
export const cellsOf = (its) => its.grid[0] * its.grid[1];

function bytes(text) {
  const raw = atob(text);
  const found = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) found[at] = raw.charCodeAt(at);
  return found;
}

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

// Maps of queries: {map} each, on the query's own grid, or {error}. All that are not remembered are asked for at once.
export async function maps(queries) {
  const keys = queries.map((query) => JSON.stringify(query));
  const missing = keys.flatMap((key, at) => (kept.has(key) || keys.indexOf(key) < at ? [] : [at]));
  const found = new Map();
  if (missing.length) {
    const wanted = missing.map((at) => queries[at]);
    const reply = live ? await post('api/maps', { queries: wanted }) : await Promise.all(wanted.map(folded));
    missing.forEach((at, number) => {
      const one = reply.error ? reply : reply[number];
      found.set(keys[at], typeof one.map === 'string' ? { map: new Float32Array(bytes(one.map).buffer) } : one);
      if (!one.error) kept.set(keys[at], found.get(keys[at]));
    });
    for (const key of kept.keys()) if (kept.size > KEPT) kept.delete(key);
  }
  return keys.map((key) => found.get(key) ?? kept.get(key));
}

// Points of a pane: {xy}, {job} that is computing them, or {error}.
export async function points(pane) {
  const key = JSON.stringify(pane);
  if (kept.has(key)) return kept.get(key);
  const reply = live ? await post('api/points', pane) : held(pane);
  const found = typeof reply.xy === 'string' ? { xy: new Float32Array(bytes(reply.xy).buffer) } : reply;
  if (found.xy) kept.set(key, found);
  return found;
}
// The points most alike to one of them: {numbers}, or {error}.
export async function neighbours(pane, point) {
  const key = `alike ${point} ${JSON.stringify(pane)}`;
  const found = kept.get(key) ?? await (live ? post('api/neighbours', { ...pane, point }) : nearestRows(pane, point));
  if (found.numbers) kept.set(key, found);
  return found;
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
async function matrix(number, tokens) {
  if (unpacked.has(number)) return unpacked.get(number);
  const stream = new Blob([bytes(byId('matrix-' + number).textContent)]).stream().pipeThrough(new DecompressionStream('deflate'));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const scales = new Float32Array(raw.slice(0, 4 * tokens).buffer);
  const entries = tokens * tokens;
  const numbers = new Int16Array(entries);
  for (let at = 0; at < entries; at++) numbers[at] = (raw[4 * tokens + at] << 8) | raw[4 * tokens + entries + at];
  unpacked.set(number, { scales, numbers });
  if (unpacked.size > MATRICES) unpacked.delete(unpacked.keys().next().value);
  return unpacked.get(number);
}

// The mean of some tokens' rows, or columns; of all tokens if none are given.
async function folded(query) {
  const store = about.stores[query.store];
  const its = store.layers.find((one) => one.number === query.layer);
  if (query.gate || query.skip) return { error: 'Gate and D need the model: mamba-attn explore shows them.' };
  const key = `${query.what === 'image' ? query.image : query.what}/${query.route < 0 || its.routes < 2 ? 'sum' : query.route}`;
  if (!(key in its.matrices)) {
    const what = query.what === 'image' ? `${store.images[query.image][0]}: its matrix is` : query.what === 'mean' ? 'Averages of this scan are' : 'How much images differ is';
    return { error: `${what} not on this page: mamba-attn explore shows it.` };
  }
  const { tokens } = its;
  const { scales, numbers } = await matrix(its.matrices[key], tokens);
  const cells = runs(query.cells).map((cell) => (cell >= 0 ? cell : cellsOf(its) - 1 - cell)).filter((token) => token < tokens);
  const some = cells.length ? cells : Array.from({ length: tokens }, (_, token) => token);
  const total = new Float64Array(tokens);
  for (const token of some) {
    for (let other = 0; other < tokens; other++) {
      const row = query.direction === 'row' ? token : other;
      total[other] += numbers[row * tokens + (query.direction === 'row' ? other : token)] * scales[row];
    }
  }
  return { map: Float32Array.from(total.subarray(0, cellsOf(its)), (value) => value / some.length) };
}

async function nearestRows(pane, point) {
  const its = about.stores[pane.store].layers.find((one) => one.number === pane.layer);
  const number = its.matrices[`mean/${pane.route < 0 || its.routes < 2 ? 'sum' : pane.route}`];
  if (pane.mode === 'blocks' || number === undefined) return { error: 'not on this page' };
  const { scales, numbers } = await matrix(number, its.tokens);
  const at = (token, other) => (pane.direction === 'row' ? numbers[token * its.tokens + other] * scales[token] : numbers[other * its.tokens + token] * scales[other]);
  const away = Array.from({ length: cellsOf(its) }, (_, token) => {
    let sum = 0;
    for (let other = 0; other < its.tokens; other++) sum += (at(token, other) - at(point, other)) ** 2;
    return sum;
  });
  return { numbers: [...away.keys()].filter((token) => token !== point).sort((a, b) => away[a] - away[b]).slice(0, NEAREST) };
}

function held(pane) {
  const store = about.stores[pane.store];
  const its = store.layers.find((one) => one.number === pane.layer);
  const route = pane.route < 0 || its.routes < 2 ? 'sum' : pane.route;
  const key = pane.mode === 'blocks' ? `stage${its.stage}/${pane.method}` : `${pane.layer}/${route}/${pane.direction}/${pane.method}`;
  const text = store.points[key];
  if (!text) return { error: 'These points are not on this page: mamba-attn explore computes them.' };
  const raw = new Uint16Array(bytes(text).buffer);
  const count = raw.length / 2;
  return { xy: Float32Array.from({ length: raw.length }, (_, at) => raw[(at % 2) * count + (at >> 1)]) };
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
