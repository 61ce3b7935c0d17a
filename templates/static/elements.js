export function element(tag, className, text = '') {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

/** A copy of the content of a <template>. */
export function fromTemplate(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** A copy of one of the page's buttons. */
export function button(name, onClick) {
  const node = fromTemplate(`${name}-button`);
  node.addEventListener('click', onClick);
  return node;
}

/** A wide element scrolls, so the keyboard has to reach it. */
export function makeScrollable(part, label) {
  part.tabIndex = 0;
  part.setAttribute('role', 'group');
  part.setAttribute('aria-label', label);
}
