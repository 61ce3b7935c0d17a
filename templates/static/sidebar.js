import { deleteConversation, listConversations, renameConversation } from './api.js';
import { Entry } from './entry.js';
import { EntryMenu } from './entry_menu.js';
import { explain, say } from './words.js';

const PAGE = 50;
const TYPING_SECONDS = 0.2;

/** The list of conversations, the newest first. It loads more as the user scrolls, and shows only what a search finds. */
export class Sidebar {
  constructor({ onCurrent, onOpen, onDeleted, onError }) {
    Object.assign(this, { onCurrent, onOpen, onDeleted, onError, shown: [], hasMore: false, asked: 0 });
    for (const id of ['entries', 'entries-note', 'search']) this[id] = document.getElementById(id);
    this.menu = new EntryMenu({ onRename: (entry) => entry.rename(), onDelete: (entry) => this.delete(entry) });
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
    this.typing = setTimeout(() => this.refresh(true), TYPING_SECONDS * 1000);
  }

  /** Loads the newest again; older ones that are loaded stay, unless the search has changed. */
  async refresh(anew = false) {
    const page = await this.load({});
    if (!page) return;
    const oldest = page.data.at(-1);
    const isListed = ({ id }) => page.data.some((listed) => listed.id === id);
    const isOlder = (entry) => entry.updated_at <= oldest?.updated_at && !isListed(entry);
    const older = anew || !page.has_more ? [] : this.shown.filter(isOlder);
    if (!older.length) this.hasMore = page.has_more;
    this.show([...page.data.map((conversation) => this.entry(conversation)), ...older]);
  }

  async loadMore() {
    if (!this.hasMore || this.loading) return;
    this.loading = true;
    const page = await this.load({ after: this.shown.at(-1).id });
    this.loading = false;
    if (!page) return;
    this.hasMore = page.has_more;
    const fresh = page.data.filter(({ id }) => !this.has(id));
    this.show([...this.shown, ...fresh.map((conversation) => this.entry(conversation))]);
  }

  /** A page of the list; null if it could not be loaded, or is no longer needed. */
  async load(parameters) {
    const asked = ++this.asked;
    const query = this.search.value.trim();
    try {
      const page = await listConversations({ limit: PAGE, ...parameters, ...(query && { query }) });
      return asked === this.asked ? page : null;
    } catch {
      if (asked === this.asked && !this.shown.length) this['entries-note'].textContent = say('list_failed');
      return null;
    }
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
      const there = this.entries.children[index];
      if (there !== item) this.entries.insertBefore(item, there ?? null);
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
      await renameConversation(entry.id, title);
    } catch (error) {
      entry.update({ ...entry, title: before });
      this.mark();
      this.onError(explain(error));
    }
    this.refresh(); // a list that is on its way still has the old title
  }

  async delete(entry) {
    try {
      await deleteConversation(entry.id);
    } catch (error) {
      if (error.status !== 404) return this.onError(explain(error));
    }
    const next = this.shown[this.shown.indexOf(entry) + 1] ?? this.shown.at(-2);
    this.show(this.shown.filter((shown) => shown !== entry));
    (next?.link ?? this.search).focus();
    this.onDeleted(entry.id);
    this.refresh(); // a list that is on its way still has the entry
  }
}
