import { element } from './elements.js';
import { GrowingText } from './growing_text.js';
import { textOf } from './item.js';
import { renderMarkdown } from './markdown.js';

/** A message in a reply: what the model says to the user. */
export class Answer {
  constructor() {
    this.node = element('div', 'content');
    this.growing = new GrowingText(this.node);
    this.announcement = '';
  }

  get text() {
    return this.growing.text;
  }

  begin(text) {
    this.growing.begin(text);
  }

  /** Adds a delta, and returns what of it is to be read aloud. */
  grow(delta) {
    return this.growing.grow(delta);
  }

  end(item) {
    this.growing.end(textOf(item));
  }

  format(onCopy) {
    this.node.replaceChildren(renderMarkdown(this.text, onCopy));
  }
}
