import { button, element, fromTemplate } from './elements.js';
import { Message } from './message.js';
import { pictureOf } from './pictures.js';
import { say } from './words.js';

/** A message of the user. It can be edited, and asked again by `onAsk`. */
export class Question extends Message {
  constructor(text, pictures, onAsk, node) {
    super('user', say('you'), element('div', 'content', text), node);
    this.body.prepend(...pictures.map(pictureOf));
    Object.assign(this, { pictures, onAsk });
  }

  /** The message as the input of a request. */
  get input() {
    if (!this.pictures.length) return this.text;
    const content = this.pictures.map((url) => ({ type: 'input_image', image_url: url }));
    if (this.text) content.push({ type: 'input_text', text: this.text });
    return [{ role: 'user', content }];
  }

  takeUnsent() {
    if (!this.editor) return '';
    const { value } = this.editor.querySelector('textarea');
    this.closeEditor();
    return value === this.text ? '' : value;
  }

  seen() {
    this.editButton ??= this.article.appendChild(button('edit', () => this.edit()));
  }

  edit(text = this.text) {
    this.editor?.remove();
    this.editor = fromTemplate('editor');
    const area = this.editor.querySelector('textarea');
    this.editor.addEventListener('submit', (event) => {
      event.preventDefault();
      this.save(area.value.trimEnd());
    });
    // Not on the form: there, Enter on the button that cancels would send the text.
    area.addEventListener('keydown', (event) => this.pressedInText(event));
    this.editor.addEventListener('keydown', (event) => this.pressed(event));
    this.editor.querySelector('.cancel').addEventListener('click', () => this.endEdit());
    this.status = 'editing';
    this.article.append(this.editor);
    area.value = text;
    area.focus();
  }

  save(text) {
    if ((text.trim() || this.pictures.length) && this.onAsk(this, text)) this.endEdit();
  }

  endEdit() {
    this.closeEditor();
    this.editButton?.focus();
  }

  closeEditor() {
    delete this.article.dataset.status;
    this.editor.remove();
    this.editor = null;
  }

  pressedInText(event) {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.editor.requestSubmit();
  }

  pressed(event) {
    if (event.key !== 'Escape' || event.isComposing) return;
    event.stopPropagation();
    this.endEdit();
  }
}
