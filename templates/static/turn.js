let turns = 0;

/** A question and the reply to it. The server has taken it once the reply has an id. */
export class Turn {
  constructor(conversation, question, reply, replaced = []) {
    Object.assign(this, { conversation, question, reply, replaced, eventId: `turn-${++turns}`, cancelled: false });
  }

  get taken() {
    return this.reply.id !== null;
  }

  /** Whether the server took this turn, going by the conversation as the server has it now. */
  isIn(items, known) {
    const [question, reply] = items.slice(-2);
    return question?.content === this.question.text && Boolean(reply) && !known.has(reply.id);
  }
}
