#!/usr/bin/env python3
"""Writes the fixtures of calor-records' waveform reader: small WFDB records in every signal format
(crates/records/tests/fixtures/wfdb/), what wfdb-python reads from them (wfdb.json), and a signal
resampled by SciPy (resample.json).

    python scripts/references/waveforms.py RECORDS crates/records/tests/fixtures

RECORDS is a folder with record 100 of the MIT-BIH Arrhythmia Database and record s0010_re of the
PTB Diagnostic ECG Database (a copy of it), both from PhysioNet under the Open Data Commons
Attribution License 1.0; the fixtures hold a second of each. Moody GB, Mark RG, IEEE Eng in Med and
Biol 20(3):45-50, 2001. Bousseljot R, Kreiseler D, Schnabel A, Biomedizinische Technik 40, S317, 1995.

Needs numpy, scipy, soundfile and wfdb. Deterministic: the same versions write the same files.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import scipy
import scipy.signal
import soundfile
import wfdb

# The sample that stands for none is minus two to this power.
MISSING = {
    **{80: 7, 508: 7, 310: 9, 311: 9, 212: 11, 16: 15, 61: 15, 160: 15},
    **{516: 15, 24: 23, 524: 23, 32: 31},
}
FRAMES = 301  # a number that fills no group of samples in any format


def pack(samples, code):
    """Bytes of samples in file order, after https://physionet.org/physiotools/wag/signal-5.htm."""
    samples = np.asarray(samples, np.int64)
    if code in (8, 80):
        return ((samples + (128 if code == 80 else 0)) & 0xFF).astype(np.uint8).tobytes()
    if code in (16, 61):
        return samples.astype("<i2" if code == 16 else ">i2").tobytes()
    if code == 160:
        return (samples + 32768).astype("<u2").tobytes()
    if code == 32:
        return samples.astype("<i4").tobytes()
    if code == 24:
        return b"".join(int(value & 0xFFFFFF).to_bytes(3, "little") for value in samples)
    per_group = {212: 2, 310: 3, 311: 3}[code]
    whole = np.concatenate([samples, np.zeros(-len(samples) % per_group, np.int64)])
    out = bytearray()
    for group in whole.reshape(-1, per_group):
        a, b, *c = (int(value) for value in group)
        if code == 212:
            a, b = a & 0xFFF, b & 0xFFF
            out += bytes([a & 0xFF, a >> 8 | b >> 8 << 4, b & 0xFF])
        else:
            a, b, c = a & 0x3FF, b & 0x3FF, c[0] & 0x3FF
            if code == 310:
                word = a << 1 | (c & 0x1F) << 11 | b << 17 | c >> 5 << 27
            else:
                word = a | b << 10 | c << 20
            out += word.to_bytes(4, "little")
    return bytes(out)


def write_data(path, columns, code, per_frame, initial=None, before=b""):
    """One signal file. `columns` are the samples of each signal."""
    if code in (508, 516, 524):
        bits = code - 500
        # soundfile takes 8 and 24 bits as the upper ones of 16 and 32.
        samples = np.stack(columns, axis=1) << (0 if bits == 16 else 8)
        soundfile.write(
            path,
            samples.astype(np.int32 if bits == 24 else np.int16),
            96000,
            subtype={8: "PCM_S8", 16: "PCM_16", 24: "PCM_24"}[bits],
            format="FLAC",
        )
        return
    if code == 8:
        columns = [np.diff(column, prepend=start) for column, start in zip(columns, initial)]
        assert max(np.abs(column).max() for column in columns) < 128
    frames = [column.reshape(-1, n) for column, n in zip(columns, per_frame)]
    with open(path, "wb") as file:
        file.write(before + pack(np.concatenate(frames, axis=1).reshape(-1), code))


def line(file, code, samples, gain, name, per_frame=1, skew=0, offset=0, initial=None):
    layout = f"{code}{f'x{per_frame}' if per_frame > 1 else ''}{f':{skew}' if skew else ''}"
    layout += f"+{offset}" if offset else ""
    initial = int(samples[0]) if initial is None else initial
    checksum = int(np.sum(samples, dtype=np.int64)) & 0xFFFF
    checksum -= 65536 if checksum >= 32768 else 0
    return f"{file} {layout} {gain} 0 0 {initial} {checksum} 0 {name}"


def write_header(folder, name, first, lines):
    with open(os.path.join(folder, f"{name}.hea"), "w") as file:
        file.write("\n".join([first, *lines]) + "\n")


def formats(folder, ecg):
    """The same second of record 100 in every format, some of it missing."""
    names = []
    for code in (8, 16, 24, 32, 61, 80, 160, 212, 310, 311, 508, 516, 524):
        scale = {8: 0.25, 80: 0.25, 508: 0.25, 24: 1000, 524: 1000, 32: 100000}.get(code, 1)
        columns = [np.round(ecg[:FRAMES, lead] * scale).astype(np.int64) for lead in range(2)]
        if code == 8:
            # Steps too large for a difference are taken more slowly.
            columns = [np.cumsum(np.clip(np.diff(c, prepend=c[0]), -127, 127)) + c[0] for c in columns]
        else:
            columns[0][100:110] = -(1 << MISSING[code])
            columns[1][299] = -(1 << MISSING[code])
        name = f"format{code}"
        write_data(os.path.join(folder, f"{name}.dat"), columns, code, [1, 1], [c[0] for c in columns])
        gain = f"{200 * scale:g}(-10)/mV"
        rows = [line(f"{name}.dat", code, c, gain, lead) for c, lead in zip(columns, ("MLII", "V5"))]
        write_header(folder, name, f"{name} 2 360 {FRAMES}", rows)
        names.append(name)
    return names


def several_rates(folder, ecg):
    """Two files, several samples a frame, bytes before the first sample, no checksums in one."""
    frames = 120
    v1, v2 = (ecg[: 4 * frames, lead].astype(np.int64) for lead in (6, 7))
    slow = ecg[: 4 * frames : 4, 12].astype(np.int64)
    write_data(os.path.join(folder, "rates_fast.dat"), [v1, v2], 16, [4, 4], before=b"0123456789")
    write_data(os.path.join(folder, "rates_slow.dat"), [slow], 160, [1])
    rows = [
        line("rates_fast.dat", 16, v1, "2000", "v1", 4, offset=10),
        line("rates_fast.dat", 16, v2, "2000(5)/uV", "v2", 4, offset=10),
        "rates_slow.dat 160 2e3 16 7",
    ]
    write_header(folder, "rates", f"rates 3 250/1000 {frames}", rows)
    return "rates"


def skewed(folder, ecg):
    columns = [ecg[:FRAMES, lead].astype(np.int64) for lead in range(2)]
    write_data(os.path.join(folder, "skewed.dat"), columns, 212, [1, 1])
    rows = [
        line("skewed.dat", 212, columns[0], "200/mV", "MLII"),
        line("skewed.dat", 212, columns[1], "200/mV", "V5", skew=3),
    ]
    write_header(folder, "skewed", f"skewed 2 360 {FRAMES}", rows)
    # The same file, by a header that does not say how long it is.
    write_header(
        folder, "unmeasured", "unmeasured 2 360", ["skewed.dat 212 200 0 0 0 0 0 MLII", "skewed.dat 212"]
    )
    return ["skewed", "unmeasured"]


def segments(folder, ecg):
    """A record of two segments, and one in variable layout with a gap and a lead that comes late."""
    for name, begin, end, leads in (
        ("piece_1", 0, 100, (0, 1)),
        ("piece_2", 100, 250, (0, 1)),
        ("piece_3", 250, 300, (1,)),
    ):
        columns = [ecg[begin:end, lead].astype(np.int64) for lead in leads]
        write_data(os.path.join(folder, f"{name}.dat"), columns, 16, [1] * len(columns))
        rows = [
            line(f"{name}.dat", 16, column, "200/mV", ("MLII", "V5")[lead])
            for column, lead in zip(columns, leads)
        ]
        write_header(folder, name, f"{name} {len(leads)} 360 {end - begin}", rows)
    write_header(folder, "fixed", "fixed/2 2 360 250", ["piece_1 100", "piece_2 150"])
    layout = [f"~ 0 200/mV 0 0 0 0 0 {lead}" for lead in ("V5", "MLII", "RESP")]
    write_header(folder, "variable_layout", "variable_layout 3 360 0", layout)
    write_header(
        folder,
        "variable",
        "variable/5 3 360 270",
        ["variable_layout 0", "~ 30", "piece_2 150", "~ 40", "piece_3 50"],
    )
    return ["fixed", "variable"]


def read(folder, name):
    """What wfdb-python makes of a record: signals at their own rates, null where missing."""
    record = wfdb.rdrecord(os.path.join(folder, name), smooth_frames=False)
    signals = []
    for lead, values, per_frame in zip(record.sig_name, record.e_p_signal, record.samps_per_frame):
        signals.append(
            {
                "name": lead,
                "rate_hz": record.fs * (per_frame or 1),
                "values": [None if np.isnan(v) else float(f"{v:.9g}") for v in values],
            }
        )
    return {"name": name, "signals": signals}


def resampled(ecg):
    """A lead from 360 to 250 Hz. SciPy's filter is another one: the ends differ, and what is near
    125 Hz."""
    values = np.round((ecg[:1080, 0] + 10) / 200, 4)
    found = scipy.signal.resample_poly(values, 25, 36, window=("kaiser", 12.0), padtype="line")
    return {
        "from_hz": 360,
        "to_hz": 250,
        "values": values.tolist(),
        "resampled": [float(f"{v:.6g}") for v in found],
    }


def main():
    records, fixtures = sys.argv[1:]
    folder = os.path.join(fixtures, "wfdb")
    os.makedirs(folder, exist_ok=True)
    mitbih = wfdb.rdrecord(os.path.join(records, "100"), physical=False, sampto=2000).d_signal - 1024
    ptb = wfdb.rdrecord(os.path.join(records, "s0010_re"), physical=False, sampto=1000).d_signal
    names = formats(folder, mitbih)
    names.append(several_rates(folder, ptb))
    names += skewed(folder, mitbih)
    names += segments(folder, mitbih)
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "wfdb": wfdb.__version__}
    for file, content in (
        ("wfdb.json", {"versions": versions, "records": [read(folder, name) for name in names]}),
        ("resample.json", {"versions": versions, **resampled(mitbih)}),
    ):
        with open(os.path.join(fixtures, file), "w") as out:
            json.dump(content, out, separators=(",", ":"))
            out.write("\n")


if __name__ == "__main__":
    main()
