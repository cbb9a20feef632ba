"""Films as input, a step a frame."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from unrolled.errors import ConfigError, DataError
from unrolled.kinds.contract import Arrays, register
from unrolled.kinds.image import Pictures, Pixels, fit
from unrolled.kinds.number import Scale

if TYPE_CHECKING:
    from unrolled.config import Config

__all__ = ["Video", "frame_times"]

_BLOCK = 64
"""Frames that `encode` hands out together."""


@register
class Video(Pictures):
    """A film: the path of a file that FFmpeg reads; its first video stream, each frame a step, whatever its time (see
    `frame_times`)."""

    kind: ClassVar[str] = "video"

    @classmethod
    def check(cls, value: Any) -> None:
        for _ in _frames(value):
            pass

    @classmethod
    def learn(cls, values: Iterable[Any], config: Config) -> Video:
        """Of every tenth frame: all are decoded, but for colours those are enough."""
        size = config.input.size

        def colours() -> Iterator[Pixels]:
            for value in values:
                for frame in islice(_frames(value), 0, None, 10):
                    yield fit(_pixels(frame), size).reshape(-1, 3)

        return cls(size, Scale.learn(colours()))

    def encode(self, value: Any) -> Arrays:
        """Bytes, blocks [n s s 3] of consecutive frames as they are asked for: a film is never in memory whole.

        A film that cannot be opened is an error at once; one that breaks further on is when its blocks come there.
        """
        blocks = self._blocks(value)
        return (chain([next(blocks)], blocks),)

    def _blocks(self, value: Any) -> Iterator[Pixels]:
        frames = (fit(_pixels(frame), self.size) for frame in _frames(value))
        while block := list(islice(frames, _BLOCK)):
            yield np.stack(block)


def frame_times(value: Any) -> npt.NDArray[np.float64]:
    """When each frame of a film is shown, seconds from its beginning, [T]; all of it is decoded for that, since what
    the file says of itself is often not so.

    Raises:
        DataError, ConfigError: as `Video.encode`.
    """
    times = [np.nan if frame.time is None else frame.time for frame in _frames(value)]
    return np.array(times, np.float64)


def _frames(value: Any) -> Iterator[Any]:
    """The frames of a film, at least one.

    Raises:
        DataError: it cannot be read; the message names the file.
        ConfigError: PyAV is not installed.
    """
    try:
        import av
        import av.error
    except ImportError:
        raise ConfigError("reading videos needs PyAV: pip install 'unrolled[video]'") from None
    if not isinstance(value, str | os.PathLike):
        raise DataError(f"expected the path of a video, got {type(value).__name__}")
    path, read = os.fspath(value), 0
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        # The open file: a path given to av could be an address of the network.
        with file, av.open(file, "r") as film:
            if film.streams.video:
                stream = film.streams.video[0]
                stream.thread_type = "AUTO"
                for frame in film.decode(stream):
                    read += 1
                    yield frame
    except (av.error.FFmpegError, OSError) as error:
        where = f" after frame {read}" if read else ""
        raise DataError(f"{path}: not a video that can be read{where}: {error.strerror or error}") from error
    if not read:
        raise DataError(f"{path}: no frames in it: it is no video, or was cut short")


def _pixels(frame: Any) -> Pixels:
    """A frame as bytes [height width 3], red, green, blue, upright as a player would show it."""
    pixels: Pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return pixels
