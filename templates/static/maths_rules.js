// Mathematics in Markdown: $…$, $$…$$, \(…\) and \[…\]. What is complete becomes `.math`, and the rest stays source.

import { lineOf, pushParagraph } from './block_state.js';

const DISPLAYS = [{ open: '$$', close: '$$', display: true }, { open: '\\[', close: '\\]', display: true }];
const DELIMITERS = [...DISPLAYS, { open: '\\(', close: '\\)' }, { open: '$', close: '$' }];
const LONGEST_OPEN = 300; // a formula in a line of text that is longer before it ends is probably none

/** A plugin of markdown-it. `open` in its environment says that the text still grows. */
export function mathsRules(parser) {
  parser.inline.ruler.before('escape', 'maths', inlineMaths);
  const alt = ['paragraph', 'reference', 'blockquote', 'list'];
  parser.block.ruler.before('fence', 'maths', blockMaths, { alt });
  const { escapeHtml } = parser.utils;
  parser.renderer.rules.math = (tokens, index) => {
    const { content, info, meta } = tokens[index];
    return `<span class="math${info}" dir="ltr" data-tex="${escapeHtml(meta.tex)}">${escapeHtml(content)}</span>`;
  };
  parser.renderer.rules.math_source = (tokens, index) =>
    `<span class="tex" dir="ltr">${escapeHtml(tokens[index].content)}</span>`;
}

function inlineMaths(state, silent) {
  const { src, pos, posMax } = state;
  const delimiter = DELIMITERS.find(({ open }) => src.startsWith(open, pos));
  if (!delimiter) return false;
  const start = pos + delimiter.open.length;
  const end = endOf(state, delimiter, start);
  if (end < 0) return openMaths(state, silent, delimiter, start);
  if (!silent) {
    const token = state.push('math', '', 0);
    token.content = src.slice(pos, end + delimiter.close.length);
    token.meta = { tex: src.slice(start, end) };
    token.info = delimiter.display ? ' display' : '';
  }
  state.pos = end + delimiter.close.length;
  return state.pos <= posMax;
}

function endOf(state, { open, close }, start) {
  const { src, posMax } = state;
  state.unclosed ??= new Set(); // so that many openers without an end are not searched again and again
  if (state.unclosed.has(open)) return -1;
  const end = closeOf(src, start, posMax, close);
  if (end < 0 && open !== '$') state.unclosed.add(open);
  if (end < 0 || !src.slice(start, end).trim()) return -1;
  return open !== '$' || isMaths(src, start, end) ? end : -1;
}

// "It costs $5 and $10" has no formula: no spaces inside the dollars, and no digit after them.
function isMaths(src, start, end) {
  return !/\s/.test(src[start]) && !/\s/.test(src[end - 1]) && !/\d/.test(src[end + 1] ?? '');
}

/** A formula that has no end yet: its source, in which no other rule finds anything. */
function openMaths(state, silent, { open }, start) {
  const rest = state.src.slice(start);
  const isOpen = state.env.open && state.posMax === state.src.length && rest.length < LONGEST_OPEN;
  if (silent || !isOpen || !rest || (open === '$' && (/^[\s\d]/.test(rest) || rest.includes('$')))) return false;
  state.push('math_source', '', 0).content = open + rest;
  state.pos = state.posMax;
  return true;
}

function closeOf(text, from, max, close) {
  for (let pos = from; pos < max; pos++) {
    if (text.startsWith(close, pos)) return pos;
    if (text[pos] === '\\') pos++;
  }
  return -1;
}

/**
 * A formula on lines of its own. Its first line says whether it is one, so that what follows cannot undo it. If nothing
 * but the delimiter stands there, the formula may have empty lines; otherwise an empty line ends it, and it is text.
 */
function blockMaths(state, startLine, endLine, silent) {
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const first = lineOf(state, startLine);
  const delimiter = DISPLAYS.find(({ open }) => first.startsWith(open));
  if (!delimiter || !beginsBlock(first, delimiter)) return false;
  if (silent) return true;
  const { nextLine, rest } = linesOf(state, startLine, endLine, delimiter);
  const content = state.getLines(startLine, nextLine, state.blkIndent, false).trim();
  const isText = rest === null ? first.trim() !== delimiter.open : rest !== '';
  state.line = nextLine;
  if (isText) return pushParagraph(state, content, [startLine, nextLine]);
  const token = state.push('math_block', 'div', 0);
  token.content = content;
  token.map = [startLine, nextLine];
  token.meta = { tex: rest === null ? null : content.slice(2, -2) };
  return true;
}

// Not if there is more text in the line after its end: then it is a formula in a line of text.
function beginsBlock(line, { open, close }) {
  const end = closeOf(line, open.length, line.length, close);
  return end < 0 || (line.slice(open.length, end).trim() && !line.slice(end + close.length).trim());
}

/** The line after a formula, and what stands after its end; null if it has none. */
function linesOf(state, startLine, endLine, { open, close }) {
  const isFence = lineOf(state, startLine).trim() === open;
  for (let line = startLine; line < endLine; line++) {
    const isOutside = line > startLine && state.sCount[line] < state.blkIndent;
    if (state.isEmpty(line) ? !isFence : isOutside) return { nextLine: line, rest: null };
    const text = lineOf(state, line);
    const end = closeOf(text, line === startLine ? open.length : 0, text.length, close);
    if (end >= 0) return { nextLine: line + 1, rest: text.slice(end + close.length).trim() };
  }
  return { nextLine: endLine, rest: null };
}
