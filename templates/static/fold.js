import { element } from './elements.js';

/** A part of a message of which the reader sees the label, and the rest after opening it. */
export class Fold {
  constructor(kind, label) {
    this.node = element('details', `fold ${kind}`);
    this.summary = this.node.appendChild(element('summary', '', label));
    this.body = this.node.appendChild(element('div', 'folded'));
    this.summary.addEventListener('click', () => { this.touched = true; });
  }

  set label(text) {
    this.summary.textContent = text;
  }

  /** Opens or closes it, unless the reader has. */
  set open(open) {
    if (!this.touched) this.node.open = open;
  }
}
