import { copyButton } from './clipboard.js';
import { button, element } from './elements.js';
import { renderMarkdown } from './markdown.js';
import { Message } from './message.js';
import { say } from './words.js';

const BLOCK_LENGTH = 2000;

/** A reply of the model. It grows by deltas until it is finished. */
export class Reply extends Message {
  constructor(id, { onCopy, onAgain }) {
    super('assistant', say('reply'), '', id);
    Object.assign(this, { onCopy, onAgain, sequenceNumber: 0, pending: '' });
    this.status = 'in_progress';
  }

  /** Shows a reply as the server has stored it, finished or not. */
  static of(item, callbacks) {
    const reply = new Reply(item.id, callbacks);
    if (item.status === 'in_progress') {
      if (item.content) reply.grow(item.content);
      reply.sequenceNumber = item.sequence_number;
    } else {
      reply.end(item, item.content);
    }
    return reply;
  }

  /** Whether a delta is the next one; earlier deltas come again when a reply is resumed. */
  append(sequenceNumber, delta) {
    if (sequenceNumber !== this.sequenceNumber + 1) return false;
    this.sequenceNumber = sequenceNumber;
    this.grow(delta);
    return true;
  }

  grow(text) {
    this.text += text;
    this.pending += text;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  // Once per frame, into blocks that end with a line: the browser lays out only the last block, not the whole reply.
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

  finish(response) {
    this.end(response, response.output_text);
    this.format();
  }

  end({ status = 'completed', status_details: details, usage, decode_seconds: seconds }, text) {
    cancelAnimationFrame(this.frame);
    this.text = text;
    this.status = status;
    this.note(reasonNote(details?.reason) || (text.trim() ? '' : say('nothing_said')));
    this.footer = this.article.appendChild(element('footer', 'foot'));
    this.footer.append(element('span', 'usage', usageLine(usage, seconds)));
    this.content.replaceChildren(element('div', 'block', text));
  }

  seen() {
    if (this.footer) this.format();
  }

  /** Markdown takes time, so messages are plain text until they become visible. */
  format() {
    if (this.formatted) return;
    this.formatted = true;
    this.content.replaceChildren(renderMarkdown(this.text, this.onCopy));
    if (this.text) this.footer.append(copyButton('copy', () => this.text, this.onCopy));
    this.footer.append(button('ask_again', () => this.onAgain(this)));
  }
}

function reasonNote(reason) {
  return reason && reason !== 'stop' ? say(`reason_${reason}`) : '';
}

function usageLine(usage, seconds) {
  const count = usage?.output_tokens;
  if (!count) return '';
  const line = say(count === 1 ? 'one_token' : 'tokens', { count });
  return seconds && count > 1 ? `${line} · ${say('speed', { speed: ((count - 1) / seconds).toFixed(1) })}` : line;
}
