"""What is wrong with an image file, or with the path that leads to it."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import stat
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

Finding = tuple[str, str]  # (kind, what is wrong)

_MAX_BYTES = 256 * 2**20
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
# Pillow reports damaged files by any of these, depending on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageReport:
    """What reading an image file gave.

    Args:
        findings: What is wrong with it.
        digest: SHA-256 of its bytes; empty if they could not be read.
    """

    findings: tuple[Finding, ...] = ()
    digest: bytes = b""


def is_deep(mode: str) -> bool:
    """Whether a Pillow mode has more than 8 bits a channel."""
    return mode == "F" or mode.startswith("I")


def check_path(path: str) -> str:
    """What is wrong with a path as a record gives it; empty if nothing."""
    if not path.strip():
        return "is empty"
    if "\0" in path:
        return "holds a zero character"
    if path.startswith(("http://", "https://", "data:", "s3://", "gs://")):
        return "is an address; download the image and give its path"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
        return "is an absolute path; on another machine it leads nowhere, start it from the root"
    if os.path.normpath(path.replace("\\", "/")).split("/")[0] == "..":
        return "leads out of the root"
    return ""


def inspect_image(path: Path) -> ImageReport:
    """Read and decode an image file.

    Args:
        path: The file; a symbolic link is followed.

    Returns:
        Its digest and everything that is wrong with it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return ImageReport((("image_unreadable", "is not a file"),))
        if status.st_size > _MAX_BYTES:
            text = f"has {status.st_size / 2**20:,.0f} MiB, more than {_MAX_BYTES // 2**20}"
            return ImageReport((("image_unreadable", text),))
        content = path.read_bytes()
    except FileNotFoundError:
        return ImageReport((("image_missing", f"does not exist{_hint(path)}"),))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return ImageReport((("image_unreadable", f"cannot be read: {reason}"),))
    digest = hashlib.sha256(content).digest()
    if not content:
        return ImageReport((("image_unreadable", "is empty (0 bytes)"),), digest)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                return ImageReport(tuple(_inspect(image)), digest)
    except Image.DecompressionBombWarning as error:
        return ImageReport((("image_size", f"is very large: {error}"),), digest)
    except _DAMAGE as error:
        return ImageReport((("image_unreadable", f"cannot be decoded: {error}"),), digest)


def _inspect(image: Image.Image) -> list[Finding]:
    if is_deep(image.mode):
        text = f"has mode {image.mode!r}; 8 bits a channel are needed, convert it first"
        return [("image_unreadable", text)]
    findings = []
    pixels = np.asarray(image.convert("RGB"))
    if (pixels == pixels[0, 0]).all():
        findings.append(("image_constant", "has one colour everywhere"))
    if image.getexif().get(_ORIENTATION, 1) != 1:
        text = "is turned by its EXIF orientation, which training does not apply; turn the pixels"
        findings.append(("image_orientation", text))
    if (frames := getattr(image, "n_frames", 1)) > 1:
        text = f"has {frames} frames; training sees the first"
        findings.append(("image_frames", text))
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and image.format != "JPEG2000":
        text = f"has mode {image.mode!r}; its colours are only approximate as RGB"
        findings.append(("image_colours", text))
    return findings


def _hint(path: Path) -> str:
    """For a file that is not there: what is there instead."""
    if path.is_symlink():
        return f"; it is a link to {os.readlink(path)}"
    if path.name in (there := _names(path.parent)):
        return ""  # it came while we looked
    if name := there.get(_plain(path.name)):
        return f"; there is {name!r}, whose letters are of another case or Unicode form"
    return "; the path has backslashes" if "\\" in str(path) else ""


@functools.lru_cache(maxsize=8)
def _names(folder: Path) -> dict[str, str]:
    try:
        return {_plain(name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
