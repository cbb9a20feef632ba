"""Images as input: brought to one size and scaled; a convolutional reader whose rows do not know of each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from ends import Small, again, config_of

from unrolled.errors import ConfigError, DataError
from unrolled.kinds import image as image_module
from unrolled.kinds.contract import INPUTS
from unrolled.kinds.image import Image, ImageReader, PlacesReader, RowsReader, decode, fit
from unrolled.kinds.label import Label
from unrolled.kinds.number import Scale

CONFIG = config_of("input.kind=image", "output.kind=label", "input.size=16", "input.features=24")
ROWS = config_of("input.kind=image", "output.kind=label", "input.size=16", "input.rows=true")
PLACES = config_of("input.kind=image", "output.kind=label", "input.size=16", "input.places=5", "input.augment=false")
DRAW = np.random.default_rng(0)
SPREAD = image_module._SPREAD
RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(height: int = 16, width: int = 16) -> Any:
    return DRAW.integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(colour: tuple[int, int, int], height: int, width: int) -> Any:
    return np.full((height, width, 3), colour, np.uint8)


PICTURES = [picture() for _ in range(6)]


def test_kind_is_known() -> None:
    assert INPUTS["image"] is Image


# --- bytes


def test_the_shape_is_kept_and_the_rest_is_white() -> None:
    wide = fit(plain(RED, 20, 80), 16)
    assert wide.shape == (16, 16, 3)
    assert (wide[6:10] == RED).all()
    assert (wide[:6] == WHITE).all()
    assert (wide[10:] == WHITE).all()
    tall = fit(plain(RED, 8, 2), 16)
    assert (tall[:, 6:10] == RED).all()
    assert (tall[:, :6] == WHITE).all()
    assert fit(plain(RED, 1, 1000), 16).shape == (16, 16, 3), "a line stays a line of one pixel"


def test_a_picture_of_the_size_stays_as_it_is() -> None:
    np.testing.assert_array_equal(fit(PICTURES[0], 16), PICTURES[0])


def test_a_smaller_picture_is_the_mean_of_what_it_stands_for() -> None:
    # A board of single black and white pixels is grey from afar; were pixels only picked, it would be one of the two.
    board = np.indices((128, 128)).sum(0) % 2 * 255
    grey = fit(np.repeat(board[..., None], 3, -1).astype(np.uint8), 16)
    assert (np.abs(grey.astype(int) - 127.5) < 3).all()


def test_all_ways_to_give_an_image_are_the_same(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(PICTURES[0])
    image.save(tmp_path / "a.png")
    for raw in (PICTURES[0], image, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(decode(raw, 16), PICTURES[0])


@pytest.mark.parametrize(
    "mode, colour, seen",
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("LA", (0, 0), WHITE),
        ("L", 7, (7, 7, 7)),
        ("1", 0, (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), RED),
        ("I;16", 256 * 9 + 200, (9, 9, 9)),
    ],
)
def test_every_mode_becomes_red_green_blue_on_white(mode: str, colour: Any, seen: Any) -> None:
    assert (decode(PIL.Image.new(mode, (4, 3), colour), 16) == seen).all()


def test_half_transparent_is_mixed_with_white() -> None:
    (mixed,) = {tuple(pixel) for pixel in decode(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 128)), 16).reshape(-1, 3)}
    assert mixed[0] == 255
    assert abs(mixed[1] - 127) <= 1


def test_a_photograph_stands_as_it_was_taken(tmp_path: Path) -> None:
    pixels = plain(WHITE, 8, 16)
    pixels[:, :8] = 0
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95, exif=turned)
    seen = decode(tmp_path / "photo.jpg", 16)
    assert seen.shape == (16, 8, 3)
    assert seen[:6].mean() < 10, "the left half is above now"
    assert seen[-6:].mean() > 245


def test_a_large_photograph_is_decoded_to_what_is_needed(tmp_path: Path) -> None:
    PIL.Image.fromarray(plain(RED, 800, 1600)).save(tmp_path / "large.jpg", quality=95)
    height, width, _ = decode(tmp_path / "large.jpg", 16).shape
    assert 32 <= height < 800
    assert width == 2 * height
    assert (np.abs(fit(decode(tmp_path / "large.jpg", 16), 16)[4:12] - np.int64(RED)) <= 2).all()


# --- what is learnt, and what is refused


def test_colours_are_scaled_by_those_of_the_training_part() -> None:
    image = Image.learn(PICTURES, CONFIG)
    (encoded,) = image.encode(PICTURES[0])
    assert encoded.dtype == np.uint8
    assert encoded.shape == (1, 16, 16, 3)
    seen = np.stack(PICTURES).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(image.scale.mean, seen.mean(0))
    np.testing.assert_allclose(image.scale.deviation, seen.std(0))
    scaled = RowsReader(16, image.scale).eval()(torch.from_numpy(encoded).transpose(0, 1))  # [16 1 48]
    wanted = (PICTURES[0] - seen.mean(0)) / seen.std(0)
    np.testing.assert_allclose(scaled[:, 0].reshape(16, 16, 3).numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, ROWS, PLACES])
def test_json_gives_the_same_encoding_and_reading(config: Any) -> None:
    image = Image.learn(PICTURES, config)
    back = again(image)
    raw = picture(9, 30)
    np.testing.assert_array_equal(back.encode(raw)[0], image.encode(raw)[0])
    steps = image.collate([image.encode(PICTURES[0])])
    readers = [end.reader(config).eval() for end in (image, back)]
    readers[1].load_state_dict(readers[0].state_dict())
    torch.testing.assert_close(readers[1](*steps.tensors), readers[0](*steps.tensors), rtol=0, atol=0)


@pytest.mark.parametrize(
    "raw, message",
    [
        (np.zeros((4, 4, 3)), "expected an image of uint8 [height, width, 3], got float64 [4, 4, 3]"),
        (np.zeros((4, 4), np.uint8), "expected an image of uint8 [height, width, 3], got uint8 [4, 4]"),
        (np.zeros((0, 4, 3), np.uint8), "expected an image of uint8 [height, width, 3], got uint8 [0, 4, 3]"),
        (3, "expected an image or the path of one, got int"),
        (PIL.Image.new("F", (2, 2)), "expected colours of 8 or 16 bits, got an image of mode F"),
    ],
)
def test_what_is_no_image_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        Image.learn([raw], CONFIG)
    assert str(caught.value) == message


@pytest.mark.parametrize("format", ["png", "jpg", "gif", "bmp", "webp"])
def test_a_broken_file_is_named(tmp_path: Path, format: str) -> None:
    whole, path = tmp_path / f"whole.{format}", tmp_path / f"broken.{format}"
    PIL.Image.fromarray(picture(64, 64)).save(whole)
    image = Image.learn([whole], CONFIG)
    content = whole.read_bytes()
    for broken in (content[: len(content) // 2], content[:10], b"", b"no image\n" * 9):
        path.write_bytes(broken)
        with pytest.raises(DataError) as caught:
            image.encode(path)
        assert str(caught.value).startswith(f"{path}: not an image that can be read: ")
        assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_has_other_colours_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone.png: No such file or directory"):
        decode(tmp_path / "gone.png", 16)
    PIL.Image.new("F", (2, 2)).save(tmp_path / "measured.tiff")
    with pytest.raises(DataError, match=r"measured.tiff: expected colours of 8 or 16 bits, got an image of mode F"):
        decode(tmp_path / "measured.tiff", 16)


def test_without_pillow_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PIL", "PIL.Image", "PIL.ImageOps"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        decode(tmp_path / "a.png", 16)
    assert str(caught.value) == "reading images needs Pillow: pip install 'unrolled[image]'"
    assert decode(PICTURES[0], 16) is PICTURES[0], "an array needs none"


# --- readers


def pixels(*pictures: Any) -> torch.Tensor:
    """[1 B s s 3]"""
    return torch.from_numpy(np.stack(pictures))[None]


def reader_of(config: Any = CONFIG, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Image.learn(PICTURES, config).reader(config).eval()


@pytest.mark.parametrize("config, width", [(CONFIG, 24), (PLACES, 10)])
def test_a_rows_vector_does_not_depend_on_the_batch_or_on_padding(config: Any, width: int) -> None:
    reader = reader_of(config)
    assert reader.step_size == width
    together = reader(pixels(*PICTURES))
    assert together.shape == (1, 6, width)
    for b, one in enumerate(PICTURES):
        torch.testing.assert_close(reader(pixels(one))[0, 0], together[0, b])
    padded = torch.zeros(4, 6, 16, 16, 3, dtype=torch.uint8)
    padded[:1] = pixels(*PICTURES)
    torch.testing.assert_close(reader(padded)[:1], together)


def test_where_something_is_counts() -> None:
    reader, spot = reader_of(), plain(WHITE, 16, 16)
    spot[:4, :4] = RED
    # Turned by a half: the same spot in another corner, which a sum over all regions alike would not tell.
    here, there = (reader(pixels(one))[0, 0] for one in (spot, np.ascontiguousarray(spot[::-1, ::-1])))
    assert (here - there).norm() > 0.3 * here.norm()


def test_a_large_picture_has_no_more_regions_than_one_of_64() -> None:
    sizes = {size: Image(size, Image.learn(PICTURES, CONFIG).scale).reader(CONFIG) for size in (64, 65, 300)}
    weights = [sum(p.numel() for p in reader.parameters()) for reader in sizes.values()]
    assert weights[0] == weights[1] == weights[2]
    far = torch.zeros(1, 2, 300, 300, 3, dtype=torch.uint8)
    assert sizes[300].eval()(far).shape == (1, 2, 24)


@pytest.mark.parametrize("config", [CONFIG, PLACES])
def test_many_pictures_in_pieces_are_the_same_with_their_gradients(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = torch.from_numpy(np.stack([picture() for _ in range(10)])).view(5, 2, 16, 16, 3)
    found = []
    for at_once in (2**19, 3 * 16 * 16):
        monkeypatch.setattr(image_module, "_PIXELS_AT_ONCE", at_once)
        reader = reader_of(config).double().train()
        torch.manual_seed(1)
        vectors = reader(film)
        vectors.square().sum().backward()
        with torch.inference_mode():
            unchanged = reader.eval()(film)
        found.append([unchanged, vectors.detach(), *(parameter.grad for parameter in reader.parameters())])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("config", [CONFIG, PLACES])
def test_gradients_reach_every_weight(config: Any) -> None:
    reader = reader_of(config).train()
    reader(pixels(*PICTURES)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in reader.parameters())


@pytest.mark.parametrize("places, kind, width", [(0, ImageReader, 128), (3, PlacesReader, 6)])
@pytest.mark.parametrize("size", [8, 9, 31, 48])
def test_any_size_is_read(size: int, places: int, kind: type, width: int) -> None:
    config = config_of("input.kind=image", "output.kind=label", f"input.size={size}", f"input.places={places}")
    reader = Image.learn(PICTURES, config).reader(config).eval()
    assert isinstance(reader, kind)
    vectors = reader(torch.zeros(1, 2, size, size, 3, dtype=torch.uint8))
    assert vectors.shape == (1, 2, width)
    assert vectors.isfinite().all()


def test_rows_are_steps_and_their_pixels_the_vector() -> None:
    image = Image.learn(PICTURES, ROWS)
    steps = image.collate([image.encode(one) for one in PICTURES[:2]])
    assert steps.lengths.tolist() == [16, 16]
    reader = reader_of(ROWS)
    assert reader.step_size == 48
    assert not reader.state_dict()
    x = reader(*steps.tensors)
    assert x.shape == (16, 2, 48)
    wanted = (PICTURES[1][5] - image.scale.mean) / image.scale.deviation
    np.testing.assert_allclose(x[5, 1].numpy(), wanted.reshape(-1), rtol=1e-4, atol=1e-5)


def dots(*at: tuple[float, float], size: int = 48) -> torch.Tensor:
    """White dots on black, each in a picture of its own at (x, y), from -1 to 1 from edge to edge; [1 B s s 3]."""
    across = (torch.arange(size) * 2 + 1) / size - 1
    shown = [torch.exp(-((across[None] - x) ** 2 + (across[:, None] - y) ** 2) / (2 * 0.06**2)) for x, y in at]
    return (torch.stack(shown)[None, ..., None] * 255).to(torch.uint8).expand(1, len(at), size, size, 3)


def looking(places: int = 8) -> PlacesReader:
    config = config_of("input.kind=image", "output.kind=label", f"input.places={places}", "input.augment=false")
    torch.manual_seed(0)
    reader = Image(48, Scale([5.0] * 3, [30.0] * 3)).reader(config)
    assert isinstance(reader, PlacesReader)
    return reader.eval()


def test_what_moves_is_read_to_move_as_far() -> None:
    reader = looking()
    with torch.no_grad():
        reader.sharpness.fill_(3.0)  # a dot is little of a picture: what is around it should not count
        here, right, down = reader(dots((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25)))[0].view(3, 2, 8) / SPREAD
    moved = torch.zeros(2, 8), torch.full((8,), 0.5)
    torch.testing.assert_close(right - here, torch.stack([moved[1], moved[0][0]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(down - here, torch.stack([moved[0][0], moved[1]]), rtol=0, atol=1e-3)


def test_a_thing_that_was_learnt_in_one_half_is_found_in_the_other() -> None:
    reader, draw = looking(1), np.random.default_rng(3)
    optimizer = torch.optim.Adam(reader.parameters(), 5e-3)

    def some(left: float, right: float) -> tuple[torch.Tensor, torch.Tensor]:
        at = np.stack([draw.uniform(left, right, 32), draw.uniform(-0.8, 0.8, 32)], axis=1)
        return dots(*map(tuple, at)), torch.from_numpy(at).float()

    for _ in range(50):
        shown, at = some(-0.8, 0.0)
        optimizer.zero_grad()
        (reader(shown)[0] / SPREAD - at).square().mean().backward()
        optimizer.step()
    shown, at = some(0.0, 0.8)
    off = (reader(shown)[0] / SPREAD - at).abs()
    assert off.max() < 0.03, "less than a pixel of 0.04"


def test_a_blank_picture_has_its_things_in_the_middle() -> None:
    read = looking()(torch.zeros(1, 2, 48, 48, 3, dtype=torch.uint8))
    torch.testing.assert_close(read, torch.zeros_like(read), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, ROWS])
def test_pictures_are_changed_in_training_only_and_by_the_seed(config: Any) -> None:
    reader, image = reader_of(config), Image.learn(PICTURES, config)
    (given,) = image.collate([image.encode(one) for one in PICTURES]).tensors
    torch.testing.assert_close(reader(given), reader(given), rtol=0, atol=0)
    reader.train()
    torch.manual_seed(3)
    first, second = reader(given), reader(given)
    assert (first - second).abs().max() > 1e-2
    torch.manual_seed(3)
    torch.testing.assert_close(reader(given), first, rtol=0, atol=0)


def test_a_picture_is_turned_moved_and_scaled_a_little_and_its_light_changes_little() -> None:
    config = config_of("input.kind=image", "output.kind=label", "input.size=48")
    base = np.zeros((48, 48, 3), np.uint8)
    base[20:28, 16:32] = 200  # a lying bar in the middle
    image = Image.learn([base], config)
    scaling = image.reader(config).train().scaling
    torch.manual_seed(0)
    given = pixels(*[base] * 400)[0]
    moved = scaling(given, scaling.draw(400))  # [N 3 h w]
    dark, light = moved.amin((1, 2, 3)), moved.amax((1, 2, 3))
    # Each colour is mixed with up to 0.15 of itself and of both others, then all with up to a fifth.
    contrast = (light - dark) / float(200 / image.scale.deviation[0])
    assert 0.3 < contrast.min() < 0.8
    assert 1.2 < contrast.max() < 1.2 * 1.45
    seen = (moved[:, 0] - moved[:, 0].amin((1, 2), keepdim=True)) / contrast_of(moved[:, 0])
    y, x = torch.meshgrid(torch.arange(48.0) - 23.5, torch.arange(48.0) - 23.5, indexing="ij")
    mass = seen.sum((1, 2))
    down, right = ((seen * at).sum((1, 2)) / mass for at in (y, x))
    assert 2.5 < right.abs().max() < 6, "a sixteenth of the side, and what turning and scaling add"
    assert 2.5 < down.abs().max() < 6
    assert abs(float(down.mean())) < 0.5
    y, x = y - down[:, None, None], x - right[:, None, None]
    moments = [(seen * a * b).sum((1, 2)) / mass for a, b in ((x, x), (x, y), (y, y))]
    angle = torch.rad2deg(torch.atan2(2 * moments[1], moments[0] - moments[2]) / 2)
    assert 10 < angle.abs().max() < 20
    area = mass / (8 * 16)
    assert 0.5 < area.min() < 0.8
    assert 1.25 < area.max() < 1.75


def contrast_of(x: Any) -> Any:
    return x.amax((1, 2), keepdim=True) - x.amin((1, 2), keepdim=True)


@pytest.mark.parametrize("kind", ["input.rows=false", "input.rows=true"])
def test_pictures_are_left_as_they_are_where_that_is_asked(kind: str) -> None:
    config = config_of("input.kind=image", "output.kind=label", "input.size=16", "input.augment=false", kind)
    reader = Image.learn(PICTURES, config).reader(config).train()
    assert reader.scaling.draw(3) is None
    config = config_of("input.kind=image", "output.kind=label", "input.size=16", kind)
    assert Image.learn(PICTURES, config).reader(config).train().scaling.draw(3) is not None


def test_what_a_picture_shows_at_its_edge_goes_on_beyond_it() -> None:
    config = config_of("input.kind=image", "output.kind=label", "input.size=16")
    image = Image.learn(PICTURES, config)
    scaling = image.reader(config).train().scaling
    white = pixels(*[plain(WHITE, 16, 16)] * 50)[0]
    moved = scaling(white, scaling.draw(50))
    torch.testing.assert_close(moved, moved[:, :, :1, :1].expand_as(moved))


def test_upright_and_lying_bars_are_told_apart() -> None:
    draw = np.random.default_rng(2)

    def bar(upright: bool) -> Any:
        one = draw.integers(0, 80, (16, 16, 3), dtype=np.uint8)
        at = draw.integers(0, 13)
        one[:, at : at + 3] += 120
        return one if upright else one.transpose(1, 0, 2)

    def some(count: int) -> tuple[list[Any], list[str]]:
        upright = draw.random(count) < 0.5
        return [bar(bool(u)) for u in upright], ["upright" if u else "lying" for u in upright]

    torch.manual_seed(0)
    images, names = some(64)
    for config in (CONFIG, ROWS):
        model = Small(config, Image.learn(images, config), Label.learn(names, config))
        model.learn([some(32) for _ in range(60)], lr=3e-3)
        others, wanted = some(100)
        answers = model.say(others)
        assert sum(a == b for a, b in zip(answers, wanted, strict=True)) >= 97
