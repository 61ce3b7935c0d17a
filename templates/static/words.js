const words = JSON.parse(document.getElementById('words').textContent);

/** The sentence of the page's language, with values in place of what stands in {braces}. */
export function say(key, values = {}) {
  return (words[key] ?? '').replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** An error of the server in the page's language, or in the server's words where the page has none. */
export function explain({ code, message }) {
  return words[`error_${code}`] ?? message;
}
