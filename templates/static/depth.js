import { pushParagraph } from './maths_rules.js';

const DEEPEST = 50; // levels of blocks; a list in a list is two

/** A plugin of markdown-it: what is nested deeper is text. markdown-it would drop it, and all that comes after it. */
export function limitDepth(parser) {
  parser.block.ruler.before('table', 'too_deep', deepText);
}

function deepText(state, startLine, endLine, silent) {
  if (state.level < DEEPEST || silent) return false;
  let line = startLine + 1;
  while (line < endLine && !state.isEmpty(line) && state.sCount[line] >= state.blkIndent) line += 1;
  state.line = line;
  return pushParagraph(state, state.getLines(startLine, line, state.blkIndent, false).trim(), [startLine, line]);
}
