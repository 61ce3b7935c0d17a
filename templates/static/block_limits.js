import { lineOf, pushParagraph } from './block_state.js';

const DEEPEST = 50; // levels of blocks; a list in a list is two
const MOST_ADDED = 1000; // cells that a table has and its text has not: a browser needs 0.2 ms for each

/** A plugin of markdown-it: what would take the browser seconds is shown as text. */
export function limitBlocks(parser) {
  parser.block.ruler.before('table', 'too_deep', deepText);
  parser.block.ruler.before('table', 'too_empty', emptyTable);
}

// markdown-it would drop what is nested deeper, and all that comes after it.
function deepText(state, startLine, endLine, silent) {
  if (state.level < DEEPEST || silent) return false;
  return pushText(state, startLine, endParagraph(state, startLine, endLine));
}

// markdown-it gives each row as many cells as the first one has.
function emptyTable(state, startLine, endLine, silent) {
  if (silent || startLine + 1 >= endLine) return false;
  const delimiters = lineOf(state, startLine + 1);
  if (!/^[-:|\s]+$/.test(delimiters)) return false;
  const line = endParagraph(state, startLine, endLine);
  const added = countPipes(delimiters) * (line - startLine) - countPipes(textOfLines(state, startLine, line));
  return added > MOST_ADDED && pushText(state, startLine, line);
}

const countPipes = (text) => text.split('|').length - 1;

/** The line after a paragraph, or a table. */
function endParagraph(state, startLine, endLine) {
  let line = startLine + 1;
  while (line < endLine && !state.isEmpty(line) && state.sCount[line] >= state.blkIndent) line += 1;
  return line;
}

function pushText(state, startLine, line) {
  state.line = line;
  return pushParagraph(state, textOfLines(state, startLine, line).trim(), [startLine, line]);
}

function textOfLines(state, startLine, line) {
  return state.getLines(startLine, line, state.blkIndent, false);
}
