// Numbers to colours, by the rules of mamba_attn.figures.colours.
function percentile(values, percent) {
  const sorted = Float64Array.from(values).sort();
  const place = (sorted.length - 1) * percent / 100;
  const below = Math.floor(place);
  return sorted[below] + (sorted[Math.min(below + 1, sorted.length - 1)] - sorted[below]) * (place - below);
}

function scaleOf(values, palette) {
  const least = Math.min(...values);
  const most = Math.max(...values);
  if (least < 0) {
    const high = percentile(values.map(Math.abs), about.percentile);
    const top = high > 0 ? high : Math.max(-least, most);
    return { low: -top, high: top, colours: about.palettes.signed, signed: true };
  }
  const high = percentile(values, about.percentile);
  const top = high > least ? high : most > least ? most : least + 1;
  return { low: least, high: top, colours: about.palettes[palette], signed: false };
}

function mixed(colours, position) {
  const place = Math.min(Math.max(position, 0), 1) * (colours.length - 1);
  const below = Math.min(Math.floor(place), colours.length - 2);
  return colours[below].map((one, channel) => Math.round(one + (colours[below + 1][channel] - one) * (place - below)));
}

// The colour of a value; below opacity 1, what is near zero, or near the lowest, lets the image through.
function colourOf(value, scale, opacity) {
  const position = Math.min(Math.max((value - scale.low) / (scale.high - scale.low), 0), 1);
  const [red, green, blue] = mixed(scale.colours, position);
  if (opacity >= 1) return `rgb(${red},${green},${blue})`;
  const strength = scale.signed ? Math.abs(2 * position - 1) : position;
  return `rgba(${red},${green},${blue},${(opacity * (about.thin + (1 - about.thin) * Math.sqrt(strength))).toFixed(3)})`;
}

const css = ([red, green, blue]) => `rgb(${red},${green},${blue})`;
const kindColour = (at, count) => css(
  count <= about.palettes.kinds.length ? about.palettes.kinds[at] : mixed(about.palettes.viridis, at / (count - 1)));

function ramp(colours) {
  const canvas = document.createElement('canvas');
  canvas.className = 'ramp';
  [canvas.width, canvas.height] = [150, 1];
  const context = canvas.getContext('2d');
  for (let x = 0; x < 150; x++) {
    context.fillStyle = css(mixed(colours, x / 149));
    context.fillRect(x, 0, 1, 1);
  }
  return canvas;
}

// A canvas as large as its place on the screen, in the screen's own pixels.
function prepared(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.style.height = height + 'px';
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const number = (value) => (value === 0 ? '0' : Math.abs(value) >= 0.001 && Math.abs(value) < 1000
  ? String(Number(value.toPrecision(3))) : value.toExponential(1));

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never HTML: names come from files
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const byId = (id) => document.getElementById(id);
