// The points of the scatterplots, drawn on a canvas between plotly's grid and what it shows under the pointer.
const SHAPES = {
  circle: (c, r) => c.arc(0, 0, r, 0, 2 * Math.PI),
  square: (c, r) => c.rect(-0.89 * r, -0.89 * r, 1.78 * r, 1.78 * r),
  diamond: (c, r) => corners(c, [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]], r),
  "triangle-up": (c, r) => corners(c, [[0, -1.15], [1.1, 0.8], [-1.1, 0.8]], r),
  cross: (c, r) => corners(c, [[-0.4, -1.1], [0.4, -1.1], [0.4, -0.4], [1.1, -0.4], [1.1, 0.4], [0.4, 0.4], [0.4, 1.1],
    [-0.4, 1.1], [-0.4, 0.4], [-1.1, 0.4], [-1.1, -0.4], [-0.4, -0.4]], r),
  x: (c, r) => (c.rotate(Math.PI / 4), SHAPES.cross(c, r)),
  star: (c, r) => corners(c, Array.from({ length: 10 }, (_, k) => [k % 2 ? 0.55 : 1.3, (k * Math.PI) / 5])
    .map(([d, a]) => [d * Math.sin(a), -d * Math.cos(a)]), r),
  pentagon: (c, r) => corners(c, [0, 1, 2, 3, 4].map((k) => [1.1 * Math.sin(k * 1.2566), -1.1 * Math.cos(k * 1.2566)]), r),
};
function corners(context, places, r) {
  places.forEach(([x, y], at) => (at ? context.lineTo(x * r, y * r) : context.moveTo(x * r, y * r)));
  context.closePath();
}
function channels(colour) {
  const hex = /^#(..)(..)(..)$/.exec(colour);
  return hex ? hex.slice(1).map((two) => parseInt(two, 16)) : colour.match(/[\d.]+/g).slice(0, 3).map(Number);
}
function palette(look) {
  if (!look.smooth) return look.colours;
  const stops = look.colours.map(channels);
  return Array.from({ length: 256 }, (_, k) => {
    const at = (k / 255) * (stops.length - 1), from = Math.min(Math.floor(at), stops.length - 2), part = at - from;
    return `rgb(${stops[from].map((low, c) => Math.round(low + (stops[from + 1][c] - low) * part))})`;
  });
}
function sheet(graph, layout) {
  let canvas = graph.querySelector("canvas.points");
  if (!canvas) {
    canvas = document.createElement("canvas");
    canvas.className = "points";
    canvas.setAttribute("aria-hidden", "true");
  }
  const above = graph.querySelectorAll("svg.main-svg")[1];
  if (canvas.nextSibling !== above) above.before(canvas);
  const dense = window.devicePixelRatio || 1;
  const [width, height] = [Math.round(layout.width * dense), Math.round(layout.height * dense)];
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
    canvas.style.width = `${layout.width}px`;
    canvas.style.height = `${layout.height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(dense, 0, 0, dense, 0, 0);
  context.clearRect(0, 0, layout.width, layout.height);
  return context;
}
function drawPoints(graph) {
  const layout = graph._fullLayout, trace = graph._fullData && graph._fullData[0];
  if (!layout || !layout.xaxis) return;
  const context = sheet(graph, layout), look = trace && graph.data[0].meta;
  if (!look) {
    graph.drawnPoints = { lit: [], x: [], count: 0 };
    return;
  }
  const { xaxis, yaxis } = layout, colours = palette(look);
  const lit = new Set((graph.lit || []).filter((point) => point < trace.x.length));
  context.beginPath();
  context.rect(xaxis._offset, yaxis._offset, xaxis._length, yaxis._length);
  context.save();
  context.clip();
  context.strokeStyle = "white";
  context.lineWidth = 0.6;
  const draw = (point, larger) => {
    context.save();
    context.translate(xaxis._offset + xaxis.l2p(trace.x[point]), yaxis._offset + yaxis.l2p(trace.y[point]));
    context.fillStyle = colours[look.colour[point]];
    context.beginPath();
    (SHAPES[look.symbols[look.symbol[point]]] || SHAPES.circle)(context, (look.size[point] + larger) / 2);
    context.fill();
    context.stroke();
    context.restore();
  };
  context.globalAlpha = lit.size ? 0.13 : 1;
  for (let point = 0; point < trace.x.length; point++) if (!lit.has(point)) draw(point, 0);
  context.globalAlpha = 1;
  if (lit.size < 40) context.strokeStyle = "#222222";
  for (const point of lit) draw(point, 2);
  context.restore();
  graph.drawnPoints = { lit: [...lit], x: trace.x, count: trace.x.length }; // read by tests and measurements
}
function follow(graph) {
  if (graph.followed) return;
  graph.followed = true;
  graph.on("plotly_afterplot", () => drawPoints(graph));
  graph.on("plotly_relayouting", () => drawPoints(graph));
}
// a pane's graph, when plotly has made it
function whenMade(view, pane, act, tries = 100) {
  const graph = document.querySelectorAll(`.graph.${view}`)[pane]?.querySelector(".js-plotly-plot");
  if (graph?.on && graph._fullLayout) act(graph);
  else if (tries) requestAnimationFrame(() => whenMade(view, pane, act, tries - 1));
}
function light(pane, points) {
  whenMade("scatter", pane, (graph) => {
    graph.lit = points || [];
    follow(graph);
    drawPoints(graph);
    if (graph.layout.selections?.length) Plotly.relayout(graph, { selections: [] }); // the frame of a drag
  });
}
// another map on the grid that is there: one restyle, several times as fast as a new figure
function remap(pane, given) {
  whenMade("patches", pane, (graph) => {
    const bytes = Uint8Array.from(atob(given.z), (letter) => letter.charCodeAt(0));
    const values = new Float32Array(bytes.buffer), z = [];
    for (let start = 0; start < values.length; start += given.width) z.push(values.slice(start, start + given.width));
    const { zmin, zmax, colorscale, tickvals, ticktext, unit, x, y } = given, none = undefined;
    const heat = graph.data.findIndex((trace) => trace.type === "heatmap");
    const other = { "annotations[0].text": unit };
    if (graph.layout.selections?.length) other.selections = []; // its frame goes in the same stroke
    Plotly.update(graph, {
      z: [z, none, none], zmin: [zmin, none, none], zmax: [zmax, none, none], colorscale: [colorscale, none, none],
      "colorbar.tickvals": [tickvals, none, none], "colorbar.ticktext": [ticktext, none, none], x: [none, x, x], y: [none, y, y],
    }, other, [heat, heat + 1, heat + 2]);
  });
}
