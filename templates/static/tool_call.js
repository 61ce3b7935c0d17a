import { Fold } from './fold.js';
import { GrowingText } from './growing_text.js';
import { inLines, textOf } from './item.js';
import { say } from './words.js';

/** A call of a tool in a reply. Its arguments are JSON once they are complete. */
export class ToolCall {
  constructor({ name }) {
    this.announcement = say('calls', { name });
    this.fold = new Fold('call', this.announcement);
    this.growing = new GrowingText(this.fold.body);
  }

  get node() {
    return this.fold.node;
  }

  get text() {
    return this.growing.text;
  }

  begin(text) {
    this.growing.begin(text);
  }

  grow(delta) {
    this.growing.grow(delta);
    return '';
  }

  end(item) {
    this.growing.end(textOf(item), inLines(textOf(item)));
  }
}
