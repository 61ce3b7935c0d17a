import { exportAddress } from './api.js';
import { isolated, say } from './words.js';

/** The menu of a conversation in the list. */
export class EntryMenu {
  constructor({ onRename, onPrint, onDelete }) {
    this.menu = document.getElementById('entry-menu');
    this.deletion = document.getElementById('deletion');
    const act = (id, action) => document.getElementById(id).addEventListener('click', () => {
      this.menu.hidePopover();
      action?.(this.entry);
    });
    act('rename', onRename);
    act('print', onPrint);
    act('delete', () => this.ask());
    act('export-markdown');
    act('export-json');
    this.deletion.addEventListener('close', () => this.deletion.returnValue === 'delete' && onDelete(this.entry));
  }

  open(entry) {
    this.entry = entry;
    for (const format of ['markdown', 'json']) {
      document.getElementById(`export-${format}`).href = exportAddress(entry.id, format);
    }
    this.menu.showPopover();
    this.place(entry.manage.getBoundingClientRect());
    this.menu.querySelector('button').focus();
  }

  // Below the button, or above it when there is no room.
  place({ left, top, bottom }) {
    const { offsetHeight, offsetWidth } = this.menu;
    const below = bottom + offsetHeight < innerHeight;
    this.menu.style.top = `${below ? bottom : Math.max(0, top - offsetHeight)}px`;
    this.menu.style.left = `${Math.min(left, innerWidth - offsetWidth - 8)}px`;
  }

  ask() {
    document.getElementById('deletion-warning').textContent = say('delete_warning', { title: isolated(this.entry.title) });
    this.deletion.returnValue = '';
    this.deletion.showModal();
  }
}
