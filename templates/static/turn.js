import { getBranch, listConversations } from './api.js';

const NEWEST = 5; // other windows may have begun some since

let turns = 0;

/**
 * A question and its reply, or another reply to an earlier question, which is none of this turn. The server has accepted
 * it when the reply has an id. `sequence` is the number of the last event of the reply.
 */
export class Turn {
  constructor(conversation, question, reply) {
    const streamId = `turn-${++turns}`;
    this.key = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`; // the server stores it
    Object.assign(this, { conversation, question, reply, replaced: [], streamId, sequence: -1, cancelled: false });
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

  /** The response to this turn in a branch, if the server accepted the turn. */
  responseIn({ data: nodes }) {
    return nodes.find((node) => node.metadata?.turn === this.key);
  }

  /** The branch with the response to this turn: of a conversation, or of one of the newest ones if its id is not known. */
  async find(conversation) {
    const ids = conversation ? [conversation] : (await listConversations({ limit: NEWEST })).data.map(({ id }) => id);
    for (const id of ids) {
      const branch = await getBranch(id);
      if (this.responseIn(branch)) return branch;
    }
    return null;
  }
}
