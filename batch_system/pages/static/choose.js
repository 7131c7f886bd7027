// The runs that are chosen in the list: how many they are and all of the page at once.
const BOX = ".run-lines tbody .c-box";

function showChosen() {
  const boxes = [...document.querySelectorAll(BOX)];
  const checked = boxes.filter((box) => box.checked);
  const number = checked.reduce((sum, box) => sum + Number(box.dataset.number), 0);
  const words = find("#chosen");
  if (words && number) words.innerHTML = `<b>${number.toLocaleString("en")} ${number === 1 ? "run" : "runs"}</b> chosen on this page`;
  const all = find("#choose-page");
  if (!all) return;
  all.hidden = false;
  all.checked = number > 0 && checked.length === boxes.length;
  all.indeterminate = number > 0 && !all.checked;
}

document.addEventListener("change", (event) => {
  if (event.target.id === "choose-page") for (const box of document.querySelectorAll(BOX)) box.checked = event.target.checked;
  if (event.target.matches(".c-box")) showChosen();
});
document.addEventListener("reset", () => setTimeout(showChosen));
showChosen();
