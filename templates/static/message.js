import { element } from './elements.js';

/** A message on the page. `id` is that of the server, and `parent` the id of the one before it, if the page knows them. */
export class Message {
  constructor(role, label, body, { id = null, parley } = {}) {
    Object.assign(this, { role, body, id, parent: parley?.parent ?? null });
    this.article = element('article', `message ${role}`);
    this.article.setAttribute('aria-label', label);
    this.article.append(body);
  }

  get status() {
    return this.article.dataset.status;
  }

  set status(status) {
    this.article.dataset.status = status;
  }

  note(text) {
    if (!this.noteLine && !text) return;
    this.noteLine ??= this.body.insertAdjacentElement('afterend', element('p', 'note'));
    this.noteLine.textContent = text;
    this.noteLine.hidden = !text;
  }

  /** Called when the message becomes visible for the first time. */
  seen() {}
}
