"""Where a mutation belongs in a source: by the text that stands there, however its lines are broken, not by number.

Lines may move, and others be written between them, without a change to a table of mutations.
"""

import itertools
import re


def find(text, old, at=""):
    """(start, end) of `old`, which must be in the text once, or be the first of its kind from the text `at` on.

    White space may differ. `at` must be there once.
    """
    begin = 0
    if at:
        begin, _ = _only(list(_pattern(at).finditer(text)), at)
    found = list(_pattern(old).finditer(text, begin))
    return _only(found[:1] if at else found, old)


def replaced(text, old, new, at=""):
    """The text with `new` in the place of `old`."""
    start, end = find(text, old, at)
    return text[:start] + new.strip() + text[end:]


def changed(text, span, new):
    """The part of the span that `new` does not begin or end with as well, white space aside."""
    start, end = span
    old = [place for place in range(start, end) if not text[place].isspace()]
    new = [character for character in new if not character.isspace()]
    shorter = min(len(old), len(new))
    same = next((i for i in range(shorter) if text[old[i]] != new[i]), shorter)
    rest = range(shorter - same)
    tail = next((i for i in rest if text[old[~i]] != new[~i]), shorter - same)
    return (old[same] if same < len(old) else end), (old[~tail] + 1 if tail < len(old) else start)


def _pattern(text):
    """Words and signs of the text one after the other."""
    tokens = re.findall(r"\w+|[^\w\s]", text)
    gaps = [r"\s+" if f"{a[-1]}{b[0]}".isidentifier() else r"\s*" for a, b in itertools.pairwise(tokens)]
    return re.compile("".join(re.escape(token) + gap for token, gap in zip(tokens, [*gaps, ""], strict=True)))


def _only(found, what):
    if len(found) != 1:
        raise ValueError(f"{what!r} is there {len(found)} times")
    return found[0].span()
