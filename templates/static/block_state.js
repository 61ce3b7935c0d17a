// What rules for blocks share: they read the lines of markdown-it's state, and add tokens to it.

/** A line without its indent. */
export function lineOf(state, line) {
  return state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
}

/** A paragraph of some lines, for rules that find none of their markup in them. */
export function pushParagraph(state, content, map) {
  state.push('paragraph_open', 'p', 1).map = map;
  const token = state.push('inline', '', 0);
  Object.assign(token, { content, map, children: [] });
  state.push('paragraph_close', 'p', -1);
  return true;
}
