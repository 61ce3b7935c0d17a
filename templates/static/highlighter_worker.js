// Finds the tokens of code, in a thread of its own: a page that waited for it would stop for up to a second.

import { COLORS } from './code_colors.js';
import hljs from './vendor/highlight.min.js';

const PLAIN = -1;
const COLOR_OF = new Map(Object.values(COLORS).flatMap((scopes, color) => scopes.map((scope) => [scope, color])));

/** Where highlight.js writes what it finds: `tokens` are triples of start, end and the number of a colour. */
class Emitter {
  constructor() {
    Object.assign(this, { tokens: [], end: 0, colors: [PLAIN] });
  }

  addText(text) {
    this.add(this.end, this.end + text.length, this.colors.at(-1));
    this.end += text.length;
  }

  add(start, end, color) {
    if (color === PLAIN || start === end) return;
    const { tokens } = this;
    if (tokens.at(-1) === color && tokens.at(-2) === start) tokens[tokens.length - 2] = end;
    else tokens.push(start, end, color);
  }

  startScope(scope) {
    const isCodeInside = scope === 'subst'; // such as `${code}` in a string
    this.colors.push(isCodeInside ? PLAIN : COLOR_OF.get(scope.split('.')[0]) ?? this.colors.at(-1));
  }

  endScope() {
    this.colors.pop();
  }

  openNode(scope) {
    this.startScope(scope);
  }

  closeNode() {
    this.endScope();
  }

  __addSublanguage({ tokens, end }) {
    for (let i = 0; i < tokens.length; i += 3) this.add(this.end + tokens[i], this.end + tokens[i + 1], tokens[i + 2]);
    this.end += end;
  }

  finalize() {}

  toHTML() {
    return '';
  }
}

hljs.configure({ __emitter: Emitter });

onmessage = ({ data: { text, language } }) => {
  const start = performance.now();
  const tokens = Uint32Array.from(tokensOf(text, language));
  const rows = rowsOf(text, tokens);
  postMessage({ tokens, rows, spent: performance.now() - start }, [tokens.buffer, rows.buffer]);
};

function tokensOf(text, language) {
  if (!hljs.getLanguage(language)) return [];
  return hljs.highlight(text, { language, ignoreIllegals: true })._emitter.tokens;
}

/** For each line of the text, where the tokens begin that are in it or after it; and their end. */
function rowsOf(text, tokens) {
  const rows = [];
  for (let start = 0, at = 0; ; start = text.indexOf('\n', start) + 1) {
    if (rows.length && !start) break;
    while (at < tokens.length && tokens[at + 1] <= start) at += 3;
    rows.push(at);
  }
  return Uint32Array.from([...rows, tokens.length]);
}
