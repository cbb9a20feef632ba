"""Pictures as input: an image, read in one step or row by row; and the convolutional reader that films share."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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

__all__ = ["Image", "ImageReader", "Pictures", "PlacesReader", "RowsReader", "decode", "fit"]

Pixels = npt.NDArray[np.uint8]

_WHITE = 255


class Pictures(Input):
    """What images and films share: the size that pictures are brought to, and each colour's mean and deviation.

    Args:
        size: s, pixels a side.
        scale: of red, green and blue, as the training part has them.
    """

    frames: ClassVar[bool] = False
    """Whether many pictures make one example, and padding stands among them."""

    def __init__(self, size: int, scale: Scale) -> None:
        self.size, self.scale = size, scale

    def reader(self, config: Config) -> nn.Module:
        settings = config.input
        if settings.places:
            return PlacesReader(self.size, self.scale, settings.places, augment=settings.augment)
        return ImageReader(self.size, self.scale, settings.features, frames=self.frames, augment=settings.augment)

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
        if self.rows:
            return RowsReader(self.size, self.scale, augment=config.input.augment)
        return super().reader(config)

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


class _Changes(NamedTuple):
    """What is changed in N pictures. places: where in the picture what is seen at a place is taken from (see
    `torch.nn.functional.affine_grid`); colours: each as a mixture of all; brightness: what is added to them."""

    places: Float[Tensor, "N 2 3"]
    colours: Float[Tensor, "N 3 3"]
    brightness: Float[Tensor, "N"]

    def repeat(self, times: int) -> _Changes:
        """The same for several pictures of each row, [times N] in line."""
        return _Changes(*(t.repeat(times, *[1] * (t.dim() - 1)) for t in self))

    def part(self, some: slice) -> _Changes:
        return _Changes(*(t[some] for t in self))


class _Scaling(nn.Module):
    """Bytes -> scaled colours, and while training the changes that leave a picture what it is: turned by up to 15
    degrees, larger or smaller by up to a fifth, moved by up to a sixteenth of its side, its edges repeated; colours
    mixed, contrast and brightness changed by up to a fifth. One change a row of the batch, the same for all frames of a
    film.

    Args:
        scale: of the three colours.
        augment: false: change nothing while training either.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, scale: Scale, augment: bool = True) -> None:
        super().__init__()
        self.augment = augment
        for name in ("mean", "deviation"):
            # Kept in the model's JSON, so not among its weights too.
            self.register_buffer(name, torch.tensor(getattr(scale, name), dtype=torch.float32), persistent=False)

    def draw(self, rows: int) -> _Changes | None:
        """A change for each of `rows`; None where nothing is changed."""
        if not (self.training and self.augment):
            return None
        a = torch.rand(rows, 7 + 9, device=self.mean.device) * 2 - 1
        angle, larger = a[:, 0] * math.radians(15), 1 + a[:, 1] * 0.2
        cos, sin = torch.cos(angle) / larger, torch.sin(angle) / larger
        wider, (right, down) = 1 + a[:, 2] * 0.1, (a[:, 3:5] / 8).unbind(1)  # a picture's side is 2, from -1 to 1
        places = torch.stack([cos * wider, -sin * wider, right, sin, cos, down], dim=1).view(rows, 2, 3)
        mixed = torch.eye(3, device=a.device) + 0.15 * a[:, 7:].view(rows, 3, 3)
        return _Changes(places, mixed * (1 + 0.2 * a[:, 5, None, None]), 0.2 * a[:, 6])

    def forward(self, pixels: UInt8[Tensor, "N h w 3"], changes: _Changes | None) -> Float[Tensor, "N 3 h w"]:
        scaled = ((pixels.to(self.mean.dtype) - self.mean) / self.deviation).permute(0, 3, 1, 2)
        if changes is None:
            return scaled
        places, colours, brightness = (t.to(scaled.dtype) for t in changes)
        with torch.autocast(scaled.device.type, enabled=False):
            grid = F.affine_grid(places, list(scaled.shape), align_corners=False)
            moved = F.grid_sample(scaled, grid, padding_mode="border", align_corners=False)
            return torch.einsum("nij,njhw->nihw", colours, moved) + brightness[:, None, None, None]


class _Reader(nn.Module, ABC):
    """Pictures -> vectors, each of its own picture alone, a limited number of pictures at a time.

    Args:
        step_size: I, the size of a step's vector.
        at_once: how many pictures are in work at a time.
    """

    def __init__(self, step_size: int, scaling: _Scaling, at_once: int) -> None:
        super().__init__()
        self.step_size, self.scaling, self.at_once = step_size, scaling, max(1, at_once)

    def forward(self, pixels: UInt8[Tensor, "T B s s 3"]) -> Float[Tensor, "T B I"]:
        """A vector for each picture.

        Of many pictures a limited number is in work at a time, so that a film needs no more memory than its bytes and
        vectors; with a gradient too: what lies between is then computed again in the backward, to the same bits.
        """
        steps, batch = pixels.shape[:2]
        flat, changes = pixels.flatten(0, 1), self.scaling.draw(batch)
        if changes is not None:
            changes = changes.repeat(steps)
        if len(flat) <= self.at_once:
            return self._normed(self._vectors(flat, changes), steps)
        vectors = []
        for start in range(0, len(flat), self.at_once):
            part = slice(start, start + self.at_once)
            given = flat[part], None if changes is None else changes.part(part)
            vectors.append(checkpoint(self._vectors, *given, use_reentrant=False, preserve_rng_state=False))
        return self._normed(torch.cat(vectors), steps)

    def _normed(self, vectors: Float[Tensor, "N I"], steps: int) -> Float[Tensor, "T B I"]:
        return vectors.view(steps, -1, self.step_size)

    @abstractmethod
    def _vectors(self, pixels: UInt8[Tensor, "N s s 3"], changes: _Changes | None) -> Float[Tensor, "N I"]:
        """Of pictures that are in work at the same time, with the changes that were drawn for them."""


class ImageReader(_Reader):
    """Pictures -> vectors: a small convolutional network, a matrix of its own for each region of what it finds, so that
    where something is counts too, the sum, and a norm: a core's gates would soon be saturated by vectors that grow at
    will, and nothing learnt any more.

    Of images it is BatchNorm, which takes away what all of them have in common: a core that writes learns first to
    write what suits any image, and would do so through vectors that are all alike. Of frames it is LayerNorm, since
    padding stands among them.

    Four convolutions 3 x 3, the first three of stride 2: without pooling there is half the work, and half to keep for
    the backward. Each is followed by GroupNorm and ReLU; the norm is of one picture alone, where BatchNorm would mix in
    the other rows of a batch and their padding.

    Args:
        size: s, pixels a side.
        scale: of the three colours.
        features: I, the size of a step's vector.
        frames: whether the pictures are those of films.
        augment: whether changed copies are trained on.
    """

    def __init__(self, size: int, scale: Scale, features: int, *, frames: bool = False, augment: bool = True) -> None:
        super().__init__(features, _Scaling(scale, augment), _PIXELS_AT_ONCE // size**2)
        widths, strides = (3, 32, 64, 128, 128), (2, 2, 2, 1)
        layers: list[nn.Module] = []
        for below, width, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [nn.Conv2d(below, width, 3, stride, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
            size = (size - 1) // stride + 1
        if size > _REGIONS:  # the matrices of all regions would be most of the model
            size = _REGIONS
            layers.append(nn.AdaptiveAvgPool2d(size))
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1] * size**2, features)
        self.norm = nn.LayerNorm(features) if frames else _BatchNorm(features)

    def _normed(self, vectors: Float[Tensor, "N I"], steps: int) -> Float[Tensor, "T B I"]:
        return super()._normed(self.norm(vectors), steps)

    def _vectors(self, pixels: UInt8[Tensor, "N s s 3"], changes: _Changes | None) -> Float[Tensor, "N I"]:
        vectors: Tensor = self.linear(self.convolutions(self.scaling(pixels, changes)).flatten(1))
        return vectors


class PlacesReader(_Reader):
    """Pictures -> places: not what is in each region of a picture, but where in it each of K things is.

    Convolutions make K maps z_k of a picture, one for each thing that is looked for. A softmax over the places (x, y)
    of a map says where the thing may be, and the mean of the places under it where it is, to fractions of a pixel:

        p_k(x, y) = exp(a_k z_k(x, y)) / sum_x'y' exp(a_k z_k(x', y'));   vector_k = c sum_xy p_k(x, y) (x, y)

    with x to the right and y downwards, from -1 to 1 from edge to edge (Levine et al. 2016, arXiv 1504.00702; Finn et
    al. 2016, arXiv 1509.06113). What is learnt at one place of a picture is known at all others, and how far a thing
    moved from frame to frame is the difference of two numbers.

    Each map has mean 0 and deviation 1, of its picture alone, and a_k is learnt. So what stands out of a map is found
    from the first update on, whatever the scale of the weights; where nothing does, it is in the middle. No norm
    follows: one over a picture's vector would move all its places when one thing moves.

    Three convolutions 3 x 3, the first of stride 2, with GroupNorm and ReLU between them. Beyond its edges a picture
    goes on as at them: zeros there would be edges that stand out.

    Args:
        size: s, pixels a side.
        scale: of the three colours.
        places: K; a step's vector has I = 2 K numbers, x of all and then y of all.
        augment: whether changed copies are trained on.
    """

    def __init__(self, size: int, scale: Scale, places: int, *, augment: bool = True) -> None:
        super().__init__(2 * places, _Scaling(scale, augment), _PIXELS_AT_ONCE // size**2)

        def convolution(below: int, width: int, stride: int = 1) -> nn.Module:
            return nn.Conv2d(below, width, 3, stride, padding=1, padding_mode="replicate", bias=False)

        first, second = _PLACES_WIDTHS
        self.convolutions = nn.Sequential(
            *(convolution(3, first, stride=2), nn.GroupNorm(8, first), nn.ReLU()),
            *(convolution(first, second), nn.GroupNorm(8, second), nn.ReLU()),
            *(convolution(second, places), nn.GroupNorm(places, places, affine=False)),
        )
        self.sharpness = nn.Parameter(torch.full((places,), math.log(_SHARPNESS)))  # log a_k

    def _vectors(self, pixels: UInt8[Tensor, "N s s 3"], changes: _Changes | None) -> Float[Tensor, "N I"]:
        maps: Tensor = self.convolutions(self.scaling(pixels, changes))
        with torch.autocast(maps.device.type, enabled=False):  # bf16 has 8 bits: it would lose what a frame moves
            scores = maps.to(self.sharpness.dtype) * self.sharpness.exp()[:, None, None]
            chances = scores.flatten(2).softmax(-1).view_as(scores)
            side = scores.shape[-1]
            at = (torch.arange(side, dtype=scores.dtype, device=scores.device) * 2 + 1) / side - 1
            return _SPREAD * torch.cat([chances.sum(2) @ at, chances.sum(3) @ at], dim=1)


_PLACES_WIDTHS = (16, 32)
"""Channels of the first two convolutions that look for places."""

_SHARPNESS = 1.0
"""a_k at first: what is small stands out of its map by several deviations, and has most of the softmax then. At 3, one
pixel has it all, and what lies between pixels is lost."""

_SPREAD = 8.0
"""c: what moves within a picture moves by an eighth of its side or so, and a core reads numbers of deviation 1 well."""


class _BatchNorm(nn.BatchNorm1d):
    """A batch of one picture has no deviation: it is normed as in evaluation."""

    def forward(self, input: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        if len(input) > 1 or not self.training:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


_REGIONS = 8
"""Regions of a picture, down and across, at most: those of a picture of 64 x 64."""

_PIXELS_AT_ONCE = 2**19
"""About 200 pictures of 48 x 48, under 100 MB in work: enough to keep the processor busy, and no burden anywhere."""


class RowsReader(nn.Module):
    """An image row by row: the scaled colours of its pixels are a step's vector, nothing is learnt here.

    Args:
        size: s, pixels a side; scale: of the three colours; augment: whether changed copies are trained on.
    """

    def __init__(self, size: int, scale: Scale, *, augment: bool = True) -> None:
        super().__init__()
        self.step_size = 3 * size
        self.scaling = _Scaling(scale, augment)

    def forward(self, pixels: UInt8[Tensor, "T B s 3"]) -> Float[Tensor, "T B I"]:
        """T rows of each image."""
        images = pixels.transpose(0, 1)
        scaled: Tensor = self.scaling(images, self.scaling.draw(len(images)))  # [B 3 T s]
        return scaled.permute(2, 0, 3, 1).flatten(2)
