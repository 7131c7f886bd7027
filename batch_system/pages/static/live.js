// Keeps the page up to date: says how old it is, connects again, and reads the page anew where messages were missed.
const live = find("#live"), says = find("#says"), stale = find("#stale");
const NOT_LIVE = 13, STALE = 15, OLD = 60, MOST_WAIT = 60, REREAD = 30;
let heardAt = performance.now(), freshAt = Date.now(), isDown = false, wait = 0.5, nextTry = 0, known = sayings(), needed = needs(), reading = null, readAt = performance.now();

function say(words) {
  says.textContent = words;
}

function sayings() {
  return new Map([...document.querySelectorAll("[data-say]")].map((each) => [each.dataset.say, each.dataset.words]));
}

// A row that leaves "Needs a person" stays as one line until the page is loaded anew, so that nobody looks for it.
function needs() {
  return new Map([...document.querySelectorAll("#p-needs article.pb")].map((row) => [row.id, find("h3", row).textContent.trim()]));
}

// Rows that somebody reads do not move: new ones come first, with a mark, and the others stay as they are shown.
const arrived = new Set();
function keepOrder(fragment) {
  const shown = [...document.querySelectorAll("#p-needs article.pb")].map((row) => row.id);
  const groups = new Set([...fragment.querySelectorAll("article.pb")].map((row) => row.parentNode));
  for (const group of groups) {
    const rows = [...group.children].filter((row) => row.matches("article.pb")), after = rows.at(-1).nextSibling;
    for (const row of rows) {
      if (!shown.includes(row.id)) arrived.add(row.id);
      row.classList.toggle("new", arrived.has(row.id));
    }
    rows.sort((a, b) => shown.indexOf(a.id) - shown.indexOf(b.id)).forEach((row) => group.insertBefore(row, after));
  }
}

function keepLeft() {
  const now = needs(), at = find(".as-of")?.textContent.match(/\d\d:\d\d/)?.[0] ?? "";
  for (const [id, name] of needed) {
    if (now.has(id)) continue;
    const how = [...document.querySelectorAll(".dw[data-say]")].find((row) => row.dataset.say.startsWith(`${name} `));
    const line = document.createElement("p");
    line.className = "under";
    line.textContent = `${how?.dataset.say ?? `${name} needs nobody any more`} ${at}`;
    find("#left")?.append(line);
  }
  needed = now;
}

function signIn() {
  location.assign(`${live.dataset.signin}?${new URLSearchParams({ next: location.pathname + location.search })}`);
}

function reread() {
  readAt = performance.now();
  return (reading ??= readAnew().finally(() => (reading = null)));
}

async function readAnew() {
  if (find("#contents[data-answer]")) return true; // the answer to a form can't be asked for again
  const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" } }).catch(() => null);
  if (answer?.redirected) return location.assign(answer.url);
  if (!answer?.ok) return;
  const text = await answer.text();
  await htmx.swap({ sourceElement: live, target: "#contents", select: "#contents", swap: "outerMorph", text });
  freshAt = Date.now();
  return true;
}

// Blocks that no message changes are read again after a while, but not by a tab that nobody sees.
const askedAt = new WeakMap();
function poll() {
  const now = performance.now(), isDue = (at, seconds) => now - at >= seconds * 1000;
  if (document.hidden) return;
  if (!stale.hidden) return isDue(readAt, REREAD) && reread();
  for (const block of document.querySelectorAll("[data-every]")) {
    if (!isDue(Math.max(askedAt.get(block) ?? 0, readAt), block.dataset.every)) continue;
    askedAt.set(block, now);
    htmx.trigger(block, "refresh");
  }
}

// A block that could not be read again keeps what it shows, and says how old that is.
function keepOld({ target, detail }) {
  if (detail.ctx?.response?.status === 401) return signIn();
  const block = target.closest?.("[data-every]");
  if (!block || find(".not-refreshed", block)) return;
  const note = document.createElement("span"), button = document.createElement("button");
  note.className = "not-refreshed sm";
  note.textContent = `Could not refresh, from ${block.dataset.at} `;
  button.className = "btn s";
  button.type = "button";
  button.textContent = "Try again";
  button.addEventListener("click", () => htmx.trigger(block, "refresh"));
  note.append(button);
  const heading = find("h2", block);
  if (heading) heading.after(note);
  else block.prepend(note);
}

async function hear() {
  heardAt = performance.now();
  if (isDown && !(await reread())) return;
  freshAt = Date.now();
  if (!isDown) return;
  isDown = false;
  wait = 0.5;
  say("Live again");
}

function connect() {
  if (live._htmx?.sse) return live._htmx.sse.delayCanceller?.();
  nextTry = performance.now() + wait * 1000 * (0.7 + Math.random() * 0.6);
  wait = Math.min(wait * 2, MOST_WAIT);
  htmx.trigger(live, "again");
}

function watch() {
  tick();
  if (document.hidden) heardAt = performance.now();
  const silent = (performance.now() - heardAt) / 1000, isOff = silent >= NOT_LIVE, age = (Date.now() - freshAt) / 1000;
  find("#verdict")?.classList.toggle("old", age >= OLD || Boolean(find(".not-refreshed")));
  live.classList.toggle("off", isOff);
  find("#live-words").textContent = isOff ? "Not live" : `Live · updated ${duration(Math.max(age, 1))} ago`;
  if (isOff && !isDown) {
    isDown = true;
    live._htmx?.sse?.reader?.cancel();
  }
  if (stale.hidden && silent >= STALE) say("Live updates have stopped");
  stale.hidden = silent < STALE;
  const left = (nextTry - performance.now()) / 1000, next = left > 0 ? `Next try in ${duration(Math.max(1, left))}` : "Trying now";
  find("#stale-words").textContent = `The numbers are ${duration(age)} old. ${next}.`;
  if (!live._htmx?.sse && performance.now() > nextTry && silent > 2) connect();
  poll();
}

for (const pane of document.querySelectorAll(".scroll")) if (pane.scrollWidth > pane.clientWidth) pane.tabIndex = 0;

if (live && window.htmx) {
  live.hidden = false;
  live.addEventListener("htmx:sse:before:message", hear);
  live.addEventListener("htmx:sse:error", (event) => {
    if (event.detail.status === 401) return signIn();
    heardAt = Math.min(heardAt, performance.now() - NOT_LIVE * 1000); // nobody answers, so there is nothing to wait for
  });
  document.addEventListener("htmx:response:error", keepOld);
  document.addEventListener("htmx:error", keepOld);
  document.addEventListener("htmx:before:swap", (event) => event.detail.tasks.forEach((task) => keepOrder(task.fragment)));
  live.addEventListener("beat", (event) => (ahead = Date.parse(event.detail.data) - Date.now()));
  live.addEventListener("reload", reread);
  document.addEventListener("visibilitychange", () => (heardAt = performance.now()));
  find("#stale-now").addEventListener("click", connect);
  document.addEventListener("click", (event) => event.target.closest?.("[data-reload]") && reread());
  document.addEventListener("htmx:after:swap", () => {
    tick();
    for (const field of document.querySelectorAll("input[name=csrf]")) field.value ||= find("meta[name=csrf]").content;
    const title = find("[data-title]")?.dataset.title;
    if (title) document.title = `${title} · Batch System`;
    const now = sayings(), fresh = [...now].filter(([key]) => !known.has(key));
    if (fresh.length) say(fresh.map(([key, words]) => words || key).join(". "));
    known = now;
    keepLeft();
  });
  setInterval(watch, 1000);
  watch();
} else setInterval(tick, 1000);

// The page without tasks shows the first task as soon as it is there.
if (find("#first-task")) setInterval(() => find("#first-task") && !document.hidden && reread(), 3000);

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-copies]");
  if (button) navigator.clipboard.writeText(find(button.dataset.copies).textContent).then(() => say("Copied"));
});
function offerCopies() {
  for (const button of document.querySelectorAll("[data-copies]")) button.hidden = !navigator.clipboard;
}
document.addEventListener("htmx:after:swap", offerCopies);
offerCopies();
