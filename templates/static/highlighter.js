import { COLORS } from './code_colors.js';

const LENGTH = 100_000; // what is after it stays plain
const SPARE_LINES = 20; // are coloured above and below what is visible
const RANGES_AT_ONCE = 2000;
const SECONDS = 5; // are enough for all code but that of which an expression of highlight.js never comes to an end
const PAUSE_MS = 80;

/**
 * Colours code. A worker finds the tokens, and the browser paints ranges: the elements do not change, so that a
 * selection stays, and text can be added.
 *
 * Only what is visible has ranges. At each change of the page, Chromium goes through all of them, which took it 0.1 s
 * for the 6,000 ranges of a block of 35 kB, and 5 ms for those of its visible lines.
 */
export class Highlighter {
  constructor() {
    if (!globalThis.CSS?.highlights || !globalThis.Highlight) return;
    this.colors = Object.keys(COLORS).map((name) => {
      const color = new Highlight();
      CSS.highlights.set(`code-${name}`, color);
      return color;
    });
    this.blocks = new WeakMap();
    this.visible = new Set();
    this.waiting = new Set(); // visible blocks with text that the worker has not seen
    this.watcher = new IntersectionObserver((entries) => this.seen(entries), { scrollMargin: '50%' });
    document.addEventListener('scroll', () => this.visible.size && this.repaint(), { capture: true, passive: true });
    addEventListener('resize', () => this.repaint());
  }

  /** Colours a `<code class="language-x">` whose text is new or has changed, or shows more lines than before. */
  show(code) {
    if (!this.colors) return;
    const block = this.blocks.get(code);
    if (!block) this.observe(code);
    else if (this.visible.has(block)) this.refresh(block);
  }

  observe(code) {
    const [, language] = /(?:^| )language-(\S+)/.exec(code.className) ?? [];
    if (!language) return;
    this.blocks.set(code, new Block(code, language));
    this.watcher.observe(code);
  }

  // What is removed from the page is no longer visible, so nothing here keeps it.
  seen(entries) {
    for (const { target, isIntersecting } of entries) {
      const block = this.blocks.get(target);
      if (isIntersecting) {
        this.visible.add(block);
        this.refresh(block);
      } else {
        this.visible.delete(block);
        this.waiting.delete(block);
        block.painted = null;
      }
    }
    this.isStale = true;
    this.repaint();
  }

  refresh(block) {
    if (block.isBehind) this.waiting.add(block);
    this.next();
    this.repaint();
  }

  // The worker has one block at a time. It pauses before a block that has grown: a long one would keep it busy.

  next() {
    if (this.asked || this.pause) return;
    const [block] = [...this.waiting].sort((one, other) => one.length - other.length);
    if (!block) return;
    if (block.length && !this.rested) this.rest();
    else this.ask(block);
  }

  rest() {
    this.pause = setTimeout(() => {
      Object.assign(this, { pause: null, rested: true });
      this.next();
    }, Math.max(PAUSE_MS, 4 * this.spent));
  }

  ask(block) {
    this.waiting.delete(block);
    Object.assign(this, { asked: block, rested: false });
    this.worker ??= this.startWorker();
    this.watchdog = setTimeout(() => this.giveUp(), SECONDS * 1000);
    this.worker.postMessage(block.take());
  }

  startWorker() {
    const worker = new Worker(new URL('./highlighter_worker.js', import.meta.url), { type: 'module' });
    worker.onmessage = ({ data }) => this.answered(data);
    worker.onerror = () => this.giveUp();
    return worker;
  }

  answered({ tokens, rows, spent }) {
    const block = this.end();
    Object.assign(block, { tokens, rows });
    this.spent = spent;
    if (this.visible.has(block)) this.refresh(block);
    this.next();
  }

  /** The block keeps the colours that it has. */
  giveUp() {
    this.worker.terminate();
    this.worker = null;
    const block = this.end();
    if (block) block.failed = true;
    this.next();
  }

  end() {
    clearTimeout(this.watchdog);
    const block = this.asked;
    this.asked = null;
    return block;
  }

  repaint() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      for (const block of this.visible) this.isStale = block.measure() || this.isStale;
      if (this.isStale) this.paint();
    });
  }

  paint() {
    for (const color of this.colors) color.clear();
    for (const block of this.visible) {
      for (const [color, range] of block.ranges()) this.colors[color].add(range);
    }
    this.isStale = false;
  }
}

/** The text of a code element, and what the worker has found in it. */
class Block {
  constructor(code, language) {
    Object.assign(this, { code, language, length: 0, tokens: [], rows: [0], failed: false });
    Object.assign(this, { first: 0, last: 0, painted: null }); // the lines and the tokens that have ranges
  }

  get text() {
    return this.code.firstChild;
  }

  get isBehind() {
    return !this.failed && this.length !== Math.min(this.text?.length ?? 0, LENGTH);
  }

  /** What the worker is to look at. */
  take() {
    const text = this.text.data.slice(0, LENGTH);
    this.length = text.length;
    return { text, language: this.language };
  }

  /** Finds out which lines are visible. Returns whether other ranges are needed than those of the last time. */
  measure() {
    const { top } = this.code.getBoundingClientRect();
    const clip = this.code.parentElement.getBoundingClientRect();
    const height = parseFloat(getComputedStyle(this.code).lineHeight);
    const first = Math.floor((Math.max(clip.top, 0) - top) / height);
    const last = Math.ceil((Math.min(clip.bottom, innerHeight) - top) / height);
    const isCovered = this.first <= Math.max(first, 0) && this.last >= last;
    if (isCovered && this.painted === this.tokens) return false;
    Object.assign(this, { first: Math.max(first - SPARE_LINES, 0), last: last + SPARE_LINES });
    return true;
  }

  * ranges() {
    const { text, tokens, rows, first, last } = this;
    this.painted = tokens;
    const line = (number) => rows[Math.min(Math.max(number, 0), rows.length - 1)];
    const begin = line(first);
    const end = Math.min(line(last + 1), begin + 3 * RANGES_AT_ONCE);
    for (let i = begin; i < end; i += 3) {
      const edges = { startContainer: text, startOffset: tokens[i], endContainer: text, endOffset: tokens[i + 1] };
      yield [tokens[i + 2], new StaticRange(edges)];
    }
  }
}
