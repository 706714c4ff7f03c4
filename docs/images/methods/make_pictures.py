"""What each method sees and predicts, drawn by the code that trains it: python docs/images/methods/make_pictures.py."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai.data import modalities, read_image, sample_datalist
from biovfm_monai.data.preprocessing import crop_of_degree
from biovfm_monai.networks.masking import block_mask, block_size, context_and_targets, cube_mask, random_mask
from biovfm_monai.sheet import draw_sheet

CONFIGS = Path(__file__).parents[3] / "configs"
SIZE, PATCH = 224, 16
GRID = (1, SIZE // PATCH, SIZE // PATCH)
LENGTH = math.prod(GRID)
GREY, RED = (0.82, 0.82, 0.82), (0.9, 0.1, 0.1)
Panel = tuple[str, np.ndarray]


def prepared(number: int) -> Tensor:
    """A sample image as a bundle gives it to a method: C x depth x height x width in [0, 1]."""
    item = sample_datalist()[number]
    return getattr(modalities, item["modality"])("image")({"image": read_image(item["image"])})["image"].as_tensor()


def square(image: Tensor) -> Tensor:
    """The largest square in the middle of the middle slice: 3 x SIZE x SIZE."""
    plane = image[:, image.shape[1] // 2].expand(3, -1, -1)
    side = min(plane.shape[1:])
    top, left = (plane.shape[1] - side) // 2, (plane.shape[2] - side) // 2
    middle = plane[None, :, top : top + side, left : left + side]
    return F.interpolate(middle, (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def panel(title: str, image: Tensor) -> Panel:
    """A title and C x height x width in [0, 1] as 8-bit colours."""
    return title, (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()


def where(tokens: Tensor, grid: tuple[int, int] = GRID[1:]) -> Tensor:
    """Numbers of tokens of a slice, or a mask of them, as a mask of its pixels."""
    mask = (
        tokens
        if tokens.dtype == torch.bool
        else torch.zeros(math.prod(grid), dtype=torch.bool).index_fill(0, tokens, True)
    )
    return mask.view(grid).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)


def only(image: Tensor, mask: Tensor) -> Tensor:
    """The image inside a mask, and grey outside."""
    return torch.where(mask, image, torch.tensor(GREY)[:, None, None])


def lined(image: Tensor, step: tuple[int, int]) -> Tensor:
    """The image with a line around each token of so many pixels."""
    image = image.expand(3, -1, -1).clone()
    for axis, size in enumerate(step):
        image.index_fill_(axis + 1, torch.arange(0, image.shape[axis + 1], size), 1.0)
        image.index_fill_(axis + 1, torch.tensor([image.shape[axis + 1] - 1]), 1.0)
    return image


def framed(image: Tensor, block: Tensor) -> Tensor:
    """The image with a red frame around a block of tokens."""
    rows, columns = torch.unravel_index(block, GRID[1:])
    top, left = int(rows.min()) * PATCH, int(columns.min()) * PATCH
    below, right = (int(rows.max()) + 1) * PATCH, (int(columns.max()) + 1) * PATCH
    red = torch.tensor(RED)[:, None, None].expand(3, below - top, right - left)
    inside = image[:, top + 4 : below - 4, left + 4 : right - 4].clone()
    image = image.clone()
    image[:, top:below, left:right] = red
    image[:, top + 4 : below - 4, left + 4 : right - 4] = inside
    return image


def views(overlay: str, images: list[int], key: int) -> tuple[Tensor, Tensor | None]:
    """The large and small views that an overlay makes of sample images: views x B x 3 x height x width in [0, 1]."""
    chosen = json.loads((CONFIGS / f"{overlay}.json").read_text())["views"]
    imports = ["$import biovfm_monai.data as data"]
    parser = ConfigParser({"imports": imports, "img_size": [SIZE, SIZE], "views": chosen})
    made = parser.get_parsed_content("views")
    batch = {
        "image": torch.stack([square(prepared(number))[:, None] for number in images]),
        "modality": [sample_datalist()[number]["modality"] for number in images],
        "key": torch.arange(len(images)) + key,
    }
    made_of = made(batch, torch.device("cpu"))
    return tuple(
        made_of[name] * made.std + made.mean if name in made_of else None for name in ("global_crops", "local_crops")
    )


def save(name: str, *rows: list[Panel]) -> None:
    """Write rows of titled panels."""
    sheet = Image.fromarray(draw_sheet(rows))
    sheet.quantize(128, kmeans=2).save(Path(__file__).with_name(f"{name}.png"), optimize=True)


BRAIN, EYE, TISSUE = 0, 1, 3
KEY = torch.tensor([5])
head, eye = square(prepared(BRAIN).movedim(3, 1).flip(2)), square(prepared(EYE))

keep, hidden = random_mask(KEY, LENGTH, 0.75)
save(
    "mae",
    [
        panel("image", head),
        panel("the encoder sees", only(head, where(keep[0]))),
        panel("is to be predicted", only(head, where(hidden[0]))),
    ],
)

mask, hidden = cube_mask(KEY, GRID, (1, 2, 2), 0.6)
save(
    "simmim",
    [
        panel("image", head),
        panel("the encoder sees", only(head, where(~mask[0]))),
        panel("a linear layer predicts", only(head, where(mask[0]))),
    ],
)

target = block_size(GRID, 0.175, 1.1, math.floor)
keep, targets = context_and_targets(KEY, GRID, block_size(GRID, 0.92, 1.0, math.ceil), target, 4)
dim = 0.35 * eye + 0.65 * torch.tensor(GREY)[:, None, None]
save(
    "ijepa",
    [panel("the teacher sees", eye), panel("the student sees", only(eye, where(keep[0])))],
    [
        panel(f"predicted: block {n + 1}", framed(torch.where(where(block), eye, dim), block))
        for n, block in enumerate(targets[0])
    ],
)

large, small = views("dinov2", [EYE], 3)
hidden = block_mask(torch.tensor([1, 2]), GRID, torch.tensor([75, 40]))
save(
    "dinov2",
    [panel(f"the teacher sees view {n + 1}", view[0]) for n, view in enumerate(large)]
    + [panel(f"the student sees view {n + 1}", only(view[0], ~where(hidden[n]))) for n, view in enumerate(large)],
    [panel(f"and small view {n + 1}", view[0]) for n, view in enumerate(small[:4])],
    [panel(f"and small view {n + 5}", view[0]) for n, view in enumerate(small[4:])],
)

large, small = views("lejepa", [TISSUE], 6)
save(
    "lejepa",
    [panel(f"large view {n + 1}", view[0]) for n, view in enumerate(large)]
    + [panel(f"small view {n + 1}", view[0]) for n, view in enumerate(small[:2])],
    [panel(f"small view {n + 3}", view[0]) for n, view in enumerate(small[2:])],
)

large, _ = views("moco_v3", [EYE, TISSUE, 4], 1)
save("moco_v3", *([panel(f"image {b + 1}, view {n + 1}", view[b]) for b in range(3)] for n, view in enumerate(large)))

wanted = torch.eye(12).repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
for name, image, title in (("barlow_twins", TISSUE, "wanted correlations"), ("vicreg", EYE, "wanted in each view")):
    large, _ = views(name, [image], 9)
    save(
        name,
        [
            *(panel(f"view {n + 1}", view[0]) for n, view in enumerate(large)),
            panel(title, lined(wanted, (16, 16))),
        ],
    )

volume = prepared(BRAIN)[:, 50:130, 40:200, 20:180]
layers = [0, 2, 4]
keep, hidden = (
    torch.zeros(500, dtype=torch.bool).index_fill(0, rows[0], True).view(5, 100) for rows in random_mask(KEY, 500, 0.55)
)
save(
    "masked_tokens",
    *(
        [panel(f"{title}, layer {n + 1}", only(volume[:, 16 * n + 8], where(mask[n], (10, 10)))) for n in layers]
        for title, mask in (("seen", keep), ("asked", hidden))
    ),
)

thick = []
for degree in (0, 2):
    slices, _, width = crop_of_degree((80, 160, 160), degree)
    stack = volume[:, :, 80].unflatten(1, (slices, -1)).mean(2).flip(1)
    shown = stack.repeat_interleave(80 // slices, 1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    thick.append(panel(f"{slices} slices, tokens {slices // 5} deep", lined(shown, (32, 32))))
flat = volume[:, 40].repeat_interleave(2, 1).repeat_interleave(2, 2)
save("spad_tokenizer", [*thick, panel("a 2D image", lined(flat, (32, 32)))])
