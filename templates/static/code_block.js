import { copyButton } from './clipboard.js';
import { button, element, makeScrollable } from './elements.js';
import { Highlighter } from './highlighter.js';
import { say } from './words.js';

const LONG_LINES = 40;
const FOLDED_LINES = 20; // as in code.css

const highlighter = new Highlighter(); // the highlights of a page are in one registry

/**
 * Frames a `<pre><code class="language-x">`, whose code is one text node that may come later, and grow. `onCopy` is
 * told when it is copied; `folded`, for what nobody watches, folds it if it is long. Returns the block.
 */
export function frameCode(pre, onCopy, options) {
  return new CodeBlock(pre, onCopy, options);
}

/** Code in its frame: the language, buttons, and lines that can be folded if they are many. */
class CodeBlock {
  constructor(pre, onCopy, { folded = false } = {}) {
    Object.assign(this, { pre, code: pre.firstElementChild, folded });
    this.node = element('div', 'code');
    this.node.dir = 'ltr';
    this.bar = element('div', 'bar');
    this.bar.append(
      element('span', 'language', this.code.className.replace('language-', '')),
      copyButton('copy_code', () => this.code.textContent, onCopy),
    );
    makeScrollable(pre, say('code'));
    pre.replaceWith(this.node);
    this.node.append(this.bar, pre);
    this.grew();
  }

  /** To be called when the text of the code has grown. */
  grew() {
    highlighter.show(this.code);
    if (this.toggle || lineCount(this.code, LONG_LINES) <= LONG_LINES) return;
    this.offerFold();
    if (this.folded) this.fold();
  }

  offerFold() {
    this.toggle = button('fold_code', () => (this.isFolded ? this.unfold() : this.fold()));
    this.toggle.setAttribute('aria-expanded', 'true');
    this.bar.lastElementChild.before(this.toggle);
    // A search of the browser, or a selection, scrolls to what it finds in the lines that are cut off.
    this.pre.addEventListener('scroll', () => this.isFolded && this.pre.scrollTop && this.unfold());
  }

  get isFolded() {
    return this.toggle?.ariaExpanded === 'false';
  }

  fold() {
    const count = lineCount(this.code) - FOLDED_LINES;
    this.rest = element('button', 'rest', say('more_lines', { count }));
    this.rest.type = 'button';
    this.rest.addEventListener('click', () => {
      this.unfold();
      this.pre.focus({ preventScroll: true });
    });
    this.node.append(this.rest);
    this.show(false);
    this.pre.scrollTop = 0;
  }

  unfold() {
    const hidden = this.pre.scrollTop; // how much of the code has been scrolled away
    this.show(true, hidden);
    this.rest.remove();
    highlighter.show(this.code);
  }

  // The log is told what has moved. It grows before it shrinks, since it scrolls when it is too short.
  show(expanded, hidden = 0) {
    this.node.classList.toggle('cut', !expanded);
    this.toggle.ariaExpanded = String(expanded);
    this.node.dispatchEvent(new CustomEvent('fold', { bubbles: true, detail: hidden }));
  }
}

/** How many lines code has, or that they are more than `limit`. */
function lineCount(code, limit = Infinity) {
  const text = code.textContent;
  let count = 0;
  for (let at = 0; at < text.length && count <= limit; count += 1) at = text.indexOf('\n', at) + 1 || text.length;
  return count;
}
