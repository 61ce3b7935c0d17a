import { ModelChoice } from './model_choice.js';
import { say } from './words.js';

const NUMBERS = ['temperature', 'top_p', 'max_output_tokens', 'seed'];
const STOPS = 8;
const STOP_LENGTH = 256;

/** The options of each conversation; null is a conversation that does not exist yet. */
export class Options {
  constructor({ onModel }) {
    this.dialog = document.getElementById('options');
    this.opener = document.getElementById('open-options');
    this.form = this.dialog.querySelector('form');
    this.fields = this.form.elements;
    this.values = new Map();
    this.model = new ModelChoice((model) => {
      this.showDefaults(model.options);
      onModel(model);
    });
    this.opener.addEventListener('click', () => this.edit());
    this.form.addEventListener('submit', (event) => this.submitted(event));
    this.form.addEventListener('input', ({ target }) => target.setCustomValidity(this.complaint(target)));
    document.getElementById('close-options').addEventListener('click', () => this.dialog.close());
    document.getElementById('reset-options').addEventListener('click', () => this.fill({}));
  }

  get current() {
    return this.values.get(this.conversation) ?? {};
  }

  /** The current options, and the model, as parameters of a request. */
  get request() {
    const { reasoning_effort: effort, ...options } = this.current;
    return { ...this.model.request, ...options, ...(effort && { reasoning: { effort } }) };
  }

  open(conversation) {
    this.conversation = conversation;
    if (conversation === null) this.values.delete(null);
    this.model.open(conversation);
    this.mark();
  }

  /** Takes over the options of the last reply of a conversation, unless they were changed here since. */
  learn(conversation, response) {
    if (!this.values.has(conversation)) this.values.set(conversation, response?.parley.options ?? {});
    if (response) this.model.learn(conversation, response.model);
    this.mark();
  }

  /** The new conversation has an id now. */
  named(conversation) {
    this.values.set(conversation, this.current);
    this.model.named(conversation);
    this.open(conversation);
  }

  /** Shows in empty fields what the server uses. */
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

  /** Shows an error of the server at the field of the option. */
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

  // An option that another client has set and that has no field here is kept.
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

  /** The error of a field that browsers cannot check themselves. */
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
