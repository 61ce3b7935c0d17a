import { renderMarkdown } from './markdown.js';

const NOTES = {
  client_cancelled: 'Stopped.',
  max_output_tokens: 'Cut off: length limit reached.',
  context_length: 'Cut off: the context is full.',
  server_error: 'The server failed; try again.',
  server_shutdown: 'The server is shutting down; try again in a moment.',
  connection_lost: 'Interrupted: the connection was lost.',
};

const BLOCK_LENGTH = 2000;

export function element(tag, className, text = '') {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

/** A message on the page; a reply is one that grows until it is finished. */
export class Message {
  constructor(role, status, text = '') {
    this.article = element('article', `message ${role}`);
    this.article.dataset.status = status;
    this.article.setAttribute('aria-label', role === 'user' ? 'You' : 'Reply');
    this.content = this.article.appendChild(element('div', 'content', text));
    this.pieces = [];
    this.pending = '';
  }

  append(delta, onDrawn) {
    this.firstDelta ??= performance.now();
    this.pieces.push(delta);
    this.pending += delta;
    this.frame ??= requestAnimationFrame(() => {
      this.draw();
      onDrawn();
    });
  }

  // Once per frame, into blocks cut at a line's end: the browser lays out the last block, not the whole reply.
  draw() {
    this.frame = null;
    this.note('');
    this.block ??= this.startBlock();
    if (this.block.length > BLOCK_LENGTH) {
      const end = this.pending.indexOf('\n') + 1;
      this.block.appendData(this.pending.slice(0, end));
      this.pending = this.pending.slice(end);
      if (end) this.block = this.startBlock();
    }
    this.block.appendData(this.pending);
    this.pending = '';
  }

  startBlock() {
    return this.content.appendChild(element('div', 'block')).appendChild(new Text());
  }

  finish(status, reason, text = this.pieces.join('')) {
    cancelAnimationFrame(this.frame);
    this.article.dataset.status = status;
    this.content.replaceChildren(renderMarkdown(text));
    this.note(NOTES[reason] ?? (text.trim() ? '' : 'The model said nothing.'));
  }

  note(text) {
    if (!this.noteLine && !text) return;
    this.noteLine ??= this.article.appendChild(element('p', 'note'));
    this.noteLine.textContent = text;
    this.noteLine.hidden = !text;
  }

  count(tokens) {
    if (!tokens) return;
    const seconds = (performance.now() - this.firstDelta) / 1000;
    const speed = tokens > 1 && seconds > 0 ? ` · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : '';
    this.article.append(element('footer', 'usage', `${tokens} ${tokens === 1 ? 'token' : 'tokens'}${speed}`));
  }
}
