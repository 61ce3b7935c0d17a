import { typesetAll } from './maths.js';

const COMMAND = /^(Mac|iP)/.test(navigator.platform) ? 'metaKey' : 'ctrlKey';

/** Prints the open conversation: all of it, and not only what is loaded and was visible. */
export class Printing {
  constructor(conversation) {
    this.conversation = conversation;
    document.addEventListener('keydown', (event) => this.pressed(event));
    // The menu of the browser waits for nothing, so it prints what is loaded.
    window.addEventListener('beforeprint', () => conversation.log.formatAll());
  }

  pressed(event) {
    if (event.key.toLowerCase() !== 'p' || !event[COMMAND] || event.shiftKey || event.altKey) return;
    event.preventDefault();
    if (!event.repeat) this.print();
  }

  async print() {
    const { id, log } = this.conversation;
    await log.loadAll();
    if (id !== this.conversation.id || !this.conversation.loaded || log.skipped) return; // the reader left, or an error is shown
    log.formatAll();
    await typesetAll();
    await document.fonts.ready;
    window.print();
  }
}
