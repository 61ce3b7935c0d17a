/** The text of an item of the API: of a message or reasoning, the arguments of a call, or the output of a tool. */
export function textOf({ content, arguments: text, output }) {
  return content?.map((part) => part.text).join('') ?? text ?? output ?? '';
}

/** The URLs of the pictures in a message. */
export function picturesOf({ content }) {
  return content.filter(({ type }) => type === 'input_image').map((part) => part.image_url);
}

/** JSON in lines, with its numbers as they were written; a text that is no JSON stays as it is. */
export function inLines(text) {
  const asWritten = (_, value, context) => {
    return typeof value === 'number' && context?.source ? JSON.rawJSON?.(context.source) ?? value : value;
  };
  try {
    return JSON.stringify(JSON.parse(text, asWritten), null, 2);
  } catch {
    return text;
  }
}
