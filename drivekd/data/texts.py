"""What is wrong with the texts of a record."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from drivekd.data.pictures import Finding
from drivekd.data.records import IMAGE_PLACEHOLDER, Record

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# "<c" that ends the text is a tag cut off behind its first letter.
_TAG_START = re.compile(r"<c(?:\d+|$)")
_TAG = re.compile(rf"<(c\d+)\s*,\s*([A-Za-z]\w*)\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*>")
_EMPTY_ANSWER = re.compile(
    r"(?:\s*final\s*(?:answer)?\s*[:=])?[\s{}().\u200b\u2060\ufeff]*(?:nan|null|n/a|undefined)?"
    r"[\s{}().\u200b\u2060\ufeff]*",
    re.IGNORECASE,
)
# Spellings that some tokenizer or processor takes for more than text. `<image>` is ours.
_SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>"
    r"|<(?!(?-i:image)>)/?(?:image|img|video|s|pad|unk|bos|eos|box|ref|quad)\d*"
    r"(?:[_ -]\w{1,12})?\s*/?>"
    r"|\[/?INST\]",
    re.IGNORECASE,
)
# What is meant as a tag but is written otherwise: another bracket or letter, or HTML's escapes.
_ALMOST_TAG = re.compile(
    rf"(?:[<\uff1c\u2039]|&lt;)\s*[cC\u0441\u0421\uff43]\d*\s*[,;\uff0c][^<>]{{0,40}}"
    rf"|CAM_\w+\s*[,;\uff0c]\s*{_NUMBER}\s*[,;\uff0c]\s*{_NUMBER}"
)
_CAMERAS = tuple(f"CAM_{n}{s}" for n in ("FRONT", "BACK") for s in ("", "_LEFT", "_RIGHT"))
_CLOSE = 0.85  # similarity of two names of cameras that are one, misspelt
# Zero-width and direction marks (not the joiners that scripts need), soft hyphens.
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\u00ad]")
# UTF-8 that was read as Windows-1252, and HTML's escapes.
_MISREAD = re.compile("\u00e2\u20ac|\u00c3[\u0080-\u00bf]|\u00ef\u00bb\u00bf")
_ESCAPED = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{1,5});")
_TWO_SCRIPTS = re.compile("[A-Za-z][\u0400-\u04ff]|[\u0400-\u04ff][A-Za-z]")
_GARBLED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_OPTION = re.compile(r"(?<![\w.'<,-])([A-Z])[.):]\s+(?=\S)")
_CHOICE = re.compile(r"\s*(?i:final\s*(?:answer)?\s*[:=]\s*)?[\s{(]*([A-Z])(?:[.):}]\s*|\s*$)(.*)")
_SAID = re.compile(r"(?i:answer|option|choice)\s*(?i:is|:)?\s*[({]?([A-Za-z])[)}]?\.?\s*")
_LOOKALIKE = re.compile(
    r"\s*(?i:final\s*(?:answer)?\s*[:=]\s*)?[\s{(]*([\u0391-\u03a9\u0410-\u042f\uff21-\uff3a])(?:[.):}]|\s*$)"
)
_NOT_WORDS = re.compile(r"[\W_]+")


def check_texts(record: Record, special_tokens: Collection[str] = ()) -> Iterator[Finding]:
    """Find what is wrong with turns, answers, placeholders, options and tags.

    Args:
        record: The record.
        special_tokens: The tokenizer's own; empty takes common spellings.

    Yields:
        Kind and message of each finding.
    """
    placeholders = sum(m.content.count(IMAGE_PLACEHOLDER) for m in record.messages)
    if placeholders != len(record.images):
        yield (
            "image_count",
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(record.images)} images",
        )
    yield from _check_turns([message.role for message in record.messages])
    for message in record.messages:
        if message.role == "assistant":
            yield from _check_answer(message.content)
    for message in record.messages:
        yield from _check_tokens(message.content, special_tokens)
        yield from _check_tags(message.content)
    yield from _check_options(record)


def normalize_text(text: str) -> str:
    """A text without case, punctuation, placeholders and spacing, to compare questions by."""
    folded = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
    return _NOT_WORDS.sub(" ", folded).strip()


def _check_turns(roles: Sequence[str]) -> Iterator[Finding]:
    if "assistant" not in roles:
        yield "no_assistant", "no assistant message; there is nothing to learn"
        return
    spoken = [role for role in roles if role != "system"]
    if spoken[0] != "user":
        yield "turn_order", "the first message is the assistant's; it must be the user's"
    if roles[-1] != "assistant":
        yield "turn_order", f"the last message is by {roles[-1]!r}; training needs an answer"
    if "system" in roles[1:]:
        yield "turn_order", "a system message stands behind the first message"
    for first, second in pairwise(spoken):
        if first == second:
            yield "role_repeated", f"two messages by {first!r} follow each other; join them"
            return


def _check_answer(answer: str) -> Iterator[Finding]:
    if _EMPTY_ANSWER.fullmatch(answer):
        yield "empty_answer", f"the answer {_excerpt(answer)} is empty"
    if IMAGE_PLACEHOLDER in answer:
        yield "placeholder_in_answer", f"{IMAGE_PLACEHOLDER} stands in an answer"


def _check_tokens(text: str, special_tokens: Collection[str]) -> Iterator[Finding]:
    found = [token for token in special_tokens if token in text and token != IMAGE_PLACEHOLDER]
    found += [match.group() for match in _SPECIAL.finditer(text)]
    for token in dict.fromkeys(found):
        yield (
            "special_token",
            f"the text holds {token!r}, which a tokenizer may take for a special token; "
            f"an image's place is written {IMAGE_PLACEHOLDER}",
        )
    if garbled := _GARBLED.search(text):
        start = max(0, garbled.start() - 20)
        yield "garbled_text", f"a character is not readable in {_excerpt(text[start:])}"
    for pattern, what in (
        (_INVISIBLE, "an invisible character stands"),
        (_MISREAD, "UTF-8 was read as another encoding"),
        (_ESCAPED, "HTML's escapes stand for characters"),
        (_TWO_SCRIPTS, "Latin and Cyrillic letters that look alike stand in one word"),
    ):
        # An answer that holds nothing else is empty; that is said elsewhere.
        if text.strip("\u200b\u2060\ufeff \n\t") and (found_at := pattern.search(text)):
            around = text[max(0, found_at.start() - 20) : found_at.end() + 20]
            yield "garbled_text", f"{what} in {around!a}"


def _check_tags(text: str) -> Iterator[Finding]:
    places: dict[tuple[str, str, str], str] = {}
    rest = _TAG.sub(" ", text)
    for almost in _ALMOST_TAG.finditer(rest):
        if not _TAG_START.match(almost.group()):  # those are looked at below
            around = rest[max(0, almost.start() - 5) : almost.end() + 20]
            if not _TAG_START.search(around):
                yield "object_tag", f"{around!a} looks like an object tag <c1,CAMERA,x,y>"
    for start in _TAG_START.finditer(text):
        tag = _TAG.match(text, start.start())
        if tag is None:
            excerpt = text[start.start() : start.start() + 40]
            yield "object_tag", f"object tag {excerpt!r} is not of the form <c1,CAMERA,x,y>"
            continue
        name, camera, x, y = tag.groups()
        if meant := _misspelt_camera(camera):
            yield "object_tag", f"object tag {tag.group()}: did you mean the camera {meant}?"
        if not all(0.0 <= float(value) <= 1.0 for value in (x, y)):
            # A share of 1.5 is a slip, one of 800 is another unit.
            unit = "; these are pixels, divide by the image's size" if _is_pixel(x, y) else ""
            yield (
                "coordinate_range",
                f"object tag {tag.group()} has a coordinate outside 0..1{unit}",
            )
        other = places.setdefault((camera, x, y), name)
        if other != name:
            yield (
                "coordinate_shared",
                f"objects {other} and {name} have one place, {tag.group()}",
            )


def _misspelt_camera(name: str) -> str:
    """The nuScenes camera that a name almost is; other names of cameras are others' own."""
    if name in _CAMERAS:
        return ""
    upper = name.upper()
    close = difflib.get_close_matches(upper, _CAMERAS, n=1, cutoff=_CLOSE)
    return close[0] if close else ""


def _is_pixel(x: str, y: str) -> bool:
    return min(float(x), float(y)) >= 0.0 and max(float(x), float(y)) >= 16.0


def _check_options(record: Record) -> Iterator[Finding]:
    """Multiple choice: letters in a row, an answer among them whose words are that option's."""
    options = _options(record.question)
    if not options:
        return
    letters = [letter for letter, _ in options]
    wanted = [chr(ord("A") + index) for index in range(len(letters))]
    if letters != wanted:
        yield "options", f"the options are {', '.join(letters)}; wanted {', '.join(wanted)}"
        return
    words = {letter: normalize_text(text) for letter, text in options}
    if len(set(words.values())) < len(words):
        yield "options", "two options have the same words"
        return
    answer = next((m.content for m in record.messages if m.role == "assistant"), "")
    if (lookalike := _LOOKALIKE.match(answer)) is not None:
        name = unicodedata.name(lookalike[1]).lower()
        yield "option_answer", f"the answer's letter is {name}, which no option has"
        return
    choice = _CHOICE.match(answer.split("\n")[0])
    if choice is None:
        said_last = _SAID.search(answer.rstrip()[-30:])
        if said_last and said_last.end() == len(answer.rstrip()[-30:]):
            letter = said_last[1].upper()
            if letter not in words:
                yield "option_answer", _no_such_option(letter, letters)
        return
    letter, said = choice[1], normalize_text(choice[2])
    if letter not in words:
        yield "option_answer", _no_such_option(letter, letters)
    elif said != words[letter] and said in words.values():
        other = next(name for name, text in words.items() if text == said)
        yield "option_answer", f"the answer is {letter}, but its words are those of option {other}"


def _no_such_option(letter: str, letters: Sequence[str]) -> str:
    return f"the answer is {letter}, but the options are {', '.join(letters)}"


def _options(question: str) -> list[tuple[str, str]]:
    """Letters and texts of the options that a question lists; none if it lists none."""
    found = list(_OPTION.finditer(question))
    letters = [match[1] for match in found]
    if len(found) < 2 or letters != sorted(letters) or letters[0] not in "AB":
        return []
    ends = [match.start() for match in found[1:]] + [len(question)]
    return [(m[1], question[m.end() : end]) for m, end in zip(found, ends, strict=True)]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
