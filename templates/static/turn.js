let turns = 0;

/** A question and its reply. The server has accepted the question when the reply has an id. */
export class Turn {
  constructor(conversation, question, reply, replaced = []) {
    Object.assign(this, { conversation, question, reply, replaced, eventId: `turn-${++turns}`, cancelled: false });
  }

  get taken() {
    return this.reply.id !== null;
  }

  /** Whether the server accepted this turn, according to the stored conversation. */
  isIn(items, known) {
    const [question, reply] = items.slice(-2);
    return question?.content === this.question.text && Boolean(reply) && !known.has(reply.id);
  }
}
