// The command box: a combobox over the page. The service says what the words mean; this shows it as options.
const command = find("#command"), words = find("input", command), list = find("#command-list"), RECENT = "batch-recent";
const MOST_RECENT = 6, LONGEST_TITLE = 100, PAUSE = 120;
let shownFor = null, newestAsk = 0, timer = 0;

const options = () => [...list.querySelectorAll("[role=option]")];

function recent() {
  try {
    const kept = JSON.parse(localStorage.getItem(RECENT));
    return kept.filter(({ path, title }) => /^\/(?![/\\])/.test(path) && typeof title === "string").slice(0, MOST_RECENT + 1);
  } catch {
    return [];
  }
}

function remember() {
  if (find("#contents[data-answer], main form.ask") || location.pathname === command.dataset.page) return;
  const path = location.pathname + location.search, title = document.title.replace(/^\(\d+\) | · Batch System$/g, "").slice(0, LONGEST_TITLE);
  localStorage.setItem(RECENT, JSON.stringify([{ path, title }, ...recent().filter((each) => each.path !== path)].slice(0, MOST_RECENT + 1)));
}

function choose(option) {
  for (const each of options()) each.setAttribute("aria-selected", each === option);
  if (option) words.setAttribute("aria-activedescendant", option.id);
  else words.removeAttribute("aria-activedescendant");
  option?.scrollIntoView({ block: "nearest" });
}

// The page of the search has lists of links. In a listbox they are options in groups.
function show(fragment, asked) {
  shownFor = asked;
  list.replaceChildren(...fragment.querySelectorAll(".grp"));
  list.querySelectorAll(".grp").forEach((group, number) => {
    const heading = find("h2", group), title = document.createElement("div");
    title.textContent = heading.textContent;
    title.id = `command-group-${number}`;
    title.className = "title";
    heading.replaceWith(title);
    group.setAttribute("role", "group");
    group.setAttribute("aria-labelledby", title.id);
    for (const each of [title, ...group.querySelectorAll("ul, li")]) each.setAttribute("role", "presentation");
  });
  list.querySelectorAll("a").forEach((link, number) => {
    link.id = `command-option-${number}`;
    link.setAttribute("role", "option");
    link.tabIndex = -1;
  });
  find(".in-terminal", command).replaceChildren(...(find(".in-terminal", fragment)?.childNodes ?? []));
  const number = options().length, none = find(".nothing", command);
  words.setAttribute("aria-expanded", number > 0);
  none.hidden = number > 0 || !asked;
  find("[role=status]", command).textContent = number ? `${number} ${asked ? "found" : "recent pages"}` : none.hidden ? "" : none.textContent;
  choose(options()[0]);
}

function showRecent() {
  const fragment = document.createElement("div"), here = location.pathname + location.search;
  const pages = recent().filter((each) => each.path !== here).slice(0, MOST_RECENT);
  if (pages.length) {
    fragment.innerHTML = '<div class="grp"><h2>Recent pages</h2><ul></ul></div>';
    find("ul", fragment).append(
      ...pages.map(({ path, title }) => {
        const line = document.createElement("li"), link = document.createElement("a"), label = document.createElement("span");
        link.className = "it";
        link.href = path;
        label.className = "cut";
        label.textContent = title;
        link.append(find(".cmd-in .i", command).cloneNode(true), label);
        line.append(link);
        return line;
      }),
    );
  }
  show(fragment, "");
}

async function askFor(asked) {
  const ask = ++newestAsk;
  if (!asked) return showRecent();
  const address = `${command.dataset.page}?${new URLSearchParams({ q: asked })}`;
  const answer = await fetch(address, { headers: { "HX-Request": "true", "HX-Target": "div#found" } }).catch(() => null);
  if (ask !== newestAsk || !command.open) return;
  if (answer?.status === 401) return signIn();
  if (answer?.ok) {
    const page = parsed(await answer.text());
    if (ask === newestAsk) show(page, asked);
  }
}

function openCommand() {
  if (command.open) return command.close();
  words.value = "";
  command.showModal();
  words.focus();
  askFor("");
}

words.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => askFor(words.value.trim()), PAUSE);
});

words.addEventListener("keydown", (event) => {
  const all = options(), at = all.findIndex((each) => each.id === words.getAttribute("aria-activedescendant"));
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (all.length) choose(all[(at + (event.key === "ArrowDown" ? 1 : -1) + all.length) % all.length]);
  } else if (event.key === "Enter" && at >= 0 && shownFor === words.value.trim()) {
    event.preventDefault(); // words without an answer yet go to the page of the search instead
    all[at].click();
  } else if (event.key === "Escape") {
    event.preventDefault();
    event.stopPropagation();
    command.close();
  }
});

// Before another listener opens the page that asks as a dialog.
command.addEventListener("click", (event) => {
  if (event.target === command || (event.target.closest("a") && !event.ctrlKey && !event.metaKey)) command.close();
});
command.addEventListener("close", () => newestAsk++);
find("header .search")?.addEventListener("click", openCommand);
remember();
