/** Where a message is written: the text, kept as a draft, and the button that sends it or stops the reply. */
export class Composer {
  constructor(user, { onSend, onStop }) {
    for (const id of ['composer', 'message', 'send', 'stop']) this[id] = document.getElementById(id);
    this.draftKey = `parley.draft.${user}`;
    this.open = false;
    this.busy = false;
    this.composer.addEventListener('submit', (event) => {
      event.preventDefault();
      onSend(this.text.trimEnd());
    });
    this.message.addEventListener('input', () => this.write(this.text));
    this.message.addEventListener('keydown', (event) => this.pressed(event));
    this.stop.addEventListener('click', onStop);
    // A tap leaves the focus where it is, so that stopping does not bring up a phone's keyboard.
    this.stop.addEventListener('pointerdown', (event) => event.preventDefault());
    this.write(sessionStorage.getItem(this.draftKey) ?? '');
  }

  get text() {
    return this.message.value;
  }

  /** Sets the text, and everything that hangs on it. */
  write(text) {
    if (this.text !== text) this.message.value = text;
    this.keepDraft(text);
    this.message.style.height = 'auto';
    this.message.style.height = `${this.message.scrollHeight}px`;
    this.refresh();
  }

  focus() {
    this.message.focus();
  }

  /** Open: the server takes messages. Busy: a reply is being made. */
  show(open, busy) {
    this.open = open;
    this.busy = busy;
    this.refresh();
  }

  refresh() {
    const stopFocused = document.activeElement === this.stop;
    this.send.disabled = !this.open || !this.text.trim();
    this.send.hidden = this.busy;
    this.stop.hidden = !this.busy;
    if (stopFocused && this.stop.hidden) this.focus();
  }

  pressed(event) {
    // In Safari the composition is over before the Enter that ends it arrives, marked by nothing but the code 229.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.composer.requestSubmit();
  }

  // For the reload when the session is gone; a text too large for the storage is too large for the server too.
  keepDraft(text) {
    try {
      sessionStorage.setItem(this.draftKey, text);
    } catch {
      this.forgetDraft();
    }
  }

  forgetDraft() {
    sessionStorage.removeItem(this.draftKey);
  }
}
