import { Fold } from './fold.js';
import { GrowingText } from './growing_text.js';
import { textOf } from './item.js';
import { say } from './words.js';

/** What the model thinks before it answers: open while it grows, folded from then on. */
export class Reasoning {
  constructor() {
    this.fold = new Fold('reasoning', say('thought'));
    this.growing = new GrowingText(this.fold.body);
    this.announcement = say('thinking');
  }

  get node() {
    return this.fold.node;
  }

  get text() {
    return this.growing.text;
  }

  begin(text) {
    this.fold.label = this.announcement;
    this.fold.open = true;
    this.since = text ? null : Date.now();
    this.growing.begin(text);
  }

  grow(delta) {
    this.growing.grow(delta);
    return '';
  }

  /** `seconds` is about how long it took; it counts if the page has not seen the beginning. */
  end(item, seconds) {
    this.seconds = this.since ? (Date.now() - this.since) / 1000 : this.seconds || seconds;
    this.since = null;
    if (this.seconds) this.fold.label = say('thought_for', { seconds: Math.max(1, Math.round(this.seconds)) });
    else this.fold.label = say('thought');
    this.fold.open = false;
    this.growing.end(textOf(item));
  }
}
