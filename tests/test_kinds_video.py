"""Films as input: read frame by frame from files that the tests make."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from ends import Small, again, config_of

from unrolled.errors import ConfigError, DataError
from unrolled.kinds import video as video_module
from unrolled.kinds.contract import INPUTS
from unrolled.kinds.image import ImageReader, PlacesReader, fit
from unrolled.kinds.label import Label, Labels
from unrolled.kinds.number import Scale
from unrolled.kinds.video import Video, frame_times

CONFIG = config_of("input.kind=video", "output.kind=label", "input.size=16", "input.features=24")
PLACES = config_of("input.kind=video", "output.kind=label", "input.size=16", "input.places=12")


def write(path: Path, frames: Sequence[Any], codec: str = "mpeg4", rate: int = 10, **options: str) -> Path:
    """A film of frames uint8 [h w 3]."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2] if len(frames) else (32, 32)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "bgr0" if codec == "ffv1" else "yuv420p"
        for pixels in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())
    return path


def shades(count: int, height: int = 32, width: int = 32) -> list[Any]:
    """Frames that get lighter."""
    return [np.full((height, width, 3), 20 + 180 * t // max(count - 1, 1), np.uint8) for t in range(count)]


def noise(count: int) -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8))


def whole(video: Video, path: Path) -> Any:
    (blocks,) = video.encode(path)
    return np.concatenate(list(blocks))


def untrained() -> Video:
    return again(Video(16, Video.learn([FILMS["short"]], CONFIG).scale))


FILMS: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _films(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("films")
    FILMS["short"] = write(folder / "short.mp4", shades(9))
    FILMS["long"] = write(folder / "long.avi", shades(150), codec="mjpeg")
    FILMS["exact"] = write(folder / "exact.mkv", noise(7), codec="ffv1")


def test_kind_is_known() -> None:
    assert INPUTS["video"] is Video


def test_frames_come_in_order_in_blocks_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fitted = video_module.fit
    monkeypatch.setattr(video_module, "fit", lambda *args: (seen.append(1), fitted(*args))[1])
    video = untrained()
    seen.clear()
    (blocks,) = video.encode(FILMS["long"])
    assert not isinstance(blocks, np.ndarray)
    first = next(blocks)
    assert len(seen) == len(first) == 64, "no more was decoded than was asked for"
    rest = list(blocks)
    assert [len(block) for block in rest] == [64, 22]
    frames = np.concatenate([first, *rest])
    assert frames.shape == (150, 16, 16, 3)
    assert frames.dtype == np.uint8
    light = frames.mean((1, 2, 3))
    np.testing.assert_allclose(light, [frame.mean() for frame in shades(150)], atol=3)


def test_frames_are_brought_to_size_as_images_are() -> None:
    frames = whole(untrained(), FILMS["exact"])
    np.testing.assert_array_equal(frames, [fit(frame, 16) for frame in noise(7)])


def test_colours_are_those_of_every_tenth_frame_of_the_training_part() -> None:
    video = Video.learn([FILMS["exact"], FILMS["long"]], CONFIG)
    fitted = [fit(noise(1)[0], 16), *whole(video, FILMS["long"])[::10]]
    seen = np.stack(fitted).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(video.scale.mean, seen.mean(0))
    np.testing.assert_allclose(video.scale.deviation, seen.std(0))


def test_json_gives_the_same_encoding() -> None:
    video = Video.learn([FILMS["exact"]], CONFIG)
    np.testing.assert_array_equal(whole(again(video), FILMS["short"]), whole(video, FILMS["short"]))
    np.testing.assert_array_equal(again(video).scale.deviation, video.scale.deviation)


@pytest.mark.parametrize("codec, options", [("mpeg4", {"bf": "2"}), ("mjpeg", {})])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_times_are_those_of_the_frames(tmp_path: Path, codec: str, options: dict[str, str], ending: str) -> None:
    path = write(tmp_path / f"film.{ending}", shades(20), codec=codec, **options)
    times = frame_times(path)
    assert len(times) == len(whole(untrained(), path))
    assert len(times) >= 20 - 2, "a codec that looks ahead may keep its last frames in an old container"
    np.testing.assert_allclose(np.diff(times), 0.1, atol=2e-3)


def test_a_film_that_was_taken_on_its_side_stands_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    path = write(tmp_path / "turned.mp4", [pixels] * 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # as a telephone has it: to be turned clockwise by a quarter
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    frames = whole(untrained(), path)
    assert frames[:, :7, 5:11].mean() < 20, "the left half is above now"
    assert frames[:, 9:, 5:11].mean() > 235
    assert (frames[:, :, :4] == 255).all(), "white beside it"


def test_frames_with_times_of_their_own_keep_them(tmp_path: Path) -> None:
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mjpeg", rate=10)
        stream.pix_fmt = "yuvj420p"
        stream.height = stream.width = 32
        stream.codec_context.time_base = Fraction(1, 100)
        for pixels, time in zip(shades(4), (0, 10, 50, 55), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    np.testing.assert_allclose(frame_times(path), [0, 0.1, 0.5, 0.55], atol=2e-3)


# --- what is refused


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path, content = tmp_path / "broken.mp4", FILMS["short"].read_bytes()
    for broken in (content[: len(content) // 2], b"", bytes(range(256)) * 9):
        path.write_bytes(broken)
        for use in (untrained().encode, frame_times, lambda one: Video.learn([one], CONFIG)):
            with pytest.raises(DataError) as caught:
                use(path)
            assert str(caught.value).startswith((f"{path}: not a video that can be read", f"{path}: no frames in it: "))
            assert "\n" not in str(caught.value)


def test_a_film_that_breaks_further_on_says_where(tmp_path: Path) -> None:
    path = tmp_path / "breaks.mkv"
    content = bytearray(FILMS["exact"].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8))
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: not a video that can be read after frame \d: "):
        whole(untrained(), path)


def test_a_film_without_frames_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        film.mux(stream.encode(frame))
    with pytest.raises(DataError) as caught:
        untrained().encode(path)
    assert str(caught.value) == f"{path}: no frames in it: it is no video, or was cut short"


def test_what_is_not_there_or_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone.mp4: No such file or directory"):
        untrained().encode(tmp_path / "gone.mp4")
    with pytest.raises(DataError, match="expected the path of a video, got int"):
        untrained().encode(3)


def test_without_pyav_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    video = untrained()
    for name in ("av", "av.error"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        video.encode(FILMS["short"])
    assert str(caught.value) == "reading videos needs PyAV: pip install 'unrolled[video]'"


# --- the reader, and what can be learnt


@pytest.mark.parametrize("config, kind", [(CONFIG, ImageReader), (PLACES, PlacesReader)])
def test_films_are_padded_and_read_frame_by_frame(config: Any, kind: type) -> None:
    video = untrained()
    rows = [(whole(video, FILMS[name]),) for name in ("short", "exact")]
    steps = video.collate(rows)
    assert steps.lengths.tolist() == [9, 7]
    reader = video.reader(config).eval()
    assert isinstance(reader, kind)
    x = reader(*steps.tensors)
    assert x.shape == (9, 2, 24)
    for b, (frames,) in enumerate(rows):
        alone = reader(torch.from_numpy(frames)[:, None])
        torch.testing.assert_close(x[: len(frames), b], alone[:, 0])
        for t, frame in enumerate(frames):
            torch.testing.assert_close(reader(torch.from_numpy(frame)[None, None])[0, 0], x[t, b])


@pytest.mark.parametrize("config", [CONFIG, PLACES])
def test_a_change_in_training_is_the_same_for_all_frames_of_a_film(config: Any) -> None:
    video = untrained()
    reader = video.reader(config).train()
    still = torch.from_numpy(fit(noise(1)[0], 16)).expand(6, 2, 16, 16, 3)
    x = reader(still)
    torch.testing.assert_close(x, x[:1].expand_as(x))
    assert (x[:, 0] - x[:, 1]).abs().max() > 1e-3


def films_of_a_dot(count: int, seed: int) -> tuple[list[Any], list[str]]:
    """Frames in which a dot falls or rises, and which it does."""
    draw, films, names = np.random.default_rng(seed), [], []
    for _ in range(count):
        frames = draw.integers(0, 60, (8, 16, 16, 3), dtype=np.uint8)
        left, falls = draw.integers(0, 12), bool(draw.random() < 0.5)
        for t in range(8):
            top = t + 2 if falls else 9 - t
            frames[t, top : top + 4, left : left + 4] = 250
        films.append(frames)
        names.append("falls" if falls else "rises")
    return films, names


class _Ready(Video):
    """Takes frames that are decoded already."""

    def encode(self, value: Any) -> Any:
        return (value,)


@pytest.mark.parametrize("config", [CONFIG, PLACES])
def test_the_direction_of_a_movement_is_learnt(config: Any) -> None:
    torch.manual_seed(0)
    video = _Ready(16, untrained().scale)
    model = Small(config, video, Label.learn(["falls", "rises"], config))
    model.learn([films_of_a_dot(32, seed) for seed in range(60)], lr=3e-3)
    films, names = films_of_a_dot(100, 99)
    answers = model.say(films)
    assert sum(a == b for a, b in zip(answers, names, strict=True)) >= 95


def test_each_frame_has_its_label() -> None:
    torch.manual_seed(0)
    config = config_of("input.kind=video", "output.kind=labels", "input.size=16", "input.features=24")
    model = Small(config, _Ready(16, Scale([100.0] * 3, [60.0] * 3)), Labels.learn(["dark", "light"], config))
    draw = np.random.default_rng(5)

    def film(length: int) -> tuple[Any, list[str]]:
        light = draw.random(length) < 0.5
        frames = draw.integers(0, 80, (length, 16, 16, 3), dtype=np.uint8)
        frames[light] += 120
        return frames, ["light" if one else "dark" for one in light]

    def some(count: int) -> Any:
        return tuple(zip(*(film(int(draw.integers(1, 9))) for _ in range(count)), strict=True))

    model.learn([some(16) for _ in range(25)])
    films, wanted = some(20)
    answers = model.say(films)
    assert [len(one) for one in answers] == [len(one) for one in wanted]
    pairs = [pair for found, names in zip(answers, wanted, strict=True) for pair in zip(found, names, strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.97 * len(pairs)
