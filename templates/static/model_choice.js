const LAST = 'parley.model';

/** Which model answers in each conversation, if there are several; null is a conversation that does not exist yet. */
export class ModelChoice {
  constructor(onChange) {
    this.name = document.getElementById('model-name');
    this.select = document.getElementById('model');
    this.models = [];
    this.chosen = new Map();
    this.conversation = null;
    this.onChange = onChange;
    this.select.addEventListener('change', () => this.choose(this.select.value));
  }

  /** Offers the models of the server. */
  offer(models) {
    this.models = models;
    this.select.replaceChildren(...models.map(({ model }) => new Option(model, model)));
    this.select.hidden = models.length < 2;
    this.name.hidden = !this.select.hidden;
    this.show();
  }

  /** The model of the open conversation: the one that was chosen there, or last elsewhere, or the server's first. */
  get current() {
    const wanted = [this.chosen.get(this.conversation), localStorage.getItem(LAST)];
    const found = wanted.map((name) => this.models.find(({ model }) => model === name));
    return found.find(Boolean) ?? this.models[0];
  }

  /** The choice as a parameter of a request. */
  get request() {
    return this.select.hidden ? {} : { model: this.current.model };
  }

  open(conversation) {
    this.conversation = conversation;
    if (conversation === null) this.chosen.delete(null);
    this.show();
  }

  /** Takes over the model of the last reply of a conversation, unless another one was chosen here since. */
  learn(conversation, model) {
    if (!this.chosen.has(conversation)) this.chosen.set(conversation, model);
    this.show();
  }

  /** The new conversation has an id now. */
  named(conversation) {
    this.chosen.set(conversation, this.chosen.get(this.conversation));
    this.open(conversation);
  }

  choose(model) {
    this.chosen.set(this.conversation, model);
    localStorage.setItem(LAST, model);
    this.show();
  }

  show() {
    if (!this.models.length) return;
    const { model } = this.current;
    this.select.value = model;
    this.select.title = model;
    this.name.textContent = model;
    this.onChange(this.current);
  }
}
