import { DeltaText } from './delta_text.js';
import { element } from './elements.js';
import { textOf } from './item.js';
import { MarkdownStream } from './markdown_stream.js';

/** A message in a reply: what the model says to the user. */
export class Answer {
  constructor(item, onCopy) {
    Object.assign(this, { onCopy, deltas: new DeltaText(), stream: null, announcement: '' });
    this.node = element('div', 'content');
  }

  get text() {
    return this.deltas.text;
  }

  begin(text) {
    this.deltas.begin(text);
    this.show(text);
  }

  /** Adds a delta, and returns what of it is to be read aloud. */
  grow(delta) {
    const fresh = this.deltas.grow(delta);
    this.show(fresh);
    return fresh;
  }

  show(fresh) {
    if (fresh) this.markdown().append(fresh);
  }

  /** Shows the whole text: as plain text if it has not grown here, until `format`. */
  end(item) {
    this.deltas.end(textOf(item));
    if (this.stream) this.stream.end(this.text);
    else this.node.replaceChildren(element('div', 'block', this.text));
  }

  /** Shows it as Markdown; `folded` folds long code. */
  format({ folded }) {
    this.markdown(folded).end(this.text);
  }

  markdown(folded = false) {
    this.stream ??= new MarkdownStream(this.node, this.onCopy, { folded });
    return this.stream;
  }
}
