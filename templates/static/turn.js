import { textOf } from './item.js';

let turns = 0;

/**
 * A question and its reply, or another reply to an earlier question, which is none of this turn. The server has accepted
 * it when the reply has an id. `sequence` is the number of the last event of the reply.
 */
export class Turn {
  constructor(conversation, question, reply, replaced = []) {
    const streamId = `turn-${++turns}`;
    Object.assign(this, { conversation, question, reply, replaced, streamId, sequence: -1, cancelled: false });
  }

  get messages() {
    return [this.question, this.reply].filter(Boolean);
  }

  get taken() {
    return this.reply.id !== null;
  }

  /** The server has accepted this turn. */
  take({ id, parley: { parent } }) {
    Object.assign(this.reply, { id, parent });
    if (this.question) this.question.id = parent;
  }

  /** Whether an event is new; earlier ones come again when a reply is resumed. */
  sees({ stream_id: streamId, sequence_number: number }) {
    if (streamId !== this.streamId || number <= this.sequence) return false;
    this.sequence = number;
    return true;
  }

  /** Whether the stored conversation has the question, so that it can be shown: then the server accepted this turn. */
  isIn(nodes, known) {
    if (!this.question) return true;
    const [question, reply] = nodes.slice(-2);
    return Boolean(reply) && !known.has(reply.id) && textOf(question) === this.question.text;
  }
}
