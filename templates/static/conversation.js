import { getConversation, listConversations } from './api.js';
import { Message } from './message.js';
import { Question } from './question.js';
import { Reply } from './reply.js';
import { Turn } from './turn.js';
import { explain, say } from './words.js';

// The errors when another tab has changed the conversation.
const OUTDATED = ['conversation_busy', 'item_not_found'];

/** The conversation on the page; its id is null until the server has created it. */
export class Conversation {
  constructor(parts) {
    // connection, log, composer, options, announcer; isListed, onNamed, onChange, onTitle, onMissing, onError
    Object.assign(this, parts, { id: null, turn: null, loaded: true, unreachable: false, wasCut: false });
    this.anchor = null; // the id of the item before the first message on the page
    this.untaken = new Map(); // turns that the server has not accepted yet, by event_id
    this.callbacks = {
      onCopy: (copied) => this.announcer.say(say(copied ? 'copied' : 'copy_failed')),
      onAgain: (reply) => this.askAgain(reply),
    };
    this.log.onEarlier = () => this.loadEarlier();
  }

  // Opening

  /** Shows another conversation. A reply that is running in this one goes on. */
  open(id) {
    Object.assign(this, { id, turn: null, loaded: !id, unreachable: false, anchor: null });
    this.onError('');
    this.log.clear();
    this.log.follow(true);
    this.announcer.forget();
    this.composer.open(id);
    this.options.open(id);
    this.onTitle('');
    this.refresh();
    return id ? this.load() : null;
  }

  async load() {
    const { id } = this;
    this.unreachable = false;
    try {
      const conversation = await getConversation(id);
      if (id === this.id && !this.turn) this.show(conversation);
    } catch (error) {
      if (id === this.id) this.failed(error);
    }
  }

  failed(error) {
    if (error.status === 404) return this.onMissing();
    this.unreachable = !this.loaded;
    if (this.unreachable) this.onError(say('not_loaded'));
  }

  show({ id, title, items, earlier }) {
    this.id = id;
    this.loaded = true;
    const messages = this.messagesFrom(items, earlier);
    const last = items.at(-1);
    this.turn = null;
    this.log.show(messages, earlier + items.length - messages.length);
    this.log.divide(last?.left_out);
    this.options.learn(id, last?.options ?? {});
    if (last?.status === 'in_progress') {
      this.turn = new Turn(id, messages.at(-2), messages.at(-1));
      this.announcer.forget(last.content);
      this.resume();
    }
    this.onTitle(title);
    this.refresh();
  }

  /**
   * The messages of a page of items, from its second question on if there are earlier ones: a reply needs its
   * question, and a question the item before it. What is skipped comes again with the page before.
   */
  messagesFrom(items, earlier) {
    const second = items.findIndex((item, index) => index && item.role === 'user');
    const start = earlier ? Math.max(1, second) : 0;
    this.anchor = items[start - 1]?.id ?? null;
    return items.slice(start).map((item) => this.message(item));
  }

  async loadEarlier() {
    const { id } = this;
    const before = this.log.first?.id;
    try {
      const { items, earlier } = await getConversation(id, { before });
      if (id !== this.id || before !== this.log.first?.id) return;
      const messages = this.messagesFrom(items, earlier);
      this.log.prepend(messages, earlier + items.length - messages.length);
    } catch {
      if (id === this.id) this.onError(say('not_loaded'));
    }
  }

  message(item) {
    if (item.role === 'assistant') return Reply.of(item, this.callbacks);
    if (item.role === 'system') return new Message('system', say('system'), item.content, item.id);
    return this.question(item.content, item.id);
  }

  question(text, id = null) {
    return new Question(text, id, (question, edited) => this.ask(edited, question));
  }

  /** Loads what another tab or device said meanwhile. */
  async catchUp() {
    const { id, turn } = this;
    if (!id || turn || !this.loaded) return;
    const conversation = await getConversation(id).catch(() => null);
    const last = conversation?.items.at(-1);
    if (last && id === this.id && !this.turn && last.id !== this.log.last?.id) this.show(conversation);
  }

  // Asking

  /** Sends a question, at the end or in place of an earlier one. Returns whether it was sent. */
  ask(text, edited = null) {
    if (this.turn || !this.loaded || !text.trim()) return false;
    const after = edited ? { after: this.log.before(edited)?.id ?? this.anchor ?? 'none' } : {};
    const turn = new Turn(this.id, this.question(text), new Reply(null, this.callbacks));
    const response = { input: text, conversation: this.id ?? 'new', ...after, ...this.options.current };
    if (!this.connection.send({ type: 'response.create', event_id: turn.eventId, response })) {
      this.onError(say('not_connected'));
      return false;
    }
    if (edited) turn.replaced = this.log.cut(edited);
    this.untaken.set(turn.eventId, turn);
    this.turn = turn;
    this.log.append(turn.question, turn.reply);
    this.log.follow(true);
    this.announcer.forget();
    this.onError('');
    this.refresh();
    this.composer.focus();
    return true;
  }

  askAgain(reply) {
    const question = this.log.before(reply);
    if (question?.role === 'user') this.ask(question.text, question);
  }

  cancel() {
    if (!this.turn || this.turn.cancelled) return;
    this.turn.cancelled = true;
    this.sendCancel(this.turn);
  }

  // A reply that is stopped before the server accepts the question has no id yet: accepted() cancels it then.
  sendCancel({ cancelled, reply }) {
    if (cancelled && reply.id) this.connection.send({ type: 'response.cancel', response_id: reply.id });
  }

  // Answers

  accepted({ event_id: eventId, response }) {
    const turn = this.untaken.get(eventId);
    if (!turn) return;
    this.untaken.delete(eventId);
    turn.reply.id = response.id;
    this.sendCancel(turn);
    if (turn === this.turn) {
      this.named(response.conversation);
      this.log.divide(response.left_out);
    }
    this.onChange();
  }

  named(id) {
    if (this.id) return;
    this.id = id;
    this.composer.named(id);
    this.options.named(id);
    this.onNamed(id);
  }

  replyWith(id) {
    return this.turn?.reply.id === id ? this.turn.reply : null;
  }

  queued({ response_id: id, position }) {
    this.replyWith(id)?.note(say('waiting', { position }));
  }

  grown({ response_id: id, sequence_number: number, delta }) {
    if (this.replyWith(id)?.append(number, delta)) this.announcer.read(delta);
  }

  done(response) {
    this.onChange();
    const reply = this.replyWith(response.id);
    if (!reply) return;
    reply.finish(response);
    this.turn = null;
    this.refresh();
    this.announcer.finish();
    this.announcer.say(reply.noteLine?.textContent || say('reply_finished'));
  }

  refused({ code, message, param, event_id: eventId }) {
    if (code === 'response_not_found') return this.lost(eventId);
    const turn = this.untaken.get(eventId);
    if (turn) this.withdraw(turn, OUTDATED.includes(code));
    this.onError(explain({ code, message }));
    if (param?.startsWith('response.')) this.options.complain(param.replace('response.', ''), message);
  }

  // The reply to resume no longer exists, or the reply to cancel has just finished.
  lost(eventId) {
    if (!this.turn || this.turn.eventId !== eventId) return;
    this.turn = null;
    this.load();
  }

  /** The server never accepted the question: restores the page, and puts the text back into the composer. */
  withdraw(turn, outdated = false) {
    this.untaken.delete(turn.eventId);
    const { text } = turn.question;
    if (turn !== this.turn) return this.composer.giveBack(text, turn.conversation);
    this.turn = null;
    this.log.cut(turn.question);
    this.log.append(...turn.replaced);
    this.refresh();
    const [edited] = turn.replaced;
    if (!edited || (outdated && edited.text !== text)) this.composer.giveBack(text, this.id);
    else if (edited.text !== text) edited.edit(text);
    if (outdated) this.load();
  }

  // The connection

  async connected() {
    this.refresh();
    if (this.unreachable) await this.open(this.id);
    else if (this.turn?.taken) this.resume();
    else if (this.turn) await this.settle(this.turn);
    else if (this.wasCut) await this.catchUp();
    this.wasCut = false;
  }

  /** Resumes the reply after its last delta. */
  resume() {
    const { eventId, reply } = this.turn;
    const resume = { type: 'response.resume', event_id: eventId, response_id: reply.id };
    this.connection.send({ ...resume, starting_after: reply.sequenceNumber });
    this.sendCancel(this.turn);
  }

  disconnected() {
    this.wasCut = true;
    for (const turn of this.untaken.values()) {
      if (turn !== this.turn) this.withdraw(turn);
    }
    this.refresh();
  }

  /** The connection was lost before the server accepted the question: finds out whether it did. */
  async settle(turn) {
    try {
      const known = new Set([...this.log.list, ...turn.replaced].map((message) => message.id));
      const conversation = this.id ? await getConversation(this.id) : await this.newest();
      if (turn !== this.turn) return;
      if (!conversation || !turn.isIn(conversation.items, known)) return this.withdraw(turn);
      this.untaken.delete(turn.eventId);
      this.named(conversation.id);
      this.show(conversation);
    } catch (error) {
      // Without a status, the page is offline again, and the next connection finds out.
      if (turn === this.turn && error.status) this.withdraw(turn);
    }
  }

  /** The newest conversation, unless the list has it already. */
  async newest() {
    const [newest] = (await listConversations({ limit: 1 })).data;
    return newest && !this.isListed(newest.id) ? getConversation(newest.id) : null;
  }

  refresh() {
    this.composer.show(this.loaded && this.connection.state === 'open', Boolean(this.turn));
    this.log.mark({ loading: !this.loaded, busy: Boolean(this.turn) });
  }
}
