// The chat page: one WebSocket (chat.v1), one conversation, one reply at a time.

import { Composer } from './composer.js';
import { Connection } from './connection.js';
import { Message, element } from './message.js';

const ANNOUNCED_LENGTH = 1000;
const NOTICE_SECONDS = 4;
const RELOADED = 'parley.reloaded';

class Chat {
  constructor() {
    for (const id of ['log', 'status', 'error', 'notice', 'announcer', 'jump']) {
      this[id] = document.getElementById(id);
    }
    this.turn = null; // What was asked and is being answered; its responseId is null until the server took it.
    this.turns = 0;
    this.pinned = true;
    this.handlers = {
      'session.created': () => this.divide(),
      'response.created': (event) => this.accepted(event),
      'response.queued': (event) => this.queued(event),
      'response.output_text.delta': (event) => this.answered(event)?.append(event.delta, () => this.follow()),
      'response.done': (event) => this.done(event.response),
      'presence.joined': (event) => this.tell(`${event.user} joined`),
      'presence.left': (event) => this.tell(`${event.user} left`),
      error: (event) => this.refused(event.error),
    };

    this.composer = new Composer(document.body.dataset.user, {
      onSend: (text) => this.ask(text),
      onStop: () => this.cancel(),
    });
    const url = new URL('ws', location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    this.connection = new Connection(url, {
      onState: (state, text) => this.showState(state, text),
      onEvent: (event) => this.handlers[event.type]?.(event),
      onClose: (code, closure) => this.closed(code, closure),
    });
  }

  start() {
    this.jump.addEventListener('click', () => this.follow(true));
    this.log.addEventListener('scroll', () => this.scrolled());
    new ResizeObserver(() => this.follow()).observe(this.log);
    document.addEventListener('keydown', (event) => event.key === 'Escape' && !event.isComposing && this.cancel());
    document.getElementById('new-chat').addEventListener('click', () => this.renew());
    document.getElementById('logout').form.addEventListener('submit', () => this.composer.forgetDraft());
    this.connection.open();
  }

  // Asking

  ask(text) {
    const eventId = `turn-${this.turns + 1}`;
    if (this.turn || !text) return;
    if (!this.connection.send({ type: 'response.create', event_id: eventId, response: { input: text } })) return;
    this.turns += 1;
    const question = new Message('user', 'completed', text);
    const reply = new Message('assistant', 'streaming');
    this.turn = { eventId, text, question, reply, responseId: null, cancelled: false };
    this.log.append(question.article, reply.article);
    this.fail('');
    this.composer.write('');
    this.refresh();
    this.composer.focus();
    this.follow(true);
  }

  cancel() {
    if (!this.turn || this.turn.cancelled) return;
    this.turn.cancelled = true;
    this.sendCancel();
  }

  // Stopped before the server took the question, a reply has no id yet: accepted() then sends this.
  sendCancel() {
    const { cancelled, responseId } = this.turn;
    if (cancelled && responseId) this.connection.send({ type: 'response.cancel', response_id: responseId });
  }

  renew() {
    this.abandon();
    this.log.replaceChildren();
    this.fail('');
    this.composer.focus();
    this.follow(true);
    this.connection.reopen();
  }

  // Being answered

  answered({ response_id: id }) {
    return this.turn?.responseId === id ? this.turn.reply : null;
  }

  accepted({ event_id: eventId, response }) {
    if (this.turn?.eventId !== eventId) return;
    this.turn.responseId = response.id;
    this.sendCancel();
  }

  queued(event) {
    this.answered(event)?.note(`Waiting, position ${event.position}`);
    this.follow();
  }

  done(response) {
    const reply = this.answered({ response_id: response.id });
    if (!reply) return;
    reply.finish(response.status, response.status_details?.reason, response.output_text);
    reply.count(response.usage?.output_tokens);
    this.endTurn();
    const { innerText } = reply.article;
    this.announce(innerText.length > ANNOUNCED_LENGTH ? 'The reply is finished.' : innerText);
  }

  refused({ code, message, event_id: eventId }) {
    if (code === 'response_not_found') return; // Stopped in the very moment it finished.
    if (this.connection.state !== 'open') return; // A refused handshake: the close code that follows says it.
    if (this.turn && this.turn.eventId === eventId && !this.turn.responseId) this.withdraw();
    this.fail(message);
  }

  endTurn() {
    this.turn = null;
    this.refresh();
    this.follow();
  }

  refresh() {
    this.composer.show(this.connection.state === 'open', Boolean(this.turn));
  }

  /** The server never took the question: hand its text back. */
  withdraw() {
    const { text, question, reply } = this.turn;
    reply.article.remove();
    if (this.composer.text.trim()) {
      question.article.dataset.status = 'failed';
      question.note('Not sent.');
    } else {
      question.article.remove();
      this.composer.write(text);
    }
    this.endTurn();
  }

  // The connection

  closed(code, closure) {
    this.abandon();
    if (closure.error) this.fail(closure.error);
    // The session is gone, so / is the login form; were it the chat again, a second reload would not help.
    if (code !== 4401 || sessionStorage.getItem(RELOADED)) return;
    sessionStorage.setItem(RELOADED, 'yes');
    location.reload();
  }

  abandon() {
    if (this.turn && !this.turn.responseId) return this.withdraw();
    this.turn?.reply.finish('interrupted', 'connection_lost');
    this.endTurn();
  }

  showState(state, text) {
    if (state !== this.status.dataset.state && state !== 'connecting') this.announce(text);
    this.status.dataset.state = state;
    this.status.textContent = text;
    this.refresh();
  }

  /** A new connection is a new conversation: what stands above was never said to it. */
  divide() {
    sessionStorage.removeItem(RELOADED);
    const last = this.log.lastElementChild;
    if (!last || last.matches('.divider')) return;
    this.log.append(element('p', 'divider', 'Reconnected. The model starts afresh from here.'));
    this.follow();
  }

  // Telling the reader

  fail(text) {
    this.error.textContent = text;
    this.error.hidden = !text;
  }

  announce(text) {
    this.announcer.textContent = text;
  }

  tell(text) {
    clearTimeout(this.noticeTimer);
    this.notice.textContent = text;
    this.notice.hidden = false;
    this.noticeTimer = setTimeout(() => { this.notice.hidden = true; }, NOTICE_SECONDS * 1000);
  }

  scrolled() {
    // No more slack than rounding needs, or a finger that scrolls up slowly would be pulled back down.
    this.pinned = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight <= 2;
    this.jump.hidden = this.pinned;
  }

  /** Keeps the end in sight, unless the reader has scrolled away from it. */
  follow(always = false) {
    if (always) this.pinned = true;
    if (this.pinned) this.log.scrollTop = this.log.scrollHeight;
    this.jump.hidden = this.pinned;
  }
}

new Chat().start();
