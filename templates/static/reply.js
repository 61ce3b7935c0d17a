import { Answer } from './answer.js';
import { copyButton } from './clipboard.js';
import { button, element } from './elements.js';
import { textOf } from './item.js';
import { Message } from './message.js';
import { Reasoning } from './reasoning.js';
import { ToolCall } from './tool_call.js';
import { say } from './words.js';

const PARTS = { message: Answer, reasoning: Reasoning, function_call: ToolCall };

/** A reply of the model. It grows by parts and their deltas until it is finished. */
export class Reply extends Message {
  constructor({ onCopy, onAgain }, node) {
    super('assistant', say('reply'), element('div', 'parts'), node);
    Object.assign(this, { onCopy, onAgain, parts: [] });
    this.status = 'in_progress';
  }

  /** Shows a response as the server has stored it, finished or not, or an item that somebody else has written. */
  static of(node, callbacks) {
    const reply = new Reply(callbacks, node);
    if (node.status === 'in_progress') reply.begin(node.output);
    else reply.end(node);
    return reply;
  }

  get answers() {
    return this.parts.filter((part) => part instanceof Answer);
  }

  /** What the model says to the user. */
  get text() {
    return this.answers.map((answer) => answer.text).join('\n\n');
  }

  /** A reply that grows here is at most behind the server. */
  shows(node) {
    if (this.id !== node.id) return false;
    const { output = [node] } = node;
    return this.status === 'in_progress' || output.map(textOf).join('\n') === this.parts.map((part) => part.text).join('\n');
  }

  update(node, onVersion) {
    if (this.status === 'in_progress' && node.status !== 'in_progress') this.finish(node);
    super.update(node, onVersion);
  }

  // While it grows

  begin(output) {
    output.forEach((item, index) => {
      const part = this.part(index, item);
      part.begin(textOf(item));
      if (item.status !== 'in_progress') part.end(item);
    });
  }

  /** Begins a part, unless it is there already. Returns what is to be read aloud. */
  add(index, item) {
    if (this.parts[index]) return '';
    this.note('');
    const part = this.part(index, item);
    part.begin('');
    return part.announcement;
  }

  /** Adds a delta to a part. Returns what is to be read aloud. */
  grow(index, delta) {
    return this.parts[index].grow(delta);
  }

  endPart(index, item) {
    this.parts[index].end(item);
  }

  part(index, item) {
    if (!this.parts[index]) {
      this.parts[index] = new PARTS[item.type](item, this.onCopy);
      this.body.append(this.parts[index].node);
    }
    return this.parts[index];
  }

  // When it is finished

  finish(response) {
    this.end(response);
    this.format({ folded: false }); // what one has watched stays as it is
  }

  end(node) {
    const { status, usage, parley, output = [node] } = node;
    for (const part of this.parts.splice(output.length)) part.node.remove();
    const length = output.reduce((sum, item) => sum + textOf(item).length, 0);
    output.forEach((item, index) => {
      const share = textOf(item).length / (length || 1);
      this.part(index, item).end(item, share * parley.decode_seconds);
    });
    this.status = status;
    this.note(reasonNote(parley.reason, node.error) || (this.isSilent ? say('nothing_said') : ''));
    this.footer = this.article.appendChild(element('footer', 'foot'));
    if (this.versions) this.placeVersions(this.versions.node);
    this.footer.append(element('span', 'usage', usageLine(usage, parley.decode_seconds)));
  }

  get isSilent() {
    const isFromHere = this.id.startsWith('resp_');
    return isFromHere && !this.text.trim() && !this.parts.some((part) => part instanceof ToolCall);
  }

  // A reply that grows has no footer yet.
  placeVersions(node) {
    this.footer?.prepend(node);
  }

  seen() {
    if (this.footer) this.format({ folded: true });
  }

  /** Markdown takes time, so messages are plain text until they become visible. */
  format(options) {
    if (this.formatted) return;
    this.formatted = true;
    for (const answer of this.answers) answer.format(options);
    if (this.text) this.footer.append(copyButton('copy', () => this.text, this.onCopy));
    if (this.parent) this.footer.append(button('ask_again', () => this.onAgain(this)));
  }
}

function reasonNote(reason, error) {
  return reason && reason !== 'stop' ? say(`reason_${reason}`, error ?? {}) : '';
}

function usageLine(usage, seconds) {
  const count = usage?.output_tokens;
  if (!count) return '';
  const line = say(count === 1 ? 'one_token' : 'tokens', { count });
  return seconds && count > 1 ? `${line} · ${say('speed', { speed: ((count - 1) / seconds).toFixed(1) })}` : line;
}
