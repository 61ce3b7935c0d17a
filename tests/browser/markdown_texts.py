"""Markdown texts for tests: corner cases, and texts that are put together by chance."""

from __future__ import annotations

import random

CASES = [
    "A paragraph.\n\nAnother one.",
    "A paragraph\nthat goes on\nover lines",
    "A paragraph\n---\nand text below a heading",
    "Heading\n===\n\ntext\n***\ntext",
    "para\n-\n- x",
    "para\n***bold italic*** text\n****",
    "# Heading\ntext\n#hashtag\n## Another",
    "- a\n- b\n\n- loose\n\n  with a paragraph\n- c",
    "- a\n  - b\n    - c\n      - d\n\n  back",
    "1. a\n\n2. b\n3. c\n\ntext\n\n4. d",
    "1. a\n\n```python\ncode\n```\n\n2. b\n\n   ```\n   inside\n   ```\n3. c",
    "1. a\n\n2",
    "* a\n\n*not a list*\n\n* b",
    "- a\n\n-b",
    "- a\n***\n- b",
    "- \n- b\n-\n\n  c",
    "10) ten\n11) eleven\n1. one",
    "    indented code\n\n    more of it\nparagraph\n    no code",
    "```\nnever closed\n- item\n",
    "```js\nlet a = `b`;\n``\n```\ntext",
    "~~~~\n~~~\n```\n~~~~\n",
    "````md\n```\ninner\n```\n````\nafter",
    "- item\n  ```\n  code\n\n  more\nafter",
    "> quote\nlazy\n> > deeper\nlazy\n\nafter",
    "> ```\n> code\ntext",
    "> - a\n> - b\n\n> another",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |\n\ntext",
    "text\n| a | b |\n| --- | :-: |\n| 1 | 2 |\ntext",
    "a | b\n--|--\n1 | 2\n- list",
    "| no | table |\ntext\n| a |\n| b |",
    "|a|\n|-",
    "text\n|a|\n|-x",
    "para\n|a|\n|-|\n|b|\n\n|c|\n|-|",
    "> |a|\n|-|",
    "See [one] and [two][2].\n\nText.\n\n[one]: https://example.com/1 'title'\n[2]: <https://example.com/2>\n",
    '[a] [b]\n\nnext\n\n[a]: https://example.com/\n"not yet a title\n[b]: https://example.com/b\n',
    '[a]\n\n[a]: https://example.com/\n"a title\nover lines"\n\nmore\n\n[a]: https://example.com/other',
    "- [a]\n\n> [a]: https://example.com/\n\ntext\n\ntext",
    "First[^1], second[^note].\n\n[^1]: The first.\n[^note]: It\n    goes on.\n\n    In two paragraphs.\n\nAfter[^1].",
    "[^1]: early\n\nlate[^1] and undefined[^2][^x]",
    "Text[^1]\n\n- item[^1]\n\n[^1]: - a list\n    - in it\n\ntext",
    "Maths $x^2$ and $$y$$ and \\(z\\) and \\[w\\].\n\nIt costs $5 and $10, or 5$.",
    "$$\nx = 1\n\ny = 2\n$$\nafter",
    "text\n$$\n- a\n+ b\n= c\n$$\ntext",
    "$$ x +\n- y\n= z $$\nafter",
    "$$ never closed\n- item\n\nnext",
    "$$\nnever closed\n\n- item",
    "$$\nx\n$$.\nafter",
    "$$x$$\n$$y$$ in text\n\\[\na\n\\]",
    "1. text\n   \\[\n   x\n   \\]\n2. $$\n   y\n   $$\n\\[\nz\n\\]",
    "> $$\n> x\n> $$\n> text\n\n> $$\n> y\ntext",
    "- [ ] open\n- [x] done **bold**\n- [X] done\n\n  more\n- [y] none\n1. [ ] one\n- [ ]\n- [ ] ",
    "**bold *both* bold** and ~~gone~~ and `code` ``a`b``",
    "**open *both\n\nnext `open\n\n[open\n\n[open](https://exam\n\n![open\n\n$x^",
    "*a **b* c**, 2*3*4, snake_case_name, __init__, **a**b",
    "**注意：**请看，*“强调”*也是。这是**重点**。**「引用」**呢",
    "https://example.com/a_b*c, www.example.com. https://example.com。请看（https://example.com/路径）https://例子.中国，好",
    "<https://example.com> <b>no html</b> &amp; &copy; &#x41; &unknown; AT&T a < b",
    "![a picture](https://example.com/x.png) ![](https://example.com/y.png) [![z](https://example.com/z.png)](https://example.com/)",
    "[a script](javascript:alert(1)) [a path](/logout) ![a path](/x.png) [mail](mailto:a@example.com)",
    "line  \nbreak\\\nbreak\nbreak \\* no \\[ x \\] \\( y \\)",
    "text\r\n\r\n- a\r\n- b\r\n\r\n```\r\ncode\r\n```\r\nend\rof mac",
    "a\n\n\n\n\nb\n   \n\t\nc",
    "---\n- - - \n- - x\n* * *\n_ _ _\n",
    "a\n    b\n\n\tc\n\n  d\n    e",
    "مرحبا **بالعالم**\n\n- عربي\n- English",
    "\0 null, [constructor] [__proto__] [^toString] ~~~~ ` `` ``` `",
    "",
    "\n\n",
    "|",
    "- - - - a\n\n      b",
    "[a]: <https://example.com\n\n[a]",
    "[\na\n]: https://example.com/\n\n[a]",
    "- a\n [b]: https://example.com/\n- [b]\n",
    "- a\n\n\n- b\n\n\n\n    c\n1) d",
]

MARKUP = r"""
text;a;word ;**;*;_;~~;`;``;$;$$;\(;\);\[;\];[;];(;);](https://example.com/);[^1];[^1]: note;[ref];|;|;<;>;!;\;';";
[ref]: https://example.com/ref;[ref]: <x> "t;![alt](https://example.com/i.png);https://example.com/x;www.example.com;
。;，;注意;：;é;😀;&;&amp;"title";-;--;---;=;===;#;# ;## H;- ;* ;+ ;1. ;2. ;10) ;- [ ] ;- [x] ;> ;>;  ;    ;   ;
```;```py;~~~;````;:-:;:--; x ;0;5"""
FRAGMENTS = [*MARKUP.replace("\n", "").split(";"), "\t"]
LINES = [
    "| a | b |",
    "|---|:-:|",
    "| 1 | 2 |",
    "|a|",
    "|-|",
    "---",
    "$$",
    "\\[",
    "\\]",
    "```",
    "- item",
    "  more",
    "    deep",
    "> quote",
    "",
]


def generated(seed: int) -> str:
    """A text out of fragments of markup, mostly in lines."""
    chance = random.Random(seed)
    lines = []
    for _ in range(chance.randrange(1, 14)):
        if chance.random() < 0.35:
            lines.append(chance.choice(["", "", "  ", "   ", "    ", "> "]) + chance.choice(LINES))
        else:
            lines.append("".join(chance.choices(FRAGMENTS, k=chance.randrange(0, 7))))
    return "\n".join(lines) + chance.choice(["", "\n", "\n\n"])


def combined(seed: int) -> str:
    """Some of the cases, one below the other."""
    chance = random.Random(seed)
    return chance.choice(["\n", "\n\n"]).join(chance.sample(CASES, 4))


def pieces(text: str, seed: int) -> list[str]:
    """A text in deltas of random lengths."""
    chance = random.Random(seed)
    longest = chance.choice([1, 3, 8, 40])
    deltas = []
    while text:
        length = chance.randint(1, longest)
        deltas.append(text[:length])
        text = text[length:]
    return deltas
