"""The first frame of image-to-video: reading it, and fitting it to the size of the clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError


def load_image(image: str | Path | Tensor | Any) -> Tensor:
    """An image as ``[3, H, W]`` fp32 in [-1, 1].

    Takes a file (any format Pillow reads; its orientation tag is obeyed, transparency is laid on white), a Pillow
    image, a uint8 array ``[H, W, 3]``, or a tensor ``[3, H, W]`` already in [-1, 1].

    Raises:
        UsageError: the file is missing or is no image.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UsageError(f"An image tensor has to be float [3, H, W] in [-1, 1], not {list(image.shape)}.")
        return image.float()
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
        except FileNotFoundError:
            raise UsageError(f"--image {image}: there is no such file.") from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... by format
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise UsageError(f"--image {image} cannot be read as an image ({reason}).") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UsageError(f"An image array has to be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}.")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UsageError(f"image has to be a file, a Pillow image, an array or a tensor, not {type(image).__name__}.")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def fit_image(image: Tensor, height: int, width: int) -> Tensor:
    """``[3, H, W]`` -> ``[3, height, width]``: antialiased bilinear resize until it covers the target, centre crop.

    Sizes are rounded as Python's ``round`` does and the crop starts at the floor, as in the official pipeline.
    """
    scale = max(height / image.shape[1], width / image.shape[2])
    size = (round(image.shape[1] * scale), round(image.shape[2] * scale))
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top : top + height, left : left + width]
