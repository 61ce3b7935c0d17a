/** Where a message is written: a draft for each conversation, and the button that sends it or stops the reply. */
export class Composer {
  constructor(user, { onSend, onStop }) {
    for (const id of ['composer', 'message', 'send', 'stop']) this[id] = document.getElementById(id);
    this.drafts = `parley.draft.${user}.`;
    this.draftKey = this.keyOf(null);
    this.ready = false;
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

  /** Gives a text back that was not sent: to a draft, or before whatever has been written since. */
  giveBack(text, conversation) {
    const key = this.keyOf(conversation);
    if (key !== this.draftKey) return this.keepDraft(text, key);
    this.write([text, this.text].filter((part) => part.trim()).join('\n\n'));
    this.focus();
  }

  focus() {
    this.message.focus();
  }

  /** Shows the draft for a conversation; null is one that is yet to be made. */
  open(conversation) {
    this.draftKey = this.keyOf(conversation);
    this.write(sessionStorage.getItem(this.draftKey) ?? '');
  }

  /** The new conversation has an id now, and so has the draft for it. */
  named(conversation) {
    sessionStorage.removeItem(this.draftKey);
    this.draftKey = this.keyOf(conversation);
    this.keepDraft(this.text);
  }

  keyOf(conversation) {
    return this.drafts + (conversation ?? 'new');
  }

  /** Ready: the server takes messages. Busy: a reply is being made. */
  show(ready, busy) {
    this.ready = ready;
    this.busy = busy;
    this.refresh();
  }

  refresh() {
    const stopFocused = document.activeElement === this.stop;
    this.send.disabled = !this.ready || !this.text.trim();
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

  // A text too large for the storage is too large for the server too.
  keepDraft(text, key = this.draftKey) {
    try {
      if (text) sessionStorage.setItem(key, text);
      else sessionStorage.removeItem(key);
    } catch {
      sessionStorage.removeItem(key);
    }
  }

  forgetDrafts() {
    for (const key of Object.keys(sessionStorage)) {
      if (key.startsWith(this.drafts)) sessionStorage.removeItem(key);
    }
  }
}
