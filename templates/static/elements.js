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
