"""Extract tokenised English sentences from documentation in reStructuredText, Markdown and similar mark-up.

Text that does not read as English is left out instead of repaired: code, tables, parameter lists, and any sentence with
symbols, paths or identifiers. This loses much text, but what remains is prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"\s*(```|~~~)")
_DOCTEST = re.compile(r"\s*(>>>|\.\.\. |\.\.\.$|In \[|Out\[|\$ )")
_DIRECTIVE = re.compile(r"\s*\.\. ")
_UNDERLINE = re.compile(r"\s*([=\-~^\"'#*+.])\1{2,}\s*$")
_TABLE = re.compile(r"\s*[|+]|.*\S {3,}\S|.*\t\S")
_ITEM = re.compile(r"\s*([-*•]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
_FIELD = re.compile(r"\s*(:[a-z]+(?: [^:]*)?:|@\w+(?: \w+:)?|\*{0,2}`{0,2}\w+`{0,2}(?: ?\([^)]*\))?\s?(?::|--)) *")
_PARAMETER = re.compile(r"\s*[*\w, .]+ : ")

# Replaced in this order: roles and links, which contain backticks, before the backticks themselves.
_MARKUP = (
    (re.compile(r"<[a-zA-Z/!][^<>]*>"), ""),
    (re.compile(r":[a-z:]+:`([^`<]*?)\s*(?:<[^`>]*>)?`"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),
    (re.compile(r"`{1,2}([^`]*)`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"(?<!\w)(\*{1,2}|_{1,2})([A-Za-z][^*_]*?)\1(?!\w)"), r"\2"),
    (re.compile(r"\s*\[[\w#*]{1,6}\]_?"), ""),
    (re.compile(r"[\u2018\u2019]"), "'"),
    (re.compile(r"[\u201c\u201d]|''"), '"'),
    (re.compile(r"\s*(?:\u2014|\s--\s|---)\s*"), " -- "),
    (re.compile(r"(?<=\w)!r\b|&nbsp;"), " "),
)

_END = re.compile(r"(?<=[.!?])[\")]*\s+(?=[\"(]?[A-Z])")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|al|Fig|Eq|Sec|Dr|Mr|Mrs|Prof|St|No|pp|approx|resp|Vol|[A-Z])\.$")
_SYMBOLS = re.compile(
    r"[{}\[\]|\\<>=_@#~^*$`+&\x00-\x1f]|::|//|\w\(|\.\.|(?!(?:e\.g|i\.e)\b)\w\.\w*[a-z]\w*|\(\)|[a-z][A-Z]|\d[a-zA-Z]{2}"
)
_FUNCTION_WORD_LIST = """
a an the this that these those it its is are was were be been has have had do does not no of to in on at by for from
with as into if when then than or and but so which who you your we our they their he she his her will would can could
may might must should there all any each some other such only more most also both between
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())
_TOKEN = re.compile(
    r"""[A-Za-z]+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|--|\d+(?:[.,]\d+)+
        |[^\W_]+(?:[-/.][^\W_]+|'(?!(?:s|re|ve|ll|d|m)\b)[^\W_]+)*(?:\.(?=\s\S))?|\S""",
    re.VERBOSE,
)
_DOTTED = re.compile(r"^(?:e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|[A-Z])\.$")


def sentences(document: str) -> Iterator[str]:
    """Yield the sentences of ``document`` that read as English, tokenised, with words separated by one space."""
    for paragraph in _paragraphs(document):
        text = paragraph
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        for sentence in _split(" ".join(text.split())):
            if _reads_as_english(sentence):
                tokens = tokenise(sentence)
                if 4 <= len(tokens) <= 80:
                    yield " ".join(tokens)


def tokenise(sentence: str) -> list[str]:
    """Split a sentence roughly as in the Penn Treebank (``do n't``, ``it 's``, each punctuation mark by itself)."""
    tokens: list[str] = []
    for token in _TOKEN.findall(sentence):
        if token.endswith(".") and len(token) > 1 and not _DOTTED.match(token):
            tokens += [token[:-1], "."]
        else:
            tokens.append(token)
    return tokens


def deduplication_key(sentence: str) -> str:
    """Return a key that is equal for sentences that differ only in names, numbers and the first word."""
    words = sentence.split()
    return " ".join(["X" if word[0].isupper() or word[0].isdigit() else word for word in words[1:]])


def _paragraphs(document: str) -> Iterator[str]:
    """Yield paragraphs: runs of lines that are neither code nor structure, joined by spaces."""
    lines: list[str] = []
    skip_until_blank = fenced = False
    literal: int | None = None  # indentation of the line that announced a literal block
    # The empty line that is appended ends the last paragraph.
    for line in [*document.expandtabs().split("\n"), ""]:
        indent = len(line) - len(line.lstrip())
        blank = not line.strip()
        if _FENCE.match(line):
            fenced = not fenced
        if literal is not None and not blank and indent <= literal:
            literal = None
        if blank:
            skip_until_blank = False
        elif _DOCTEST.match(line):
            skip_until_blank = True
        prose = not (blank or fenced or literal is not None or skip_until_blank)
        prose = prose and not any(p.match(line) for p in (_FENCE, _DIRECTIVE, _UNDERLINE, _TABLE, _PARAMETER))
        item = _ITEM.match(line) or _FIELD.match(line)
        if lines and (item or not prose):
            yield " ".join(lines)
            lines = []
        if prose:
            lines.append(line[item.end() :] if item else line.strip())
            if line.rstrip().endswith("::"):
                literal = indent


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _END.finditer(paragraph):
        end = match.start() + len(match.group().rstrip())
        # "e.g. The" and "Mr. Smith" look like ends of sentences.
        if not _ABBREVIATION.search(paragraph[start : match.start()]):
            yield paragraph[start:end]
            start = match.end()
    yield paragraph[start:]


def _reads_as_english(sentence: str) -> bool:
    if not 20 <= len(sentence) <= 500 or not sentence[:2].strip('"(')[:1].isupper():
        return False
    if sentence.startswith(("TODO", "FIXME", "XXX", "NOTE")):
        return False
    if not sentence.rstrip('")').endswith((".", "!", "?")) or not sentence.isascii() or _SYMBOLS.search(sentence[:-1]):
        return False
    # Lists of names, code and other languages have few of English's function words, prose has many.
    words = re.findall(r"[A-Za-z']+", sentence)
    letters = sum(map(len, words))
    common = sum(word.lower() in _FUNCTION_WORDS for word in words)
    capital = sum(word.isupper() and len(word) > 1 for word in words)
    return (
        len(words) >= 4
        and letters > 0.75 * len(sentence.replace(" ", ""))
        and common >= max(2, 0.2 * len(words))
        and capital <= 0.2 * len(words)
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
    )
