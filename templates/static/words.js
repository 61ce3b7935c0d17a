const words = JSON.parse(document.getElementById('words').textContent);

/** A sentence in the language of the page, with values for the names in {braces}. */
export function say(key, values = {}) {
  return (words[key] ?? '').replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** A text whose direction is its own, for a place in a sentence. */
export function isolated(text) {
  return `\u2068${text}\u2069`;
}

/** An error of the server in the language of the page, or in the words of the server if the page has none. */
export function explain({ code, message }) {
  return words[`error_${code}`] ?? message;
}
