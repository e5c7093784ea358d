// Saves what is shown: pictures, numbers, the whole page; names of files say what is inside.
import { ask, byId, live, picture } from './data.js';
import { element, paint } from './colours.js';
import { saving } from './controls.js';
import { shownMaps, strips } from './maps.js';
import { litPoints, plotted } from './points.js';
import { cellsOn, layerOf, pane, state, storeOf, written } from './state.js';
import { caption } from './words.js';

function download(content, ending) {
  const link = element('a', undefined, { href: URL.createObjectURL(content), download: `${storeOf().name}_${fileName()}${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function fileName() {
  const its = layerOf();
  const patches = cellsOn(its).filter((cell) => cell >= 0);
  const who = patches.length === 1 ? `patch_${Math.floor(patches[0] / its.grid[1])}_${patches[0] % its.grid[1]}` : patches.length ? `${patches.length}_patches` : 'all_patches';
  return `stage_${its.stage}_block_${its.block}_${who}_${pane().direction === 'row' ? 'takes_from' : 'gives_to'}`;
}

// Canvases next to each other with their titles, as one picture.
saving.png = (what) => {
  const found = {
    maps: () => shownMaps().map((one) => [one.canvas, one.canvas.parentElement.querySelector('b').textContent]),
    strip: () => [...byId('strip').children].map((one) => [one.firstChild, one.children[1].textContent]),
    points: () => [...byId('plots').querySelectorAll('canvas')].filter((one) => one.clientWidth > 40 && !one.parentElement.closest('[hidden]')).map((one) => [one, one.closest('button')?.textContent ?? '']),
  }[what]();
  const ratio = window.devicePixelRatio || 1;
  const across = Math.min(found.length, 8);
  const size = (one) => [one.clientWidth * ratio, one.clientHeight * ratio];
  const [wide, high] = [0, 1].map((axis) => Math.max(...found.map(([one]) => size(one)[axis])) + (axis ? 30 : 12) * ratio);
  const canvas = element('canvas', undefined, { width: across * wide, height: Math.ceil(found.length / across) * high + 34 * ratio });
  const context = canvas.getContext('2d');
  context.fillStyle = paint('card');
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = paint('ink');
  context.font = `600 ${14 * ratio}px system-ui, sans-serif`;
  context.fillText(`${storeOf().name}: ${what === 'points' ? plotted()[0].heading.textContent : caption(pane())}`, 6 * ratio, 20 * ratio, canvas.width - 12 * ratio);
  context.font = `${12 * ratio}px system-ui, sans-serif`;
  context.imageSmoothingEnabled = false;
  found.forEach(([one, title], at) => {
    const [x, y] = [(at % across) * wide + 6 * ratio, Math.floor(at / across) * high + 32 * ratio];
    context.drawImage(one, x, y, ...size(one));
    context.fillText(title, x, y + size(one)[1] + 16 * ratio, wide - 12 * ratio);
  });
  canvas.toBlob((blob) => download(blob, `_${what}.png`));
};

// The numbers behind the picture, for numpy.load.
saving.npz = async () => {
  const its = layerOf();
  const files = { title: text(`${storeOf().name}: ${caption(pane())}`), address: text(written()), image: text(storeOf().images[pane().image][0]), grid: array(Int32Array.from(its.grid), [2]), selected: array(Int32Array.from(cellsOn(its)), [cellsOn(its).length]) };
  for (const one of shownMaps()) if (one.values) files[`map_${one.slot.what}${files[`map_${one.slot.what}`] ? '_b' : ''}`] = array(Float64Array.from(one.values), one.its.grid);
  for (const [name, one] of strips) files[`block_${name}`] = array(Float64Array.from(one.values), one.its.grid);
  plotted().forEach((one, at) => {
    if (one.xy) files[`points${at ? '_b' : ''}`] = array(one.xy, [one.xy.length / 2, 2]);
    files[`lit${at ? '_b' : ''}`] = array(Int32Array.from(litPoints(at)), [litPoints(at).length]);
  });
  const photo = await pixels(picture(pane().store, pane().image));
  if (photo) files.photo = photo;
  download(new Blob([zip(files)]), '.npz');
};

async function pixels(source) {
  if (!source) return null;
  const made = new Image();
  made.src = source;
  await made.decode();
  const canvas = new OffscreenCanvas(made.naturalWidth, made.naturalHeight);
  const context = canvas.getContext('2d');
  context.drawImage(made, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return array(data.filter((_, at) => at % 4 < 3), [canvas.height, canvas.width, 3]);
}

const text = (value) => npy(`<U${[...value].length}`, '()', new Uint8Array(Uint32Array.from(value, (letter) => letter.codePointAt(0)).buffer));
const array = (values, shape) => npy({ Int32Array: '<i4', Float32Array: '<f4', Float64Array: '<f8' }[values.constructor.name] ?? '|u1', `(${shape.join(', ')}${shape.length === 1 ? ',' : ''})`, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));

function npy(type, shape, data) {
  const head = `{'descr': '${type}', 'fortran_order': False, 'shape': ${shape}, }`;
  const header = head.padEnd(Math.ceil((head.length + 11) / 64) * 64 - 11) + '\n';
  const found = new Uint8Array(10 + header.length + data.length);
  found.set([0x93, 78, 85, 77, 80, 89, 1, 0, header.length & 255, header.length >> 8]);
  found.set(new TextEncoder().encode(header), 10);
  found.set(data, 10 + header.length);
  return found;
}

// A zip without compression.
function zip(files) {
  const [local, central] = [[], []];
  let at = 0;
  const entries = Object.entries(files);
  for (const [name, data] of entries) {
    const path = new TextEncoder().encode(name + '.npy');
    const fields = [20, 0, 0, 0, 0x21, checksum(data), data.length, data.length, path.length, 0];
    const head = packed([0x04034b50], fields, [4, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2]);
    central.push(packed([0x02014b50, 20], [...fields, 0, 0, 0, 0, at], [4, 2, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4]), path);
    local.push(head, path, data);
    at += head.length + path.length + data.length;
  }
  const size = central.reduce((sum, one) => sum + one.length, 0);
  const end = packed([0x06054b50, 0, 0, entries.length, entries.length, size, at, 0], [], [4, 2, 2, 2, 2, 4, 4, 2]);
  const found = new Uint8Array(at + size + end.length);
  let place = 0;
  for (const part of [...local, ...central, end]) {
    found.set(part, place);
    place += part.length;
  }
  return found;
}

function packed(first, rest, sizes) {
  const view = new DataView(new ArrayBuffer(sizes.reduce((a, b) => a + b)));
  let at = 0;
  [...first, ...rest].forEach((value, one) => {
    if (sizes[one] === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += sizes[one];
  });
  return new Uint8Array(view.buffer);
}

function checksum(data) {
  let found = -1;
  for (const byte of data) {
    found ^= byte;
    for (let bit = 0; bit < 8; bit++) found = (found >>> 1) ^ (0xedb88320 & -(found & 1));
  }
  return (found ^ -1) >>> 0;
}

byId('file').hidden = !live;
byId('file').addEventListener('click', async () => {
  byId('message').textContent = 'The page is being written; the browser saves it in a moment.';
  const reply = await ask(`api/file?store=${pane().store}&image=${pane().image}&state=${encodeURIComponent(written())}`, {}, 'blob');
  byId('message').textContent = reply.error ?? '';
  if (!reply.error) download(reply, '.html');
});
byId('copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    byId('copy').textContent = 'Copied';
  } catch {
    byId('copy').textContent = 'Copy it from the address bar';
  }
  setTimeout(() => { byId('copy').textContent = 'Copy link'; }, 2000);
});
