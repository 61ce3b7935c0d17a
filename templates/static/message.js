import { element } from './elements.js';
import { textOf } from './item.js';
import { Versions } from './versions.js';

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

  get text() {
    return this.body.textContent;
  }

  /** Takes away the text that the user is writing here and has not sent. */
  takeUnsent() {
    return '';
  }

  /** Whether this message shows a node of the server, or a part of it while it grows. */
  shows(node) {
    return this.id === node.id && this.text === textOf(node);
  }

  /** Takes over what the server knows more of the node that it shows. */
  update({ parley }, onVersion) {
    this.parent = parley.parent;
    if (parley.versions.count < 2) return this.versions?.node.remove();
    this.versions ??= new Versions((direction) => onVersion(this.versions, direction));
    if (!this.versions.node.isConnected) this.placeVersions(this.versions.node);
    this.versions.show(parley.versions);
  }

  placeVersions(node) {
    this.article.append(node);
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
