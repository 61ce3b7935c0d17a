import { say } from './words.js';

const PAUSE_SECONDS = 1;
const LONGEST = 1000; // a sentence that is longer is read in pieces
// A full stop ends a sentence when something follows it, and not after a digit: "3.5", and "1." before an item.
const END = /\n|[。！？…]+[”’」』）]*|(?<!\d)[.!?]{1,9}["'”’)*_]{0,9}(?=\s)/;

/** Tells screen readers what happens: words of the page, and each sentence of a reply when it is complete. */
export class Announcer {
  constructor() {
    this.region = document.getElementById('announcer');
    this.waiting = [];
    this.forget();
  }

  /** Starts another reply. Its `text` so far is not announced, nor the rest of the last reply. */
  forget(text = '') {
    this.pending = '';
    this.inCode = Boolean(text.match(/^\s*(```|~~~)/gm)?.length % 2);
    this.atLineStart = !text || text.endsWith('\n');
  }

  say(text) {
    this.waiting.push(text);
    if (!this.timer) this.speak();
  }

  // A screen reader reads a live region that changes too often in pieces, or not at all.
  speak() {
    this.timer = null;
    if (!this.waiting.length) return;
    this.region.textContent = this.waiting.join(' ');
    this.waiting = [];
    this.timer = setTimeout(() => this.speak(), PAUSE_SECONDS * 1000);
  }

  /** Adds text to the reply. */
  read(text) {
    this.pending += text;
    for (let end = END.exec(this.pending); end; end = END.exec(this.pending)) {
      const length = end.index + end[0].length;
      this.sentence(this.pending.slice(0, length));
      this.pending = this.pending.slice(length);
    }
    if (this.pending.length > LONGEST) {
      this.sentence(this.pending);
      this.pending = '';
    }
  }

  /** The reply is finished, so its last sentence is complete. */
  finish() {
    this.sentence(this.pending);
    this.forget();
  }

  sentence(text) {
    const fence = this.atLineStart && /^\s*(```|~~~)/.test(text);
    this.atLineStart = text.endsWith('\n');
    if (fence) {
      this.inCode = !this.inCode;
      if (this.inCode) this.say(say('code_skipped'));
    } else if (!this.inCode && /[\p{L}\p{N}]/u.test(text)) {
      this.say(spoken(text));
    }
  }
}

/** A sentence without its Markdown. */
function spoken(text) {
  const bare = text.trim().replace(/^(#+|[-*+>]|\d+\.)\s+/, '');
  return bare.replace(/!?\[([^\]]*)\]\([^)]*\)/g, '$1').replace(/[*`|]+/g, '');
}
