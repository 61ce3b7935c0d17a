import { changeConversation, getBranch } from './api.js';
import { BranchLoader } from './branch_loader.js';
import { MessageFactory } from './message_factory.js';
import { Turn } from './turn.js';
import { explain, say } from './words.js';

// The errors when another window has changed the conversation.
const OUTDATED = ['conversation_locked', 'item_not_found'];

/** The conversation on the page. */
export class Conversation {
  constructor(parts) {
    // connection, log, composer, options, announcer; onNamed, onTitle, onMissing, onError
    Object.assign(this, parts, { turn: null, loaded: true, unreachable: false });
    this.untaken = new Map(); // turns that the server has not accepted yet, by stream_id
    this.loader = new BranchLoader(null, this);
    this.messages = new MessageFactory({
      onCopy: (copied) => this.announcer.say(say(copied ? 'copied' : 'copy_failed')),
      onAgain: (reply) => this.askAgain(reply),
      onAsk: (question, text) => this.ask(text, question),
      onVersion: (versions, direction) => this.showVersion(versions, direction),
    });
    this.log.onEarlier = () => this.loadEarlier();
  }

  /** Null until the server has created it. */
  get id() {
    return this.loader.id;
  }

  // Opening

  /** Shows another conversation. A reply that is running in this one goes on. */
  open(id) {
    this.rescue(this.log.list);
    this.loader.close();
    this.loader = new BranchLoader(id, this);
    Object.assign(this, { turn: null, loaded: !id, unreachable: false });
    this.onError('');
    this.log.clear();
    this.log.follow(true);
    this.announcer.forget();
    this.composer.open(id);
    this.options.open(id);
    this.onTitle('');
    this.refresh();
    return this.sync();
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

  // What the server has

  /** Shows what the server has. While a turn is not accepted, that waits, since only the page knows it. */
  sync() {
    return this.loader.load();
  }

  /** Whether the server knows all that the page shows. */
  get isSettled() {
    return !this.turn || this.turn.taken;
  }

  /** Whether a branch has the reply that runs. While the database is slow, it waits to be stored. */
  isStoredIn({ data: nodes }) {
    return !this.turn || nodes.some((node) => node.id === this.turn.reply.id);
  }

  /** The id of the last message. */
  get leaf() {
    return this.log.last?.id ?? null;
  }

  failed(error) {
    if (error.status === 404) return this.turn ? null : this.onMissing();
    this.unreachable = !this.loaded;
    if (this.unreachable) this.onError(say('not_loaded'));
  }

  show({ id, title, data: nodes, earlier }) {
    const before = [...this.log.list];
    if (this.unreachable) this.onError('');
    Object.assign(this, { loaded: true, unreachable: false });
    this.log.show(nodes, earlier, this.messages);
    this.rescue(before.filter((message) => !this.log.list.includes(message)));
    const response = nodes.findLast((node) => node.object === 'response');
    this.log.divide(response?.parley.left_out);
    this.options.learn(id, response);
    this.follow(nodes.at(-1)?.status === 'in_progress');
    this.onTitle(title);
    this.refresh();
  }

  /** Puts what the user was writing in messages that go away into the draft. */
  rescue(messages, conversation = this.id) {
    for (const message of messages) {
      const text = message.takeUnsent();
      if (text) this.composer.giveBack(text, conversation);
    }
  }

  /** Goes on with the last reply if it is running, wherever it was asked for. */
  follow(isRunning) {
    if (!isRunning) {
      if (this.turn) this.finished(this.turn.reply);
    } else if (this.turn?.reply !== this.log.last) {
      this.turn = new Turn(this.id, null, this.log.last);
      this.announcer.forget(this.log.last.text);
      this.resume();
    }
  }

  /** The server says how a conversation is now. */
  changed(told) {
    if (told.id === this.id) this.loader.changed(told);
  }

  /** Shows the older or the newer version of a message, in all windows; its buttons stay where they are. */
  async showVersion({ place, top }, direction) {
    const { loader } = this;
    const { changes } = loader;
    if (this.turn) return;
    try {
      await changeConversation(loader.id, { leaf: place[direction] });
    } catch (error) {
      if (loader.closed) return;
      this.onError(explain(error));
      this.sync();
      return;
    }
    if (changes !== loader.changes) return; // the user has gone on meanwhile
    this.log.unpin();
    await this.sync();
    await this.log.loadAll(place[direction]);
    await this.log.reveal(place[direction]);
    const { versions } = this.log.find(place[direction]) ?? {};
    if (!versions) return;
    this.log.hold(versions.top - top);
    if (!this.composer.isFocused) versions.focus(direction);
    this.announcer.say(versions.label);
  }

  // Asking

  /** Sends a question, at the end or as another version of an earlier one. Returns whether it was sent. */
  ask(text, edited = null, pictures = edited?.pictures ?? []) {
    if (!text.trim() && !pictures.length) return false;
    const question = this.messages.question(text, pictures);
    question.parent = edited ? edited.parent : this.log.last?.id ?? null;
    return this.begin(new Turn(this.id, question, this.messages.reply()), question.input, question.parent, edited);
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
    const metadata = { turn: turn.key };
    const request = { input, conversation, truncation: 'auto', metadata, ...this.options.request };
    if (!this.connection.send({ type: 'response.create', stream_id: turn.streamId, ...request })) {
      this.onError(say('not_connected'));
      return false;
    }
    if (replaced) turn.replaced = this.log.cut(replaced);
    this.rescue(turn.replaced.slice(1)); // the first one may be the question whose edit is being sent
    this.untaken.set(turn.streamId, turn);
    this.turn = turn;
    this.loader.noteChange();
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
    if (turn !== this.turn) return;
    this.loader.noteChange();
    this.named(event.response.conversation.id);
    this.log.divide(event.response.parley.left_out);
    if (this.loader.outdated || turn.replaced.length) this.sync(); // a replaced message has one more version now
  }

  named(id) {
    if (this.id) return;
    this.loader.id = id;
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
    if (this.turn?.streamId !== streamId) return;
    const { reply } = this.turn;
    reply.finish(response);
    this.finished(reply);
    this.loader.noteChange();
    this.refresh();
    if (this.loader.incomplete) this.sync();
  }

  finished({ noteLine }) {
    this.turn = null;
    this.announcer.finish();
    this.announcer.say(noteLine?.textContent || say('reply_finished'));
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
    this.loader.noteChange();
    this.sync();
  }

  /** The server never accepted the turn: restores the page, and puts the text back into the composer. */
  withdraw(turn, outdated = false) {
    this.untaken.delete(turn.streamId);
    const { text, pictures } = turn.question ?? {};
    if (turn !== this.turn) return turn.question && this.composer.giveBack(text, turn.conversation, pictures);
    this.turn = null;
    this.loader.noteChange();
    this.log.cut(turn.messages[0]);
    this.log.append(...turn.replaced);
    this.refresh();
    if (outdated || this.loader.outdated) this.sync();
    if (!turn.question) return;
    const [edited] = turn.replaced;
    if (!edited || outdated) this.composer.giveBack(text, this.id, pictures);
    else edited.edit(text);
  }

  // The connection

  async connected() {
    this.refresh();
    this.withdrawOthers();
    if (this.unreachable) return this.open(this.id);
    if (!this.isSettled) await this.settle(this.turn);
    else if (this.turn) this.resume();
    if (this.wasCut) await this.sync();
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
    this.withdrawOthers();
    this.refresh();
  }

  /** Gives back the questions that the server has not accepted in conversations that are not open any more. */
  withdrawOthers() {
    for (const turn of this.untaken.values()) {
      if (turn !== this.turn) this.withdraw(turn);
    }
  }

  /** The connection was lost before the server accepted the turn: finds out whether it did. */
  async settle(turn) {
    try {
      const branch = await turn.find(this.id);
      if (turn !== this.turn) return;
      if (!branch) return this.withdraw(turn);
      this.untaken.delete(turn.streamId);
      turn.take(turn.responseIn(branch));
      this.named(branch.id);
      this.resume();
    } catch (error) {
      // Without a status, the page is offline again, and the next connection finds out.
      if (turn === this.turn && error.status) this.withdraw(turn);
    }
  }

  refresh() {
    this.composer.show(this.loaded && this.connection.state === 'open', Boolean(this.turn));
    this.log.mark({ loading: !this.loaded, busy: Boolean(this.turn) });
  }
}
