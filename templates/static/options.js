import { say } from './words.js';

const NUMBERS = ['temperature', 'top_p', 'max_output_tokens', 'seed'];
const STOPS = 8;
const STOP_LENGTH = 256;

/** How replies are made, for each conversation; null is one that is yet to be made. */
export class Options {
  constructor() {
    this.dialog = document.getElementById('options');
    this.opener = document.getElementById('open-options');
    this.form = this.dialog.querySelector('form');
    this.fields = this.form.elements;
    this.values = new Map();
    this.defaults = {};
    this.opener.addEventListener('click', () => this.edit());
    this.form.addEventListener('submit', (event) => this.submitted(event));
    this.form.addEventListener('input', ({ target }) => target.setCustomValidity(this.complaint(target)));
    document.getElementById('close-options').addEventListener('click', () => this.dialog.close());
    document.getElementById('reset-options').addEventListener('click', () => this.fill({}));
  }

  get current() {
    return this.values.get(this.conversation) ?? {};
  }

  open(conversation) {
    this.conversation = conversation;
    if (conversation === null) this.values.delete(null);
    this.mark();
  }

  /** The options of a conversation's last reply, unless they were changed here since. */
  learn(conversation, options) {
    if (!this.values.has(conversation)) this.values.set(conversation, options);
    this.mark();
  }

  /** The new conversation has an id now. */
  named(conversation) {
    this.values.set(conversation, this.current);
    this.open(conversation);
  }

  /** What the server does where a field is empty. */
  showDefaults(defaults) {
    for (const name of NUMBERS) this.fields[name].placeholder = defaults[name] ?? '';
    this.fields.max_output_tokens.placeholder ||= say('what_fits');
    this.fields.seed.placeholder ||= say('by_chance');
    this.fields.instructions.placeholder = defaults.instructions ?? say('none');
    this.fields.stop.placeholder = defaults.stop?.join('\n') || say('none');
  }

  edit() {
    this.fill(this.current);
    this.dialog.showModal();
  }

  /** Shows what the server says about an option. */
  complain(name, message) {
    const field = this.fields[name];
    if (!field) return;
    this.edit();
    field.setCustomValidity(message);
    field.reportValidity();
  }

  fill(options) {
    for (const name of ['instructions', ...NUMBERS]) this.fields[name].value = options[name] ?? '';
    this.fields.stop.value = [options.stop ?? []].flat().join('\n');
    for (const field of this.fields) field.setCustomValidity('');
  }

  submitted(event) {
    event.preventDefault();
    this.values.set(this.conversation, this.entered());
    this.mark();
    this.dialog.close();
  }

  // An option without a field here, which another client asked for, stays.
  entered() {
    const options = { ...this.current };
    for (const name of ['instructions', 'stop', ...NUMBERS]) delete options[name];
    for (const name of NUMBERS) {
      if (this.fields[name].value !== '') options[name] = this.fields[name].valueAsNumber;
    }
    if (this.fields.instructions.value.trim()) options.instructions = this.fields.instructions.value;
    if (this.stops().length) options.stop = this.stops();
    return options;
  }

  stops() {
    return this.fields.stop.value.split('\n').filter(Boolean);
  }

  /** What is wrong with a field that browsers cannot check by themselves. */
  complaint(field) {
    if (field !== this.fields.stop) return '';
    const stops = this.stops();
    const good = stops.length <= STOPS && stops.every((text) => text.length <= STOP_LENGTH);
    return good ? '' : say('stop_strings_wrong');
  }

  mark() {
    const changed = Object.keys(this.current).length > 0;
    this.opener.classList.toggle('changed', changed);
    this.opener.title = say(changed ? 'options_changed' : 'options');
    this.opener.setAttribute('aria-label', this.opener.title);
  }
}
