"""Reading the chosen option out of a free-text answer.

The readings are tried from the most explicit to the least, and the first that finds anything
decides: a declared answer ("Final: C", "the answer is (b)"; the last one counts), a stated
preference ("I would choose D"), a conclusion ("so B"), a letter that opens a line ("C. stopped"), a
letter in running text ("option D"), and the words of an option. Within the last three, two
different candidates contradict each other and nothing is chosen.

The word "a" and the article of "A car" are never option A. The public DriveBench extractor searches
for any stand-alone "a" first and reads "The answer is C, because a car is turning." as A.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_FLAGS = re.IGNORECASE
_IS = r"(?:\s*[:=]|\s+(?:is|was|would\s+be|should\s+be|must\s+be)\b)"
_DECLARATION = re.compile(
    rf"\bfinal(?:\s+(?:answer|choice|decision|option))?[\"']?{_IS}"
    rf"|\banswer[\"']?(?:\s+(?:to|for)\s[^.:?!\n]{{1,80}}?)?{_IS}"
    rf"|\b(?:correct|right|best)\s+(?:option|choice|one){_IS}"
    r"|<answer>|\\boxed\b",
    _FLAGS,
)
_PREFERENCE = re.compile(
    r"\b(?:I|we)(?:\s*'(?:d|ll)|\s+(?:would|will|should|must|therefore|thus))*"
    r"\s+(?:choose|chose|pick|select|go\s+with|answer)\b"
    rf"|\b(?:option|choice|selection){_IS}",
    _FLAGS,
)
_CONCLUSION = re.compile(
    r"(?:\b(?:so|therefore|thus|hence)\b,?(?:\s+(?:it\s+is|it's|it\s+must\s+be)\b)?|[=-]>|\u2192)",
    _FLAGS,
)
_FILLER = re.compile(
    r"(?:[\s:=\"'<$-]|\b(?:therefore|thus|clearly|most|likely|probably|definitely|the|letter|option"
    r"|choice|answer)\b)*",
    _FLAGS,
)
_LETTER = re.compile(r"(?P<open>[(\[{]\s*)?(?P<letter>[A-Za-z])(?![\w'/&-])(?!\.\w\.)")
_DELIMITED = re.compile(r"\s*(?:[.,;:!?)\]}\"<]|$|\n)|\s+[-\u2013\u2014]\s")
_CONNECTED = re.compile(
    r"\s+(?:because|since|as|is|due|based|given|so|but|although|while|for)\b", _FLAGS
)
_SECOND = re.compile(
    r"[\s)\]}]*(?:,|/|&|\bor\b|\band\b)\s*(?:option\s+)?(?=[(\[{]?[A-Z]\b)", _FLAGS
)
_NOT_BEFORE = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\bneither|\bnor|\bexcept|\brather\s+than|\binstead\s+of"
    r"|\bother\s+than)\s+(?:(?:option|choice|the|be|an?|in)\s+)*[(\[{]?$",
    _FLAGS,
)
_NOT_AFTER = re.compile(
    r"[)\]}.]*\s+(?:(?:is|are|was|would\s+be)\s+(?:not|wrong|incorrect|false|excluded|ruled)\b"
    r"|isn't|cannot|can\s+be\s+(?:excluded|ruled))",
    _FLAGS,
)
# "lane B" names a thing; "so lane change: B" does not.
_THING_BEFORE = re.compile(
    r"\b(?:an?|lane|vehicle|car|truck|bus|van|camera|cam|view|object|pedestrian|point|position|type|class"
    r"|level|plan|zone|exit|route|road|gate|row|image|figure|step)\s+$",
    _FLAGS,
)
_STOP = re.compile(r"\s*(?:[.,;:!?)\]}\"<]|$|\n)")
_CLOSED = re.compile(r"\s*[)\]}.:]")
_NAMED_BEFORE = re.compile(r"\b(?:option|choice|letter|answer)\s+$", _FLAGS)
_AMBIGUOUS_WORDS = frozenset("ai")


@dataclass(frozen=True)
class _Reading:
    """What was found: a letter, or None for a contradiction or a letter outside the options."""

    letter: str | None


def extract_choice(text: str, options: Sequence[str]) -> str | None:
    """Read which option an answer chooses.

    Args:
        text: The answer, in any of the usual forms: ``"Final: C. stopped"``, ``"Final: {C. ...}"``,
            ``"(c)"``, ``"**Option C**"``, ``"The answer is C, because ..."``, ``"stopped"``.
        options: The options' texts, in the order of the letters A, B, C, ...

    Returns:
        The letter in upper case, or None if nothing, something contradictory, or a letter outside
        the options was found.

    Raises:
        TypeError: If ``text`` is not a string.
        ValueError: If there are no options, more than 26, or two alike.

    Example:
        >>> from drivekd.driving.extraction import extract_choice
        >>> extract_choice("A car is ahead, so B", ["accelerate", "brake"])
        'B'
        >>> extract_choice("A car is ahead.", ["accelerate", "brake"]) is None
        True
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; a string is needed")
    texts = [_clean(option).strip(" .") for option in options]
    if not 1 <= len(texts) <= 26 or len({t.lower() for t in texts}) < len(texts) or "" in texts:
        raise ValueError(f"options must be 1 to 26 different texts, got {list(options)}")
    return _Reader(texts).read(_clean(text))


def _clean(text: str) -> str:
    """Drop markup and reasoning blocks; unify quotes, widths and spaces; keep lines."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL | _FLAGS)
    text = unicodedata.normalize("NFKC", text)
    text = text.translate(str.maketrans("\u2019\u2018\u201c\u201d", "''\"\""))
    text = re.sub(r"[*`]+|__|(?m:^\s*(?:#+|>|[-\u2022])\s+)", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


class _Reader:
    """Reads answers to one question."""

    def __init__(self, options: Sequence[str]) -> None:
        self.options = [option.lower() for option in options]
        self.letters = string.ascii_uppercase[: len(options)]
        # Longest first, so that "four or more" is not read as "four".
        by_length = sorted(self.options, key=len, reverse=True)
        self.phrase = re.compile(
            rf"(?<![\w-])(?:{'|'.join(map(_flexible, by_length))})(?![\w-])", _FLAGS
        )
        self.echo = re.compile(
            "".join(
                rf"\(?{letter}\s*[.):]\s*{_flexible(option)}\s*[.,;]?\s*"
                for letter, option in zip(self.letters, self.options, strict=True)
            ),
            _FLAGS,
        )

    def read(self, text: str) -> str | None:
        if len(self.options) > 1:
            text = self.echo.sub("", text)  # the options repeated are no choice
        for marker in (_DECLARATION, _PREFERENCE, _CONCLUSION):
            ends = [match.end() for match in marker.finditer(text)]
            for end in reversed(ends):
                if reading := self._value(text, end):
                    return reading.letter
            # "Final: I think it is (C)": what follows the marker counts before what leads to it.
            if ends and marker is _DECLARATION and (reading := self._undeclared(text[ends[-1] :])):
                return reading.letter
        reading = self._undeclared(text)
        return reading.letter if reading else None

    def _undeclared(self, text: str) -> _Reading | None:
        for candidates in (self._alone, self._leading, self._running, self._phrases):
            found = set(candidates(text))
            if found:
                return _Reading(found.pop() if len(found) == 1 else None)
        return None

    def _value(self, text: str, start: int) -> _Reading | None:
        """Read what stands right behind a marker."""
        filler = _FILLER.match(text, start)
        position = filler.end() if filler else start
        reading = self._letter(text, position, named=True)
        if reading is not None:
            return reading
        match = self.phrase.match(text, position + len(_leading_brackets(text, position)))
        if match and not self._is_weak(text, match):
            return _Reading(self._letter_of(match.group()))
        return None

    def _letter(self, text: str, position: int, *, named: bool) -> _Reading | None:
        """Read a letter at a position, with the option's text behind it if there is one."""
        match = _LETTER.match(text, position)
        if match is None:
            return None
        letter, end = match["letter"], match.end()
        delimited = _DELIMITED.match(text, end) is not None
        if not delimited and not self._is_open_letter(text, match, named=named):
            return None
        if letter.upper() not in self.letters:
            return _Reading(None) if delimited and (named or match["open"]) else None
        second = _SECOND.match(text, end)
        if second is not None:
            other = self._letter(text, second.end(), named=False)
            if other is not None and other.letter != letter.upper():
                return _Reading(None)
        return _Reading(letter.upper() if self._agrees(text, end, letter.upper()) else None)

    def _is_open_letter(self, text: str, match: re.Match[str], *, named: bool) -> bool:
        """Say whether a letter followed by a word is a choice and not an article or pronoun."""
        letter, end = match["letter"], match.end()
        if letter.lower() not in _AMBIGUOUS_WORDS:
            return named or letter.isupper()
        if _SECOND.match(text, end):  # "A or B"
            return True
        own = letter.upper() in self.letters and self._starts_with_option(text, end, letter.upper())
        return named and (own or _CONNECTED.match(text, end) is not None)

    def _agrees(self, text: str, end: int, letter: str) -> bool:
        """Say whether the text behind a letter is not another option's text."""
        if self._starts_with_option(text, end, letter):
            return True
        match = self.phrase.match(text, _skip_delimiters(text, end))
        return match is None or self._is_weak(text, match)

    def _starts_with_option(self, text: str, end: int, letter: str) -> bool:
        option = _flexible(self.options[self.letters.index(letter)])
        pattern = re.compile(rf"{option}(?![\w-])", _FLAGS)
        return pattern.match(text, _skip_delimiters(text, end)) is not None

    def _alone(self, text: str) -> Iterator[str | None]:
        """Give the choice if the whole text is a letter or an option."""
        bare = text.strip(" \n.,;:!?()[]{}\"'")
        if len(bare) == 1 and bare.isalpha():
            yield bare.upper() if bare.upper() in self.letters else None
        elif self.phrase.fullmatch(bare):
            yield self._letter_of(bare)

    def _leading(self, text: str) -> Iterator[str | None]:
        """Give letters that open a line, followed by a delimiter; and a yes or no that opens it."""
        for line in text.split("\n"):
            line = line.strip()
            match = _LETTER.match(line)
            if (
                match
                and _DELIMITED.match(line, match.end())
                and match["letter"].upper() in self.letters
            ):
                reading = self._letter(line, 0, named=True)
                if reading is not None:
                    yield reading.letter
        opening = re.match(
            r"yes\b|no(?=\s*(?:[.,;:!)-]|$)|\s+(?:there|it|they|the)\b)", text, _FLAGS
        )
        if opening and opening.group().lower() in self.options:
            yield self._letter_of(opening.group())

    def _running(self, text: str) -> Iterator[str | None]:
        """Give letters in running text that are neither articles, names of things nor negated."""
        for match in re.finditer(r"(?<![\w.'/&-])[(\[{]?\s*(?P<letter>[A-Za-z])(?![\w'/&-])", text):
            start, end = match.start("letter"), match.end()
            letter = match["letter"]
            if letter.upper() not in self.letters:
                continue
            before, bracketed = _before(text, match), match.group()[0] in "([{"
            named = _NAMED_BEFORE.search(before) is not None
            if bracketed:
                chosen = _CLOSED.match(text, end) is not None
            elif named or letter.isupper():
                chosen = self._letter(text, start, named=named) is not None
            else:
                chosen = False
            if not chosen or _THING_BEFORE.search(before) or self._is_negated(text, match):
                continue
            yield letter.upper() if self._agrees(text, end, letter.upper()) else None

    def _phrases(self, text: str) -> Iterator[str | None]:
        """Give options whose text appears and is not negated."""
        for match in self.phrase.finditer(text):
            if not self._is_negated(text, match) and not self._is_weak(text, match):
                yield self._letter_of(match.group())

    def _is_negated(self, text: str, match: re.Match[str]) -> bool:
        return bool(_NOT_BEFORE.search(_before(text, match)) or _NOT_AFTER.match(text, match.end()))

    def _is_weak(self, text: str, match: re.Match[str]) -> bool:
        """Say whether a "yes" or "no" is only a word of a sentence ("no vehicle")."""
        if match.group().lower() not in {"yes", "no"}:
            return False
        return _STOP.match(text, match.end()) is None

    def _letter_of(self, phrase: str) -> str:
        return self.letters[self.options.index(" ".join(phrase.lower().split()))]


def _before(text: str, match: re.Match[str]) -> str:
    """Give the few words in front of a match."""
    return text[max(0, match.start() - 60) : match.start()]


def _flexible(option: str) -> str:
    """Give a pattern for an option's text with any white space between its words."""
    return r"\s+".join(map(re.escape, option.split()))


def _leading_brackets(text: str, position: int) -> str:
    match = re.compile(r"[(\[{\"'\s]*").match(text, position)
    return match.group() if match else ""


def _skip_delimiters(text: str, end: int) -> int:
    match = re.compile(r"[\s.):,;\]}\"\u2013\u2014-]*").match(text, end)
    return match.end() if match else end
