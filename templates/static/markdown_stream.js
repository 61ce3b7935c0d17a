import { openTextOf, treesOf } from './block_tree.js';
import { Blocks } from './blocks.js';
import { followFootnotes } from './footnotes.js';
import { Definitions, parseBlocks } from './markdown.js';
import { certainLines } from './open_text.js';

const SHARE = 3; // of the time that drawing takes, so much passes before the next time, so that the page stays smooth

/**
 * Markdown that grows in an element, block by block. Blocks that have ended are never touched again, except for text
 * that mentions what is defined later.
 */
export class MarkdownStream {
  /** `onCopy` is told when code is copied; `folded` folds it if it is long. */
  constructor(node, onCopy, { folded = false } = {}) {
    Object.assign(this, { node, context: { onCopy, folded } });
    followFootnotes(node);
    this.clear();
  }

  clear() {
    Object.assign(this, { text: '', carry: '', tail: '', ended: false, drawAt: 0, dependent: [] });
    this.definitions = new Definitions(); // of the blocks that have ended
    this.node.replaceChildren();
    this.blocks = new Blocks(this.node, this.context, true);
  }

  append(text) {
    this.text += text;
    this.read(text);
    this.frame ??= requestAnimationFrame(() => this.drawInTime());
  }

  /** Shows the whole text, which may be another one. */
  end(text = this.text) {
    cancelAnimationFrame(this.frame);
    if (text !== this.text) {
      this.clear();
      this.text = text;
      this.read(text);
    }
    if (this.ended) return;
    this.read('', true);
    this.ended = true;
    this.draw();
  }

  // As markdown-it normalizes it; "\r\n" may come in two pieces.
  read(text, ended = false) {
    const whole = this.carry + text;
    this.carry = !ended && whole.endsWith('\r') ? '\r' : '';
    this.tail += whole.slice(0, whole.length - this.carry.length).replace(/\r\n?/g, '\n').replaceAll('\0', '\ufffd');
  }

  drawInTime() {
    this.frame = null;
    const start = performance.now();
    if (start < this.drawAt) {
      this.frame = requestAnimationFrame(() => this.drawInTime());
      return;
    }
    this.draw();
    const now = performance.now();
    this.drawAt = now + SHARE * (now - start);
  }

  draw() {
    const text = this.ended ? this.tail : certainLines(this.tail);
    const definitions = this.definitions.extended();
    const tokens = parseBlocks(text, definitions);
    const openToken = this.ended ? null : openTextOf(text, tokens);
    Object.assign(this.context, { definitions, openToken });
    const trees = treesOf(tokens);
    this.blocks.update(trees);
    for (const part of this.dependent) part.refresh();
    this.close(trees, text.split('\n').length - 1);
  }

  /**
   * A block has ended if the line in which the next one begins is complete, and one more: where a table begins, the
   * second line says so.
   */
  close(trees, completeLines) {
    const count = trees.findLastIndex(({ token }) => token.map[0] + 2 <= completeLines);
    if (count < 1) return;
    const end = lineStart(this.tail, trees[count - 1].token.map[1]);
    parseBlocks(this.tail.slice(0, end), this.definitions);
    this.dependent.push(...this.blocks.release(count));
    this.tail = this.tail.slice(end);
  }
}

function lineStart(text, line) {
  let start = 0;
  for (let count = 0; count < line; count++) start = text.indexOf('\n', start) + 1;
  return start;
}
