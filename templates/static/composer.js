import { Pictures } from './pictures.js';

/** The field for a message, with a draft for each conversation, and the button that sends it or stops the reply. */
export class Composer {
  constructor(user, { onSend, onStop, onError }) {
    for (const id of ['composer', 'message', 'send', 'stop']) this[id] = document.getElementById(id);
    this.drafts = `parley.draft.${user}.`;
    this.draftKey = this.keyOf(null);
    this.pictures = new Pictures({ onChange: () => this.refresh(), onError });
    this.ready = false;
    this.busy = false;
    this.composer.addEventListener('submit', (event) => {
      event.preventDefault();
      onSend(this.text.trimEnd());
    });
    this.message.addEventListener('input', () => this.write(this.text));
    this.message.addEventListener('keydown', (event) => this.pressed(event));
    this.stop.addEventListener('click', onStop);
    // A tap does not move the focus, so that stopping a reply does not open the keyboard of a phone.
    this.stop.addEventListener('pointerdown', (event) => event.preventDefault());
  }

  get text() {
    return this.message.value;
  }

  /** Sets the text, and everything that depends on it. */
  write(text) {
    if (this.text !== text) this.message.value = text;
    this.keepDraft(text);
    this.message.style.height = 'auto';
    this.message.style.height = `${this.message.scrollHeight}px`;
    this.refresh();
  }

  /** Puts back what was not sent: into the draft, before anything that was written since. */
  giveBack(text, conversation, pictures = []) {
    const key = this.keyOf(conversation);
    this.pictures.giveBack(pictures, key);
    const isOpen = key === this.draftKey;
    const written = isOpen ? this.text : sessionStorage.getItem(key) ?? '';
    const draft = [text, written].filter((part) => part.trim()).join('\n\n');
    if (!isOpen) return this.keepDraft(draft, key);
    this.write(draft);
    this.focus();
  }

  /** Moves the draft for a conversation that is gone into that for another one. */
  move(conversation, other) {
    const key = this.keyOf(conversation);
    const draft = sessionStorage.getItem(key);
    sessionStorage.removeItem(key);
    if (draft) this.giveBack(draft, other);
  }

  focus() {
    this.message.focus();
  }

  get isFocused() {
    return document.activeElement === this.message;
  }

  /** Shows the draft for a conversation; null is a conversation that does not exist yet. */
  open(conversation) {
    this.draftKey = this.keyOf(conversation);
    this.pictures.open(this.draftKey);
    this.write(sessionStorage.getItem(this.draftKey) ?? '');
  }

  /** The new conversation has an id now, and so has the draft for it. */
  named(conversation) {
    sessionStorage.removeItem(this.draftKey);
    this.draftKey = this.keyOf(conversation);
    this.pictures.named(this.draftKey);
    this.keepDraft(this.text);
  }

  keyOf(conversation) {
    return this.drafts + (conversation ?? 'new');
  }

  /** `ready`: the server accepts messages. `busy`: a reply is running. */
  show(ready, busy) {
    this.ready = ready;
    this.busy = busy;
    this.refresh();
  }

  refresh() {
    const stopFocused = document.activeElement === this.stop;
    this.send.disabled = !this.ready || !(this.text.trim() || this.pictures.urls.length);
    this.send.hidden = this.busy;
    this.stop.hidden = !this.busy;
    if (stopFocused && this.stop.hidden) this.focus();
  }

  pressed(event) {
    // In Safari an input method has ended before its Enter arrives; only the key code 229 marks that Enter.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.composer.requestSubmit();
  }

  // A text that is too large for the storage is too large for the server as well.
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
