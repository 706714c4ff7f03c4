"""Files as a plain viewer shows them, beside what the presets make of them.

    python docs/modalities/make_pictures.py [FOLDER]

FOLDER holds chest.jpeg and retina.jpeg, a radiograph and a scan of https://doi.org/10.17632/rscbjbr9sj (CC BY 4.0);
without it their pictures stay as they are. All other images come with the dependencies.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from biovfm_monai.data import modalities, read_image, sample_datalist
from biovfm_monai.data.modalities.base import SlicesFirstd

WIDTH, GAP, TITLE = 660, 6, 22
Panel = tuple[str, Image.Image]


def drawn(values: torch.Tensor) -> Image.Image:
    """The first slice of C x depth x height x width in [0, 1]."""
    pixels = (values[:, 0].movedim(0, -1) * 255).round().byte()
    return Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy())


def file(image: MetaTensor) -> Panel:
    """As a viewer shows it that knows nothing of the modality: 8 bit as they are, others from minimum to maximum."""
    values = SlicesFirstd("image")({"image": image})["image"].as_tensor()
    low, high = (0, 255) if values.dtype == torch.uint8 else (values.min(), values.max())
    return "file", drawn((values - low) / (high - low))


def after(name: str, image: MetaTensor, **options: bool | str) -> Panel:
    """What the preset makes of it."""
    title = ", ".join([name, *(f"{key}={value!r}" for key, value in options.items())])
    return title, drawn(getattr(modalities, name)("image", **options)({"image": image})["image"].as_tensor())


def negative(photo: Path, path: Path) -> None:
    """A radiograph as detectors store it: 12 bits, bones dark, and a window for the display."""
    grey = torch.from_numpy(np.array(Image.open(photo).convert("L"))).int()
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = DigitalXRayImageStorageForPresentation
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.SeriesInstanceUID, d.StudyInstanceUID, d.Modality, d.PatientID = generate_uid(), generate_uid(), "DX", ""
    (d.Rows, d.Columns), d.BitsAllocated, d.BitsStored, d.HighBit = grey.shape, 16, 12, 11
    d.PixelRepresentation, d.SamplesPerPixel, d.PhotometricInterpretation = 0, 1, "MONOCHROME1"
    d.WindowCenter, d.WindowWidth = 1500, 1020
    d.PixelData = (2010 - 4 * grey).to(torch.uint16).numpy().tobytes()
    d.save_as(path, enforce_file_format=True)


def save(name: str, *rows: list[Panel]) -> None:
    """Write rows of titled panels."""
    sheet, right, top = Image.new("RGB", (WIDTH, WIDTH), "white"), 0, 0
    for row in rows:
        box, left, below = ((WIDTH + GAP) // len(row) - GAP, 290), 0, 0
        for title, panel in row:
            picture = ImageOps.contain(panel, box)
            ImageDraw.Draw(sheet).text((left + 2, top + 4), title, "black", ImageFont.load_default(13))
            sheet.paste(picture, (left, top + TITLE))
            left, below = left + picture.width + GAP, max(below, top + TITLE + picture.height + GAP)
        right, top = max(right, left - GAP), below
    sheet.crop((0, 0, right, top - GAP)).quantize(256, kmeans=3).save(Path(__file__).with_name(f"{name}.png"))


_, eye, _, tissue, cell, chest, body, _ = (read_image(item["image"]) for item in sample_datalist())
names = "693_J2KI", "examples_jpeg2k", "examples_ybr_color"
head, scan, echo = (read_image(get_testdata_file(f"{name}.dcm")) for name in names)
framed = MetaTensor(torch.nn.functional.pad(eye.as_tensor(), (150, 150, 500, 500)))
save("ct", *([file(i), after("ct", i), after("ct", i, window=w)] for i, w in ((chest, "soft tissue"), (head, "bone"))))
save("mri", [file(body), after("mri", body), after("mri", body, bias_field=True)])
save("ultrasound", *([file(image), after("ultrasound", image)] for image in (scan, echo)))
save("fundus", [file(framed), after("fundus", framed)])
save("pathology", [file(tissue), after("pathology", tissue, even_stains=True)])
save("microscopy", [file(cell), after("microscopy", cell), after("microscopy", cell.float())])
if len(sys.argv) > 1:
    chest_photo, retina = Path(sys.argv[1]) / "chest.jpeg", read_image(Path(sys.argv[1]) / "retina.jpeg")
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "chest.dcm"
        negative(chest_photo, stored)
        pixels = MetaTensor(torch.from_numpy(dcmread(stored).pixel_array.astype(np.float32)).T[None])
        save("xray", [file(pixels), after("xray", read_image(stored))])
    save("oct", [file(retina), after("oct", retina)])
