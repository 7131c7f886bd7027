// Ticks relative times. The clock of the service counts, not that of the browser.
const find = (selector, within = document) => within.querySelector(selector);
let ahead = Date.parse(find("meta[name=now]")?.content) - Date.now() || 0;

function duration(seconds) {
  if (seconds < 9.95) return `${Math.floor(seconds)} s`;
  const whole = Math.round(seconds), minutes = Math.round(seconds / 60), hours = Math.round(seconds / 3600);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function tick() {
  const now = Date.now() + ahead;
  for (const time of document.querySelectorAll("time[data-relative]")) {
    const exact = (Date.parse(time.dateTime) - now) / 1000;
    const seconds = "past" in time.dataset ? Math.min(0, exact) : exact, text = duration(Math.abs(seconds));
    const words = Math.abs(seconds) > 2592000 ? time.title : seconds > 0 ? `in ${text}` : `${text} ago`;
    if (time.textContent !== words) time.textContent = words;
  }
}
