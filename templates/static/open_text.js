// What can be shown of Markdown that still grows.

const LONGEST = 300; // what is open for longer is probably no markup
const DEEPEST = 8; // emphasis in emphasis
const ITEM = String.raw`^[\s>]*(?:(?:[-+*]|\d{1,9}[.)])[\s>]+)*`;
// The beginnings of lines that may become a list, a heading, a line, a fence, a table or a definition.
const MARKERS = new RegExp(`${ITEM}(?:\\d{0,9}[.)]?|\\[[ xX]?\\]?\\s*|[-+*_=#|:\`~$\\\\[\\s]*)$`);
const FENCE = new RegExp(`${ITEM}(?:\`{3,}[^\`]*|~{3,}.*)$`);
const DEFINITION = /^[\s>]*\[(?:[^\]^][^\]]*\]:.*|\^[^\]\s]*(?:\](?::\s*)?)?)$/;
// No two expressions in it can share spaces: that took minutes for a line of many.
const DELIMITERS = /^[ \t]*(?:\|[ \t]*)?:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*(?:\|[ \t]*)?$/m;
// The end of a line of text that may become markup.
const MARKUP = /(?:[*_~`$\\]+|!?\[(?:\^[^\]\s]*\]?)?|!|&#?\w{0,31}|<[^\s<>]*)$/;

/** The lines of a text that are certain: those that begin like something else are held back for a moment. */
export function certainLines(text) {
  const at = text.lastIndexOf('\n') + 1;
  const last = text.slice(at);
  if (last.length > LONGEST) return text;
  const before = text.lastIndexOf('\n', at - 2) + 1;
  const isRow = /^\s*\|/.test(last);
  const mayBeHeader = at > 0 && /^\s*\|/.test(text.slice(before, at)) && /^[\s|:-]*$/.test(last);
  if ((isRow || mayBeHeader) && !isInTable(text, before)) return text.slice(0, mayBeHeader ? before : at);
  return [MARKERS, FENCE, DEFINITION].some((uncertain) => uncertain.test(last)) ? text.slice(0, at) : text;
}

function isInTable(text, end) {
  const start = text.lastIndexOf('\n\n', end) + 1;
  return DELIMITERS.test(text.slice(start, end));
}

/** A plugin of markdown-it. If `open` in the environment is true, markup that has no end yet ends with the text. */
export function openText(parser) {
  parser.core.ruler.before('inline', 'certain', ({ tokens, env }) => {
    if (env.open) for (const token of tokens) token.content = certainText(token.content);
  });
  parser.inline.ruler.before('backticks', 'open_code', openCode);
  parser.inline.ruler.after('image', 'open_link', openLink);
  parser.inline.ruler2.after('balance_pairs', 'open_emphasis', openEmphasis);
}

function certainText(text) {
  return text.slice(0, -LONGEST) + text.slice(-LONGEST).replace(MARKUP, '').trimEnd();
}

/** The rest of the text, if it is still open. */
function openRest({ env, src, pos, posMax }, silent) {
  return env.open && !silent && posMax === src.length && src.length - pos < LONGEST ? src.slice(pos) : '';
}

function openCode(state, silent) {
  if (state.src[state.pos] !== '`') return false;
  const [, marker, code] = /^(`+)(?!`)(.+)$/.exec(openRest(state, silent)) ?? [];
  if (!code || code.match(/`+/g)?.includes(marker)) return false;
  state.push('code_inline', 'code', 0).content = code.trimStart();
  state.pos = state.posMax;
  return true;
}

// `[text](addr` shows its text.
function openLink(state, silent) {
  const { src, pos, posMax } = state;
  const [opening] = /^!?\[/.exec(src.slice(pos, pos + 2)) ?? [];
  if (!opening || !openRest(state, silent)) return false;
  const start = pos + opening.length;
  const end = state.md.helpers.parseLinkLabel(state, start - 1);
  if (end < 0) {
    state.pos = start;
    return !src.includes('\n', pos);
  }
  if (!/^(?:\([^)\n]*|\[[^\]\n]*)?$/.test(src.slice(end + 1))) return false;
  Object.assign(state, { pos: start, posMax: end });
  state.md.inline.tokenize(state);
  Object.assign(state, { pos: posMax, posMax });
  return true;
}

function openEmphasis(state) {
  const { delimiters, tokens } = state;
  if (!state.env.open) return;
  for (const opener of openersOf(delimiters, tokens).slice(-DEEPEST).reverse()) {
    opener.end = delimiters.length;
    state.push('text', '', 0);
    delimiters.push({ ...opener, token: tokens.length - 1, end: -1, open: false, close: true });
  }
}

// Those that nothing closes, outside of what is closed. A single marker inside of a word is probably none.
function openersOf(delimiters, tokens) {
  let closed = -1;
  return delimiters.filter(({ open, end, length, token }, index) => {
    closed = Math.max(closed, end);
    return open && end < 0 && index > closed && (length > 1 || !/\w$/.test(tokens[token - 1]?.content ?? ''));
  });
}
