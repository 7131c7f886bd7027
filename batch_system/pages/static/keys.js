// Single keys. They are off where text is entered, in dialogs, and where the person has turned them off.
const ROWS = "main table.rows > tbody > tr:not(.day), article.pb, article.lt, article.dn";
const GO = { h: "Night", i: "Incidents", t: "Tasks", r: "Runs", c: "Changes", b: "Backups", n: "Nodes" };
const KEYS = "batch-keys";
const LIST = [
  ["Ctrl-K /", "Find, filter or do"], ["g h", "Night"], ["g i", "Incidents"], ["g t", "Tasks"], ["g r", "Runs"], ["g c", "Changes"],
  ["g b", "Backups"], ["g n", "Nodes"], ["j k", "Next row, row before"], ["Enter", "Open the row"], ["R", "Run now, or retry: asks first"],
  ["a", "Acknowledge: asks first"], ["l", "Log"], ["b", "Runbook"], ["d", "What was dealt with"], ["[ ]", "Night before, night after"],
  ["w", "Window"], ["f", "Follow the log"], ["x", "Choose the line"], ["n N", "Next hit in the log, hit before"], ["?", "This list"],
  ["Esc", "Close"],
];
let isGoing = false;

const inRow = (selector) => find(selector, document.activeElement.closest(ROWS) || find("main"));

function step(by) {
  const rows = [...document.querySelectorAll(ROWS)].filter((row) => row.getClientRects().length);
  const at = rows.indexOf(document.activeElement.closest(ROWS));
  const row = rows[at < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(Math.max(at + by, 0), rows.length - 1)];
  row?.setAttribute("tabindex", "-1");
  row?.focus();
}

function night(by) {
  const nights = [...document.querySelectorAll(".nights a")].map((link) => link.getAttribute("href"));
  const at = nights.findIndex((href) => new URL(href, location).href === location.href);
  const next = nights[(at < 0 ? nights.length - 1 : at) + by];
  if (next) location.assign(next);
  else if (by > 0 && at >= 0) location.assign(location.pathname);
}

function hit(by) {
  const marks = [...document.querySelectorAll("#log-lines mark")];
  const at = marks.indexOf(document.activeElement);
  const mark = marks[at < 0 ? (by > 0 ? 0 : marks.length - 1) : (at + by + marks.length) % marks.length];
  mark?.setAttribute("tabindex", "-1");
  mark?.focus();
}

function listKeys() {
  if (!find("#keys")) {
    const rows = LIST.map(([key, words]) => `<dt><kbd>${key}</kbd></dt><dd>${words}</dd>`).join("");
    document.body.insertAdjacentHTML("beforeend", `<dialog id="keys" class="card ask" aria-labelledby="keys-title"><h2 id="keys-title">Keys</h2>
      <dl class="plan">${rows}</dl><p class="sm t2">Single keys can be turned off on the page of your token.</p>
      <form class="row" method="dialog"><button class="btn" autofocus>Close</button></form></dialog>`);
  }
  find("#keys").showModal();
}

const DO = {
  "/": () => openCommand(),
  j: () => step(1),
  k: () => step(-1),
  r: () => inRow('a[href$="/retry"], a[href$="/start"]')?.click(),
  a: () => inRow('a[href$="/acknowledge"]')?.click(),
  l: () => (inRow('a[href$="#log"]') || find("#log-lines"))?.[inRow('a[href$="#log"]') ? "click" : "focus"](),
  b: () => inRow('a[rel="noreferrer"]')?.click(),
  d: () => {
    const fold = find("details.dealt");
    if (fold) fold.open = !fold.open;
    find("summary", fold || document)?.focus();
  },
  "[": () => night(-1),
  "]": () => night(1),
  w: () => find(".head .seg a:not([aria-current]), .head .seg button")?.focus(),
  f: () => find("#follow")?.click(),
  x: () => find(".c-box", document.activeElement.closest(ROWS) || document.createElement("i"))?.click(),
  n: (event) => hit(event.shiftKey ? -1 : 1),
  "?": listKeys,
  Enter: () => document.activeElement.matches(ROWS) && (find("a[data-open]", document.activeElement) || find("a[href]", document.activeElement))?.click(),
};

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "k" && !find("dialog[open]:not(#command)")) {
    event.preventDefault();
    return openCommand();
  }
  const isText = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (isText && event.key === "Escape") return event.target.blur();
  if (isText || event.ctrlKey || event.metaKey || event.altKey || find("dialog[open]")) return;
  if (event.key !== "Enter" && localStorage.getItem(KEYS) === "off") return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const place = isGoing && [...document.querySelectorAll(".nav a")].find((link) => link.textContent.trim().startsWith(GO[key] || "?"));
  isGoing = !isGoing && key === "g";
  if (place) return place.click();
  if (!DO[key] || (key === "Enter" && !document.activeElement.matches(ROWS))) return;
  event.preventDefault();
  DO[key](event);
});

const keySwitch = find("[data-keys]");
if (keySwitch) {
  keySwitch.hidden = false;
  const box = find("input", keySwitch);
  box.checked = localStorage.getItem(KEYS) !== "off";
  box.addEventListener("change", () => localStorage.setItem(KEYS, box.checked ? "on" : "off"));
}
