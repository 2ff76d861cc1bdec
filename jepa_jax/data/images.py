"""Opens and decodes an encoded image without trusting what it says of itself."""

import io

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

# A side of 8192: no image that a network is trained on has more, and 16 threads may decode at once.
_MOST_PIXELS = 2**26
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def open_image(content: bytes) -> Image.Image:
    """A PNG, JPEG or WebP, whatever its name says; of a PNG or JPEG only the header is read yet.

    Not by `Image.open`: of the thirty formats that it knows one starts a program, and at a size
    below its own limit it prints a warning and goes on.

    Raises:
      ValueError: for another format, or for more pixels than any dataset's images have, of
        whatever few bytes.
      Exception: of any kind, if it is damaged.
    """
    kind: type[ImageFile.ImageFile]
    if content.startswith(_PNG):
        kind = PngImageFile
    elif content.startswith(_JPEG):
        kind = JpegImageFile
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        kind = WebPImageFile
        # Its decoder takes memory for all pixels before anybody could ask how many there are.
        _check_pixels(*_webp_size(content))
    else:
        raise ValueError("neither a PNG, a JPEG nor a WebP" if content else "an empty file")
    image = kind(io.BytesIO(content))
    _check_pixels(image.width, image.height)
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(f"an image of {width}x{height} pixels")


def _webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) in the first chunk: of a canvas, a lossless or a lossy image."""

    def number(start: int, stop: int) -> int:
        return int.from_bytes(content[start:stop], "little")

    if content[12:16] == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if content[12:16] == b"VP8L":
        bits = number(21, 25)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF


def decode_image(content: bytes, size: int = 0) -> np.ndarray:
    """The pixels of a PNG, JPEG or WebP.

    Grey is repeated to three channels, 16 bits become 8 by scaling, a palette and CMYK become RGB,
    and transparency is dropped; an animation is its first frame.

    Args:
      content: of the file.
      size: 0 leaves the image as it is; else its shorter side is resized to so many pixels
        (bilinear, with anti-aliasing, as torchvision's Resize of a PIL image) and the square in
        the middle is cut out.

    Returns:
      uint8 [H, W, 3], or [size, size, 3].

    Raises:
      Exception: of any kind, if it is damaged or no such image.
    """
    image = _as_rgb(open_image(content))
    if size:
        shorter = min(image.width, image.height)
        width, height = (size * side // shorter for side in (image.width, image.height))
        _check_pixels(width, height)
        # Not `draft`, which halves a JPEG while decoding: the pixels would be others.
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips: every value above 255 would be white.
        wide = np.clip(np.asarray(image), 0, 2**16 - 1).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
