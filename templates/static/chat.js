// The chat page: one WebSocket (chat.v1), one conversation, one reply at a time.

import MarkdownIt from './vendor/markdown-it.min.js';

const NOTES = {
  client_cancelled: 'Stopped.',
  max_output_tokens: 'Cut off: length limit reached.',
  context_length: 'Cut off: the context is full.',
  server_error: 'The server failed; try again.',
  server_shutdown: 'The server is shutting down; try again in a moment.',
  connection_lost: 'Interrupted: the connection was lost.',
};

// What a close code means to the reader. Codes not listed, and 1006 above all: we are offline.
const CLOSURES = {
  1009: { why: 'Disconnected', error: 'That message is too long for the server.' },
  1011: { why: 'Server error' },
  1012: { why: 'Server restarting' },
  1013: { why: 'Connection too slow' },
  4401: { why: 'Session refused', final: true, error: 'The server refuses this session. Log out, then log in again.' },
  4403: { why: 'Not allowed', final: true, error: 'The server takes no chats from this address (see PARLEY_ORIGINS).' },
  4429: { why: 'Too many connections', seconds: 60 },
};

const BLOCK_LENGTH = 2000;
const ANNOUNCED_LENGTH = 1000;
const NOTICE_SECONDS = 4;
const RELOADED = 'parley.reloaded';

const markdown = createMarkdown();

function createMarkdown() {
  // breaks: a line that ended while the reply streamed in stays ended when it is done.
  const parser = new MarkdownIt({ html: false, linkify: false, breaks: true }).disable('image');
  const { rules } = parser.renderer;
  const plain = (tokens, index, options, env, renderer) => renderer.renderToken(tokens, index, options);

  // A relative link from a model would lead into this very server: only full addresses are links.
  parser.validateLink = (address) => /^(https?:\/\/|mailto:)/i.test(address.trim());
  rules.link_open = (tokens, index, ...rest) => {
    tokens[index].attrSet('target', '_blank');
    tokens[index].attrSet('rel', 'noopener noreferrer');
    return plain(tokens, index, ...rest);
  };

  // Column alignment comes as a style attribute, which the Content-Security-Policy forbids.
  rules.th_open = rules.td_open = (tokens, index, ...rest) => {
    const alignment = tokens[index].attrGet('style')?.replace('text-align:', '');
    tokens[index].attrs = alignment ? [['class', alignment]] : null;
    return plain(tokens, index, ...rest);
  };
  rules.table_open = (...table) => `<div class="table">${plain(...table)}`;
  rules.table_close = (...table) => `${plain(...table)}</div>`;
  return parser;
}

function renderMarkdown(text) {
  const template = document.createElement('template');
  template.innerHTML = markdown.render(text);
  return template.content;
}

function element(tag, className, text = '') {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

/** A socket that comes back by itself, and says what it is doing. */
class Connection {
  constructor(url, { onState, onEvent, onClose }) {
    Object.assign(this, { url, onState, onEvent, onClose, failures: 0, hurriable: false });
    window.addEventListener('online', () => this.hurry());
    document.addEventListener('visibilitychange', () => document.hidden || this.hurry());
  }

  open() {
    clearTimeout(this.timer);
    this.hurriable = false;
    this.report('connecting', 'Connecting…');
    this.socket = new WebSocket(this.url, ['chat.v1']);
    this.socket.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.socket.onclose = (closure) => this.closed(closure.code);
  }

  reopen() {
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
    this.open();
  }

  send(event) {
    if (this.state !== 'open' || this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(event));
    return true;
  }

  // Open means that the server has spoken: it closes a socket without credentials only after accepting it.
  receive(event) {
    if (event.type === 'session.created') {
      this.failures = 0;
      this.report('open', 'Connected');
    }
    this.onEvent(event);
  }

  closed(code) {
    const closure = CLOSURES[code] ?? { why: 'Offline' };
    this.report('closed', closure.why);
    this.onClose(code, closure);
    if (closure.final) return;
    // Random from the first try on: a restarted server must not meet all its pages in the same instant.
    const seconds = closure.seconds ?? 1 + Math.random() * Math.min(29, 2 ** this.failures++);
    this.hurriable = !closure.seconds;
    this.wait(closure.why, Date.now() + seconds * 1000);
  }

  // Counts towards a moment, not down by ticks: a tab in the background gets few ticks.
  wait(why, moment) {
    const left = moment - Date.now();
    if (left <= 0) return this.open();
    this.report('closed', `${why}, retrying in ${Math.ceil(left / 1000)} s`);
    this.timer = setTimeout(() => this.wait(why, moment), Math.min(left, 1000));
  }

  hurry() {
    if (this.hurriable) this.open();
  }

  report(state, text) {
    this.state = state;
    this.onState(state, text);
  }
}

/** A message on the page; a reply is one that grows until it is finished. */
class Message {
  constructor(role, status, text = '') {
    this.article = element('article', `message ${role}`);
    this.article.dataset.status = status;
    this.article.setAttribute('aria-label', role === 'user' ? 'You' : 'Reply');
    this.content = this.article.appendChild(element('div', 'content', text));
    this.pieces = [];
    this.pending = '';
  }

  append(delta, onDrawn) {
    this.firstDelta ??= performance.now();
    this.pieces.push(delta);
    this.pending += delta;
    this.frame ??= requestAnimationFrame(() => {
      this.draw();
      onDrawn();
    });
  }

  // Once per frame, into blocks cut at a line's end: the browser lays out the last block, not the whole reply.
  draw() {
    this.frame = null;
    this.note('');
    this.block ??= this.startBlock();
    if (this.block.length > BLOCK_LENGTH) {
      const end = this.pending.indexOf('\n') + 1;
      this.block.appendData(this.pending.slice(0, end));
      this.pending = this.pending.slice(end);
      if (end) this.block = this.startBlock();
    }
    this.block.appendData(this.pending);
    this.pending = '';
  }

  startBlock() {
    return this.content.appendChild(element('div', 'block')).appendChild(new Text());
  }

  finish(status, reason, text = this.pieces.join('')) {
    cancelAnimationFrame(this.frame);
    this.article.dataset.status = status;
    this.content.replaceChildren(renderMarkdown(text));
    this.note(NOTES[reason] ?? (text.trim() ? '' : 'The model said nothing.'));
  }

  note(text) {
    if (!this.noteLine && !text) return;
    this.noteLine ??= this.article.appendChild(element('p', 'note'));
    this.noteLine.textContent = text;
    this.noteLine.hidden = !text;
  }

  count(tokens) {
    if (!tokens) return;
    const seconds = (performance.now() - this.firstDelta) / 1000;
    const speed = tokens > 1 && seconds > 0 ? ` · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : '';
    this.article.append(element('footer', 'usage', `${tokens} ${tokens === 1 ? 'token' : 'tokens'}${speed}`));
  }
}

class Chat {
  constructor() {
    for (const id of ['log', 'status', 'error', 'notice', 'announcer', 'composer', 'message', 'send', 'stop', 'jump']) {
      this[id] = document.getElementById(id);
    }
    this.draftKey = `parley.draft.${document.body.dataset.user}`;
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

    const url = new URL('ws', location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    this.connection = new Connection(url, {
      onState: (state, text) => this.showState(state, text),
      onEvent: (event) => this.handlers[event.type]?.(event),
      onClose: (code, closure) => this.closed(code, closure),
    });
  }

  start() {
    this.composer.addEventListener('submit', (event) => this.submit(event));
    this.message.addEventListener('input', () => this.compose(this.message.value));
    this.message.addEventListener('keydown', (event) => this.pressed(event));
    this.stop.addEventListener('click', () => this.cancel());
    // A tap leaves the focus where it is, so that stopping does not bring up a phone's keyboard.
    this.stop.addEventListener('pointerdown', (event) => event.preventDefault());
    this.jump.addEventListener('click', () => this.follow(true));
    this.log.addEventListener('scroll', () => this.scrolled());
    new ResizeObserver(() => this.follow()).observe(this.log);
    document.addEventListener('keydown', (event) => event.key === 'Escape' && !event.isComposing && this.cancel());
    document.getElementById('new-chat').addEventListener('click', () => this.renew());
    document.getElementById('logout').form.addEventListener('submit', () => sessionStorage.removeItem(this.draftKey));
    this.compose(sessionStorage.getItem(this.draftKey) ?? '');
    this.connection.open();
  }

  // Asking

  pressed(event) {
    // In Safari the composition is over before the Enter that ends it arrives, marked by nothing but the code 229.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.composer.requestSubmit();
  }

  submit(event) {
    event.preventDefault();
    const text = this.message.value.trimEnd();
    const eventId = `turn-${this.turns + 1}`;
    if (this.turn || !text) return;
    if (!this.connection.send({ type: 'response.create', event_id: eventId, response: { input: text } })) return;
    this.turns += 1;
    const question = new Message('user', 'completed', text);
    const reply = new Message('assistant', 'streaming');
    this.turn = { eventId, text, question, reply, responseId: null, cancelled: false };
    this.log.append(question.article, reply.article);
    this.fail('');
    this.compose('');
    this.message.focus();
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
    this.message.focus();
    this.follow(true);
    this.connection.reopen();
  }

  /** Sets the composer's text, and everything that hangs on it. */
  compose(text) {
    if (this.message.value !== text) this.message.value = text;
    this.keepDraft(text);
    this.message.style.height = 'auto';
    this.message.style.height = `${this.message.scrollHeight}px`;
    this.refresh();
  }

  // For the reload when the session is gone; a text too large for the storage is too large for the server too.
  keepDraft(text) {
    try {
      sessionStorage.setItem(this.draftKey, text);
    } catch {
      sessionStorage.removeItem(this.draftKey);
    }
  }

  refresh() {
    const stopFocused = document.activeElement === this.stop;
    this.send.disabled = this.connection.state !== 'open' || !this.message.value.trim();
    this.send.hidden = Boolean(this.turn);
    this.stop.hidden = !this.turn;
    if (stopFocused && this.stop.hidden) this.message.focus();
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

  /** The server never took the question: hand its text back. */
  withdraw() {
    const { text, question, reply } = this.turn;
    reply.article.remove();
    if (this.message.value.trim()) {
      question.article.dataset.status = 'failed';
      question.note('Not sent.');
    } else {
      question.article.remove();
      this.compose(text);
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
