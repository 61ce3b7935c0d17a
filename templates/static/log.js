import { element } from './elements.js';
import { say } from './words.js';

const FORMATTED_AT_ONCE = 8;

/** The messages, and the scroll position of the reader. */
export class Log {
  constructor() {
    for (const id of ['log', 'earlier', 'messages', 'jump']) this[id] = document.getElementById(id);
    this.list = [];
    this.pinned = true;
    this.skipped = 0; // how many earlier messages are not loaded
    this.onEarlier = async () => {};
    this.owners = new WeakMap();
    this.divider = element('p', 'divider', say('left_out'));
    this.watcher = new IntersectionObserver((entries) => this.seen(entries), { root: this.log, rootMargin: '100%' });
    const resized = new ResizeObserver(() => this.follow());
    resized.observe(this.log);
    resized.observe(this.messages);
    const nearing = new IntersectionObserver((entries) => this.nearsEarlier(entries), { root: this.log });
    nearing.observe(this.earlier);
    this.earlier.addEventListener('click', () => this.loadEarlier());
    this.jump.addEventListener('click', () => this.follow(true));
    this.log.addEventListener('scroll', () => this.scrolled());
    this.log.addEventListener('click', ({ target }) => target.closest('summary') && this.unfolded());
  }

  get first() {
    return this.list[0];
  }

  get last() {
    return this.list.at(-1);
  }

  clear() {
    this.watcher.disconnect();
    this.list = [];
    this.messages.replaceChildren();
    this.skip(0);
  }

  show(messages, skipped) {
    this.clear();
    this.append(...messages);
    this.skip(skipped);
    for (const message of messages.slice(-FORMATTED_AT_ONCE)) this.meet(message);
  }

  append(...messages) {
    this.list.push(...messages);
    this.messages.append(...messages.map((message) => message.article));
    for (const message of messages) {
      this.owners.set(message.article, message);
      this.watcher.observe(message.article);
    }
  }

  /** Adds earlier messages; what the reader sees stays where it is. */
  prepend(messages, skipped) {
    const below = this.log.scrollHeight - this.log.scrollTop;
    this.list.unshift(...messages);
    this.messages.prepend(...messages.map((message) => message.article));
    for (const message of messages) {
      this.owners.set(message.article, message);
      this.watcher.observe(message.article);
    }
    this.skip(skipped);
    this.divide(this.leftOut);
    this.log.scrollTop = this.log.scrollHeight - below;
  }

  skip(count) {
    this.skipped = count;
    this.earlier.hidden = !count;
  }

  nearsEarlier(entries) {
    if (entries.at(-1).isIntersecting && !this.pinned) this.loadEarlier();
  }

  async loadEarlier() {
    if (this.earlier.disabled || !this.skipped) return;
    this.earlier.disabled = true;
    await this.onEarlier();
    this.earlier.disabled = false;
  }

  /** Removes a message and all that follow it, and returns them. */
  cut(message) {
    const messages = this.list.splice(this.list.indexOf(message));
    for (const { article } of messages) article.remove();
    return messages;
  }

  before(message) {
    return this.list[this.list.indexOf(message) - 1];
  }

  /** Draws a line after the oldest `count` messages, without system prompts: the model no longer sees those. */
  divide(count) {
    this.leftOut = count;
    const said = this.list.filter((message) => message.role !== 'system');
    if (count && count >= this.skipped) said[count - this.skipped]?.article.before(this.divider);
    else this.divider.remove();
  }

  mark({ loading, busy }) {
    this.log.ariaBusy = loading;
    this.messages.classList.toggle('busy', busy);
  }

  seen(entries) {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) this.meet(this.owners.get(target));
    }
  }

  meet(message) {
    this.watcher.unobserve(message.article);
    message.seen();
  }

  scrolled() {
    // Only as much slack as rounding needs: with more, slow scrolling up would be pulled back down.
    this.pinned = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight <= 2;
    this.jump.hidden = this.pinned;
  }

  // What the reader opens stays where it is: it is measured before `follow` would scroll to the end.
  unfolded() {
    requestAnimationFrame(() => this.scrolled());
  }

  /** Keeps the end visible, unless the reader has scrolled up. */
  follow(always = false) {
    if (always) this.pinned = true;
    if (this.pinned) this.log.scrollTop = this.log.scrollHeight;
    this.jump.hidden = this.pinned;
  }
}
