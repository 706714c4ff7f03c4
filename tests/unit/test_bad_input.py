"""Bad and odd files: each is read right or refused by name; none crashes, hangs, or takes memory without bounds."""

import csv
import os
import re
import resource
import stat
import struct
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_files import (
    GREY,
    PHOTO,
    SLICES,
    VOLUME,
    archive,
    as_shown,
    cut,
    decoded,
    dicom_bomb,
    edited,
    empty_slide,
    exif,
    flipped,
    mha,
    nifti,
    nifti_bomb,
    npz_bomb,
    npz_with_labels_bomb,
    nrrd,
    palette,
    photo,
    pixels,
    png,
    png_that_says,
    relabelled,
    series,
    several,
    ship,
    slice_,
    tiff,
    tiff_in_a_circle,
    tiff_of_pages,
    tiff_turned,
)
from image_files import write_nifti
from PIL import Image

from biovfm_monai.data import read_image
from biovfm_monai.data.datalist import read_datalist
from biovfm_monai.data.find import NO_IMAGE, endings, survey
from biovfm_monai.data.reading import part_of
from biovfm_monai.errors import InputError

HOUNSFIELD = (2.0 * SLICES - 1000).T


class Outcome(NamedTuple):
    """What is expected of an image, or of a file without any."""

    kind: str
    what: Any
    spacing: Any = None


def reads(array, spacing=None):
    """The survey lists it, and it is read so; array is a function where making it takes long."""
    return Outcome("read", array, spacing)


def refused(reason):
    """The survey lists it, reading refuses it."""
    return Outcome("refused", reason)


def rejected(reason):
    """The survey leaves it out."""
    return Outcome("rejected", reason)


def whole_or_refused(array):
    """It is read so, refused, or left out."""
    return Outcome("either", array)


NOT_READ = whole_or_refused(np.empty(0))


def refusal(name):
    """Why an image is not read; None if it is."""
    try:
        read_image(name)
    except InputError as error:
        return str(error)
    return None


def check_read(name, outcome):
    """Every voxel is as expected, and lies somewhere."""
    image = read_image(name)
    array = outcome.what() if callable(outcome.what) else outcome.what
    np.testing.assert_array_equal(np.squeeze(image.numpy()), np.squeeze(array).astype(np.float32))
    assert np.isfinite(image.affine).all()
    assert np.linalg.det(image.affine) != 0
    if outcome.spacing is not None:
        assert image.pixdim.tolist() == pytest.approx(outcome.spacing, rel=1e-5)
    return image


def check_item(item, outcome):
    """A listed image is what its header promised, or refused by its name."""
    if outcome.kind == "refused":
        assert re.search(f"{re.escape(first_file(item).name)}.*{outcome.what}", refusal(item["image"]) or "")
        return
    image = check_read(item["image"], outcome)
    assert [*image.shape[1:]] in (item["shape"], [*item["shape"], 1])
    assert image.shape[0] == item["channels"]
    if "spacing" in item and image.ndim == 4:
        assert image.pixdim.tolist() == pytest.approx(item["spacing"], rel=1e-4)


def check_rejected(one, outcome):
    """A file that is left out is named with the reason in one line, and then cannot be read by its name either."""
    assert re.search(outcome.what, one.reason)
    if one.reason == NO_IMAGE:
        refusal(one.file)
        return
    name, folder = Path(one.file).name, Path(one.file).parent.name
    assert name in one.reason or f"{folder}: " in one.reason
    assert len(one.reason.replace(name, "").splitlines()) == 1
    message = refusal(f"{one.file}::train_images::0" if name.endswith(".npz") else one.file)
    if name in one.reason and not re.search("the same instance|labels", one.reason):
        assert name in (message or "")


def check_either(items, left_out, outcome):
    """No other exception, and no voxel that is not expected."""
    assert items or left_out
    for one in left_out:
        check_rejected(one, rejected(""))
    for item in items:
        message = refusal(item["image"])
        if message is None:
            check_read(item["image"], outcome)
        else:
            assert first_file(item).name in message


def first_file(item):
    return part_of(item["image"] if isinstance(item["image"], str) else item["image"][0])[0]


# The table: name of a file or folder -> function that makes it, and what is expected of each image in it

NAN, INFINITE = VOLUME.copy(), VOLUME.copy()
NAN[3, 4, 2], INFINITE[0, 0, 0] = np.nan, -np.inf
TWO = np.stack([VOLUME, -VOLUME], 3)
ROUND = np.rint(VOLUME).astype(np.int64)
SHEARED = np.array([[2, 0.5, 0, 1], [0, 2, 0.3, 2], [0, 0, 2, 3], [0, 0, 0, 1.0]])
COLOURS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
CLEAR = np.dstack([PHOTO, GREY.astype(np.uint8)])
BITS = GREY > 2**15
ODD_NAMES = ["a space.png", "quote's \".png", "two\nlines.png", "Größe 影像.png", "c::d.png", "-f.png", "UPPER.PNG"]

NIFTI = {
    "nan.nii.gz": (partial(nifti, array=NAN), refused("holds 1 NaN or infinite")),
    "infinite.nii.gz": (partial(nifti, array=INFINITE), refused("holds 1 NaN or infinite")),
    "negative spacing.nii.gz": (partial(nifti, pixdim=[1, 1, -2, 1, 0, 0, 0, 0]), reads(VOLUME, [1, 2, 1])),
    "zero spacing.nii.gz": (partial(nifti, pixdim=[1, 1, 0, 1, 0, 0, 0, 0]), rejected("spacing of")),
    "nan spacing.nii.gz": (partial(nifti, pixdim=[1, 1, np.nan, 1, 0, 0, 0, 0]), rejected("spacing of")),
    "infinite spacing.nii.gz": (partial(nifti, pixdim=[1, 1, np.inf, 1, 0, 0, 0, 0]), rejected("spacing of")),
    "sheared.nii.gz": (partial(nifti, affine=SHEARED), reads(VOLUME)),
    "zero affine.nii": (partial(nifti, srow_x=0, srow_y=0, srow_z=0), whole_or_refused(VOLUME)),
    "nan affine.nii": (partial(nifti, srow_x=np.nan), whole_or_refused(VOLUME)),
    "nan place.nii": (partial(nifti, srow_x=[1, 0, 0, np.nan]), whole_or_refused(VOLUME)),
    "another spacing in the affine.nii": (partial(nifti, srow_x=[3, 0, 0, 0]), reads(VOLUME, [1, 1, 1])),
    "micrometres.nii": (partial(nifti, xyzt_units=3), reads(VOLUME, [0.001] * 3)),
    "says 70 rows.nii": (partial(nifti, dim=[3, 70, 9, 5, 1, 1, 1, 1]), NOT_READ),
    "says 70 rows.nii.gz": (partial(nifti, dim=[3, 70, 9, 5, 1, 1, 1, 1]), NOT_READ),
    "says 7 GiB.nii.gz": (partial(nifti, dim=[3, 1250, 1250, 1250, 1, 1, 1, 1]), NOT_READ),
    "says 2^40 volumes.nii": (partial(nifti, kind=nib.Nifti2Image, dim=[4, 7, 9, 5, 2**40, 1, 1, 1]), NOT_READ),
    "no volumes.nii": (partial(nifti, dim=[4, 7, 9, 5, 0, 1, 1, 1]), rejected("size")),
    "negative size.nii": (partial(nifti, dim=[3, -7, 9, 5, 1, 1, 1, 1]), rejected("size")),
    "no axes.nii": (partial(nifti, dim=[0] * 8), rejected("is no image")),
    "voxels behind the end.nii": (partial(nifti, vox_offset=1e6), NOT_READ),
    "unknown type.nii": (partial(nifti, datatype=77), rejected("header cannot be read")),
    "scale of nan.nii": (partial(nifti, scl_slope=np.nan), reads(VOLUME)),
    "offset of nan.nii": (partial(nifti, scl_slope=1, scl_inter=np.nan), rejected("header cannot be read")),
    "rgb.nii.gz": (partial(nifti, array=np.zeros((7, 9, 5), COLOURS)), rejected("no image of one channel")),
    "complex.nii.gz": (partial(nifti, array=VOLUME.astype(np.complex64)), rejected("no image of one channel")),
    "int64.nii.gz": (partial(nifti, array=ROUND), reads(ROUND)),
    "float64.nii.gz": (partial(nifti, array=VOLUME.astype(np.float64)), reads(VOLUME)),
    "uint8.nii.gz": (partial(nifti, array=ROUND.astype(np.uint8)), reads(ROUND.astype(np.uint8))),
    "beyond float32.nii": (partial(nifti, array=VOLUME.astype(np.float64) * 1e38), refused("infinite")),
    "big endian.nii": (
        lambda p: p.write_bytes(nib.Nifti1Image(VOLUME, np.eye(4), nib.Nifti1Header(endianness=">")).to_bytes()),
        reads(VOLUME),
    ),
    "4D.nii.gz": (partial(nifti, array=TWO), reads(VOLUME), reads(-VOLUME)),
    "a::b.nii": (partial(nifti, array=TWO), reads(VOLUME), reads(-VOLUME)),
    "5D.nii.gz": (partial(nifti, array=TWO[..., None, :]), rejected("nor images over time")),
    "pair.hdr": (lambda p: nib.save(nib.Nifti1Pair(VOLUME, np.eye(4)), p), reads(VOLUME)),
    "analyze.hdr": (lambda p: nib.save(nib.AnalyzeImage(VOLUME, np.eye(4)), p), reads(VOLUME)),
    "no voxels.hdr": (
        lambda p: (nib.save(nib.AnalyzeImage(VOLUME, np.eye(4)), p), p.with_suffix(".img").unlink()),
        NOT_READ,
    ),
    "no header.img": (lambda p: p.write_bytes(VOLUME.tobytes()), rejected("")),
    "UPPER.NII.GZ": (lambda p: write_nifti(p.with_name("lower.nii.gz"), VOLUME).rename(p), reads(VOLUME)),
    "not packed.nii.gz": (lambda p: write_nifti(p.with_name("a.nii"), VOLUME).rename(p), rejected("header cannot be")),
    "packed.nii": (lambda p: write_nifti(p.with_name("a.nii.gz"), VOLUME).rename(p), rejected("header cannot be")),
    "one bit is wrong.nii.gz": (partial(flipped, nifti), NOT_READ),
    "bomb.nii.gz": (nifti_bomb, rejected("")),
}

NRRD = {
    "plain.mha": (mha, reads(VOLUME, [1, 2, 3])),
    "plain.nrrd": (nrrd, reads(VOLUME, [1, 2, 3])),
    "packed.nrrd": (partial(nrrd, encoding="gzip"), reads(VOLUME, [1, 2, 3])),
    "UPPER.NRRD": (nrrd, reads(VOLUME, [1, 2, 3])),
    "UPPER.MHA": (mha, whole_or_refused(VOLUME)),
    "nan.mha": (partial(mha, array=NAN), refused("holds 1 NaN or infinite")),
    "infinite.nrrd": (partial(nrrd, array=INFINITE), refused("holds 1 NaN or infinite")),
    **{
        f"spacing {size}.{make.__name__}": (partial(make, **{key: f"1 {size} 3"}), rejected("spacing|header cannot"))
        for make, key in ((mha, "ElementSpacing"), (nrrd, "spacings"))
        for size in ("0", "-2", "inf")
    },
    "spacing nan.mha": (partial(mha, ElementSpacing="1 nan 3"), rejected("spacing")),
    # The standard of NRRD has NaN for a spacing that is not known.
    "spacing nan.nrrd": (partial(nrrd, spacings="1 nan 3"), reads(VOLUME, [1, 1, 3])),
    "short voxels.mhd": (partial(mha, data="short.raw"), NOT_READ),
    "no voxels.mhd": (lambda p: (mha(p, data="gone.raw"), p.with_name("gone.raw").unlink()), NOT_READ),
    "says 70 rows.mha": (partial(mha, DimSize="70 9 5"), NOT_READ),
    "says 7 GiB.mha": (partial(mha, DimSize="1250 1250 1250"), NOT_READ),
    "says 4000 GiB.mha": (partial(mha, DimSize="10000 10000 10000"), rejected("")),
    "negative size.mha": (partial(mha, DimSize="-7 9 5"), rejected("")),
    "no size.mha": (partial(mha, DimSize="0 9 5"), rejected("")),
    "unknown type.mha": (partial(mha, kind="NUMBER"), rejected("")),
    "says 70 rows.nrrd": (partial(nrrd, sizes="70 9 5"), NOT_READ),
    "says 70 rows packed.nrrd": (partial(nrrd, encoding="gzip", sizes="70 9 5"), NOT_READ),
    "says 7 GiB.nrrd": (partial(nrrd, sizes="1250 1250 1250"), NOT_READ),
    "says too many voxels to count.nrrd": (partial(nrrd, sizes="4294967296 4294967296 5"), rejected("")),
    "not packed.nrrd": (partial(edited, nrrd, b"raw", b"gzip"), reads(VOLUME)),
    "NRRD.mha": (nrrd, whole_or_refused(VOLUME)),
}

PHOTOS = {
    "1 bit.png": (partial(png, array=BITS), reads(BITS.T * 255)),
    "16 bit.png": (partial(png, array=GREY), reads(GREY.T)),
    "palette.png": (palette, reads(lambda: np.asarray(Image.fromarray(PHOTO).quantize(5).convert("RGB")).T)),
    "transparent.png": (partial(png, array=CLEAR), reads(CLEAR.T)),
    "cmyk.jpg": (partial(photo, mode="CMYK"), reads(partial(decoded, "CMYK", "jpeg"))),
    **{
        f"EXIF of {n}.jpg": (partial(photo, exif=exif(n)), reads(partial(decoded, "RGB", "jpeg", turn=n)))
        for n in range(1, 10)
    },
    "EXIF of 6.png": (partial(png, exif=exif(6)), reads(PHOTO.T[:, :, ::-1].transpose(0, 2, 1))),
    "EXIF that means nothing.jpg": (
        partial(photo, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        reads(partial(decoded, "RGB", "jpeg")),
    ),
    "film.png": (
        lambda p: Image.fromarray(PHOTO).save(p, save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
        rejected("holds 2 pictures"),
    ),
    "1 x 1.png": (partial(png, array=np.full((1, 1), 7, np.uint8)), reads(np.full((1, 1), 7))),
    "1 x 5000.png": (partial(png, array=np.tile(GREY[0], 715)[None, :5000]), reads(np.tile(GREY[0], 715)[:5000])),
    "plain.bmp": (photo, reads(PHOTO.T)),
    "says 90 rows.png": (partial(png_that_says, width=7, height=90), NOT_READ),
    "says no rows.png": (partial(png_that_says, width=7, height=0), rejected("")),
    "wrong checksum.png": (partial(edited, png, struct.pack(">I", 9), struct.pack(">I", 8)), rejected("header cannot")),
    "one bit is wrong.png": (partial(flipped, png), NOT_READ),
    "bomb.png": (
        partial(png_that_says, width=50000, height=50000, depth=1, colour=0, pixels=np.zeros((9, 6250), np.uint8)),
        rejected("header cannot be read|GiB of memory"),
    ),
    "JPEG.png": (partial(photo, format="jpeg"), reads(partial(decoded, "RGB", "jpeg"))),
    "PNG.jpg": (partial(photo, format="png"), reads(PHOTO.T)),
    "TIFF.png": (partial(photo, format="tiff"), reads(PHOTO.T)),
    "PostScript.png": (partial(photo, format="eps"), rejected("header cannot be read")),
    "DICOM.png": (slice_, rejected("header cannot be read")),
    "PNG.nii.gz": (partial(photo, format="png"), rejected("header cannot be read")),
    "PNG.tif": (partial(photo, format="png"), rejected("header cannot be read")),
    "PNG.npz": (partial(photo, format="png"), rejected("header cannot be read")),
    "PNG.dcm": (partial(photo, format="png"), rejected("no readable DICOM")),
    "PNG.nrrd": (partial(photo, format="png"), whole_or_refused(PHOTO.T)),
    **{name: (png, reads(PHOTO.T)) for name in ODD_NAMES},
    "not UTF-8 \udcff.png": (png, rejected("")),
}

FLOATS = VOLUME[:, :, 0]
TIFF = {
    "float16.tif": (tiff(FLOATS.astype(np.float16)), reads(FLOATS.astype(np.float16).T)),
    "float64.tif": (tiff(FLOATS.astype(np.float64)), reads(FLOATS.T)),
    "nan.tif": (tiff(NAN[:, :, 2]), refused("holds 1 NaN or infinite")),
    "lzw.tif": (tiff(GREY, compression="lzw", predictor=True), reads(GREY.T)),
    "colours lzw.tif": (tiff(PHOTO, compression="lzw", photometric="rgb"), reads(PHOTO.T)),
    "tiles.tif": (tiff(np.tile(GREY, (4, 5)), tile=(16, 16)), reads(np.tile(GREY, (4, 5)).T)),
    "planes.tif": (tiff(PHOTO.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), reads(PHOTO.T)),
    "big endian.tif": (tiff(GREY, byteorder=">"), reads(GREY.T)),
    "BigTIFF.tif": (tiff(GREY, bigtiff=True), reads(GREY.T)),
    "int8.tif": (tiff(GREY.astype(np.int8)), reads(GREY.astype(np.int8).T)),
    "int16.tif": (tiff(GREY.astype(np.int16)), reads(GREY.astype(np.int16).T)),
    "uint32.tif": (tiff(GREY.astype(np.uint32) * 65537), reads((GREY.astype(np.uint32) * 65537).T)),
    "white is zero.tif": (tiff(PHOTO[..., 0], photometric="miniswhite"), reads(255 - PHOTO[..., 0].T)),
    "white is zero 16 bit.tif": (tiff(GREY, photometric="miniswhite"), whole_or_refused(2**16 - 1 - GREY.T)),
    "complex.tif": (tiff(FLOATS.astype(np.complex64)), NOT_READ),
    "pages of several sizes.tif": (tiff_of_pages, reads(GREY.T)),
    "pages in a circle.tif": (tiff_in_a_circle, whole_or_refused(np.dstack([GREY.T, GREY.T]))),
    "glass.tif": (empty_slide, rejected("")),
    **{
        f"turned by {n} {name}": (partial(tiff_turned, array=array, turn=n, **options), reads(as_shown(array, n)))
        for n in range(10)
        for name, array, options in (
            ("grey.tif", GREY, {}),
            ("grey packed.tif", GREY, {"compression": "lzw"}),
            ("grey tiles.tif", np.tile(GREY, (4, 5)), {"tile": (16, 16)}),
            ("colours.tif", PHOTO, {"photometric": "rgb"}),
            ("deep colours.tif", PHOTO.astype(np.uint16) * 257, {"photometric": "rgb"}),
            ("pages.tif", SLICES, {"metadata": None}),
        )
    },
    "turned palette.tif": (
        lambda p: Image.fromarray(PHOTO).quantize(5).save(p, exif=exif(6)),
        reads(lambda: as_shown(np.asarray(Image.fromarray(PHOTO).quantize(5).convert("RGB")), 6)),
    ),
    "turned stack of ImageJ.tif": (
        partial(
            tiff_turned,
            array=SLICES,
            turn=8,
            imagej=True,
            resolution=(2, 4),
            metadata={"axes": "ZYX", "spacing": 3, "unit": "mm"},
        ),
        reads(as_shown(SLICES, 8), [0.25, 0.5, 3]),
    ),
}

ARCHIVES = {
    "one.npz": (archive, reads(PHOTO.T)),
    "nan.npz": (partial(archive, train_images=NAN[None]), refused("holds 1 NaN or infinite")),
    "objects.npz": (partial(archive, train_images=np.array([{}], dtype=object)), rejected("of object")),
    "labels that are objects.npz": (partial(archive, train_labels=np.array([{}], object)), rejected("labels cannot")),
    "too few labels.npz": (
        partial(archive, train_images=PHOTO[[0, 1]], train_labels=np.zeros(3)),
        rejected("labels cannot be used"),
    ),
    "two labels in a row.npz": (
        partial(archive, train_images=PHOTO[[0, 1]], train_labels=np.zeros(4)),
        rejected("labels cannot be used"),
    ),
    "no images.npz": (partial(archive, train_images=PHOTO[:0]), rejected("")),
    "other arrays.npz": (lambda p: np.savez(p, x=PHOTO), rejected("holds no array train_images")),
    "one bit is wrong.npz": (partial(flipped, archive), NOT_READ),
    "says 100 GiB.npz": (partial(npz_bomb, shape=(2**27 + 2**24, 28, 28)), NOT_READ),
    "says 100 GiB of labels.npz": (partial(npz_with_labels_bomb, shape=(1, 100 * 2**30)), NOT_READ),
    **{
        f"holds 2 GiB of {descr} labels {shape}.npz": (
            partial(npz_with_labels_bomb, descr=descr, shape=shape, zeros=2**31),
            rejected("labels cannot be used"),
        )
        for descr, shape in (("|u1", (1, 2**31)), ("|V16", (1, 2**27)))
    },
    "labels of nothing.npz": (
        partial(npz_with_labels_bomb, descr="<U0", shape=(1, 2**40)),
        rejected("labels cannot be used"),
    ),
    "millions of images of one pixel.npz": (
        partial(npz_bomb, shape=(2**28, 1, 1), zeros=2**28),
        rejected("268435456 images, more than"),
    ),
    "bomb.npz": (partial(npz_bomb, shape=(1, 992, 2048, 2048), zeros=992 * 2**22), rejected("GiB of memory")),
}

SAME = {"SOPInstanceUID": "1.2.3.4"}
TURNED = [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1]]
ENCODED = {
    "explicit": b"1.2.840.10008.1.2.1\0",
    "implicit": b"1.2.840.10008.1.2\0\0\0",
    "big endian": b"1.2.840.10008.1.2.2\0",
    "run lengths": b"1.2.840.10008.1.2.5\0",
    "unknown": b"1.2.840.10008.1.2.9\0",
}
SHIPPED = [
    "CT_small.dcm", "JPEG-lossy.dcm", "JPGExtended.dcm", "JPEG2000.dcm", "JPEGLSNearLossless_08.dcm",
    "JPEGLSNearLossless_16.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_small_odd.dcm", "SC_ybr_full_422_uncompressed.dcm",
    "examples_palette.dcm", "image_dfl.dcm",
]  # fmt: skip
DICOM = {
    **{name: (ship(name), reads(partial(pixels, name))) for name in SHIPPED},
    "32 bit big endian.dcm": (
        partial(relabelled, "rtdose_expb.dcm", Modality="CT"),
        whole_or_refused(partial(pixels, "rtdose_expb.dcm")),
    ),
    "SC_rgb_rle_16bit.dcm": (ship("SC_rgb_rle_16bit.dcm"), whole_or_refused(partial(pixels, "SC_rgb_rle_16bit.dcm"))),
    **{
        name: (ship(name), rejected(NO_IMAGE))
        for name in ("test-SR.dcm", "rtplan.dcm", "rtplan_truncated.dcm", "liver_1frame.dcm", "rtdose.dcm", "badVR.dcm")
    },
    "MR_truncated.dcm": (ship("MR_truncated.dcm"), NOT_READ),
    "series": (series, reads(HOUNSFIELD, [1, 1, 3])),
    "series.png": (series, reads(HOUNSFIELD)),
    "series.nii.gz": (series, reads(HOUNSFIELD)),
    "series.npz": (series, reads(HOUNSFIELD)),
    "same numbers": (partial(series, InstanceNumber=1), reads(HOUNSFIELD)),
    "no numbers": (partial(series, InstanceNumber=None), reads(HOUNSFIELD)),
    "numbers against places": (partial(series, InstanceNumber=lambda n: -n), reads(HOUNSFIELD)),
    "the same slice again": (
        several(series, lambda p: (p / "copy.dcm").write_bytes((p / "3.dcm").read_bytes())),
        reads(HOUNSFIELD),
        rejected("the same instance as 3.dcm"),
    ),
    "instances of one name": (partial(series, **SAME), reads(HOUNSFIELD)),
    "two series": (
        several(partial(series, numbers=range(3)), partial(series, numbers=range(3, 6), series="1.9")),
        reads(HOUNSFIELD[..., :3]),
        reads(HOUNSFIELD[..., 3:]),
    ),
    "localizer": (
        partial(series, numbers=range(3), ImageOrientationPatient=lambda n: TURNED[n]),
        *(reads(HOUNSFIELD[..., n]) for n in range(3)),
    ),
    "missing slice": (partial(series, numbers=[0, 1, 2, 4, 5]), rejected("2.dcm and 4.dcm are 6.000 mm apart")),
    "tilted": (partial(series, ImagePositionPatient=lambda n: [0, n, 3 * n]), reads(HOUNSFIELD)),
    "shifted": (partial(series, ImagePositionPatient=lambda n: [0, n * n / 4, 3 * n]), rejected("shifted by 0.250 to")),
    "two at one place": (
        partial(series, ImagePositionPatient=lambda n: [0, 0, 3 * min(n, 4)]),
        rejected("share a place|apart"),
    ),
    "sizes that differ": (
        several(partial(series, numbers=range(3)), lambda p: slice_(p / "3.dcm", 3, Rows=3)),
        reads(HOUNSFIELD[..., :3]),
        reads(HOUNSFIELD[:, :3, 3]),
    ),
    "one is cut": (several(series, lambda p: cut(partial(slice_, number=3), 0.9, p / "3.dcm")), NOT_READ),
    **{
        f"{what} that means nothing": (
            lambda p, old=old, new=new, tags=tags: [
                edited(partial(slice_, number=n, **tags), old, new, p / f"{n}.dcm") for n in range(3)
            ],
            whole_or_refused(HOUNSFIELD[..., :3]),
        )
        for what, tags, old, new in (
            ("number", {"InstanceNumber": 77}, b"IS\2\x0077", b"IS\2\0x7"),
            ("acquisition", {"AcquisitionNumber": 77}, b"IS\2\x0077", b"IS\2\0x7"),
            ("frames", {"NumberOfFrames": 77}, b"IS\2\x0077", b"IS\2\0x7"),
            ("place", {}, b"0.0\\0.0\\", b"0.0\\x.0\\"),
            ("direction", {}, b"1.0\\0.0\\0.0\\0.0\\1.0\\0.0", b"1.0\\0.0\\0.0\\0.0\\x.0\\0.0"),
            ("short direction", {}, b"1.0\\0.0\\0.0\\0.0\\1.0\\0.0", b"1.0\\0.0\\0.0            "),
            ("spacing", {"PixelSpacing": [1.5, 1]}, b"1.5\\1.0", b"x.5\\1.0"),
            ("slope", {"RescaleSlope": 77}, b"77.0", b"x7.0"),
        )
    },
    **{
        f"says 600 rows {name}": (partial(relabelled, name, Rows=600), whole_or_refused(partial(pixels, name)))
        for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_gdcm.dcm")
    },
    "a broken file beside": (
        several(series, lambda p: (p / "6.dcm").write_text("This is no image.")),
        reads(HOUNSFIELD),
        rejected("no readable DICOM"),
    ),
    "a hidden file beside": (several(series, lambda p: (p / "._0.dcm").write_text("Mac OS X")), reads(HOUNSFIELD)),
    "no preamble.dcm": (lambda p: (slice_(p), p.write_bytes(p.read_bytes()[132:])), rejected("no readable DICOM")),
    "no ending": (slice_, reads(HOUNSFIELD[..., 0])),
    "inverted.dcm": (partial(slice_, PhotometricInterpretation="MONOCHROME1"), reads(HOUNSFIELD[..., 0])),
    "unsigned.dcm": (
        partial(slice_, PixelRepresentation=0, RescaleSlope=1, RescaleIntercept=-1024),
        reads(SLICES[0].astype(np.uint16).T.astype(float) - 1024),
    ),
    "slope of zero.dcm": (partial(slice_, RescaleSlope=0), NOT_READ),
    "slope that is half.dcm": (partial(slice_, RescaleSlope=0.5), reads(SLICES[0].T * 0.5 - 1000)),
    "12 bits.dcm": (partial(slice_, BitsStored=12, HighBit=11), reads(HOUNSFIELD[..., 0])),
    "says 600 rows.dcm": (partial(slice_, Rows=600), NOT_READ),
    "says 65535 rows.dcm": (partial(slice_, Rows=65535, Columns=65535), rejected("")),
    "no columns.dcm": (partial(slice_, Columns=0), rejected("")),
    "frames of nothing.dcm": (partial(slice_, NumberOfFrames=90), NOT_READ),
    "no pixels.dcm": (lambda p: (slice_(p), p.write_bytes(p.read_bytes()[: -8 - 96 - 4])), NOT_READ),
    **{
        f"spacing {size}.dcm": (partial(slice_, PixelSpacing=[size, 1]), rejected("spacing of|cannot be read"))
        for size in (0, -1)
    },
    "no spacing.dcm": (partial(slice_, PixelSpacing=None), reads(HOUNSFIELD[..., 0])),
    "nan spacing.dcm": (partial(edited, partial(slice_, PixelSpacing=[1.5, 1]), b"1.5\\1", b"nan\\1"), rejected("")),
    "direction of zeros.dcm": (partial(slice_, ImageOrientationPatient=[0] * 6), reads(HOUNSFIELD[..., 0])),
    **{
        f"called {name}.dcm": (
            partial(edited, ship("CT_small.dcm"), ENCODED["explicit"], uid),
            whole_or_refused(partial(pixels, "CT_small.dcm")),
        )
        for name, uid in ENCODED.items()
    },
    "bomb.dcm": (dicom_bomb, NOT_READ),
}

ENDINGS = ["", *endings().split()]
BESIDE = {
    "folder.png": (lambda p: (p.mkdir(), png(p / "a.png")), reads(PHOTO.T)),
    "linked to itself.png": (lambda p: p.symlink_to(p.name), rejected("")),
    "loop": (lambda p: (p.mkdir(), png(p / "a.png"), (p / "again").symlink_to(p)), reads(PHOTO.T)),
    **{
        f"{kind}{ending}": (make, rejected(""))
        for kind, make in {
            "pipe": os.mkfifo,
            "socket": partial(os.mknod, mode=stat.S_IFSOCK | 0o600),
            "endless": lambda path: path.symlink_to("/dev/zero"),
            "dangling": lambda path: path.symlink_to("gone"),
        }.items()
        for ending in ("", ".png", ".nii.gz", ".npz", ".dcm", ".nrrd", ".tif")
    },
    **{f"empty{ending}": (Path.touch, rejected("")) for ending in ENDINGS},
    **{f"text{ending}": (lambda path: path.write_text("This is no image."), rejected("")) for ending in ENDINGS},
}

PACKED = [
    "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm", "image_dfl.dcm",
]  # fmt: skip
CUT = {
    ".nii.gz": (nifti, VOLUME),
    ".nii": (nifti, VOLUME),
    ".png": (png, PHOTO.T),
    ".jpg": (photo, partial(decoded, "RGB", "jpeg")),
    ".bmp": (photo, PHOTO.T),
    ".dcm": (slice_, HOUNSFIELD[..., 0]),
    ".tif": (tiff(GREY, compression="lzw"), GREY.T),
    " pages.tif": (tiff(SLICES, metadata=None), SLICES.T),
    " pages and shape.tif": (tiff(SLICES), SLICES.T),
    " pages packed.tif": (tiff(SLICES, compression="zlib"), SLICES.T),
    ".npz": (archive, PHOTO.T),
    ".nrrd": (nrrd, VOLUME),
    " packed.nrrd": (partial(nrrd, encoding="gzip"), VOLUME),
    ".mha": (mha, VOLUME),
    **{f" {name}": (ship(name), partial(pixels, name)) for name in PACKED},
}

CASES = NIFTI | NRRD | PHOTOS | TIFF | ARCHIVES | DICOM | BESIDE | {
    f"{10 * tenth} percent{name}": (partial(cut, make, tenth / 10), whole_or_refused(whole))
    for name, (make, whole) in CUT.items()
    for tenth in range(10)
}  # fmt: skip


@contextmanager
def two_gigabytes_more():
    """What takes more memory than that raises MemoryError, and so cannot take all of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CASES, ids=ascii)
def test_every_image_of_a_file_is_read_right_or_refused_by_name(tmp_path, name):
    make, *outcomes = CASES[name]
    make(tmp_path / name)
    with two_gigabytes_more():
        found = list(survey(tmp_path))
        items = [item for one in found for item in one.items]
        left_out = [rejection for one in found for rejection in one.rejected]
        if outcomes[0].kind == "either":
            check_either(items, left_out, outcomes[0])
            return
        listed = [outcome for outcome in outcomes if outcome.kind != "rejected"]
        assert (len(items), len(left_out)) == (len(listed), len(outcomes) - len(listed))
        for item, outcome in zip(items, listed, strict=True):
            check_item(item, outcome)
        for rejection, outcome in zip(left_out, outcomes[len(listed) :], strict=True):
            check_rejected(rejection, outcome)


@pytest.mark.parametrize("descr", ["|u1", "|V16"])
def test_an_array_of_an_archive_that_is_no_image_is_refused_by_name_before_it_is_unpacked(tmp_path, descr):
    npz_with_labels_bomb(tmp_path / "a.npz", shape=(1, 2**31), descr=descr, zeros=2**26)
    with two_gigabytes_more():
        assert "a.npz: " in (refusal(f"{tmp_path}/a.npz::train_labels::0") or "")


INDEXED_AND_PACKED = """
import pathlib, resource, sys
from biovfm_monai.data import index, pack

# More than what is asserted, but not all of the machine.
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, resource.getrlimit(resource.RLIMIT_AS)[1]))
tree, out = sys.argv[1:]
index([tree], f"{out}/datalist.json", modality="ct")
pack(f"{out}/datalist.json", f"{out}/store", num_workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def table(path):
    """The files that a list names, each with a reason of one line."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        name = part_of(row["file"])[0].name
        assert row.get("reason") in (None, NO_IMAGE) or len(row["reason"].replace(name, "name").splitlines()) == 1, row
    return [row["file"] for row in rows]


def printable(path):
    return os.fsencode(path).decode(errors="backslashreplace")


def files_of(item):
    """All files that an item is read from."""
    paths = [part_of(item["image"])[0]] if isinstance(item["image"], str) else [Path(one) for one in item["image"]]
    return {str(file) for path in paths for file in (path.iterdir() if path.is_dir() else [path])}


def test_a_tree_of_all_of_them_is_indexed_and_packed_and_each_accounted_for_once(tmp_path, run):
    tree, out = tmp_path / "tree", tmp_path / "out"
    for number, (name, (make, *_)) in enumerate(CASES.items()):
        (tree / f"{number:03}").mkdir(parents=True)
        make(tree / f"{number:03}" / name)

    done = run("-c", INDEXED_AND_PACKED, tree, out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 3 * 2**20  # KiB

    items = [item for section in read_datalist(out / "datalist.json").values() for item in section]
    left_out = table(out / "rejected.csv")
    assert max(Counter(left_out).values()) == 1
    stored = {printable(file) for item in items for file in files_of(item)}
    series = {str(Path(file).parent) for file in [*stored, *left_out] if file.endswith(".dcm")} | set(left_out)
    lost, twice = [], []
    for parent, _, names in os.walk(tree):
        for file in (Path(parent) / name for name in names if not name.startswith(".")):
            listed = (printable(file) in stored, printable(file) in left_out)
            voxels = file.with_suffix(".hdr").exists() and file.suffix == ".img"
            if listed == (True, True):
                twice.append(file)
            elif listed == (False, False) and not voxels and not (file.suffix == ".dcm" and str(file.parent) in series):
                lost.append(file)
    assert (lost, twice) == ([], [])

    images = [item["image"] if isinstance(item["image"], str) else item["image"][0] for item in items]
    not_stored = table(out / "store-rejected.csv") + table(out / "store-duplicates.csv")
    assert max(Counter(not_stored).values()) == 1
    assert set(not_stored) <= set(images)
    assert len(images) == len(not_stored) + pq.read_table(out / "store/index.parquet").num_rows


@contextmanager
def somebody():
    """As root, who may read everything, be nobody for a while."""
    root = os.geteuid() == 0
    if root:
        try:
            os.seteuid(65534)
        except OSError:
            pytest.skip("root may read everything, and cannot be anybody else here")
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.timeout(60)
def test_a_file_and_a_folder_that_may_not_be_read_are_named():
    # Nobody else may enter the folders that pytest makes.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        png(folder / "secret.png")
        slice_(folder / "secret.dcm")
        series(folder / "shut")
        for secret in ("secret.png", "secret.dcm", "shut"):
            (folder / secret).chmod(0)
        with somebody():
            if not os.path.lexists(folder / "secret.png"):
                pytest.skip("only root may enter the folder for temporary files")
            found = list(survey(folder))
        (folder / "shut").chmod(0o700)
    assert [item for one in found for item in one.items] == []
    left_out = {Path(rejection.file).name: rejection.reason for one in found for rejection in one.rejected}
    assert set(left_out) == {"secret.png", "secret.dcm", "shut"}
    assert all(re.search("Permission|rights", reason) for reason in left_out.values())
