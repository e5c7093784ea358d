// Keys that are not meant for a control become the value of the store "key". Keys pressed while the last ones are still
// being processed wait, because what they change depends on the result.
const pressed = { waiting: [], sent: 0 };
function send() {
  if (!pressed.waiting.length || Date.now() - pressed.sent < 3000) return;
  pressed.sent = Date.now();
  window.dash_clientside.set_props("key", { data: { keys: pressed.waiting.splice(0, 32), at: pressed.sent } });
}
document.addEventListener("keydown", (event) => {
  const target = event.target;
  const button = target.matches("input[type=radio], input[type=checkbox]");
  const typing = !button && target.closest("input, textarea, select, [role=listbox], [role=combobox], [role=slider]");
  const arrow = event.key.startsWith("Arrow");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (arrow && button) return; // radio buttons move with arrows
  if (arrow || ["Escape", "[", "]", "r", "m", "v", "p", "?"].includes(event.key) || /^[0-9]$/.test(event.key)) {
    event.preventDefault();
    pressed.waiting.push(event.key);
    send();
  }
});

// plotly's events do not say whether Shift was held
let shift = null;
document.addEventListener("mousedown", (event) => {
  if (event.shiftKey !== shift) window.dash_clientside.set_props("shift", { data: event.shiftKey });
  shift = event.shiftKey;
}, true);

window.dash_clientside = Object.assign({}, window.dash_clientside, {
  explorer: {
    address: (state) => {
      if (state) history.replaceState(null, "", "?state=" + state);
      return null;
    },
    light: (points, figure, id) => {
      light(id.pane, points);
      return null;
    },
    map: (given, id) => {
      if (given) remap(id.pane, given);
      return null;
    },
    gallery: (clicks, link) => {
      if (!((clicks || 0) % 2)) return [window.dash_clientside.no_update, "gallery hidden"];
      return [link, "gallery"];
    },
    acted: () => {
      pressed.sent = 0;
      setTimeout(send, 0);
      return window.dash_clientside.no_update;
    },
    // the browser draws the picture, nothing is sent
    picture: (given) => {
      if (given) {
        const { figure, ...how } = given;
        Plotly.downloadImage(figure, how);
      }
      return null;
    },
  },
});
