import { say } from './words.js';

// What a close code means to the reader, as keys of words. Codes not listed, and 1006 above all: we are offline.
const CLOSURES = {
  1009: { why: 'disconnected', error: 'message_too_long' },
  1011: { why: 'server_error' },
  1012: { why: 'server_restarting' },
  1013: { why: 'too_slow' },
  4401: { why: 'session_refused', final: true, error: 'invalid_credentials' },
  4403: { why: 'not_allowed', final: true, error: 'origin_not_allowed' },
  4429: { why: 'too_many_connections', seconds: 60 },
};

/** A socket that comes back by itself, and says what it is doing. */
export class Connection {
  constructor(url, { onState, onEvent, onClose }) {
    Object.assign(this, { url, onState, onEvent, onClose, failures: 0, hurriable: false });
    window.addEventListener('online', () => this.hurry());
    document.addEventListener('visibilitychange', () => document.hidden || this.hurry());
  }

  open() {
    clearTimeout(this.timer);
    this.hurriable = false;
    this.report('connecting', say('connecting'));
    this.socket = new WebSocket(this.url, ['chat.v1']);
    this.socket.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.socket.onclose = (closure) => this.closed(closure.code);
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
      this.report('open', say('connected'));
    }
    this.onEvent(event);
  }

  closed(code) {
    const closure = CLOSURES[code] ?? { why: 'offline' };
    this.report('closed', say(closure.why));
    this.onClose(code, closure);
    if (closure.final) return;
    // Random from the first try on: a restarted server must not meet all its pages in the same instant.
    const seconds = closure.seconds ?? 1 + Math.random() * Math.min(29, 2 ** this.failures++);
    this.hurriable = !closure.seconds;
    this.wait(say(closure.why), Date.now() + seconds * 1000);
  }

  // Counts towards a moment, not down by ticks: a tab in the background gets few ticks.
  wait(why, moment) {
    const left = moment - Date.now();
    if (left <= 0) return this.open();
    this.report('closed', say('retrying', { why, seconds: Math.ceil(left / 1000) }));
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
