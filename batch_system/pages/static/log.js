// The log of a run: follows its end until somebody scrolls up. The list may come with a later reading of the page.
const follow = find("#follow");
const MOST_LINES = 5000, MOST_READ = 10, AROUND = 500;
let lines = null, isFollowing = false, unseen = 0, unread = [];

function setFollowing(isOn) {
  isFollowing = isOn;
  follow.setAttribute("aria-pressed", isOn);
  if (!isOn) return;
  setUnseen(0);
  lines.scrollTop = lines.scrollHeight;
}

function setUnseen(number) {
  unseen = number;
  const toEnd = find("#to-end");
  toEnd.hidden = !unseen;
  toEnd.textContent = `New lines: ${unseen}, jump to end`;
}

function take(changes) {
  const added = changes.flatMap((change) => [...change.addedNodes]).filter((node) => node.tagName === "LI");
  unread = [...unread, ...added.map((line) => find("span", line).textContent)].slice(-MOST_READ);
  if (!isFollowing) return setUnseen(unseen + added.length);
  while (lines.children.length > MOST_LINES) lines.firstElementChild.remove();
  lines.scrollTop = lines.scrollHeight;
}

function startLog() {
  const found = find("#log-lines");
  if (!follow || !found || found === lines) return;
  lines = found;
  follow.hidden = find("#read-new").hidden = false;
  lines.addEventListener("scroll", () => {
    const isAtEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 24;
    if (isAtEnd !== isFollowing) setFollowing(isAtEnd);
  });
  new MutationObserver(take).observe(lines, { childList: true });
  if ("follow" in lines.dataset) setFollowing(true);
  else if (!/^#L\d/.test(location.hash)) showWhatMatters();
}

// A log that is over opens at its first error, or at its end.
function showWhatMatters() {
  const error = lines.querySelector(".lv-error, .lv-critical");
  const above = error && error.getBoundingClientRect().top - lines.getBoundingClientRect().top;
  lines.scrollTop = error ? above - lines.clientHeight / 3 : lines.scrollHeight;
}

if (follow) {
  follow.addEventListener("click", () => setFollowing(!isFollowing));
  find("#read-new").addEventListener("click", () => {
    say(unread.join(". ") || "There is no new line");
    unread = [];
  });
  document.addEventListener("click", (event) => event.target.closest?.("#to-end") && setFollowing(true));
  document.addEventListener("htmx:after:swap", startLog);
  startLog();
  // A link to a line that is not among those shown leads to the lines around it.
  const line = location.hash.match(/^#L(\d{1,8})$/)?.[1];
  if (line && !find(location.hash)) {
    const to = `${Number(line) + AROUND}`;
    if (new URLSearchParams(location.search).get("to") !== to) location.replace(`?${new URLSearchParams({ to })}${location.hash}`);
  }
}
