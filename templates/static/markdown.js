// Markdown to tokens, and those of text to HTML. Nothing in it runs, loads, or links to this server.

import { limitBlocks } from './block_limits.js';
import { cjkEmphasis } from './cjk_emphasis.js';
import { footnoteRules } from './footnotes.js';
import { mathsRules } from './maths_rules.js';
import { openText } from './open_text.js';
import MarkdownIt from './vendor/markdown-it.min.js';
import { say } from './words.js';

const WWW = /^[\w-]+\.[^\s<>"'`，。；：！？、（）《》「」『』【】“”‘’]*[\w/]/;
const parser = createParser();

function createParser() {
  // breaks: a line break of the model stays visible.
  const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
  for (const plugin of [mathsRules, footnoteRules, cjkEmphasis, openText, limitBlocks]) parser.use(plugin);
  parser.core.ruler.disable(['normalize', 'block']); // `parseBlocks` does that

  // A relative link of a model would lead to this server, so only full addresses become links.
  parser.validateLink = (address) => /^(https?:\/\/|mailto:)/i.test(address.trim());
  parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
  parser.linkify.add('ftp:', null).add('//', null);
  parser.linkify.add('www.', {
    validate: (text, pos) => WWW.exec(text.slice(pos, pos + 2000))?.[0].length ?? 0,
    normalize: (match) => { match.url = `https://${match.url}`; },
  });
  const { rules } = parser.renderer;
  rules.link_open = (tokens, index) => `<a${linkAttributes(tokens[index].attrGet('href'))}>`;
  rules.image = image;
  return parser;
}

function linkAttributes(address) {
  return ` href="${parser.utils.escapeHtml(address)}" target="_blank" rel="noopener noreferrer"`;
}

/** A picture is a link to it, or only its text where it stands in another link. */
function image(tokens, index, options, env, renderer) {
  const { children, attrs } = tokens[index];
  const address = tokens[index].attrGet('src');
  const text = parser.utils.escapeHtml(renderer.renderInlineAsText(children, options, env).trim() || address);
  const before = tokens.slice(0, index);
  const links = before.filter(({ type }) => type === 'link_open').length;
  if (links > before.filter(({ type }) => type === 'link_close').length) return text;
  return attrs && `<a class="image" title="${say('picture')}"${linkAttributes(address)}>${text}</a>`;
}

/** The links and footnotes that a text defines. Those of another text can be added in `extended`. */
export class Definitions {
  constructor({ references = null, footnotes = null } = {}) {
    this.references = Object.create(references);
    this.footnotes = Object.create(footnotes);
  }

  extended() {
    return new Definitions(this);
  }

  /** A definition as a string. */
  key(kind, label) {
    return JSON.stringify(this[kind][label]);
  }

  /** These for the parser; `asked` gets what it asks for, defined or not. */
  asking(asked) {
    const watch = (kind) => new Proxy(this[kind], {
      get: (target, label) => {
        asked.push({ kind, label, answer: this.key(kind, label) });
        return target[label];
      },
    });
    return { references: watch('references'), footnotes: watch('footnotes') };
  }
}

/** The tokens of the blocks of a text, whose own text is not parsed yet. */
export function parseBlocks(text, definitions) {
  const tokens = [];
  parser.block.parse(text, parser, definitions, tokens);
  return tokens;
}

/** The HTML of the text in a block. `open` says that it goes on; `asked` gets the definitions that it asks for. */
export function renderText(content, definitions, open, asked) {
  const env = { open, ...definitions.asking(asked) };
  const state = new parser.core.State(content, parser, env);
  state.tokens = [Object.assign(new state.Token('inline', '', 0), { content, children: [] })];
  parser.core.process(state);
  return parser.renderer.render(state.tokens, parser.options, env);
}
