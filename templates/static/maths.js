import { element, makeScrollable } from './elements.js';
import { say } from './words.js';

const SOURCES = '.math[data-tex]:not(:has(> math))';
const TYPESET = '.math:has(> math)';
const TEX_LENGTH = 2000;
const ELEMENTS = 2000;
const DEPTH = 100;
const KEPT = 500; // formulas
const SLICE_MS = 8;
const MACROS = { '\\pmb': '\\boldsymbol{#1}' }; // its own \pmb has a style that the Content-Security-Policy forbids
const OPTIONS = { throwOnError: true, trust: false, maxExpand: 1000, maxSize: [20, 300], wrap: 'tex', macros: MACROS };

// These define, link, name elements, or need what the Content-Security-Policy forbids (\cancelto).
const REFUSED = new RegExp(`\\\\(?:${[
  '[egx]?def', 'let', 'futurelet', 'global', '(?:re)?newcommand', 'providecommand', 'DeclareMathOperator',
  'definecolor', 'href', 'url', 'includegraphics', 'label', 'ref', 'eqref', 'class', 'id', 'style', 'data', 'cancelto',
].join('|')})(?![a-zA-Z])`);

/** Turns TeX into MathML. Its library is loaded with the first formula. */
class Typesetter {
  constructor() {
    Object.assign(this, { kept: new Map(), waiting: new Set(), library: null });
  }

  typeset(root) {
    if (root.matches?.(SOURCES)) this.waiting.add(root);
    for (const formula of root.querySelectorAll(SOURCES)) this.waiting.add(formula);
    if (this.library) this.fillWaiting();
    else if (this.waiting.size) this.load();
  }

  load() {
    this.loading ??= this.loadLibrary().finally(() => { this.loading = null; });
  }

  async loadLibrary() {
    try {
      await Promise.all([
        load('link', { rel: 'stylesheet', href: vendor('temml.css') }),
        load('script', { src: vendor('temml.min.js') }),
      ]);
      await load('script', { src: vendor('temml-mhchem.min.js') }); // formulas of chemistry
      this.library = globalThis.temml;
      this.fillWaiting();
    } catch {
      // The next formula tries again; until then, the sources are what is shown.
    }
  }

  /** Fills all that wait, in one go. */
  async fillAll() {
    await this.loading;
    if (this.library) this.fillWaiting(Infinity);
  }

  /** Fills what fits a slice of time at once, so one formula always, and the rest later. */
  fillWaiting(milliseconds = SLICE_MS) {
    const start = performance.now();
    for (const formula of this.waiting) {
      this.waiting.delete(formula);
      this.fill(formula);
      if (performance.now() - start > milliseconds) break;
    }
    if (!this.waiting.size) return;
    this.later ??= setTimeout(() => {
      this.later = null;
      this.fillWaiting();
    });
  }

  fill(formula) {
    if (!formula.matches(SOURCES)) return; // it has changed while it waited
    const math = this.mathOf(formula.dataset.tex, formula.classList.contains('display'));
    if (!math) return;
    formula.dataset.source = formula.textContent;
    formula.replaceChildren(document.importNode(math, true));
    if (formula.classList.contains('display')) makeScrollable(formula, say('formula'));
  }

  /** The MathML of a formula, or null if its source is to be shown. */
  mathOf(tex, displayMode) {
    const key = `${displayMode} ${tex}`;
    const math = this.kept.has(key) ? this.kept.get(key) : this.render(tex, displayMode);
    this.kept.delete(key); // so that the one that was used least recently is the first
    this.kept.set(key, math);
    if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    return math;
  }

  render(tex, displayMode) {
    if (tex.length > TEX_LENGTH || REFUSED.test(tex)) return null;
    const holder = element('span', '');
    try {
      this.library.render(tex, holder, { ...OPTIONS, displayMode });
    } catch {
      return null;
    }
    const isModest = holder.getElementsByTagName('*').length <= ELEMENTS && depthOf(holder) <= DEPTH;
    return isModest ? holder.firstElementChild : null;
  }
}

function vendor(name) {
  return new URL(`./vendor/${name}`, import.meta.url).href;
}

function load(tag, attributes) {
  return new Promise((onload, onerror) => {
    document.head.append(Object.assign(document.createElement(tag), { ...attributes, onload, onerror }));
  });
}

function depthOf(node) {
  let depth = 0;
  for (let level = [node]; level.length; depth += 1) level = level.flatMap(({ children }) => [...children]);
  return depth;
}

/** Puts formulas of a selection into the clipboard as their source. */
function copyFormulas(event) {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return;
  const range = selection.getRangeAt(0).cloneRange();
  const formulaAt = (node) => (node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement)?.closest(TYPESET);
  const [first, last] = [formulaAt(range.startContainer), formulaAt(range.endContainer)];
  if (first) range.setStartBefore(first);
  if (last) range.setEndAfter(last);
  const copied = element('div', 'visually-hidden');
  copied.append(range.cloneContents());
  const formulas = copied.querySelectorAll(TYPESET);
  if (!formulas.length) return;
  for (const formula of formulas) formula.textContent = formula.dataset.source;
  document.body.append(copied);
  event.clipboardData.setData('text/plain', copied.innerText);
  event.clipboardData.setData('text/html', copied.innerHTML);
  copied.remove();
  event.preventDefault();
}

const typesetter = new Typesetter();
document.addEventListener('copy', copyFormulas);

/** Shows `root`, or each `.math` element in it, as a formula: at once if the library is there, else later. */
export function typeset(root) {
  typesetter.typeset(root);
}

/** Resolves when all formulas are shown that were to be typeset. */
export function typesetAll() {
  return typesetter.fillAll();
}
