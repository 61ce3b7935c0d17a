import { element } from './elements.js';
import { picturesOf, textOf } from './item.js';
import { Message } from './message.js';
import { Question } from './question.js';
import { Reply } from './reply.js';
import { ToolResult } from './tool_result.js';
import { say } from './words.js';

/** Makes messages of the nodes of a conversation: of responses, and of items that were sent. */
export class MessageFactory {
  constructor(callbacks) {
    // onCopy, onAgain, onAsk, onVersion; the names of called tools, by call_id
    Object.assign(this, { callbacks, tools: new Map() });
  }

  of(node) {
    const message = this.create(node);
    this.update(message, node);
    return message;
  }

  /** Shows what the server knows more of a message. */
  update(message, node) {
    message.update(node, this.callbacks.onVersion);
  }

  create(node) {
    for (const { call_id: id, name } of node.output ?? [node]) if (name) this.tools.set(id, name);
    if (node.type === 'function_call_output') return new ToolResult(node, this.tools.get(node.call_id));
    if (node.role === 'user') return this.question(textOf(node), picturesOf(node), node);
    if (node.role === 'system') return new Message('system', say('system'), element('div', 'content', textOf(node)), node);
    return Reply.of(node, this.callbacks);
  }

  question(text, pictures, node) {
    return new Question(text, pictures, this.callbacks.onAsk, node);
  }

  /** A reply that the server has not accepted yet. */
  reply() {
    return new Reply(this.callbacks);
  }
}
