/* What is wrong with the layout of a page: buttons and labels that leave their card, and texts that lie over others. */
() => {
  const wrong = [];
  const words = text => text.trim().replace(/\s+/g, " ").slice(0, 60);
  const isShown = element => element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
  const inScroller = element => {
    for (let each = element; each; each = each.parentElement)
      if (/auto|scroll/.test(getComputedStyle(each).overflowX) && each !== document.documentElement) return true;
    return false;
  };
  const visible = (rect, element) => {
    let { left, top, right, bottom } = rect;
    for (let each = element; each; each = each.parentElement) {
      const style = getComputedStyle(each);
      if (style.clipPath !== "none" || style.position === "fixed") return null;
      if (style.overflowX !== "visible" || style.overflowY !== "visible") {
        const box = each.getBoundingClientRect();
        left = Math.max(left, box.left), right = Math.min(right, box.right);
        top = Math.max(top, box.top), bottom = Math.min(bottom, box.bottom);
      }
    }
    return right - left > 1 && bottom - top > 1 ? { left, top, right, bottom } : null;
  };
  for (const each of document.querySelectorAll(".btn, button, .chip, summary, .seg > *, input, select")) {
    if (!isShown(each)) continue;
    const rect = each.getBoundingClientRect();
    if (inScroller(each)) continue;
    const box = (each.closest(".card, .strip") || document.documentElement).getBoundingClientRect();
    if (rect.left < box.left - 1 || rect.right > box.right + 1) wrong.push(`leaves its card: ${words(each.textContent)}`);
  }
  for (const each of document.querySelectorAll("input:not([type=checkbox], [type=radio], [type=hidden])"))
    if (isShown(each) && each.getBoundingClientRect().width < 80) wrong.push(`too narrow to type: ${each.name}`);
  const shown = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || element.closest("title, script, style, template") || !isShown(element)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const rects = element.closest("svg") ? [element.getBoundingClientRect()] : range.getClientRects();
    for (const rect of rects) {
      const part = visible(rect, element);
      if (!part) continue;
      shown.push({ ...part, node, text: words(node.data) });
      const line = `${element.tagName}.${element.className}`;
      if (part.right > innerWidth + 1 && !inScroller(element)) wrong.push(`leaves the window: ${words(node.data)} (${line})`);
    }
  }
  shown.sort((one, other) => one.top - other.top);
  for (const [number, one] of shown.entries()) {
    for (const other of shown.slice(number + 1)) {
      if (other.top > one.bottom) break;
      const width = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const height = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (width > 2 && height > 4 && one.node !== other.node) wrong.push(`overlap: ${one.text} | ${other.text}`);
    }
  }
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) wrong.push(`the page is ${width} px wide`);
  return wrong;
}
