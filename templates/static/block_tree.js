const TASK = /^\[([ xX])\]\s+/;

/** The blocks of a text as trees: a token, and the branches in it. */
export function treesOf(tokens) {
  const root = { branches: [] };
  const stack = [root];
  for (const token of tokens) {
    if (token.nesting < 0) {
      const { token: { tag }, branches } = stack.pop();
      if (tag === 'li') markTask(stack.at(-1).branches.at(-1).token, branches);
    } else if (token.type !== 'reference_definition') {
      const branch = { token, branches: [] };
      stack.at(-1).branches.push(branch);
      if (token.nesting > 0) stack.push(branch);
    }
  }
  return root.branches;
}

// An item that begins with `[x] ` is a task.
function markTask(item, [first]) {
  const text = first?.token.type === 'paragraph_open' ? first.branches[0].token : null;
  const [marker, mark] = TASK.exec(text?.content ?? '') ?? [];
  if (!marker) return;
  text.content = text.content.slice(marker.length);
  item.meta = { task: mark === ' ' ? 'open' : 'done' };
}

/** The token of the text that goes on, if the text goes on. */
export function openTextOf(text, tokens) {
  if (/\n[ \t]*\n[ \t]*$/.test(text.slice(-300))) return null;
  const last = tokens.findLast(({ nesting }) => nesting >= 0);
  return last?.type === 'inline' ? last : null;
}
