import { element } from './elements.js';
import { renderText } from './markdown.js';
import { typeset } from './maths.js';
import { patchChildren, patchText } from './patch.js';

const LENGTH = 10_000; // what comes after it stays plain: some markup takes a time that grows with the square of it

/** The text in a block. It is rendered again when it, or a definition that it asks for, has changed. */
export class BlockText {
  constructor(node, context) {
    Object.assign(this, { node, context, content: null, rest: '', open: false, asked: [] });
  }

  update(token) {
    const content = token.content.slice(0, LENGTH);
    const rest = token.content.slice(LENGTH);
    const open = token === this.context.openToken && !rest;
    const isSame = content === this.content && open === this.open && Boolean(rest) === Boolean(this.rest);
    Object.assign(this, { content, rest, open });
    if (!isSame) return this.render();
    this.refresh();
    if (rest) patchText(this.node.lastChild.firstChild, rest);
  }

  refresh() {
    const { definitions } = this.context;
    if (this.asked.some(({ kind, label, answer }) => definitions.key(kind, label) !== answer)) this.render();
  }

  render() {
    const { definitions } = this.context;
    const template = document.createElement('template');
    this.asked = [];
    template.innerHTML = renderText(this.content, definitions, this.open, this.asked);
    if (this.rest) template.content.append(element('span', 'plain', this.rest));
    patchChildren(this.node, template.content);
    typeset(this.node);
  }
}
