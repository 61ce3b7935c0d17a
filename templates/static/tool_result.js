import { element } from './elements.js';
import { Fold } from './fold.js';
import { inLines, textOf } from './item.js';
import { Message } from './message.js';
import { say } from './words.js';

/** What a tool has returned; `name` is that of the tool, if the page knows it. */
export class ToolResult extends Message {
  constructor(item, name) {
    const label = name ? say('result_of', { name }) : say('result');
    const fold = new Fold('result', label);
    fold.body.append(element('div', 'block', inLines(textOf(item))));
    super('tool', label, fold.node, item);
    this.output = textOf(item);
  }

  get text() {
    return this.output;
  }
}
