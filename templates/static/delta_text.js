/** A text that comes in deltas. */
export class DeltaText {
  constructor() {
    Object.assign(this, { text: '', known: 0 });
  }

  /** Takes the beginning of a text, as the server has stored it; its deltas come again. */
  begin(text) {
    this.text = text;
    this.known = text.length;
  }

  /** Adds a delta, and returns what of it is new. */
  grow(delta) {
    const fresh = delta.slice(this.known);
    this.known -= delta.length - fresh.length;
    this.text += fresh;
    return fresh;
  }

  end(text) {
    Object.assign(this, { text, known: text.length });
  }
}
