/** The colours of code, each with the scopes of highlight.js that have it: `keyword` is `::highlight(code-keyword)`. */
export const COLORS = {
  keyword: ['keyword', 'selector-tag', 'template-tag', 'name', 'tag', 'strong', 'emphasis'],
  string: ['string', 'regexp', 'char', 'code', 'link', 'formula'],
  comment: ['comment', 'quote'],
  number: ['number', 'literal', 'symbol', 'bullet'],
  title: ['title', 'section', 'selector-id', 'selector-class'],
  type: ['type', 'built_in', 'class', 'selector-pseudo'],
  attribute: ['attr', 'attribute', 'property', 'variable', 'template-variable', 'selector-attr'],
  meta: ['meta', 'doctag'],
  addition: ['addition'],
  deletion: ['deletion'],
};
