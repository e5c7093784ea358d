// Numbers to colours, by the rules of mamba_attn.figures.colours; the same sign has the same colour everywhere.
import { about, clamp } from './data.js';
import { state } from './state.js';

const SHADES = 510; // of a map
export const DIFFERENCES = ['difference', 'versus', 'apart'];
export const css = ([red, green, blue]) => `rgb(${red},${green},${blue})`;
export const paint = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();

// What of some values is shown: their sign, a normalisation, a logarithm; as mamba_attn.figures.shown does it.
const SIGNS = { absolute: Math.abs, positive: (value) => Math.max(value, 0), signed: (value) => value };
export const strengths = (values) => Float64Array.from(values, SIGNS[state.sign]);
export function shown(strength) {
  const { normalise, log } = state;
  let found = strength;
  const least = found.reduce((a, b) => Math.min(a, b), Infinity);
  const most = found.reduce((a, b) => Math.max(a, b), -Infinity);
  const sum = found.reduce((a, b) => a + Math.abs(b), 0);
  if (normalise === 'range') found = found.map((value) => (value - least) / (most - least || 1));
  else if (normalise !== 'none') found = found.map((value) => value / ((normalise === 'sum' ? sum : Math.max(-least, most)) || 1));
  if (!log) return found;
  const largest = found.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  return largest ? found.map((value) => Math.sign(value) * Math.max(Math.log10(Math.abs(value) / largest) + 3, 0)) : found;
}

function percentile(values, percent) {
  const sorted = Float64Array.from(values, Math.abs).sort();
  const place = (sorted.length - 1) * percent / 100;
  const below = Math.floor(place);
  return sorted[below] + (sorted[Math.min(below + 1, sorted.length - 1)] - sorted[below]) * (place - below);
}

// One scale for maps that are compared: the largest of them, without the largest half percent of each.
export function topOf(all) {
  const found = Math.max(0, ...all.map((values) => percentile(values, about.percentile)));
  return found || Math.max(0, ...all.map((values) => values.reduce((a, b) => Math.max(a, Math.abs(b)), 0))) || 1;
}

// The scale of a map: centred on zero with a sign, as differences always are, else from zero.
export function scaleOf(values, top, what = '') {
  const signed = what !== 'spread' && state.normalise !== 'range' && (state.sign === 'signed' || DIFFERENCES.includes(what) || values.some((value) => value < 0));
  const beyond = values.some((value) => Math.abs(value) > top * 1.000001);
  return { low: signed ? -top : 0, high: top, colours: about.palettes[signed ? 'signed' : state.palette], signed, beyond };
}

export function mixed(colours, position) {
  const place = clamp(position, 0, 1) * (colours.length - 1);
  const below = Math.min(Math.floor(place), colours.length - 2);
  return colours[below].map((one, channel) => Math.round(one + (colours[below + 1][channel] - one) * (place - below)));
}

// Where a value lies on a scale: 0 to 1.
export const onScale = (value, { low, high }) => clamp((value - low) / (high - low), 0, 1);

// A map as a picture of one pixel per cell; below opacity 1, what is near zero lets the photo through.
export function tile(values, [rows, columns], scale, opacity = 1) {
  const canvas = new OffscreenCanvas(columns, rows);
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(columns, rows);
  const table = Array.from({ length: SHADES + 1 }, (_, at) => {
    const strength = scale.signed ? Math.abs(2 * at / SHADES - 1) : at / SHADES;
    return [...mixed(scale.colours, at / SHADES), opacity >= 1 ? 255 : Math.round(255 * opacity * Math.sqrt(strength))];
  });
  values.forEach((value, cell) => pixels.data.set(table[Math.round(onScale(value, scale) * SHADES)], 4 * cell));
  context.putImageData(pixels, 0, 0);
  return canvas;
}

export const kindColour = (at, count) => css(
  count <= about.palettes.kinds.length ? about.palettes.kinds[at] : mixed(about.palettes.viridis, at / (count - 1)));

export const ramp = (colours) => element('span', { class: 'ramp', style: `background:linear-gradient(to right,${colours.map(css)})` });

// A line in black with a white border: it is seen on every ground.
export function stroked(context, line, wide, border = 2, colour = '#111') {
  for (const [paint_, width] of [['white', wide + border], [colour, wide]]) {
    [context.strokeStyle, context.lineWidth] = [paint_, width];
    context.stroke(line);
  }
}

// Line pieces [x0, y0, x1, y1], or corners [x, y] joined to an area, as a path.
export function pieces(all) {
  const made = new Path2D();
  for (const [x0, y0, x1, y1] of all) {
    made.moveTo(x0, y0);
    made.lineTo(x1, y1);
  }
  return made;
}
export function area(corners) {
  const made = new Path2D();
  corners.forEach(([x, y], at) => made[at ? 'lineTo' : 'moveTo'](x, y));
  made.closePath();
  return made;
}

// A canvas as large as its place on the page, in the screen's own pixels.
export function prepared(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  canvas.style.height = height + 'px';
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// An element, of attributes, where functions (such as onclick) and true or false are properties, and of elements and words.
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (['function', 'boolean'].includes(typeof value)) made[key] = value;
    else if (value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter(Boolean)); // words are never HTML: names come from files
  return made;
}
