import { getBranch } from './api.js';

const RETRY_SECONDS = 5;

/**
 * Loads the branch of one conversation whenever the server may have another one than the page shows.
 *
 * Its owner, the page, has `leaf`, the last id that it shows; `isSettled`, whether the server knows all that it shows;
 * `isStoredIn(branch)`, whether a branch has all that it shows; `show(branch)` and `failed(error)`.
 */
export class BranchLoader {
  constructor(id, owner) {
    Object.assign(this, { id, owner, outdated: false, incomplete: false, told: null, loading: false, closed: false });
    this.changes = 0; // counts what the page knows before the server tells it
  }

  /** Ends it: the page shows another conversation. */
  close() {
    this.closed = true;
    this.noteChange();
  }

  /** The page has changed what it shows: a branch that is on its way may be older. */
  noteChange() {
    this.changes += 1;
  }

  /** Loads the branch and shows it. While the page is not settled, that waits for the next call. */
  load() {
    this.outdated = Boolean(this.id);
    if (!this.loading) this.done = this.loadUntilCurrent();
    return this.done;
  }

  async loadUntilCurrent() {
    this.loading = true;
    while (this.outdated && !this.closed && this.owner.isSettled) {
      Object.assign(this, { outdated: false, incomplete: false, told: null });
      const { changes } = this;
      const branch = await getBranch(this.id).catch((error) => ({ error }));
      if (this.closed) return;
      if (branch.error) this.failed(branch.error);
      else if (changes !== this.changes) this.outdated = true;
      else if (this.owner.isStoredIn(branch)) this.show(branch);
      else this.incomplete = true; // until the reply has ended
    }
    this.loading = false;
  }

  show(branch) {
    this.owner.show({ ...branch, title: this.told?.title ?? branch.title });
    if (this.told) this.outdated ||= this.told.leaf !== this.owner.leaf;
  }

  // A network that is gone is seen by the connection, which makes the page load the branch when it is back.
  failed(error) {
    clearTimeout(this.retrying);
    if (error.status >= 500) this.retrying = setTimeout(() => this.closed || this.load(), RETRY_SECONDS * 1000);
    this.owner.failed(error);
  }

  /** The server says how the conversation is now, perhaps after a change elsewhere. */
  changed(told) {
    if (this.loading) this.told = told; // the branch that is on its way may be older
    // Whether the last reply runs or has ended, its own events say.
    else if (told.leaf !== this.owner.leaf) this.load();
  }
}
