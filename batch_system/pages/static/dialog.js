// Opens pages that ask, such as "Cancel this run?", as a dialog over the page. The answer comes from the service.
const ASKS = /\/(retry|cancel|acknowledge|pause|resume|start|redrive|verify|mute|leave|undo)$/;

function parsed(html) {
  return new DOMParser().parseFromString(html, "text/html");
}

async function ask(link) {
  const answer = await fetch(link.href).catch(() => null);
  const form = answer?.ok ? find("form.ask", parsed(await answer.text())) : null;
  if (!form) return location.assign(link.href);
  const dialog = document.createElement("dialog");
  dialog.className = "card ask";
  dialog.setAttribute("aria-labelledby", "asked");
  form.className = "";
  find("h1", form).outerHTML = `<h2 id="asked">${find("h1", form).innerHTML}</h2>`;
  dialog.append(form);
  document.body.append(dialog);
  dialog.addEventListener("close", () => {
    dialog.remove();
    (link.isConnected ? link : find(`a[href="${link.getAttribute("href")}"]`) || find("#contents")).focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form, dialog, event.submitter);
  });
  find(".row a", form).addEventListener("click", (event) => {
    event.preventDefault();
    dialog.close();
  });
  dialog.showModal();
  find("[autofocus]", form)?.focus();
}

async function send(form, dialog, button) {
  button.disabled = true;
  const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) }).catch(() => null);
  if (answer?.ok) {
    if (new URL(answer.url).pathname !== location.pathname) return location.assign(answer.url);
    await reread();
    find("#done").textContent = `${find("#asked", dialog).textContent.replace(/\?$/, "")}: done`;
    setTimeout(() => (find("#done").textContent = ""), 8000);
    return dialog.close();
  }
  if (answer?.status === 401) return signIn();
  const page = answer && parsed(await answer.text());
  const words = page && (find("main [role=alert]", page) || find("main p", page))?.textContent;
  const problem = find("[role=alert]", form) || document.createElement("p");
  problem.className = "c-failed";
  problem.setAttribute("role", "alert");
  problem.textContent = words || "The service did not answer, so it is not known whether this was done.";
  find(".row", form).before(problem);
  button.disabled = false;
  button.focus();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  const isPlain = !event.button && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
  if (!link || !isPlain || link.origin !== location.origin || !ASKS.test(link.pathname) || link.closest("form")) return;
  event.preventDefault();
  ask(link);
});
