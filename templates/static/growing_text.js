import { DeltaText } from './delta_text.js';
import { element } from './elements.js';

const BLOCK_LENGTH = 2000;

/** Plain text that grows in an element. */
export class GrowingText {
  constructor(node) {
    Object.assign(this, { node, deltas: new DeltaText(), pending: '' });
  }

  get text() {
    return this.deltas.text;
  }

  /** Shows the beginning of a text, as the server has stored it; its deltas come again. */
  begin(text) {
    this.deltas.begin(text);
    this.show(text);
  }

  /** Adds a delta, and returns what of it is new. */
  grow(delta) {
    const fresh = this.deltas.grow(delta);
    this.show(fresh);
    return fresh;
  }

  show(fresh) {
    this.pending += fresh;
    if (this.pending) this.frame ??= requestAnimationFrame(() => this.draw());
  }

  /** Shows the whole text, perhaps in another form. What shows it already stays, with a selection in it. */
  end(text, shown = text) {
    cancelAnimationFrame(this.frame);
    if (this.pending) this.draw();
    this.deltas.end(text);
    if (this.node.textContent !== shown) this.node.replaceChildren(element('div', 'block', shown));
  }

  // Once per frame, into blocks that end with a line: the browser lays out only the last block, not the whole text.
  draw() {
    this.frame = null;
    this.block ??= this.startBlock();
    if (this.block.length > BLOCK_LENGTH) {
      const end = this.pending.indexOf('\n') + 1;
      this.block.appendData(this.pending.slice(0, end));
      this.pending = this.pending.slice(end);
      if (end) this.block = this.startBlock();
    }
    this.block.appendData(this.pending);
    this.pending = '';
  }

  startBlock() {
    return this.node.appendChild(element('div', 'block')).appendChild(new Text());
  }
}
