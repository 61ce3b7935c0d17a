// Markdown to elements. Nothing in them runs, loads, or links to this server.

import { copyButton } from './clipboard.js';
import { element } from './elements.js';
import MarkdownIt from './vendor/markdown-it.min.js';
import { say } from './words.js';

const markdown = createMarkdown();

function createMarkdown() {
  // breaks: a line break that was visible while the reply streamed stays visible.
  const parser = new MarkdownIt({ html: false, linkify: false, breaks: true }).disable('image');
  const { rules } = parser.renderer;
  const plain = (tokens, index, options, env, renderer) => renderer.renderToken(tokens, index, options);

  // A relative link of a model would lead to this server, so only full addresses become links.
  parser.validateLink = (address) => /^(https?:\/\/|mailto:)/i.test(address.trim());
  rules.link_open = (tokens, index, ...rest) => {
    tokens[index].attrSet('target', '_blank');
    tokens[index].attrSet('rel', 'noopener noreferrer');
    return plain(tokens, index, ...rest);
  };

  // markdown-it aligns columns by style attributes, which the Content-Security-Policy forbids.
  rules.th_open = rules.td_open = (tokens, index, ...rest) => {
    const alignment = tokens[index].attrGet('style')?.replace('text-align:', '');
    tokens[index].attrs = alignment ? [['class', alignment]] : null;
    return plain(tokens, index, ...rest);
  };
  rules.table_open = (...table) => `<div class="table">${plain(...table)}`;
  rules.table_close = (...table) => `${plain(...table)}</div>`;
  return parser;
}

/** The elements of a Markdown text; `onCopy` is told when a code block is copied. */
export function renderMarkdown(text, onCopy) {
  const template = document.createElement('template');
  template.innerHTML = markdown.render(text);
  for (const pre of template.content.querySelectorAll('pre')) frameCode(pre, onCopy);
  for (const table of template.content.querySelectorAll('.table')) makeScrollable(table, say('table'));
  return template.content;
}

function frameCode(pre, onCopy) {
  const code = pre.firstElementChild;
  const frame = element('div', 'code');
  const bar = element('div', 'bar');
  bar.append(
    element('span', 'language', code.className.replace('language-', '')),
    copyButton('copy_code', () => code.textContent, onCopy),
  );
  makeScrollable(pre, say('code'));
  pre.replaceWith(frame);
  frame.append(bar, pre);
}

/** A wide element scrolls, so the keyboard has to reach it. */
function makeScrollable(part, label) {
  part.tabIndex = 0;
  part.setAttribute('role', 'group');
  part.setAttribute('aria-label', label);
}
