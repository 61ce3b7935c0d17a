import { BlockText } from './block_text.js';
import { frameCode } from './code_block.js';
import { element, makeScrollable } from './elements.js';
import { typeset } from './maths.js';
import { patchText } from './patch.js';
import { say } from './words.js';

/** The elements of blocks, the last ones in their parent. What stays the same is not touched. */
export class Blocks {
  constructor(parent, context, isTop = false) {
    Object.assign(this, { parent, context, isTop, views: [] });
  }

  update(branches) {
    branches.forEach((branch, index) => {
      const old = this.views[index];
      const view = old?.fits(branch.token) ? old : new (kindOf(branch.token))(branch.token, this.context, this.isTop);
      view.update(branch);
      if (!old) this.parent.append(view.node);
      else if (view !== old) old.node.replaceWith(view.node);
      this.views[index] = view;
    });
    for (const { node } of this.views.splice(branches.length)) node.remove();
  }

  /** Leaves the first elements as they are, and returns their texts that depend on definitions. */
  release(count) {
    return this.views.splice(0, count).flatMap((view) => view.dependent);
  }

  get dependent() {
    return this.views.flatMap((view) => view.dependent);
  }
}

function kindOf({ type }) {
  switch (type) {
    case 'fence':
    case 'code_block': return Code;
    case 'math_block': return Formula;
    case 'footnote_open': return Footnote;
    case 'list_item_open': return Item;
    case 'table_open': return Table;
    default: return Block;
  }
}

/** An element with text or with other blocks. */
class Block {
  constructor(token, context, isTop) {
    Object.assign(this, { context, key: keyOf(token), text: null, blocks: null });
    this.node = this.body = document.createElement(token.tag);
    // The first strong character decides on a whole list or quotation, and on each cell.
    if (isTop || /^t[hd]$/.test(token.tag)) this.node.dir = 'auto';
    for (const [name, value] of attributesOf(token)) this.node.setAttribute(name, value);
  }

  /** Whether it can show another token. */
  fits(token) {
    return this.key === keyOf(token);
  }

  update({ branches }) {
    if (branches[0]?.token.type === 'inline') {
      this.text ??= new BlockText(this.body, this.context);
      this.text.update(branches[0].token);
    } else if (this.blocks || branches.length) {
      this.blocks ??= new Blocks(this.body, this.context);
      this.blocks.update(branches);
    }
  }

  get dependent() {
    if (this.text) return this.text.asked.length ? [this.text] : [];
    return this.blocks?.dependent ?? [];
  }
}

class Item extends Block {
  constructor(token, context) {
    super(token, context);
    if (token.meta?.task) this.node.append(checkbox(token.meta.task === 'done'));
  }
}

function checkbox(checked) {
  const node = element('input', 'task');
  node.type = 'checkbox';
  node.disabled = true;
  node.toggleAttribute('checked', checked);
  node.setAttribute('aria-label', say(checked ? 'task_done' : 'task_open'));
  return node;
}

class Table extends Block {
  constructor(token, context) {
    super(token, context);
    this.node = element('div', 'table');
    this.node.append(this.body);
    makeScrollable(this.node, say('table'));
  }
}

class Footnote extends Block {
  constructor(token, context) {
    super(token, context);
    const { label } = token.meta;
    const back = element('button', 'back', label);
    back.type = 'button';
    back.dataset.note = label;
    back.setAttribute('aria-label', say('footnote_back', { label }));
    this.node.className = 'footnote';
    this.body = element('div', '');
    this.body.dir = 'auto';
    this.node.append(back, this.body);
  }
}

class Code {
  constructor(token, { onCopy, folded }) {
    this.key = keyOf(token);
    const pre = document.createElement('pre');
    const code = pre.appendChild(document.createElement('code'));
    const [language] = token.info.trim().split(/\s+/);
    if (language) code.className = `language-${language}`;
    pre.dir = 'ltr';
    this.text = code.appendChild(new Text());
    this.block = frameCode(pre, onCopy, { folded });
    this.node = this.block.node;
    this.dependent = [];
  }

  fits(token) {
    return this.key === keyOf(token);
  }

  update({ token }) {
    if (token.content === this.text.data) return;
    patchText(this.text, token.content);
    this.block.grew();
  }
}

/** A formula on lines of its own; without its end, it is source. */
class Formula {
  constructor(token) {
    Object.assign(this, { key: keyOf(token), dependent: [], content: '' });
    this.node = element('div', '');
    this.node.dir = 'ltr';
    this.text = this.node.appendChild(new Text());
  }

  fits(token) {
    return this.key === keyOf(token);
  }

  update({ token: { content, meta: { tex } } }) {
    if (content === this.content) return;
    this.content = content;
    if (this.node.firstChild !== this.text) this.node.replaceChildren(this.text); // it was typeset
    patchText(this.text, content);
    this.node.className = tex === null ? 'tex display' : 'math display';
    if (tex === null) return;
    this.node.dataset.tex = tex;
    typeset(this.node);
  }
}

/** What must be the same so that an element can stay. */
function keyOf({ type, tag, info, attrs, meta }) {
  return `${type} ${tag} ${info} ${attrs ?? ''} ${meta?.task ?? meta?.label ?? ''}`;
}

// markdown-it aligns columns by style attributes, which the Content-Security-Policy forbids.
function attributesOf({ attrs }) {
  const withoutStyle = ([name, value]) => (name === 'style' ? ['class', value.replace('text-align:', '')] : [name, value]);
  return (attrs ?? []).map(withoutStyle);
}
