import { element } from './elements.js';
import { say } from './words.js';

const FORMATTED_AT_ONCE = 8;

/** The messages, and the scroll position of the reader. */
export class Log {
  constructor() {
    for (const id of ['log', 'earlier', 'messages', 'jump']) this[id] = document.getElementById(id);
    this.list = [];
    this.pinned = true;
    this.top = 0; // where the reader was at the last scroll event, or `follow` has scrolled to
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
    this.log.addEventListener('fold', ({ detail }) => this.unfolded(detail));
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
    this.expectEarlier(null); // what is on its way belongs to what was here
  }

  find(id) {
    return this.list.find((message) => message.id === id);
  }

  /** Shows the nodes of a branch, which follow `skipped` others. Messages that show them already stay. */
  show(nodes, skipped, messages) {
    const unloaded = Math.max(0, nodes.findIndex((node) => node.id === this.first?.id));
    const shown = nodes.slice(unloaded);
    const start = this.list.findIndex((message) => message.id === shown[0]?.id);
    const kept = start < 0 ? 0 : this.keep(start, shown, messages);
    if (!kept) this.clear();
    const added = (kept ? shown.slice(kept) : nodes).map((node) => messages.of(node));
    this.append(...added);
    this.skip(kept ? skipped + unloaded - start : skipped);
    for (const message of added.slice(-FORMATTED_AT_ONCE)) this.meet(message);
  }

  /** Updates the messages that show some nodes, removes what follows them, and returns how many there are. */
  keep(start, nodes, messages) {
    let kept = 0;
    while (kept < nodes.length && this.list[start + kept]?.shows(nodes[kept])) {
      messages.update(this.list[start + kept], nodes[kept]);
      kept += 1;
    }
    if (this.list[start + kept]) this.cut(this.list[start + kept]);
    return kept;
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

  /** Loads a page of earlier messages. Returns the promise that is already waited for, if one is on its way. */
  loadEarlier() {
    if (!this.skipped) return null;
    if (!this.loading) {
      const loading = this.onEarlier().finally(() => loading === this.loading && this.expectEarlier(null));
      this.expectEarlier(loading);
    }
    return this.loading;
  }

  expectEarlier(loading) {
    this.loading = loading;
    this.earlier.disabled = Boolean(loading);
  }

  /** Loads earlier messages, unless one page of them fails: all of them, or until one has an id. */
  async loadAll(until = undefined) {
    for (let left = Infinity; this.skipped && this.skipped < left && !this.find(until);) {
      left = this.skipped;
      await this.loadEarlier();
    }
  }

  /** Formats all messages that are loaded, visible or not. */
  formatAll() {
    for (const message of this.list) this.meet(message);
  }

  /** Scrolls to a message and waits until it is drawn: until then, what is in it may have no place. */
  async reveal(id) {
    this.find(id)?.article.scrollIntoView({ block: 'nearest' });
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
  }

  /** Scrolls by so many pixels, by which something has moved that is to stay in its place. */
  hold(moved) {
    this.log.scrollTop += moved;
    this.measure();
  }

  /** What the reader looks at stays where it is, although the end changes. */
  unpin() {
    this.pinned = false;
  }

  /** Removes a message and all that follow it, and returns them. */
  cut(message) {
    const messages = this.list.splice(this.list.indexOf(message));
    for (const { article } of messages) article.remove();
    return messages;
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

  // An event that says where `follow` has scrolled to may come when the end has moved on already.
  scrolled() {
    const isFollowing = this.pinned && this.log.scrollTop >= this.top;
    this.top = this.log.scrollTop;
    if (!isFollowing) this.measure();
  }

  measure() {
    // Only as much slack as rounding needs: with more, slow scrolling up would be pulled back down.
    this.pinned = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight <= 2;
    this.jump.hidden = this.pinned;
  }

  // What the reader opens stays where it is: it is measured before `follow` would scroll to the end.
  unfolded(above = 0) {
    this.log.scrollTop += above;
    requestAnimationFrame(() => this.measure());
  }

  /** Keeps the end visible, unless the reader has scrolled up. */
  follow(always = false) {
    if (always) this.pinned = true;
    if (this.pinned) {
      this.log.scrollTop = this.log.scrollHeight;
      this.top = this.log.scrollTop;
    }
    this.jump.hidden = this.pinned;
  }
}
