// Signs in with the secret of a link. It stands in the fragment of the address, which no server and no log sees, and is
// removed from the address before anything else happens.
const show = document.getElementById("show"), field = document.getElementById("secret");
show.hidden = false;
show.addEventListener("click", () => {
  field.type = field.type === "password" ? "text" : "password";
  show.setAttribute("aria-pressed", field.type === "text");
});
const secret = location.hash.slice(1);
history.replaceState(null, "", location.pathname + location.search);
if (secret) {
  document.getElementById("secret").value = secret;
  document.getElementById("signin").submit();
}
localStorage.removeItem("batch-recent"); // the pages that the person before has seen
