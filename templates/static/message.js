import { element } from './elements.js';

/** A message on the page; `id` is that of the server, if the page knows it. */
export class Message {
  constructor(role, label, text, id = null) {
    Object.assign(this, { role, text, id });
    this.article = element('article', `message ${role}`);
    this.article.setAttribute('aria-label', label);
    this.content = this.article.appendChild(element('div', 'content', text));
  }

  get status() {
    return this.article.dataset.status;
  }

  set status(status) {
    this.article.dataset.status = status;
  }

  note(text) {
    if (!this.noteLine && !text) return;
    this.noteLine ??= this.content.insertAdjacentElement('afterend', element('p', 'note'));
    this.noteLine.textContent = text;
    this.noteLine.hidden = !text;
  }

  /** Called when the message becomes visible for the first time. */
  seen() {}
}
