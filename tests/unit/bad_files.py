"""Files made wrong: cut short, with headers that lie, of odd kinds, or made to take all memory."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from image_files import write_dicom, write_png
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian

RNG = np.random.default_rng(0)
VOLUME = RNG.normal(0, 100, (7, 9, 5)).astype(np.float32)
PHOTO = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 2**16, (9, 7), dtype=np.uint16)
SLICES = RNG.integers(-300, 900, (6, 6, 8), dtype=np.int16)


def cut(make, share, path):
    make(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def edited(make, old, new, path):
    make(path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def flipped(make, path):
    """One bit in the middle is another."""
    make(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def nifti(path, array=VOLUME, affine=None, kind=nib.Nifti1Image, **fields):
    """A volume whose header then says other things."""
    content = kind(array, np.eye(4) if affine is None else affine, dtype=array.dtype).to_bytes()
    size = kind.header_class.template_dtype.itemsize
    header = kind.header_class(content[:size], check=False)
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + content[size:]
    path.write_bytes(gzip.compress(content) if path.name.endswith("gz") else content)


def mha(path, data=None, kind="FLOAT", array=VOLUME, **lines):
    """MetaImage, its voxels in another file where there is a name for it."""
    lines = {
        "ObjectType": "Image", "NDims": array.ndim, "BinaryData": True, "BinaryDataByteOrderMSB": False,
        "DimSize": " ".join(map(str, array.shape)), "ElementSpacing": "1 2 3", "ElementType": f"MET_{kind}",
    } | lines | {"ElementDataFile": data or "LOCAL"}  # fmt: skip
    content = "".join(f"{name} = {value}\n" for name, value in lines.items()).encode()
    path.write_bytes(content + (b"" if data else array.tobytes("F")))
    if data:
        path.with_name(data).write_bytes(array.tobytes("F")[: 7 * 9 * 5])


def nrrd(path, array=VOLUME, encoding="raw", **lines):
    lines = {
        "type": "float", "dimension": 3, "sizes": "7 9 5", "spacings": "1 2 3", "encoding": encoding,
        "endian": "little",
    } | lines  # fmt: skip
    content = array.tobytes("F")
    content = gzip.compress(content) if encoding == "gzip" else content
    path.write_bytes("\n".join(["NRRD0004", *(f"{k}: {v}" for k, v in lines.items()), "", ""]).encode() + content)


def png(path, array=PHOTO, **options):
    write_png(path, array, **options)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_says(path, width, height, depth=8, colour=2, pixels=PHOTO):
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def photo(path, mode="RGB", **options):
    Image.fromarray(PHOTO).convert(mode).save(path, **options)


def decoded(mode, kind, turn=1, **options):
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert(mode).save(file, kind, **options)
    return as_shown(np.asarray(Image.open(file).convert("RGB")), turn)


def exif(turn):
    """What a camera says of how it was held."""
    tags = Image.Exif()
    tags[0x112] = turn
    return tags.tobytes()


# Where the row 0 and the column 0 of what is stored are shown (TIFF 6.0, p. 36)
SHOWN = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def as_shown(array, turn):
    """What is stored in rows, turned, with x first as images are read: a picture, or one behind the other."""
    colour = array.shape[-1] == 3
    pages = array if array.ndim == 3 and not colour else [array]
    shown = [SHOWN.get(turn, np.asarray)(page).T for page in pages]
    return shown[0] if len(shown) == 1 else np.stack(shown, -1)


def tiff_turned(path, array, turn, **options):
    tifffile.imwrite(path, array, extratags=[(274, "H", 1, turn, True)], **options)


def palette(path):
    Image.fromarray(PHOTO).quantize(5).save(path)


def tiff(array, **options):
    return lambda path: tifffile.imwrite(path, array, **options)


def tiff_of_pages(path):
    with tifffile.TiffWriter(path) as file:
        for page in (GREY, GREY[:4, :3], PHOTO):
            file.write(page)


def tiff_in_a_circle(path):
    """Its second page says that the third is the second again."""
    tifffile.imwrite(path, GREY, metadata=None)
    with tifffile.TiffFile(path) as file:
        page, end = file.pages[0], file.filehandle.size
    content = bytearray(path.read_bytes())
    after = page.offset + 2 + 12 * len(page.tags)
    content[after : after + 4] = struct.pack("<I", end)
    path.write_bytes(content + content[page.offset : after] + struct.pack("<I", end))


def empty_slide(path):
    """A whole slide of nothing but glass."""
    glass = np.full((2048, 2048, 3), 255, np.uint8)
    with tifffile.TiffWriter(path) as file:
        for n in (1, 2, 4):
            size = {"resolution": (20000 / n, 20000 / n), "resolutionunit": "CENTIMETER", "subfiletype": n > 1}
            file.write(glass[::n, ::n], tile=(256, 256), compression="jpeg", photometric="rgb", metadata=None, **size)


def archive(path, **arrays):
    np.savez(path, **{"train_images": PHOTO[None]} | arrays)


def slice_(path, number=0, series="1.2.3", **tags):
    write_dicom(path, series, number, **{"PixelData": SLICES[number].tobytes(), "InstanceNumber": number} | tags)


def series(folder, numbers=range(6), **tags):
    """Slices of a volume; a tag may be a function of the slice's number."""
    for n in numbers:
        slice_(folder / f"{n}.dcm", n, **{name: of(n) if callable(of) else of for name, of in tags.items()})


def several(*makers):
    return lambda path: [make(path) for make in makers]


def deflated(begin, zeros, block=2**26):
    """A stream that unpacks to some bytes and then very many zeros, without packing them all."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    begin = packer.compress(begin) + packer.flush(zlib.Z_FULL_FLUSH)
    repeated = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    return begin + repeated * (zeros // block) + packer.flush()


def npy_header(shape, descr="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def zipped(path, members):
    """An archive of arrays: name -> what each begins with, and how many zeros follow."""
    files, entries = b"", b""
    for name, (begin, zeros) in members.items():
        content, file = deflated(begin, zeros), f"{name}.npy".encode()
        said = (0 if zeros else zlib.crc32(begin), len(content), len(begin) + zeros, len(file))
        entries += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 33, *said, *[0] * 5, len(files)) + file
        files += struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 33, *said, 0) + file + content
    count = len(members)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(entries), len(files), 0)
    path.write_bytes(files + entries + end)


def npz_bomb(path, shape, zeros=0):
    """An archive of one array, of which so many zeros are there."""
    zipped(path, {"train_images": (npy_header(shape), zeros)})


def npz_with_labels_bomb(path, shape, descr="|u1", zeros=0):
    """One honest image, and labels of which so many zeros are there."""
    image = npy_header((1, 9, 7, 3)) + PHOTO.tobytes()
    zipped(path, {"train_images": (image, 0), "train_labels": (npy_header(shape, descr), zeros)})


def nifti_bomb(path):
    header = nib.Nifti1Header()
    header.set_data_shape((8000, 8000, 500))
    header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = deflated(header.binaryblock + bytes(4), 2**31)
    path.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + content + bytes(8))


def dicom_bomb(path):
    """A dataset that is deflated as a whole, with 4 GiB of zeros behind its header."""
    slice_(path)
    plain = path.read_bytes()
    plain = plain[plain.index(b"\x08\0\x16\0UI") : plain.index(b"\xe0\x7f\x10\0")]
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, False)
        pydicom.filereader._read_file_meta_info(file)
        begin = file.tell()
    pixels = b"\xe0\x7f\x10\0OW\0\0" + struct.pack("<I", 2**32 - 2**26)
    path.write_bytes(path.read_bytes()[:begin] + deflated(plain + pixels, 2**32 - 2**26))


def shipped(name):
    return Path(get_testdata_file(name, download=False))


def ship(name):
    return lambda path: path.write_bytes(shipped(name).read_bytes())


def relabelled(name, path, **tags):
    dataset = pydicom.dcmread(shipped(name))
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.save_as(path)


def pixels(name):
    """The values of a DICOM file that ships with pydicom, by pydicom or, where that has no decoder, by imagecodecs."""
    dataset = pydicom.dcmread(shipped(name))
    try:
        array = dataset.pixel_array
    except RuntimeError:
        code, uid = get_frame(dataset.PixelData, 0), dataset.file_meta.TransferSyntaxUID
        array = (imagecodecs.jpegls_decode if uid.name.startswith("JPEG-LS") else imagecodecs.jpeg_decode)(code)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return (apply_color_lut(array, dataset) >> 8).T
    return (apply_modality_lut(array, dataset) if dataset.SamplesPerPixel == 1 else array).T
