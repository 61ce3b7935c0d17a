import { say } from './words.js';

const DEFINITION = /^\[\^([^\s\]]+)\]:[ \t]*/;
const REFERENCE = /\[\^([^\s\]]+)\]/y;

/** A plugin of markdown-it. A footnote stands where it is defined; `footnotes` in the environment has the labels. */
export function footnoteRules(parser) {
  parser.block.ruler.before('reference', 'footnote', definition, { alt: ['paragraph', 'reference'] });
  parser.inline.ruler.before('link', 'footnote', reference);
  parser.renderer.rules.footnote_reference = (tokens, index) => `<sup>${referenceHtml(parser, tokens[index])}</sup>`;
}

function referenceHtml(parser, { content, meta }) {
  const [label, name] = [content, say('footnote', { label: content })].map(parser.utils.escapeHtml);
  if (!meta.isDefined) return label;
  return `<button type="button" class="note" data-note="${label}" aria-label="${name}">${label}</button>`;
}

function definition(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  const match = DEFINITION.exec(state.src.slice(start, state.eMarks[startLine]));
  if (!match || state.sCount[startLine] - state.blkIndent >= 4) return false;
  if (silent) return true;
  state.env.footnotes[match[1]] ??= true;
  const token = state.push('footnote_open', 'div', 1);
  token.meta = { label: match[1] };
  pushContent(state, startLine, endLine, start + match[0].length);
  token.map = [startLine, state.line];
  state.push('footnote_close', 'div', -1);
  return true;
}

// The blocks of a footnote: what follows its label, and the lines below that are indented.
function pushContent(state, startLine, endLine, contentStart) {
  const { bMarks, tShift, sCount, blkIndent, parentType } = state;
  const [mark, shift, count] = [bMarks[startLine], tShift[startLine], sCount[startLine]];
  state.blkIndent = blkIndent + 4;
  state.parentType = 'footnote';
  [bMarks[startLine], tShift[startLine], sCount[startLine]] = [contentStart, 0, state.blkIndent];
  state.md.block.tokenize(state, startLine, endLine);
  [bMarks[startLine], tShift[startLine], sCount[startLine]] = [mark, shift, count];
  Object.assign(state, { blkIndent, parentType });
}

// A number is a footnote even before its definition has come, so that the definition moves no text.
function reference(state, silent) {
  REFERENCE.lastIndex = state.pos;
  const match = state.src[state.pos] === '[' && REFERENCE.exec(state.src);
  if (!match) return false;
  const [whole, label] = match;
  const isDefined = Boolean(state.env.footnotes[label]);
  if (!isDefined && !/^\d+$/.test(label)) return false;
  if (!silent) Object.assign(state.push('footnote_reference', '', 0), { content: label, meta: { isDefined } });
  state.pos += whole.length;
  return true;
}

/** Lets the buttons of references and footnotes lead to each other; the address of the page stays. */
export function followFootnotes(root) {
  root.addEventListener('click', ({ target }) => {
    const button = target.closest('[data-note]');
    if (!button) return;
    const kind = button.classList.contains('back') ? '.note' : '.back';
    const other = root.querySelector(`${kind}[data-note="${CSS.escape(button.dataset.note)}"]`);
    other?.scrollIntoView({ block: 'nearest' });
    other?.focus();
  });
}
