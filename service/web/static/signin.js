// Signs in with a token or the secret of a link, and makes tokens. The secret of a link stands in the fragment of the
// address, which no server and no log sees, and is removed from the address before anything else happens.
const fromLink = location.hash.slice(1);
history.replaceState(null, "", location.pathname);

const $ = (id) => document.getElementById(id);
const base = new URL("api/v1/", document.baseURI);
let csrf = null;

async function call(method, path, body) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (csrf !== null) headers["X-CSRF-Token"] = csrf;
  const options = { method, headers, credentials: "same-origin" };
  if (body !== undefined) options.body = JSON.stringify(body);
  const answer = await fetch(new URL(path, base), options);
  const content = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(content?.detail ?? `The service answered ${answer.status}.`);
  return content;
}

function say(text) {
  $("message").textContent = text && `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
  $("message").hidden = text === "";
}

function ask() {
  $("signin").hidden = false;
  $("secret").focus();
}

function show(session) {
  csrf = session.csrf_token;
  $("name").textContent = session.name;
  $("role").textContent = session.role;
  $("make").hidden = session.role !== "admin";
  $("signout").hidden = csrf === null; // a proxy, or the application around this one, has signed this person in
  $("secret").value = "";
  $("signin").hidden = true;
  $("signed-in").hidden = false;
  say("");
}

async function signIn(secret) {
  try {
    show(await call("POST", "session", { secret }));
  } catch (error) {
    ask();
    say(error.message);
  }
}

$("signin").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn($("secret").value.trim());
});

$("make").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const made = await call("POST", "tokens", {
      name: $("token-name").value.trim(),
      role: $("token-role").value,
      expires_in_days: Number($("token-days").value),
    });
    $("token").textContent = made.secret;
    $("url").textContent = new URL(".", document.baseURI).href.replace(/\/$/, "");
    $("made").hidden = false;
    $("made").scrollIntoView({ block: "nearest" });
    say("");
  } catch (error) {
    say(error.message);
  }
});

$("signout").addEventListener("click", async () => {
  await call("DELETE", "session").catch(() => null);
  location.reload();
});

if (fromLink) {
  await signIn(fromLink);
} else {
  await call("GET", "session").then(show, ask);
}
