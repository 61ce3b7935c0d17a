import { button } from './elements.js';
import { say } from './words.js';

const DONE_SECONDS = 2;

/** A button that copies what `text` returns, and shows it; `onCopy` is told whether it worked. */
export function copyButton(name, text, onCopy) {
  const node = button(name, async () => {
    const copied = await copy(text());
    onCopy(copied);
    if (!copied) return;
    node.dataset.done = say('copied');
    setTimeout(() => delete node.dataset.done, DONE_SECONDS * 1000);
  });
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

// On plain http, browsers have navigator.clipboard only for the same machine.
function copyBySelection(text) {
  const { activeElement } = document;
  const area = document.body.appendChild(document.createElement('textarea'));
  area.className = 'visually-hidden';
  area.value = text;
  area.select();
  const copied = document.execCommand('copy');
  area.remove();
  activeElement?.focus();
  return copied;
}
