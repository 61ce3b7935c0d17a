// Markdown to elements, with nothing in it that runs, loads or leads into this server.

import MarkdownIt from './vendor/markdown-it.min.js';

const markdown = createMarkdown();

function createMarkdown() {
  // breaks: a line that ended while the reply streamed in stays ended when it is done.
  const parser = new MarkdownIt({ html: false, linkify: false, breaks: true }).disable('image');
  const { rules } = parser.renderer;
  const plain = (tokens, index, options, env, renderer) => renderer.renderToken(tokens, index, options);

  // A relative link from a model would lead into this very server: only full addresses are links.
  parser.validateLink = (address) => /^(https?:\/\/|mailto:)/i.test(address.trim());
  rules.link_open = (tokens, index, ...rest) => {
    tokens[index].attrSet('target', '_blank');
    tokens[index].attrSet('rel', 'noopener noreferrer');
    return plain(tokens, index, ...rest);
  };

  // Column alignment comes as a style attribute, which the Content-Security-Policy forbids.
  rules.th_open = rules.td_open = (tokens, index, ...rest) => {
    const alignment = tokens[index].attrGet('style')?.replace('text-align:', '');
    tokens[index].attrs = alignment ? [['class', alignment]] : null;
    return plain(tokens, index, ...rest);
  };
  rules.table_open = (...table) => `<div class="table">${plain(...table)}`;
  rules.table_close = (...table) => `${plain(...table)}</div>`;
  return parser;
}

export function renderMarkdown(text) {
  const template = document.createElement('template');
  template.innerHTML = markdown.render(text);
  return template.content;
}
