import { button, element } from './elements.js';
import { say } from './words.js';

/** One conversation in the list. */
export class Entry {
  constructor(conversation, { onOpen, onManage, onRename }) {
    this.id = conversation.id;
    this.onRename = onRename;
    this.item = element('li', 'entry');
    this.link = element('a', 'button');
    this.link.href = `#${this.id}`;
    this.link.dir = 'auto';
    this.link.addEventListener('click', onOpen);
    this.manage = button('manage', () => onManage(this));
    this.manage.setAttribute('aria-haspopup', 'dialog');
    this.item.append(this.link, this.manage);
    this.update(conversation);
  }

  update({ title, updated_at, response_id }) {
    Object.assign(this, { title, updated_at, response_id });
    this.markRunning(Boolean(response_id));
    this.link.textContent = title;
    this.link.title = title;
    this.manage.setAttribute('aria-label', say('manage', { title }));
    this.manage.title = '';
  }

  /** Whether it comes before another one in the list. */
  isNewer({ id, updated_at: moment }) {
    return this.updated_at > moment || (this.updated_at === moment && this.id > id);
  }

  markRunning(running) {
    if (!running) return this.mark?.remove();
    this.mark ??= element('span', 'running');
    Object.assign(this.mark, { role: 'img', ariaLabel: say('running'), title: say('running') });
    this.link.after(this.mark);
  }

  markCurrent(current) {
    if (current) this.link.setAttribute('aria-current', 'page');
    else this.link.removeAttribute('aria-current');
  }

  rename() {
    this.input = element('input', 'new-title');
    Object.assign(this.input, { value: this.title, maxLength: 256, ariaLabel: say('new_title'), autocomplete: 'off', dir: 'auto' });
    this.input.addEventListener('keydown', (event) => this.pressed(event));
    this.input.addEventListener('blur', () => this.endRename(true));
    this.item.prepend(this.input);
    this.item.classList.add('renaming');
    this.input.focus();
    this.input.select();
  }

  pressed(event) {
    if (event.isComposing || event.keyCode === 229 || !['Enter', 'Escape'].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    this.endRename(event.key === 'Enter');
    this.link.focus();
  }

  endRename(save) {
    if (!this.input) return;
    const { input } = this;
    this.input = null; // removing the input fires blur once more
    input.remove();
    this.item.classList.remove('renaming');
    const title = input.value.trim();
    if (save && title && title !== this.title) this.onRename(this, title);
  }
}
