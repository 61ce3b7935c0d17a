import { say } from './words.js';

// The words for each close code. With any other code, above all 1006, the page is offline.
const CLOSURES = {
  1009: { why: 'disconnected', error: 'message_too_long' },
  1011: { why: 'server_error' },
  1012: { why: 'server_restarting' },
  1013: { why: 'too_slow' },
  4401: { why: 'session_refused', final: true, error: 'invalid_credentials' },
  4403: { why: 'not_allowed', final: true, error: 'origin_not_allowed' },
  4429: { why: 'too_many_connections', seconds: 60 },
};

/** A socket that reconnects by itself, and reports its state. */
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
    this.socket = new WebSocket(this.url, ['chat.v2']);
    this.socket.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.socket.onclose = (closure) => this.closed(closure.code);
  }

  send(event) {
    if (this.state !== 'open' || this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(event));
    return true;
  }

  // The socket counts as open when the server has sent an event: it accepts a socket before it checks credentials.
  receive(event) {
    if (event.type === 'parley.session.created') {
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
    // Random from the first try on, so that not all pages reconnect to a restarted server in the same instant.
    const seconds = closure.seconds ?? 1 + Math.random() * Math.min(29, 2 ** this.failures++);
    this.hurriable = !closure.seconds;
    this.wait(say(closure.why), Date.now() + seconds * 1000);
  }

  // Compares with a moment instead of counting ticks: a tab in the background gets few ticks.
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
