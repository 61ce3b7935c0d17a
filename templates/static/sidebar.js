import { changeConversation, deleteConversation, listConversations } from './api.js';
import { Entry } from './entry.js';
import { EntryMenu } from './entry_menu.js';
import { explain, say } from './words.js';

const PAGE = 50;
const TYPING_SECONDS = 0.2;

/** The list of conversations, the newest first. It loads more as the user scrolls, and shows only what a search finds. */
export class Sidebar {
  constructor(callbacks) {
    // onCurrent, onOpen, onPrint, onLoaded, onDeleted, onError
    Object.assign(this, callbacks, { shown: [], hasMore: false, asked: 0, deleting: new Set() });
    for (const id of ['entries', 'entries-note', 'search']) this[id] = document.getElementById(id);
    this.menu = new EntryMenu({
      onRename: (entry) => entry.rename(),
      onPrint: (entry) => this.onPrint(entry),
      onDelete: (entry) => this.delete(entry),
    });
    this.search.addEventListener('input', () => this.typed());
    document.addEventListener('visibilitychange', () => document.hidden || this.refresh());
    const options = { root: this.entries.parentElement, rootMargin: '50%' };
    this.end = new IntersectionObserver(([end]) => end.isIntersecting && this.loadMore(), options);
    this.end.observe(document.getElementById('more'));
  }

  has(id) {
    return this.shown.some((entry) => entry.id === id);
  }

  select(id) {
    this.current = id;
    this.mark();
  }

  typed() {
    clearTimeout(this.typing);
    this.typing = setTimeout(() => {
      this.anew = true;
      this.refresh();
    }, TYPING_SECONDS * 1000);
  }

  /** Loads the newest again; older ones that are loaded stay, unless the search has changed. */
  async refresh() {
    const page = await this.load({});
    if (!page) return;
    const oldest = page.data.at(-1);
    const isListed = ({ id }) => page.data.some((listed) => listed.id === id);
    const isOlder = (entry) => entry.updated_at <= oldest?.updated_at && !isListed(entry);
    const older = this.anew || !page.has_more ? [] : this.shown.filter(isOlder);
    this.anew = false;
    if (!older.length) this.hasMore = page.has_more;
    this.show([...page.data.map((conversation) => this.entry(conversation)), ...older]);
    this.onLoaded(page.data);
  }

  async loadMore() {
    if (!this.hasMore || this.loading) return;
    const page = await this.load({ after: this.shown.at(-1).id });
    if (!page) return;
    this.hasMore = page.has_more;
    const fresh = page.data.filter(({ id }) => !this.has(id));
    this.show([...this.shown, ...fresh.map((conversation) => this.entry(conversation))]);
  }

  /** A page of the list; null if it could not be loaded, or is no longer needed. */
  async load(parameters) {
    const asked = ++this.asked;
    const query = this.search.value.trim();
    this.loading = true;
    try {
      const page = await listConversations({ limit: PAGE, ...parameters, ...(query && { query }) });
      return asked === this.asked ? page : null;
    } catch {
      if (asked === this.asked && !this.shown.length) this['entries-note'].textContent = say('list_failed');
      return null;
    } finally {
      if (asked === this.asked) this.loading = false;
    }
  }

  /** The server says how a conversation is now. A list that is on its way may not know it. */
  update(conversation) {
    if (this.search.value.trim()) return this.typed();
    if (this.loading) return this.refresh();
    const entry = this.entry(conversation);
    const others = this.shown.filter((other) => other !== entry);
    const older = others.findIndex((other) => entry.isNewer(other));
    if (older >= 0) others.splice(older, 0, entry);
    else if (!this.hasMore) others.push(entry);
    this.show(others);
  }

  /** Removes a conversation that was deleted elsewhere. Returns false for one that is being deleted here. */
  remove(id) {
    if (this.deleting.has(id)) return false;
    const entry = this.shown.find((shown) => shown.id === id);
    if (entry) this.drop(entry);
    if (this.loading) this.refresh();
    return true;
  }

  /** Takes an entry off the list; a focus in it goes to its neighbour. */
  drop(entry, focused = entry.item.contains(document.activeElement)) {
    const next = this.shown[this.shown.indexOf(entry) + 1] ?? this.shown.at(-2);
    this.show(this.shown.filter((shown) => shown !== entry));
    if (focused) (next?.link ?? this.search).focus();
  }

  entry(conversation) {
    const known = this.shown.find((entry) => entry.id === conversation.id);
    known?.update(conversation);
    return known ?? new Entry(conversation, {
      onOpen: this.onOpen,
      onManage: (entry) => this.menu.open(entry),
      onRename: (entry, title) => this.rename(entry, title),
    });
  }

  // Nodes that are in the right place are not moved, so they keep the focus.
  show(entries) {
    for (const entry of this.shown) if (!entries.includes(entry)) entry.item.remove();
    entries.forEach(({ item }, index) => {
      const there = this.entries.children[index] ?? null;
      if (there === item) return;
      if (item.isConnected && this.entries.moveBefore) this.entries.moveBefore(item, there); // it keeps the focus
      else this.entries.insertBefore(item, there);
    });
    this.shown = entries;
    const note = this.search.value.trim() ? 'nothing_found' : 'no_conversations';
    this['entries-note'].textContent = entries.length ? '' : say(note);
    this.mark();
    // A new observation reports again whether the end is visible.
    this.end.disconnect();
    this.end.observe(document.getElementById('more'));
  }

  mark() {
    for (const entry of this.shown) {
      entry.markCurrent(entry.id === this.current);
      if (entry.id === this.current) this.onCurrent(entry.title);
    }
  }

  async rename(entry, title) {
    const before = entry.title;
    entry.update({ ...entry, title });
    this.mark();
    try {
      await changeConversation(entry.id, { title });
    } catch (error) {
      entry.update({ ...entry, title: before });
      this.mark();
      this.onError(explain(error));
    }
    this.refresh(); // a list that is on its way still has the old title
  }

  async delete(entry) {
    this.deleting.add(entry.id);
    try {
      await deleteConversation(entry.id);
    } catch (error) {
      if (error.status !== 404) return this.onError(explain(error));
    } finally {
      this.deleting.delete(entry.id);
    }
    this.drop(entry, true);
    this.onDeleted(entry.id);
    this.refresh(); // a list that is on its way still has the entry
  }
}
