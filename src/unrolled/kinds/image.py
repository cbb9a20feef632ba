"""Pictures as input: an image, read in one step or row by row; and the convolutional reader that films share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unrolled.errors import ConfigError, DataError
from unrolled.kinds.contract import Arrays, Input, register
from unrolled.kinds.number import Scale

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    from unrolled.config import Config

__all__ = ["Image", "ImageReader", "Pictures", "RowsReader", "decode", "fit"]

Pixels = npt.NDArray[np.uint8]

_WHITE = 255


class Pictures(Input):
    """What images and films share: the size that pictures are brought to, and each colour's mean and deviation.

    Args:
        size: s, pixels a side.
        scale: of red, green and blue, as the training part has them.
    """

    def __init__(self, size: int, scale: Scale) -> None:
        self.size, self.scale = size, scale

    def reader(self, config: Config) -> nn.Module:
        return ImageReader(self.size, self.scale, config.input.features)

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, "scale": self.scale.to_json()}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Any:
        return cls(int(obj["size"]), Scale.from_json(obj["scale"]))


@register
class Image(Pictures):
    """An image: the path of a file that Pillow reads, a Pillow image, or an array of bytes [height width 3].

    Args:
        rows: read it row by row from the top, a step each, and not as one step.
    """

    kind: ClassVar[str] = "image"

    def __init__(self, size: int, scale: Scale, rows: bool = False) -> None:
        super().__init__(size, scale)
        self.rows = rows

    @classmethod
    def check(cls, value: Any) -> None:
        decode(value, 1)

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Image:
        size = config.input.size
        scale = Scale.learn(fit(decode(value, size), size).reshape(-1, 3) for value in values)
        return cls(size, scale, config.input.rows)

    def encode(self, value: Any) -> Arrays:
        """Bytes, [1 s s 3], or [s s 3] row by row; the reader scales them, so that they need little room till then."""
        pixels = fit(decode(value, self.size), self.size)
        return (pixels if self.rows else pixels[None],)

    def reader(self, config: Config) -> nn.Module:
        return RowsReader(self.size, self.scale) if self.rows else super().reader(config)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "rows": self.rows}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Image:
        return cls(int(obj["size"]), Scale.from_json(obj["scale"]), bool(obj["rows"]))


def decode(value: Any, size: int) -> Pixels:
    """A raw image as bytes [height width 3]: red, green, blue; what is transparent shows white.

    Args:
        size: the side that is wanted: a photograph may be decoded to less than all its pixels, but to twice that.

    Raises:
        DataError: no such image, or not one; the message names the file.
        ConfigError: Pillow is not installed.
    """
    if isinstance(value, np.ndarray):
        return _expect_pixels(value)
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ConfigError("reading images needs Pillow: pip install 'unrolled[image]'") from None
    if isinstance(value, PIL.Image.Image):
        return _colours(value)
    if not isinstance(value, str | os.PathLike):
        raise DataError(f"expected an image or the path of one, got {type(value).__name__}")
    path = os.fspath(value)
    try:
        with PIL.Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))
            return _colours(PIL.ImageOps.exif_transpose(image))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # each format's decoder has its own for a broken file
        raise DataError(f"{path}: not an image that can be read: {' '.join(str(error).split())}") from error


def _colours(image: Any) -> Pixels:
    """A Pillow image as bytes [height width 3]."""
    import PIL.Image

    if image.mode.startswith("I;16"):
        # Pillow would cut off whatever is brighter than 255.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise DataError(f"expected colours of 8 or 16 bits, got an image of mode {image.mode}")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), coloured)
    return np.asarray(image.convert("RGB"))


def _expect_pixels(array: npt.NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise DataError(f"expected an image of uint8 [height, width, 3], got {array.dtype} {list(array.shape)}")
    return array


def fit(pixels: Pixels, size: int) -> Pixels:
    """A picture [height width 3] brought to [size size 3]: the longer side fills it, the shape is kept, the rest is
    white. Where it gets smaller, each pixel is the weighted mean of all that it stands for."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    h, w = (max(1, round(side * size / longer)) for side in (height, width))
    if (h, w) != (height, width):
        # A copy where numpy's array is read-only, which torch warns of.
        image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
        scaled = F.interpolate(image, (h, w), mode="bilinear", antialias=True)
        pixels = scaled[0].permute(1, 2, 0).numpy()
    fitted = np.full((size, size, 3), _WHITE, np.uint8)
    top, left = (size - h) // 2, (size - w) // 2
    fitted[top : top + h, left : left + w] = pixels
    return fitted


class _Scaling(nn.Module):
    """Bytes -> scaled colours, and while training the small changes that leave a picture what it is: moved by up to 3
    pixels, its edges repeated; contrast and brightness changed by up to a tenth. One change a row of the batch, the
    same for all frames of a film."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, size: int, scale: Scale) -> None:
        super().__init__()
        self.reach = min(3, size // 16)  # of a tiny picture 3 pixels are much
        for name in ("mean", "deviation"):
            # Kept in the model's JSON, so not among its weights too.
            self.register_buffer(name, torch.tensor(getattr(scale, name), dtype=torch.float32), persistent=False)

    def draw(self, rows: int) -> Tensor | None:
        """A change for each of `rows`, [rows 4]: down, right, contrast, brightness; None where nothing is changed."""
        if not self.training:
            return None
        changes = torch.rand(rows, 4, device=self.mean.device) * 2 - 1
        changes[:, :2] = (changes[:, :2] * (self.reach + 0.5)).round().clamp(-self.reach, self.reach)
        changes[:, 2:] *= 0.1
        return changes

    def forward(self, pixels: UInt8[Tensor, "N h w 3"], changes: Float[Tensor, "N 4"] | None) -> Tensor:
        """[N 3 h w]"""
        if changes is not None:
            h, w = pixels.shape[1:3]
            down, right = changes[:, :2].long().unbind(1)
            y = (torch.arange(h, device=pixels.device) - down[:, None]).clamp(0, h - 1)
            x = (torch.arange(w, device=pixels.device) - right[:, None]).clamp(0, w - 1)
            pixels = pixels[torch.arange(len(pixels), device=pixels.device)[:, None, None], y[:, :, None], x[:, None]]
        scaled = (pixels.to(self.mean.dtype) - self.mean) / self.deviation
        if changes is not None:
            contrast, brightness = changes[:, 2:, None, None, None].to(scaled.dtype).unbind(1)
            scaled = scaled * (1 + contrast) + brightness
        return scaled.permute(0, 3, 1, 2)


class ImageReader(nn.Module):
    """Pictures -> vectors: a small convolutional network, then a linear layer on each region, the mean of all regions,
    and LayerNorm: a core's gates would soon be saturated by vectors that grow at will, and nothing learnt any more.

    Four convolutions 3 x 3, the first three of stride 2: without pooling there is half the work, and half to keep for
    the backward. Each is followed by GroupNorm and ReLU; the norm is of one picture alone, where BatchNorm would mix in
    the other rows of a batch and their padding.

    Args:
        size: s, pixels a side.
        scale: of the three colours.
        features: I, the size of a step's vector.
    """

    def __init__(self, size: int, scale: Scale, features: int) -> None:
        super().__init__()
        self.step_size = features
        self.scaling = _Scaling(size, scale)
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for below, width, stride in zip(widths, widths[1:], (2, 2, 2, 1), strict=False):
            layers += [nn.Conv2d(below, width, 3, stride, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1], features)
        self.norm = nn.LayerNorm(features)
        self.at_once = max(1, _PIXELS_AT_ONCE // size**2)

    def forward(self, pixels: UInt8[Tensor, "T B s s 3"]) -> Float[Tensor, "T B I"]:
        """A vector for each picture.

        Of many pictures a limited number is in work at a time, so that a film needs no more memory than its bytes and
        vectors; with a gradient too: what lies between is then computed again in the backward, to the same bits.
        """
        steps, batch = pixels.shape[:2]
        flat, changes = self._in_line(pixels)
        if len(flat) <= self.at_once:
            return self._vectors(flat, changes).view(steps, batch, -1)
        vectors = []
        for start in range(0, len(flat), self.at_once):
            part = slice(start, start + self.at_once)
            given = flat[part], None if changes is None else changes[part]
            vectors.append(checkpoint(self._vectors, *given, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(vectors).view(steps, batch, -1)

    def regions(self, pixels: UInt8[Tensor, "1 B s s 3"]) -> Float[Tensor, "R B I"]:
        """A vector for each of R regions of an image, row by row from its upper left, for attention to look at; their
        mean, normed, is what `forward` gives."""
        return self._regions(*self._in_line(pixels)).transpose(0, 1)

    def _in_line(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures one after the other, [N s s 3], and the change of each."""
        steps, batch = pixels.shape[:2]
        changes = self.scaling.draw(batch)
        return pixels.flatten(0, 1), None if changes is None else changes.repeat(steps, 1)

    def _regions(self, pixels: Tensor, changes: Tensor | None) -> Tensor:
        """[N s s 3] -> [N R I]"""
        found: Tensor = self.convolutions(self.scaling(pixels, changes))
        vectors: Tensor = self.linear(found.flatten(2).transpose(1, 2))
        return vectors

    def _vectors(self, pixels: Tensor, changes: Tensor | None) -> Tensor:
        """[N s s 3] -> [N I]"""
        vectors: Tensor = self.norm(self._regions(pixels, changes).mean(1))
        return vectors


_PIXELS_AT_ONCE = 2**19
"""About 200 pictures of 48 x 48, under 100 MB in work: enough to keep the processor busy, and no burden anywhere."""


class RowsReader(nn.Module):
    """An image row by row: the scaled colours of its pixels are a step's vector, nothing is learnt here.

    Args:
        size: s, pixels a side; scale: of the three colours.
    """

    def __init__(self, size: int, scale: Scale) -> None:
        super().__init__()
        self.step_size = 3 * size
        self.scaling = _Scaling(size, scale)

    def forward(self, pixels: UInt8[Tensor, "T B s 3"]) -> Float[Tensor, "T B I"]:
        """T rows of each image."""
        images = pixels.transpose(0, 1)
        scaled: Tensor = self.scaling(images, self.scaling.draw(len(images)))  # [B 3 T s]
        return scaled.permute(2, 0, 3, 1).flatten(2)
