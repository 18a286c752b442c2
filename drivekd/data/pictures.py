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
_LEAST_SIDE = 4  # pixels
_MOST_STRETCH = 200
_OPAQUE = 255
_LFS_POINTER = b"version https://git-lfs"
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
# Pillow reports damaged files by any of these, depending on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageReport:
    """What reading an image file gave.

    Args:
        findings: What is wrong with it.
        digest: SHA-256 of its pixels, so that a copy in another lossless format is the same
            picture; of its bytes if it cannot be decoded, empty if they could not be read.
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


def look_for_image(path: Path) -> ImageReport:
    """Whether there is a file that may be an image, without opening it.

    Args:
        path: The file; a symbolic link is followed.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return ImageReport((("image_missing", f"does not exist{_hint(path)}"),))
    except (OSError, ValueError) as error:
        return ImageReport((_unreadable(error),))
    if not stat.S_ISREG(status.st_mode):
        return ImageReport((("image_unreadable", "is not a file"),))
    if status.st_size > _MAX_BYTES:
        text = f"has {status.st_size / 2**20:,.0f} MiB, more than {_MAX_BYTES // 2**20}"
        return ImageReport((("image_unreadable", text),))
    if not status.st_size:
        return ImageReport((("image_unreadable", "is empty (0 bytes)"),))
    return ImageReport()


def _unreadable(error: OSError | ValueError) -> Finding:
    reason = getattr(error, "strerror", None) or error
    return "image_unreadable", f"cannot be read: {reason}"


def inspect_image(path: Path) -> ImageReport:
    """Read and decode an image file.

    Args:
        path: The file; a symbolic link is followed.

    Returns:
        Its digest and everything that is wrong with it.
    """
    if (report := look_for_image(path)).findings:
        return report
    try:
        content = path.read_bytes()
    except OSError as error:
        return ImageReport((_unreadable(error),))
    digest = hashlib.sha256(content).digest()
    if content.startswith(_LFS_POINTER):
        text = "is a Git LFS pointer; fetch the file itself (git lfs pull)"
        return ImageReport((("image_unreadable", text),), digest)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                return _inspect(image, digest)
    except Image.DecompressionBombWarning as error:
        return ImageReport((("image_size", f"is very large: {error}"),), digest)
    except _DAMAGE as error:
        return ImageReport((("image_unreadable", f"cannot be decoded: {error}"),), digest)


def _inspect(image: Image.Image, digest: bytes) -> ImageReport:
    if is_deep(image.mode):
        text = f"has mode {image.mode!r}; 8 bits a channel are needed, convert it first"
        return ImageReport((("image_unreadable", text),), digest)
    findings = []
    pixels = np.asarray(image.convert("RGB"))
    if (pixels == pixels[0, 0]).all():
        findings.append(("image_constant", "has one colour everywhere"))
    short, long = sorted(image.size)
    if short < _LEAST_SIDE or long > _MOST_STRETCH * short:
        text = (
            f"is {image.width} x {image.height} pixels; models want {_LEAST_SIDE} or more a side, "
            f"Qwen-VL's processor refuses more than {_MOST_STRETCH} times as long as wide"
        )
        findings.append(("image_size", text))
    if image.getexif().get(_ORIENTATION, 1) != 1:
        text = "is turned by its EXIF orientation, which training does not apply; turn the pixels"
        findings.append(("image_orientation", text))
    if (frames := getattr(image, "n_frames", 1)) > 1:
        text = f"has {frames} frames; training sees the first"
        findings.append(("image_frames", text))
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and image.format != "JPEG2000":
        text = f"has mode {image.mode!r}; its colours are only approximate as RGB"
        findings.append(("image_colours", text))
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < _OPAQUE:
        text = "has transparent pixels; training drops that and sees the colours beneath"
        findings.append(("image_colours", text))
    shape = f"{image.width} {image.height} ".encode()
    return ImageReport(tuple(findings), hashlib.sha256(shape + pixels.tobytes()).digest())


def _hint(path: Path) -> str:
    """For a file that is not there: what is there instead."""
    if path.is_symlink():
        return f"; it is a link to {os.readlink(path)}"
    if path.name in (there := _names(path.parent)):
        return ""  # it came while we looked
    if name := there.get(_plain(path.name)):
        return f"; there is {name!r}, which differs in case, spaces or Unicode form"
    return "; the path has backslashes" if "\\" in str(path) else ""


@functools.lru_cache(maxsize=8)
def _names(folder: Path) -> dict[str, str]:
    try:
        return {_plain(name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
