// Saves what is shown: pictures, numbers, the whole page; names of files say what is inside.
import { ask, byId, live, picture } from './data.js';
import { element, paint } from './colours.js';
import { saving } from './controls.js';
import { shownMaps, strips } from './maps.js';
import { litPoints, plotted } from './points.js';
import { cellsOn, imageOf, layerOf, pane, state, storeOf, written } from './state.js';
import { caption } from './words.js';

function download(content, ending) {
  const link = element('a', { href: URL.createObjectURL(content), download: `${storeOf().name}_${fileName()}${ending}` });
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
  const seen = (canvas) => canvas.clientWidth > 40 && !canvas.parentElement.closest('[hidden]');
  const titleOf = (canvas) => canvas.closest('button')?.children[1] ?? canvas.parentElement.querySelector('b');
  const box = byId({ maps: 'maps', strip: 'strip', points: 'plots' }[what]);
  const found = [...box.querySelectorAll('canvas.map, canvas.plot, button canvas')].filter((one) => what === 'strip' || seen(one));
  const ratio = window.devicePixelRatio || 1;
  const across = Math.min(found.length, 8);
  const size = (one) => [one.clientWidth * ratio, one.clientHeight * ratio];
  const [wide, high] = [0, 1].map((axis) => Math.max(...found.map((one) => size(one)[axis])) + (axis ? 30 : 12) * ratio);
  const canvas = element('canvas', { width: across * wide, height: Math.ceil(found.length / across) * high + 34 * ratio });
  const context = canvas.getContext('2d');
  context.fillStyle = paint('card');
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = paint('ink');
  context.font = `600 ${14 * ratio}px system-ui, sans-serif`;
  context.fillText(`${storeOf().name}: ${what === 'points' ? plotted()[0].heading.textContent : caption(pane())}`, 6 * ratio, 20 * ratio, canvas.width - 12 * ratio);
  context.font = `${12 * ratio}px system-ui, sans-serif`;
  context.imageSmoothingEnabled = false;
  found.forEach((one, at) => {
    const [x, y] = [(at % across) * wide + 6 * ratio, Math.floor(at / across) * high + 32 * ratio];
    context.drawImage(one, x, y, ...size(one));
    context.fillText(titleOf(one)?.textContent ?? '', x, y + size(one)[1] + 16 * ratio, wide - 12 * ratio);
  });
  canvas.toBlob((blob) => download(blob, `_${what}.png`));
};

// The numbers behind the picture, for numpy.load.
saving.npz = async () => {
  const [its, numbers] = [layerOf(), (values) => array(Int32Array.from(values), [values.length])];
  const files = { title: text(`${storeOf().name}: ${caption(pane())}`), address: text(written()), image: text(imageOf()[0]), grid: numbers(its.grid), selected: numbers(cellsOn(its)) };
  const map = (one) => array(Float64Array.from(one.values), one.its.grid);
  for (const one of shownMaps()) if (one.values) files[`map_${one.slot.what}${files[`map_${one.slot.what}`] ? '_b' : ''}`] = map(one);
  for (const [name, one] of strips) files[`block_${name}`] = map(one);
  plotted().forEach((one, at) => {
    if (one.xy) files[`points${at ? '_b' : ''}`] = array(one.xy, [one.xy.length / 2, 2]);
    files[`lit${at ? '_b' : ''}`] = numbers(litPoints(at));
  });
  const photo = await pixels(picture(pane().store, pane().image));
  if (photo) files.photo = photo;
  download(new Blob(zip(files)), '.npz');
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

const TYPES = new Map([[Int32Array, '<i4'], [Float32Array, '<f4'], [Float64Array, '<f8']]);
const text = (value) => npy(`<U${[...value].length}`, '()', Uint32Array.from(value, (letter) => letter.codePointAt(0)));
const array = (values, shape) => npy(TYPES.get(values.constructor) ?? '|u1', `(${shape.join(', ')}${shape.length === 1 ? ',' : ''})`, values);

function npy(type, shape, { buffer, byteOffset, byteLength }) {
  const head = `{'descr': '${type}', 'fortran_order': False, 'shape': ${shape}, }`;
  const header = head.padEnd(Math.ceil((head.length + 11) / 64) * 64 - 11) + '\n';
  const found = new Uint8Array(10 + header.length + byteLength);
  found.set([0x93, 78, 85, 77, 80, 89, 1, 0, header.length & 255, header.length >> 8]);
  found.set(new TextEncoder().encode(header), 10);
  found.set(new Uint8Array(buffer, byteOffset, byteLength), 10 + header.length);
  return found;
}

// The parts of a zip without compression.
function zip(files) {
  const [local, central] = [[], []];
  const sizeOf = (parts) => parts.reduce((sum, one) => sum + one.length, 0);
  for (const [name, data] of Object.entries(files)) {
    const path = new TextEncoder().encode(name + '.npy');
    const fields = [20, 0, 0, 0, 0x21, checksum(data), data.length, data.length, path.length, 0];
    central.push(packed('IHHHHHHIIIHHHHHII', 0x02014b50, 20, ...fields, 0, 0, 0, 0, sizeOf(local)), path);
    local.push(packed('IHHHHHIIIHH', 0x04034b50, ...fields), path, data);
  }
  const count = central.length / 2;
  return [...local, ...central, packed('IHHHHIIH', 0x06054b50, 0, 0, count, count, sizeOf(central), sizeOf(local), 0)];
}

// Little-endian whole numbers of 2 bytes (H) and 4 (I).
function packed(format, ...values) {
  return Uint8Array.from(values.flatMap((value, at) => [0, 8, 16, 24].slice(0, format[at] === 'I' ? 4 : 2).map((shift) => value >>> shift & 255)));
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
