"""Spoken digits, a spectrum every 10 ms as a file of its own, and tables of them: train.csv, valid.csv and test.csv."""

from __future__ import annotations

import io
import tarfile
import wave
from pathlib import Path

import numpy as np

SPEAKERS = {"theo": "valid", "yweweler": "test"}
"""The last two of six in alphabetical order; the others are learnt."""
RATE, WINDOW, STEP, POINTS = 8000, 200, 80, 256
"""Samples a second, in a window (25 ms), from one to the next (10 ms), and of the Fourier transform."""
BANDS = 32
WARPS = (1.0, 0.88, 1.12)
"""Vocal tracts of other lengths, whose resonances lie so many times as high: each recording to learn from is heard with
all of them (Jaitly and Hinton 2013), since four speakers are few."""


def prepare(data: Path, out: Path) -> None:
    """Columns: file (float32 [T 32], the logarithm of the energy in 32 bands), digit."""
    (out / "spectra").mkdir(exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    bands = {warp: mel_bands(warp) for warp in WARPS}
    with tarfile.open(data / "recordings_00-19.tar.xz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = Path(member.name)
            file = archive.extractfile(member)
            if file is None or name.suffix != ".wav":
                continue
            digit, speaker, _ = name.stem.split("_")
            samples, part = read_wave(file.read()), SPEAKERS.get(speaker, "train")
            for warp in WARPS if part == "train" else WARPS[:1]:
                path = f"spectra/{name.stem}{'' if warp == 1 else f'_{warp:g}'}.npy"
                np.save(out / path, spectra(samples, bands[warp]))
                rows[part].append(f"{path},{digit}")
    for part, lines in rows.items():
        (out / f"{part}.csv").write_text("\n".join(["file,digit", *lines]) + "\n", "utf-8", newline="\n")


def read_wave(content: bytes) -> np.ndarray:
    """Samples from -1 to 1, [N]."""
    with wave.open(io.BytesIO(content)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 2**15


def spectra(samples: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """The logarithm of the energy in each band, float32 [T 32], less its mean over the recording: how loud it is, and
    what room and microphone make of it, say nothing of the digit."""
    samples = np.pad(samples, (0, max(WINDOW - len(samples), 0)))
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::STEP] * np.hanning(WINDOW)
    energy = np.abs(np.fft.rfft(windows, POINTS)) ** 2
    logarithm = np.log(energy @ bands.T + 1e-6)
    return (logarithm - logarithm.mean(0)).astype(np.float32)


def mel_bands(warp: float) -> np.ndarray:
    """Triangles that overlap by half, as wide as the ear hears them: equally wide on the mel scale, 2595 log10(1 + f /
    700) (O'Shaughnessy 1987). [32, frequencies]

    warp: frequencies are `warp` times as high, but for those near the highest, which stays.
    """
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    knee = 0.8 * RATE / 2 / max(warp, 1)
    edges = np.interp(edges, [0, knee, RATE / 2], [0, knee * warp, RATE / 2])
    frequencies = np.fft.rfftfreq(POINTS, 1 / RATE)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)), 0, None)
