"""Features of the files that rows of a cohort point to: what a classical model can use of them.

Every function here takes the files of the labels and returns one row a label, NaN where a label
has no file. numpy and pyarrow are imported where they are needed.
"""

from __future__ import annotations

import sys
import wave
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoints"))
import common

MINUTES_PER_DAY = 1440
# Of speech: windows of 25 ms every 10 ms, as most recognisers take them.
WINDOW_S, HOP_S, MEL_BANDS, QUARTERS = 0.025, 0.01, 40, 4
LOWEST_ENERGY = 1e-10


def paths_of_labels(cohort: Path, column: str, subjects, moments, sources=None) -> list[list[Path]]:
    """The files of each label, in order of time: those of rows up to and including its moment.

    Labels are sorted by subject, then moment.
    """
    import numpy
    import pyarrow
    import pyarrow.parquet

    found = [[] for _ in range(len(subjects))]
    for file in sorted((cohort / "data").rglob("*.parquet")):
        names = pyarrow.parquet.read_schema(file).names
        if column not in names:
            continue
        wanted = ["subject_id", "time", column] + ["site"] * ("site" in names)
        table = pyarrow.parquet.read_table(file, columns=wanted)
        table = table.filter(pyarrow.compute.is_valid(table[column]))
        times = table["time"].cast(pyarrow.int64()).to_pylist()
        sites = table["site"].to_pylist() if "site" in names else [None] * len(table)
        for subject, time, path, site in zip(
            table["subject_id"].to_pylist(), times, table[column].to_pylist(), sites
        ):
            if sources is not None and site not in sources:
                continue
            first = numpy.searchsorted(subjects, subject, side="left")
            end = numpy.searchsorted(subjects, subject, side="right")
            for label in range(first, end):
                if time is None or time <= moments[label]:
                    found[label].append(cohort / path)
    return found


def omics(files: list[list[Path]]):
    """The last vector of each label: columns `feature` and `value`, the same features in all."""
    import numpy
    import pyarrow.parquet

    place_of, rows = {}, []
    for paths in files:
        row = {}
        if paths:
            table = pyarrow.parquet.read_table(paths[-1])
            if not {"feature", "value"} <= set(table.column_names):
                raise common.CheckpointError(f"{paths[-1]} has no columns `feature` and `value`")
            row = dict(zip(table["feature"].to_pylist(),
                           table["value"].to_numpy(zero_copy_only=False)))
        for name in row:
            place_of.setdefault(name, len(place_of))
        rows.append(row)
    features = numpy.full((len(rows), len(place_of)), numpy.nan, numpy.float32)
    for label, row in enumerate(rows):
        for name, value in row.items():
            features[label, place_of[name]] = value
    return features


def activity(files: list[list[Path]]):
    """Of recordings of one day each, a count a minute from midnight on: mean, standard deviation
    and share of zeros of the counts, how much the days differ, and the mean of each hour. Counts
    are taken as log(1 + count): they have a long tail."""
    import numpy
    import pyarrow.parquet

    read = {}

    def day(path: Path):
        if path not in read:
            table = pyarrow.parquet.read_table(path)
            counts = table.column(table.num_columns - 1).to_numpy(zero_copy_only=False)
            if len(counts) != MINUTES_PER_DAY:
                raise common.CheckpointError(f"{path} has {len(counts)} rows, and a day has "
                                             f"{MINUTES_PER_DAY} minutes")
            read[path] = numpy.log1p(counts.astype(float))
        return read[path]

    features = numpy.full((len(files), 28), numpy.nan)
    for label, paths in enumerate(files):
        if paths:
            days = numpy.array([day(path) for path in paths])
            hours = days.reshape(len(days), 24, 60).mean(2)
            features[label] = [
                days.mean(), days.std(), (days == 0).mean(), days.mean(1).std(), *hours.mean(0)]
    return features


def images(files: list[list[Path]]):
    """The grey values of each label's last picture; all pictures must have one size."""
    import numpy
    from PIL import Image

    pictures, size = [], None
    for paths in files:
        if not paths:
            pictures.append(None)
            continue
        with Image.open(paths[-1]) as picture:
            grey = picture.convert("L")
            if size not in (None, grey.size):
                raise common.CheckpointError(f"{paths[-1]} is {grey.size} pixels, others are {size}")
            size = grey.size
            pictures.append(numpy.asarray(grey, numpy.float32).reshape(-1))
    width = 0 if size is None else size[0] * size[1]
    missing = numpy.full(width, numpy.nan, numpy.float32)
    return numpy.array([missing if picture is None else picture for picture in pictures])


def speech(files: list[list[Path]]):
    """The mean log energy in each mel band over the last recording of each label, and over each
    quarter of it. WAV of 16 bits."""
    import numpy

    features = numpy.full((len(files), MEL_BANDS * (1 + QUARTERS)), numpy.nan)
    for label, paths in enumerate(files):
        if paths:
            bands = log_mel(*read_wave(paths[-1]))
            parts = [bands, *numpy.array_split(bands, QUARTERS, axis=1)]
            features[label] = numpy.concatenate([part.mean(1) for part in parts])
    return features


def read_wave(path: Path):
    """Samples from -1 to 1, the mean of the channels, and their rate in Hz."""
    import numpy

    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise common.CheckpointError(f"{path} has {8 * file.getsampwidth()} bits a sample, "
                                             "and this reads 16")
            samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2")
            samples = samples.reshape(-1, file.getnchannels()).mean(1) / 32768
            return samples, file.getframerate()
    except (wave.Error, EOFError) as error:
        raise common.CheckpointError(f"{path} is no WAV file: {error}") from None


def log_mel(samples, rate_hz: int):
    """Log energies `[bands, frames]`: Hann windows, power spectrum, triangles that are evenly
    spaced on the mel scale 2595 log10(1 + f / 700) (O'Shaughnessy 1987) up to half the rate."""
    import numpy

    window, hop = round(WINDOW_S * rate_hz), round(HOP_S * rate_hz)
    size = 1 << (window - 1).bit_length()
    # At least one frame for every quarter.
    needed = window + (QUARTERS - 1) * hop
    samples = numpy.pad(samples, (0, max(needed - len(samples), 0)))
    starts = numpy.arange(0, len(samples) - window + 1, hop)
    frames = samples[starts[:, None] + numpy.arange(window)] * numpy.hanning(window)
    power = numpy.abs(numpy.fft.rfft(frames, size)) ** 2

    highest = 2595 * numpy.log10(1 + rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (numpy.linspace(0, highest, MEL_BANDS + 2) / 2595) - 1)
    bins_hz = numpy.fft.rfftfreq(size, 1 / rate_hz)
    low, middle, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising, falling = (bins_hz - low) / (middle - low), (high - bins_hz) / (high - middle)
    bank = numpy.maximum(0, numpy.minimum(rising, falling))
    return numpy.log(numpy.maximum(bank @ power.T, LOWEST_ENERGY))


READERS = {
    "omics_path": ("omics", omics),
    "waveform_path": ("activity", activity),
    "image_path": ("pixels", images),
    "audio_path": ("speech", speech),
}
"""Column of paths -> name of the block of features, what makes it."""
