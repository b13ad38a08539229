#!/usr/bin/env python3
"""Writes the image fixtures of crates/records: small files in every format that is read, and what
Pillow and Transformers, pydicom and nibabel make of them.

usage: scripts/references/images.py [--out crates/records/tests/fixtures/image]

processors.json: files, a checkpoint's preprocessor configuration, and the pixel values of
Transformers' image processor of that name (its Pillow backend). floats.json: a 16-bit file and
Pillow's float resize of it. slices.json: DICOM and NIfTI files, options, and the grey levels (0…1)
that pydicom or nibabel lead to, channel by channel. Needs numpy, pillow (with OpenJPEG),
transformers, pydicom and nibabel; everything is seeded.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, apply_windowing, convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

PROCESSORS = {
    "BitImageProcessor": BitImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}


def scene(random, height, width, channels=3):
    """A smooth picture with edges and noise, [height, width, channels] of bytes."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.zeros((height, width, channels))
    for channel in range(channels):
        wave = np.sin(rows / (3 + channel)) * np.cos(columns / (4 + channel))
        picture[..., channel] = 127 + 90 * wave + random.normal(0, 12, (height, width))
    picture[height // 3 : height // 2, width // 4 : width // 2] = 255
    picture[: height // 5, : width // 5] = 0
    return np.clip(picture, 0, 255).astype(np.uint8)


# --- pictures -------------------------------------------------------------------------------------


def pictures(out, random):
    """The files, by name."""
    colour = scene(random, 47, 61)
    alpha = random.integers(0, 256, (47, 61), dtype=np.uint8)
    images = {
        "colour.png": Image.fromarray(colour),
        "tall.png": Image.fromarray(scene(random, 90, 31)),
        "tiny.png": Image.fromarray(scene(random, 7, 9)),
        "alpha.png": Image.merge("RGBA", [*Image.fromarray(colour).split(), Image.fromarray(alpha)]),
        "palette.png": Image.fromarray(colour).quantize(37),
        "grey.png": Image.fromarray(colour[..., 0]),
        "grey_alpha.png": Image.merge("LA", [Image.fromarray(colour[..., 0]), Image.fromarray(alpha)]),
        "bilevel.png": Image.fromarray(colour[..., 0]).convert("1"),
    }
    for name, image in images.items():
        image.save(out / name, optimize=True)
    smooth = Image.fromarray(colour).resize((64, 48), Image.Resampling.BICUBIC)
    smooth.save(out / "photo.jpg", quality=92, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(out / "turned.jpg", quality=92, subsampling=0, exif=exif)
    smooth.save(out / "progressive.jpg", quality=92, subsampling=2, progressive=True)


def processed(out):
    """What Transformers makes of the files."""
    from transformers.image_utils import load_image

    vit = {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 16}}
    siglip = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 18}}
    clip = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 18},
        "crop_size": {"height": 15, "width": 16},
    }
    dino = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 33}, "crop_size": 14}
    cases = [
        ("colour.png", vit, 0),
        ("colour.png", {**vit, "resample": 1, "size": {"height": 13, "width": 11}}, 0),
        ("colour.png", siglip, 0),
        ("colour.png", clip, 0),
        ("colour.png", dino, 0),
        ("colour.png", {**vit, "size": {"height": 47, "width": 13}}, 0),
        ("colour.png", {**siglip, "do_normalize": False, "size": {"height": 9, "width": 61}}, 0),
        ("tall.png", clip, 0),
        ("tall.png", {**dino, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]}, 0),
        ("tiny.png", {**vit, "resample": 3}, 0),
        ("tiny.png", {**clip, "resample": 1}, 0),
        ("alpha.png", clip, 0),
        ("palette.png", clip, 0),
        ("grey.png", siglip, 0),
        ("grey_alpha.png", siglip, 0),
        ("bilevel.png", siglip, 0),
        # Decoders of JPEG may differ by a few levels; what follows may not.
        ("photo.jpg", {**siglip, "size": {"height": 24, "width": 32}, "do_normalize": False}, 3 / 255),
        ("turned.jpg", {**siglip, "size": {"height": 16, "width": 12}, "do_normalize": False}, 3 / 255),
        ("progressive.jpg", {**siglip, "size": {"height": 12, "width": 16}, "do_normalize": False}, 5 / 255),
    ]
    references = []
    for name, configuration, tolerance in cases:
        keys = {key: value for key, value in configuration.items() if key != "image_processor_type"}
        # The processor that does not convert by itself is given what the others convert to.
        image = load_image(str(out / name)).convert("RGB")
        processor = PROCESSORS[configuration["image_processor_type"]](**keys)
        values = processor(image, return_tensors="np")["pixel_values"][0].astype(np.float32)
        references.append(
            {
                "file": name,
                "preprocessor": configuration,
                "tolerance": tolerance,
                "shape": list(values.shape),
                "values": numbers(values),
            }
        )
    return references


def floats(out, random):
    """16 bits: shown over their whole range or a window, resized as floats, cut to that range."""
    wide = scene(random, 33, 41)[..., 0].astype(np.uint16) * 180 + random.integers(0, 180, (33, 41), dtype=np.uint16)
    Image.fromarray(wide).save(out / "grey_16.png")
    references = []
    for filter, resampling in [
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
        ("lanczos", Image.Resampling.LANCZOS),
    ]:
        for low, high, window in [(0, 65535, None), (5000, 30000, {"centre": 17500, "width": 25000})]:
            levels = np.clip((wide.astype(np.float64) - low) / (high - low) * 255, 0, 255).astype(np.float32)
            resized = Image.fromarray(levels).resize((17, 14), resampling)
            values = np.clip(np.array(resized), 0, 255).astype(np.float64) / 255
            options = {"height": 14, "width": 17, "filter": filter, "mean": [0.0] * 3, "std": [1.0] * 3}
            if window:
                options["window"] = window
            references.append({"file": "grey_16.png", "options": options, "values": numbers(values)})
    return references


# --- DICOM ----------------------------------------------------------------------------------------


def dicom(pixels, syntax=ExplicitVRLittleEndian, **keys):
    """A secondary capture of pixels [rows, columns] or [rows, columns, 3], or of several frames."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    order = {"is_implicit_VR": syntax.is_implicit_VR, "is_little_endian": syntax.is_little_endian}
    image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128, **order)
    image.SOPClassUID = meta.MediaStorageSOPClassUID
    image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    image.PatientName = "Nobody"
    image.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    image.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        image.PlanarConfiguration = 0
    image.Rows, image.Columns = pixels.shape[:2]
    image.BitsAllocated = pixels.dtype.itemsize * 8
    image.BitsStored = image.BitsAllocated
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    for key, value in keys.items():
        setattr(image, key, value)
    image.HighBit = image.BitsStored - 1
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    image.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    image["PixelData"].VR = "OB" if image.BitsAllocated == 8 else "OW"
    return image


def lut(first, values, bits):
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = [int(value) for value in values]
    item["LUTData"].VR = "US"
    return Sequence([item])


def stretched(values, low=None, high=None):
    values = np.asarray(values, dtype=np.float64)
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    return np.clip((values - low) / (high - low), 0, 1)


def dicoms(out, random):
    """DICOM files, and the levels that pydicom leads to."""
    hounsfield = (scene(random, 12, 14)[..., 0].astype(np.int16) * 8 - 1000).astype(np.int16)
    bytes_ = scene(random, 12, 14)[..., 1]
    colour = scene(random, 12, 14)
    ct = {"RescaleSlope": "2", "RescaleIntercept": "-24.5", "WindowCenter": ["40", "300"], "WindowWidth": ["400", "1500"]}
    references = []

    def add(name, image, levels, options=None, tolerance=1e-6, reference=None):
        path = out / f"{name}.dcm"
        if reference is None:
            image.save_as(path, enforce_file_format=True)
        levels = np.asarray(levels, dtype=np.float64)
        planes = [levels] if levels.ndim == 2 else [levels[..., channel] for channel in range(3)]
        references.append(
            {
                "file": path.name if reference is None else f"{reference}.dcm",
                "options": {"height": levels.shape[0], "width": levels.shape[1], **(options or {})},
                "tolerance": tolerance,
                "planes": [numbers(plane) for plane in planes],
            }
        )

    for name, syntax in [
        ("explicit", ExplicitVRLittleEndian),
        ("implicit", ImplicitVRLittleEndian),
        ("big_endian", ExplicitVRBigEndian),
        ("deflated", DeflatedExplicitVRLittleEndian),
    ]:
        image = dicom(hounsfield, syntax, **ct)
        units = apply_modality_lut(hounsfield, image)
        add(name, image, stretched(apply_voi_lut(units, image)))
    window = {"window": {"centre": -100, "width": 600}}
    add("explicit", None, stretched(units, -400, 200), window, reference="explicit")
    range_ = {"percentiles": [5.0, 90.0]}
    low, high = np.percentile(units.astype(np.float32), [5, 90])
    add("explicit", None, stretched(units, low, high), range_, reference="explicit")

    for name, function in [("exact", "LINEAR_EXACT"), ("sigmoid", "SIGMOID")]:
        image = dicom(bytes_, WindowCenter="100", WindowWidth="90", VOILUTFunction=function)
        add(name, image, apply_windowing(bytes_, image) / 255)

    image = dicom(bytes_, PhotometricInterpretation="MONOCHROME1")
    add("monochrome1", image, 1 - stretched(bytes_))

    curve = (np.linspace(0, 1, 180) ** 2 * 4095).astype(int)
    image = dicom(bytes_, VOILUTSequence=lut(30, curve, 12))
    add("voi_table", image, apply_voi_lut(bytes_, image) / 4095)
    image = dicom(bytes_, ModalityLUTSequence=lut(0, np.arange(256)[::-1] * 200, 16))
    image.ModalityLUTSequence[0].ModalityLUTType = "US"
    add("modality_table", image, stretched(apply_modality_lut(bytes_, image)))

    add("colour", dicom(colour), colour / 255)
    image = dicom(colour, PhotometricInterpretation="YBR_FULL")
    add("ybr", image, convert_color_space(colour, "YBR_FULL", "RGB") / 255, tolerance=1 / 255 + 1e-6)

    image = dicom(bytes_ // 8, PhotometricInterpretation="PALETTE COLOR")
    for channel in ["Red", "Green", "Blue"]:
        setattr(image, f"{channel}PaletteColorLookupTableDescriptor", [32, 0, 16])
        table = random.integers(0, 65536, 32, dtype=np.uint16)
        setattr(image, f"{channel}PaletteColorLookupTableData", table.astype("<u2").tobytes())
    add("palette", image, (apply_color_lut(bytes_ // 8, image) >> 8) / 255)

    # Compressed. 12 of 16 bits, and colour.
    twelve = (bytes_.astype(np.uint16) << 4) + random.integers(0, 16, bytes_.shape, dtype=np.uint16)
    image = dicom(twelve, BitsStored=12)
    image.compress(RLELossless, generate_instance_uid=False)
    add("rle_12", image, stretched(twelve))
    image = dicom(colour)
    image.compress(RLELossless, generate_instance_uid=False)
    add("rle_colour", image, colour / 255)

    for name, pixels, mode in [("j2k_16", twelve, "grey"), ("j2k_colour", colour, "colour")]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, irreversible=False, mct=int(mode == "colour"))
        image = dicom(pixels, **({"PhotometricInterpretation": "YBR_RCT"} if mode == "colour" else {}))
        image.file_meta.TransferSyntaxUID = JPEG2000Lossless
        image.PixelData = encapsulate([buffer.getvalue()])
        image["PixelData"].VR = "OB"
        add(name, image, pixels / 255 if mode == "colour" else stretched(pixels))

    for name, pixels in [("jpeg_grey", bytes_), ("jpeg_colour", colour)]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
        decoded = np.array(Image.open(buffer))
        image = dicom(pixels, **({"PhotometricInterpretation": "YBR_FULL_422"} if pixels.ndim == 3 else {}))
        image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        image.PixelData = encapsulate([buffer.getvalue()])
        image["PixelData"].VR = "OB"
        image.WindowCenter, image.WindowWidth = "128", "256"
        if pixels.ndim == 3:
            del image.WindowCenter, image.WindowWidth
        add(name, image, decoded / 255, tolerance=3 / 255)

    # Enhanced: two frames with a window of their own and a rescaling of both.
    frames = np.stack([hounsfield, hounsfield[::-1] // 2])
    image = dicom(hounsfield, NumberOfFrames=2)
    image.PixelData = frames.astype("<i2").tobytes()
    shared = Dataset()
    rescaling = Dataset()
    rescaling.RescaleSlope, rescaling.RescaleIntercept, rescaling.RescaleType = "0.5", "10", "HU"
    shared.PixelValueTransformationSequence = Sequence([rescaling])
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for centre, width in [("0", "300"), ("-100", "80")]:
        voi = Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, width
        group = Dataset()
        group.FrameVOILUTSequence = Sequence([voi])
        groups.append(group)
    image.PerFrameFunctionalGroupsSequence = Sequence(groups)
    for index, group in enumerate(groups):
        units = frames[index] * 0.5 + 10
        flat = dicom(hounsfield)
        voi = group.FrameVOILUTSequence[0]
        flat.WindowCenter, flat.WindowWidth = voi.WindowCenter, voi.WindowWidth
        levels = stretched(apply_windowing(units, flat))
        add("enhanced", image, levels, {"frame": index}, reference=None if index == 0 else "enhanced")
    return references


# --- NIfTI ----------------------------------------------------------------------------------------


def volumes(out, random):
    """Volumes stored in different orders, and the slices that nibabel's canonical form leads to."""
    references = []

    def add(image, name, volume=0):
        path = out / name
        nibabel.save(image, path)
        loaded = nibabel.as_closest_canonical(nibabel.load(path))
        data = np.asarray(loaded.dataobj, dtype=np.float64)
        data = data[..., volume] if data.ndim == 4 else data
        for plane, slice_, picture in [
            ("axial", 2, data[::-1, ::-1, 2].T),
            ("coronal", "middle", data[::-1, data.shape[1] // 2, ::-1].T),
            ("sagittal", 0, data[0, ::-1, ::-1].T),
        ]:
            options = {"height": picture.shape[0], "width": picture.shape[1], "plane": plane, "slice": slice_, "volume": volume}
            finite = np.where(np.isfinite(picture), picture, np.nan)
            levels = np.nan_to_num(stretched(picture, np.nanmin(finite), np.nanmax(finite)))
            references.append({"file": path.name, "options": options, "tolerance": 1e-5, "planes": [numbers(levels)]})

    # Stored feet to head, left to right, front to back; a little oblique; scaled.
    affine = np.array([[0.2, 2.0, 0.1, -20], [-0.1, 0.1, -3.0, 30], [1.5, -0.2, 0.2, -10], [0, 0, 0, 1.0]])
    stored = random.integers(-500, 1500, (5, 7, 6), dtype=np.int16)
    image = nibabel.Nifti1Image(stored, affine)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=1)
    image.header.set_slope_inter(0.25, -12.5)
    add(image, "volume_1.nii.gz")

    # NIfTI-2, big-endian, two volumes, with a quaternion alone and a mirrored third axis.
    values = random.normal(0, 100, (6, 5, 4, 2)).astype(">f4")
    values[1, 2, 2, 1] = np.nan
    header = nibabel.Nifti2Header(endianness=">")
    header.set_data_dtype(">f4")
    affine = np.diag([-1.5, 2.0, -2.5, 1.0])
    turn = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    image = nibabel.Nifti2Image(values, turn @ affine, header)
    image.set_sform(None, code=0)
    image.set_qform(turn @ affine, code=1)
    add(image, "volume_2.nii", volume=1)

    # Without any orientation.
    image = nibabel.Nifti1Image(random.integers(0, 255, (4, 5, 3), dtype=np.uint8), None)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    add(image, "volume_3.nii")
    return references


# --------------------------------------------------------------------------------------------------


def numbers(values):
    """As JSON numbers that give back the same f32."""
    return [float(np.format_float_positional(value, unique=True)) for value in np.ravel(values).astype(np.float32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("crates/records/tests/fixtures/image"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pictures(out, random)
    references = {
        "processors": processed(out),
        "floats": floats(out, random),
        "slices": dicoms(out, random) + volumes(out, random),
    }
    for name, cases in references.items():
        path = out / f"{name}.json"
        path.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
        print(f"wrote {path}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
