"""Files as a plain viewer shows them, beside what the presets make of them: python docs/modalities/make_pictures.py."""

from pathlib import Path

import torch
from monai.data import MetaTensor
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydicom.data import get_testdata_file

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
