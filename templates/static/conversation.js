import { getBranch, listConversations } from './api.js';
import { MessageFactory } from './message_factory.js';
import { Turn } from './turn.js';
import { explain, say } from './words.js';

// The errors when another tab has changed the conversation.
const OUTDATED = ['conversation_locked', 'item_not_found'];

/** The conversation on the page; its id is null until the server has created it. */
export class Conversation {
  constructor(parts) {
    // connection, log, composer, options, announcer; isListed, onNamed, onChange, onTitle, onMissing, onError
    Object.assign(this, parts, { id: null, turn: null, loaded: true, unreachable: false, wasCut: false });
    this.untaken = new Map(); // turns that the server has not accepted yet, by stream_id
    this.messages = new MessageFactory({
      onCopy: (copied) => this.announcer.say(say(copied ? 'copied' : 'copy_failed')),
      onAgain: (reply) => this.askAgain(reply),
      onAsk: (question, text) => this.ask(text, question),
    });
    this.log.onEarlier = () => this.loadEarlier();
  }

  // Opening

  /** Shows another conversation. A reply that is running in this one goes on. */
  open(id) {
    Object.assign(this, { id, turn: null, loaded: !id, unreachable: false });
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
      const branch = await getBranch(id);
      if (id === this.id && !this.turn) this.show(branch);
    } catch (error) {
      if (id === this.id) this.failed(error);
    }
  }

  failed(error) {
    if (error.status === 404) return this.onMissing();
    this.unreachable = !this.loaded;
    if (this.unreachable) this.onError(say('not_loaded'));
  }

  show({ id, title, data: nodes, earlier }) {
    Object.assign(this, { id, loaded: true, turn: null });
    const response = nodes.findLast((node) => node.object === 'response');
    this.log.show(nodes.map((node) => this.messages.of(node)), earlier);
    this.log.divide(response?.parley.left_out);
    this.options.learn(id, response?.parley.options ?? {});
    if (nodes.at(-1)?.status === 'in_progress') {
      this.turn = new Turn(id, null, this.log.last);
      this.announcer.forget(this.log.last.text);
      this.resume();
    }
    this.onTitle(title);
    this.refresh();
  }

  async loadEarlier() {
    const { id } = this;
    const before = this.log.first?.id;
    try {
      const { data: nodes, earlier } = await getBranch(id, { before });
      if (id !== this.id || before !== this.log.first?.id) return;
      this.log.prepend(nodes.map((node) => this.messages.of(node)), earlier);
    } catch {
      if (id === this.id) this.onError(say('not_loaded'));
    }
  }

  /** Loads what another tab or device said meanwhile. */
  async catchUp() {
    const { id, turn } = this;
    if (!id || turn || !this.loaded) return;
    const branch = await getBranch(id).catch(() => null);
    const last = branch?.data.at(-1);
    if (last && id === this.id && !this.turn && last.id !== this.log.last?.id) this.show(branch);
  }

  // Asking

  /** Sends a question, at the end or as another version of an earlier one. Returns whether it was sent. */
  ask(text, edited = null) {
    if (!text.trim()) return false;
    const question = this.messages.question(text);
    question.parent = edited ? edited.parent : this.log.last?.id ?? null;
    return this.begin(new Turn(this.id, question, this.messages.reply()), text, question.parent, edited);
  }

  /** Asks for another reply to the same question. */
  askAgain(earlier) {
    const reply = this.messages.reply();
    reply.parent = earlier.parent;
    this.begin(new Turn(this.id, null, reply), [], reply.parent, earlier);
  }

  // The turn takes the place of a message and of all that follow it. On the server, they stay on a branch of their own.
  begin(turn, input, after, replaced) {
    if (this.turn || !this.loaded) return false;
    const conversation = this.id ? { id: this.id, after } : 'new';
    const request = { input, conversation, truncation: 'auto', ...this.options.request };
    if (!this.connection.send({ type: 'response.create', stream_id: turn.streamId, ...request })) {
      this.onError(say('not_connected'));
      return false;
    }
    if (replaced) turn.replaced = this.log.cut(replaced);
    this.untaken.set(turn.streamId, turn);
    this.turn = turn;
    this.log.append(...turn.messages);
    this.log.follow(true);
    this.announcer.forget();
    this.onError('');
    this.refresh();
    this.composer.focus();
    return true;
  }

  cancel() {
    if (!this.turn || this.turn.cancelled) return;
    this.turn.cancelled = true;
    this.sendCancel(this.turn);
  }

  // A reply that is stopped before the server accepts the question has no id yet: accepted() cancels it then.
  sendCancel({ cancelled, reply, streamId }) {
    if (!cancelled || !reply.id) return;
    this.connection.send({ type: 'parley.response.cancel', stream_id: streamId, response_id: reply.id });
  }

  // Answers

  accepted(event) {
    this.turn?.sees(event);
    const turn = this.untaken.get(event.stream_id);
    if (!turn) return;
    this.untaken.delete(event.stream_id);
    turn.take(event.response);
    this.sendCancel(turn);
    if (turn === this.turn) {
      this.named(event.response.conversation.id);
      this.log.divide(event.response.parley.left_out);
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

  queued({ response_id: id, position }) {
    if (this.turn?.reply.id === id) this.turn.reply.note(say('waiting', { position }));
  }

  added(event) {
    if (this.turn?.sees(event)) this.announce(this.turn.reply.add(event.output_index, event.item));
  }

  grown(event) {
    if (this.turn?.sees(event)) this.announcer.read(this.turn.reply.grow(event.output_index, event.delta));
  }

  /** A part of the reply has ended. */
  ended(event) {
    if (!this.turn?.sees(event)) return;
    this.turn.reply.endPart(event.output_index, event.item);
    if (event.item.type === 'message') this.announcer.finish();
  }

  announce(text) {
    if (text) this.announcer.say(text);
  }

  done({ stream_id: streamId, response }) {
    this.onChange();
    if (this.turn?.streamId !== streamId) return;
    const { reply } = this.turn;
    reply.finish(response);
    this.turn = null;
    this.refresh();
    this.announcer.finish();
    this.announcer.say(reply.noteLine?.textContent || say('reply_finished'));
  }

  refused({ error, stream_id: streamId }) {
    if (error.code === 'response_not_found') return this.lost(streamId);
    const turn = this.untaken.get(streamId);
    if (turn) this.withdraw(turn, OUTDATED.includes(error.code));
    this.onError(explain(error));
    if (turn && error.param) this.options.complain(error.param, error.message);
  }

  // The reply to resume no longer exists, or the reply to cancel has just finished.
  lost(streamId) {
    if (this.turn?.streamId !== streamId) return;
    this.turn = null;
    this.load();
  }

  /** The server never accepted the turn: restores the page, and puts the text back into the composer. */
  withdraw(turn, outdated = false) {
    this.untaken.delete(turn.streamId);
    const text = turn.question?.text;
    if (turn !== this.turn) return text && this.composer.giveBack(text, turn.conversation);
    this.turn = null;
    this.log.cut(turn.messages[0]);
    this.log.append(...turn.replaced);
    this.refresh();
    if (outdated) this.load();
    if (!text) return;
    const [edited] = turn.replaced;
    if (!edited || outdated) this.composer.giveBack(text, this.id);
    else edited.edit(text);
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

  /** Resumes the reply after its last event. */
  resume() {
    const { reply, sequence, streamId } = this.turn;
    const resume = { type: 'parley.response.resume', stream_id: streamId, response_id: reply.id };
    this.connection.send({ ...resume, starting_after: sequence });
    this.sendCancel(this.turn);
  }

  disconnected() {
    this.wasCut = true;
    for (const turn of this.untaken.values()) {
      if (turn !== this.turn) this.withdraw(turn);
    }
    this.refresh();
  }

  /** The connection was lost before the server accepted the turn: finds out whether it did. */
  async settle(turn) {
    try {
      const known = new Set([...this.log.list, ...turn.replaced].map((message) => message.id));
      const branch = this.id ? await getBranch(this.id) : await this.newest();
      if (turn !== this.turn) return;
      if (!branch || !turn.isIn(branch.data, known)) return this.withdraw(turn);
      this.untaken.delete(turn.streamId);
      this.named(branch.id);
      this.show(branch);
    } catch (error) {
      // Without a status, the page is offline again, and the next connection finds out.
      if (turn === this.turn && error.status) this.withdraw(turn);
    }
  }

  /** The newest conversation, unless the list has it already. */
  async newest() {
    const [newest] = (await listConversations({ limit: 1 })).data;
    return newest && !this.isListed(newest.id) ? getBranch(newest.id) : null;
  }

  refresh() {
    this.composer.show(this.loaded && this.connection.state === 'open', Boolean(this.turn));
    this.log.mark({ loading: !this.loaded, busy: Boolean(this.turn) });
  }
}
