const CJK = /[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}\p{scx=Bopomofo}\uff00-\uffef]/u;

/**
 * A plugin of markdown-it: `**注意：**请看` is bold. CommonMark asks for a space beside punctuation there, which Chinese
 * and Japanese do not write.
 */
export function cjkEmphasis(parser) {
  parser.inline.State = class extends parser.inline.State {
    scanDelims(start, canSplitWord) {
      const run = super.scanDelims(start, canSplitWord);
      const before = [...this.src.slice(Math.max(0, start - 2), start)].at(-1) ?? ' ';
      const after = String.fromCodePoint(this.src.codePointAt(start + run.length) ?? 32);
      const isBesideCjk = CJK.test(before) || CJK.test(after);
      if (!canSplitWord || !isBesideCjk || /\s/.test(before) || /\s/.test(after)) return run;
      return { ...run, can_open: true, can_close: true };
    }
  };
}
