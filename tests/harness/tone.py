"""Sine tones in WAV files: made for a phone to speak, and looked for in what the other phone heard (Goertzel)."""

import array
import math
import sys
import wave
from pathlib import Path

SAMPLE_RATE_HZ = 8000
FULL_SCALE = 32767


def write_tone(path: Path, *, frequency_hz: float, duration_s: float, amplitude: float = 0.4) -> None:
    """Write a mono 16-bit WAV file at 8000 Hz with one sine tone; `amplitude` is a fraction of full scale."""
    step = 2 * math.pi * frequency_hz / SAMPLE_RATE_HZ
    peak = amplitude * FULL_SCALE
    samples = array.array("h", (round(peak * math.sin(step * n)) for n in range(round(duration_s * SAMPLE_RATE_HZ))))
    if sys.byteorder == "big":
        samples.byteswap()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(samples.tobytes())


def read_samples(path: Path) -> list[int]:
    """The samples of a mono 16-bit WAV file at 8000 Hz, also of one whose header its writer never completed.

    Raises:
        ValueError: the file has another format.
    """
    data = path.read_bytes()
    format_at, data_at = data.find(b"fmt "), data.find(b"data")
    if data[:4] != b"RIFF" or format_at < 0 or data_at < 0:
        raise ValueError(f"{path.name} is no WAV file")
    channels = int.from_bytes(data[format_at + 10 : format_at + 12], "little")
    rate_hz = int.from_bytes(data[format_at + 12 : format_at + 16], "little")
    width_bits = int.from_bytes(data[format_at + 22 : format_at + 24], "little")
    if (channels, rate_hz, width_bits) != (1, SAMPLE_RATE_HZ, 16):
        raise ValueError(f"{path.name} has {channels} channels of {width_bits} bits at {rate_hz} Hz")
    body = data[data_at + 8 :]
    samples = array.array("h", body[: len(body) // 2 * 2])
    if sys.byteorder == "big":
        samples.byteswap()
    return samples.tolist()


def tone_share(samples: list[int], frequency_hz: float) -> float:
    """How much of the power of `samples` lies at `frequency_hz`: 1.0 for a pure tone, near 0 when it is not there."""
    power = sum(sample * sample for sample in samples)
    if not power:
        return 0.0
    coefficient = 2 * math.cos(2 * math.pi * frequency_hz / SAMPLE_RATE_HZ)
    before = last = 0.0
    for sample in samples:
        before, last = last, sample + coefficient * last - before
    at_frequency = last * last + before * before - coefficient * last * before
    return 2 * at_frequency / (len(samples) * power)


def seconds_with_tone(samples: list[int], frequency_hz: float, *, window_s: float = 0.1, share: float = 0.8) -> float:
    """For how long the tone is heard: the sum of the windows in which it has at least `share` of the power."""
    size = round(window_s * SAMPLE_RATE_HZ)
    windows = (samples[start : start + size] for start in range(0, len(samples) - size + 1, size))
    loud = (window for window in windows if max(window) > FULL_SCALE // 50)
    return window_s * sum(tone_share(window, frequency_hz) >= share for window in loud)
