"""Whole slides: which tiles hold tissue, and what they show."""

import json

import numpy as np
import pytest
import tifffile
from image_files import preset
from skimage import data as photographs

from biovfm_monai.data import find_images, index, read_image
from biovfm_monai.errors import InputError

pytest.importorskip("openslide")


def write_slide(path, pixel=0.25, resolution=True):
    """Glass of 6 x 5 tiles of 1,024 pixels of `pixel` micrometres, with tissue on six of them; at three sizes."""
    tissue = np.tile(photographs.immunohistochemistry(), (4, 6, 1))
    slide = np.full((5 * 1024, 6 * 1024, 3), 245, np.uint8)
    slide[1024 : 3 * 1024, 2048 : 5 * 1024] = tissue[: 2 * 1024, : 3 * 1024]
    options = {"photometric": "rgb", "tile": (256, 256), "compression": "jpeg"}
    if resolution:
        options["resolutionunit"] = "CENTIMETER"
    with tifffile.TiffWriter(path) as file:
        for number in range(3):
            size = 10000 / pixel / 2**number
            extra = {"resolution": (size, size)} if resolution else {}
            extra |= {"subifds": 0} if number == 0 else {"subfiletype": 1}
            file.write(slide[:: 2**number, :: 2**number], **options, **extra)
    return slide


@pytest.mark.parametrize("at_once", [8192, 100])
def test_tiles_of_tissue_are_found_and_show_half_a_micrometre_per_pixel(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("biovfm_monai.data.slides._AT_ONCE", at_once)
    slide = write_slide(tmp_path / "a.tif")
    items = find_images(tmp_path)
    corners = [(2048 + 1024 * column, 1024 + 1024 * row) for row in range(2) for column in range(3)]
    assert [item["image"] for item in items] == [f"{tmp_path}/a.tif::{x}::{y}" for x, y in corners]
    assert {item["subject"] for item in items} == {"patient-1"}
    assert items[0]["spacing"] == [0.0005, 0.0005]
    for item, (x, y) in zip(items, corners, strict=True):
        tile = preset("pathology", item["image"])
        assert tile.shape == (3, 1, 512, 512)
        shown = slide[y : y + 1024, x : x + 1024].reshape(512, 2, 512, 2, 3).mean((1, 3)).transpose(2, 0, 1)
        # What is stored was decimated and compressed, so only the large is the same.
        small = [image.reshape(3, 32, 16, 32, 16).mean((2, 4)) for image in (tile.numpy()[:, 0] * 255, shown)]
        assert np.abs(small[0] - small[1]).mean() < 4


def test_a_coarser_slide_has_fewer_tiles(tmp_path):
    write_slide(tmp_path / "a.tif", pixel=0.5)
    assert len(find_images(tmp_path)) == 24


def test_the_tiles_of_a_slide_are_in_one_section(tmp_path):
    for name in "abcdef":
        write_slide(tmp_path / f"{name}.tif")
    index([tmp_path], tmp_path / "out/datalist.json", validation=0.5)
    sections = json.loads((tmp_path / "out/datalist.json").read_text())
    of = {name: {item["image"].partition("::")[0] for item in items} for name, items in sections.items()}
    assert not of["training"] & of["validation"]
    assert len(of["training"] | of["validation"]) == 6


def test_a_slide_without_resolution_and_one_read_whole_are_refused(tmp_path):
    write_slide(tmp_path / "a.tif", resolution=False)
    with pytest.raises(InputError, match=r"a\.tif: does not say how many micrometres"):
        find_images(tmp_path)
    with pytest.raises(InputError, match=r"a\.tif: a whole slide does not fit into memory"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "b.svs").write_bytes(b"no slide")
    with pytest.raises(InputError, match=r"b\.svs: cannot be read as a whole slide"):
        find_images(tmp_path / "b.svs")
