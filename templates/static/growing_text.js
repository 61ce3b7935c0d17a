import { element } from './elements.js';

const BLOCK_LENGTH = 2000;

/** Text that grows in an element. */
export class GrowingText {
  constructor(node) {
    Object.assign(this, { node, text: '', pending: '', known: 0 });
  }

  /** Shows the beginning of a text, as the server has stored it; its deltas come again. */
  begin(text) {
    this.grow(text);
    this.known = text.length;
  }

  /** Adds a delta, and returns what of it is new. */
  grow(delta) {
    const fresh = delta.slice(this.known);
    this.known -= delta.length - fresh.length;
    this.text += fresh;
    this.pending += fresh;
    if (this.pending) this.frame ??= requestAnimationFrame(() => this.draw());
    return fresh;
  }

  /** Shows the whole text, perhaps in another form. */
  end(text, shown = text) {
    cancelAnimationFrame(this.frame);
    Object.assign(this, { text, pending: '', known: text.length, frame: null });
    this.node.replaceChildren(element('div', 'block', shown));
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
