#!/usr/bin/env python3
"""Writes crates/records/tests/fixtures/mel.json: log-mel spectrograms as Transformers'
WhisperFeatureExtractor gives them, for the tests of calor-records; and beside it the same sound as
FLAC and MP3 (mel_chirp.flac, mel_chirp.mp3).

    python scripts/references/log_mel.py crates/records/tests/fixtures

The values are those of the extractor's numpy code, which computes in float64 (and rounds the
spectrum to complex64); its torch code, in float32, is compared with it. Needs numpy, soundfile,
torch and transformers. Deterministic: the same versions write the same files.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import soundfile
import transformers
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

RATE_HZ = 16000


def chirp(seconds, rate_hz=RATE_HZ):
    """From 100 Hz to 6 kHz, swelling and fading, as 16-bit samples."""
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * (100 * time + (6000 - 100) / (2 * seconds) * time**2)
    return np.round(20000 * np.sin(phase) * np.sin(np.pi * time / seconds)).astype(np.int16)


def noise(samples):
    return np.random.default_rng(3).integers(-3000, 3000, samples).astype(np.int16)


def features(waveform, mel_bins, padded=None):
    """[mel_bins, frames] of float samples, with zeros up to `padded` of them."""
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    whole = np.zeros(padded or len(waveform), np.float32)
    whole[: len(waveform)] = waveform
    exact = extractor._np_extract_fbank_features(whole[None], "cpu")[0]
    # torch refuses to mirror what is shorter than half a frame.
    if len(whole) <= 200:
        return exact
    # What a user calls; it takes torch where there is torch.
    called = extractor(
        waveform,
        sampling_rate=RATE_HZ,
        padding="max_length" if padded else "do_not_pad",
        max_length=padded,
        return_tensors="np",
    ).input_features[0]
    difference = float(np.abs(exact - called).max())
    print(f"{mel_bins} bins, {len(whole)} samples: torch differs by {difference:.1e}")
    assert called.shape == exact.shape and difference < 1e-4
    return exact


def case(name, signals, signal, taken, mel_bins, padded=None, shown=None):
    waveform = signals[signal][:taken].astype(np.float32) / 32768
    values = features(waveform, mel_bins, padded)
    shown = range(values.shape[1]) if shown is None else shown
    return {
        "name": name,
        "signal": signal,
        "taken": taken,
        "padded": padded or taken,
        "mel_bins": mel_bins,
        "frames": [[frame, [round(float(v), 6) for v in values[:, frame]]] for frame in shown],
        "mean": float(values.mean(dtype=np.float64)),
    }


def main():
    folder = sys.argv[1]
    signals = {"chirp": chirp(0.4), "noise": noise(4567)}
    cases = [
        case("a chirp", signals, "chirp", 6400, 80),
        case("noise, 128 bins", signals, "noise", 3200, 128),
        case("noise, not a whole number of hops", signals, "noise", 4567, 80, shown=[0, 1, 26, 27]),
        case("less than half a frame", signals, "noise", 165, 80),
        case(
            "a chirp in 30 s",
            signals,
            "chirp",
            6400,
            80,
            padded=480000,
            shown=[0, 20, 39, 40, 41, 42, 1500, 2999],
        ),
    ]
    filters = [
        {
            "mel_bins": bins,
            "sums": WhisperFeatureExtractor(feature_size=bins).mel_filters.sum(axis=0).tolist(),
        }
        for bins in (80, 128)
    ]

    soundfile.write(os.path.join(folder, "mel_chirp.flac"), signals["chirp"], RATE_HZ, "PCM_16")
    mp3 = os.path.join(folder, "mel_chirp.mp3")
    soundfile.write(mp3, signals["chirp"], RATE_HZ, format="MP3")
    # libsndfile decodes with mpg123, another decoder than the one under test.
    decoded, rate_hz = soundfile.read(mp3, dtype="float32")
    assert rate_hz == RATE_HZ
    values = features(decoded, 80)
    lossy = {
        "samples": len(decoded),
        "frames": [
            [frame, [round(float(v), 6) for v in values[:, frame]]]
            for frame in range(0, values.shape[1], 4)
        ],
    }
    with open(os.path.join(folder, "mel.json"), "w") as file:
        json.dump(
            {
                "versions": {
                    "numpy": np.__version__,
                    "soundfile": soundfile.__version__,
                    "transformers": transformers.__version__,
                },
                "signals": {name: signal.tolist() for name, signal in signals.items()},
                "cases": cases,
                "filters": filters,
                "mp3": lossy,
            },
            file,
            separators=(",", ":"),
        )
        file.write("\n")


if __name__ == "__main__":
    main()
