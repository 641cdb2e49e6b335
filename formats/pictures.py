"""Pictures as Pillow opens them: sizes, depths and transparency. data.py makes pixels of them."""
import numpy as np
from PIL import Image


def check_size(image):
    """Raise DecompressionBombError if a picture would take too much memory."""
    width, height = image.size
    # Above this limit Pillow only warns; it raises at twice the limit
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height} pixels")
    # Padded to a square with 4 bytes per pixel, 1 x 65000 would take 17 GB
    long, short = max(image.size), min(image.size)
    if long ** 2 > 4 * Image.MAX_IMAGE_PIXELS or long > 1000 * short:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels: too long, or too large as a square")


def eight_bits(image):
    """A picture with at most 8 bits per channel; of deep grey, the upper 8 of those in use.

    Grey of 8, 10, 12 or 14 bits is often saved in 16 or 32: the smallest of these depths that holds
    all values is taken. Raises ValueError if white has no certain value.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose value for white is unknown: "
                         "save it with 8 bits")
    if not image.mode.startswith("I"):  # I;16, I;16B or I: grey with more than 8 bits
        return image
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"grey values from {grey.min()} to {grey.max()}, expected at most 16 bits")
    depth = next(bits for bits in (8, 10, 12, 14, 16) if grey.max() < 2 ** bits)
    return Image.fromarray((grey >> depth - 8).astype(np.uint8))


def flatten(image, background):
    """A picture in RGB. Transparency is dropped as in LLaVA ("none"), or shows "white"."""
    if image.mode == "RGBA" and background == "white":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_flat(image):
    """Whether an RGB or RGBA picture has only one colour."""
    return all(low == high for low, high in image.getextrema())
