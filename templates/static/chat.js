// The chat page: one WebSocket (chat.v2), and a list of conversations, of which one is open.

import { Announcer } from './announcer.js';
import { Composer } from './composer.js';
import { Connection } from './connection.js';
import { Conversation } from './conversation.js';
import { Drawer } from './drawer.js';
import { Log } from './log.js';
import { logInAgain, loggedIn } from './login.js';
import { Options } from './options.js';
import { Printing } from './printing.js';
import { Sidebar } from './sidebar.js';
import { explain, say } from './words.js';

const NOTICE_SECONDS = 4;

class Chat {
  constructor() {
    for (const id of ['title', 'status', 'error', 'notice']) this[id] = document.getElementById(id);
    this.announcer = new Announcer();
    this.drawer = new Drawer();
    this.options = new Options({ onModel: ({ capabilities }) => this.composer.pictures.allow(capabilities.includes('images')) });
    this.composer = new Composer(document.body.dataset.user, {
      onSend: (text) => this.send(text),
      onStop: () => this.conversation.cancel(),
      onError: (text) => this.fail(text),
    });
    this.sidebar = new Sidebar({
      onCurrent: (title) => this.showTitle(title),
      onOpen: () => this.drawer.close(),
      onPrint: ({ id }) => this.print(id),
      onLoaded: (conversations) => conversations.forEach((one) => this.conversation.changed(one)),
      onDeleted: (id) => id === this.conversation.id && this.renew(),
      onError: (text) => this.fail(text),
    });
    const url = new URL('ws', location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    this.connection = new Connection(url, {
      onState: (state, text) => this.showState(state, text),
      onEvent: (event) => this.handlers[event.type]?.(event),
      onClose: (code, closure) => this.closed(code, closure),
    });
    this.conversation = this.createConversation();
    this.printing = new Printing(this.conversation);
    this.handlers = this.createHandlers();
  }

  createConversation() {
    const { announcer, composer, connection, options } = this;
    return new Conversation({
      announcer,
      composer,
      connection,
      options,
      log: new Log(),
      onNamed: (id) => this.named(id),
      onTitle: (title) => this.showTitle(title),
      onMissing: () => this.missing(),
      onError: (text) => this.fail(text),
    });
  }

  createHandlers() {
    const { conversation } = this;
    const grown = (event) => conversation.grown(event);
    const done = (event) => conversation.done(event);
    return {
      'parley.session.created': ({ session }) => this.connected(session),
      'response.created': (event) => conversation.accepted(event),
      'parley.queue': (event) => conversation.queued(event),
      'response.output_item.added': (event) => conversation.added(event),
      'response.output_text.delta': grown,
      'response.reasoning_text.delta': grown,
      'response.function_call_arguments.delta': grown,
      'response.output_item.done': (event) => conversation.ended(event),
      'response.completed': done,
      'response.incomplete': done,
      'response.failed': done,
      'parley.warning': ({ error }) => this.fail(explain(error)),
      'parley.conversation.updated': (event) => this.updated(event.conversation),
      'parley.conversation.deleted': (event) => this.deleted(event.conversation.id),
      'parley.presence.joined': ({ user }) => this.tell(say('joined', { user })),
      'parley.presence.left': ({ user }) => this.tell(say('left', { user })),
      error: (event) => this.refused(event),
    };
  }

  start() {
    for (const button of document.querySelectorAll('.new-chat')) button.addEventListener('click', () => this.renew());
    window.addEventListener('hashchange', () => this.route());
    document.addEventListener('visibilitychange', () => document.hidden || this.conversation.sync());
    document.addEventListener('keydown', (event) => this.pressed(event));
    document.getElementById('logout').addEventListener('submit', () => this.leave());
    this.connection.open();
    this.route();
  }

  // The address names the open conversation, so that reload, back and forward work.

  route() {
    const id = location.hash.startsWith('#conv_') ? location.hash.slice(1) : null;
    this.sidebar.select(id);
    return this.conversation.open(id);
  }

  /** Opens a conversation of the list, if another one is open, and prints it. */
  async print(id) {
    this.drawer.close();
    if (id !== this.conversation.id) {
      history.pushState(null, '', `#${id}`);
      await this.route();
    }
    if (id === this.conversation.id) this.printing.print(); // else it is gone, or the reader is
  }

  renew() {
    if (location.hash) history.pushState(null, '', location.pathname + location.search);
    this.drawer.close();
    this.route();
    this.composer.focus();
  }

  named(id) {
    history.replaceState(null, '', `#${id}`);
    this.sidebar.select(id);
  }

  // What happens in other windows, and here too

  updated(conversation) {
    this.sidebar.update(conversation);
    if (conversation.id === this.conversation.id) this.showTitle(conversation.title);
    this.conversation.changed(conversation);
  }

  /** A conversation was deleted, perhaps in another window. */
  deleted(id) {
    if (this.sidebar.remove(id) && id === this.conversation.id) this.missing();
  }

  leave() {
    this.leaving = true;
    this.composer.forgetDrafts();
  }

  /** The open conversation is gone: what was being written there goes to a new one. */
  missing() {
    const { id, turn, isSettled } = this.conversation;
    if (!isSettled) this.conversation.withdraw(turn);
    history.replaceState(null, '', location.pathname + location.search);
    this.route();
    this.composer.move(id, null);
    this.fail(say('error_conversation_not_found'));
  }

  send(text) {
    if (!this.conversation.ask(text, null, this.composer.pictures.urls)) return;
    this.composer.pictures.take();
    this.composer.write('');
  }

  // Esc stops the reply, unless it closes a dialog or a menu, clears the search, or belongs to an input method.
  pressed(event) {
    if (event.key !== 'Escape' || event.isComposing || event.keyCode === 229) return;
    if (event.target.type === 'search' || document.querySelector('dialog[open], :popover-open')) return;
    this.conversation.cancel();
  }

  // The connection

  async connected(session) {
    loggedIn();
    this.options.model.offer(session.models);
    await this.conversation.connected();
    this.sidebar.refresh();
  }

  closed(code, closure) {
    this.conversation.disconnected();
    if (code === 4401 && this.leaving) return; // the logout closes this connection before its own page comes
    if (closure.error) this.fail(say(`error_${closure.error}`));
    if (code === 4401) logInAgain();
  }

  // The close code that follows says why a handshake was refused.
  refused(event) {
    if (this.connection.state === 'open') this.conversation.refused(event);
  }

  showState(state, text) {
    if (state !== this.status.dataset.state && state !== 'connecting') this.announcer.say(text);
    this.status.dataset.state = state;
    this.status.textContent = text;
    this.conversation?.refresh();
  }

  // Telling the reader

  showTitle(title) {
    this.title.textContent = title || say('new_chat');
    document.title = title ? `${title} · Parley` : 'Parley';
  }

  fail(text) {
    this.error.textContent = text;
    this.error.hidden = !text;
  }

  tell(text) {
    clearTimeout(this.noticeTimer);
    this.notice.textContent = text;
    this.notice.hidden = false;
    this.noticeTimer = setTimeout(() => { this.notice.hidden = true; }, NOTICE_SECONDS * 1000);
  }
}

new Chat().start();
