// Tells the service the zone of the browser, for the switch between UTC and local time, and names it there.
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
const button = document.querySelector("[data-local-zone]");
const city = zone?.split("/").pop().replaceAll("_", " ");
if (button && city === "UTC") {
  button.form.remove(); // there is nothing to switch
} else if (zone && button && button.value === "UTC") {
  button.value = zone;
  button.textContent = city;
}
