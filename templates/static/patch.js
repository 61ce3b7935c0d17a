// Changes live nodes into other ones. What is equal is not touched, so a selection in it survives.

/** Gives a live node the children of another one, which may be used up. */
export function patchChildren(live, fresh) {
  const wanted = [...fresh.childNodes];
  const old = [...live.childNodes];
  wanted.forEach((node, index) => {
    if (!old[index]) live.append(node);
    else if (!patchNode(old[index], node)) old[index].replaceWith(node);
  });
  for (const node of old.slice(wanted.length)) node.remove();
}

/** Changes as little of a text as possible: often it only grows. */
export function patchText(live, text) {
  if (live.data === text) return;
  if (text.startsWith(live.data)) return live.appendData(text.slice(live.length));
  const length = commonLength(live.data, text);
  live.replaceData(length, live.length - length, text.slice(length));
}

/** Whether a live node could become the other one. */
function patchNode(live, fresh) {
  if (live.nodeName !== fresh.nodeName) return false;
  if (live.nodeType === Node.TEXT_NODE) patchText(live, fresh.data);
  else if (!isSameFormula(live, fresh)) patchElement(live, fresh);
  return true;
}

function patchElement(live, fresh) {
  for (const { name } of [...live.attributes]) if (!fresh.hasAttribute(name)) live.removeAttribute(name);
  for (const { name, value } of fresh.attributes) {
    if (live.getAttribute(name) !== value) live.setAttribute(name, value);
  }
  patchChildren(live, fresh);
}

// A formula that is typeset has other children than its source.
function isSameFormula(live, fresh) {
  return Boolean(live.dataset?.tex) && live.className === fresh.className && live.dataset.tex === fresh.dataset.tex;
}

function commonLength(a, b) {
  let length = 0;
  while (length < a.length && a[length] === b[length]) length++;
  return length;
}
