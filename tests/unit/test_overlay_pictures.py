"""Pictures of what a segmentation finds: the right slice, the right way up, each class in its colour."""

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image

from biovfm_monai.engines import OverlayHandler


def one_hot(classes, affine):
    return MetaTensor(torch.nn.functional.one_hot(classes, 3).movedim(-1, 0), affine=affine)


def draw(folder, classes, found, affine):
    """Pixels of truth and prediction, 240 x 240 each, of a dark image."""
    sample = {
        "image": MetaTensor(torch.linspace(0, 1e-3, classes.numel()).reshape(1, *classes.shape) - 7, affine=affine),
        "label": one_hot(classes, affine),
        "pred": one_hot(found, affine),
    }
    engine = Engine(lambda engine, batch: [sample])
    OverlayHandler(folder).attach(engine)
    engine.run([0, 1], max_epochs=1)
    engine.run([0, 1], max_epochs=1)  # another evaluation draws anew
    sheet = np.asarray(Image.open(folder / "overlay.png")).astype(int)
    assert sheet.shape == (2 * 260 + 4, 3 * 244 + 4, 3)
    return sheet[16:256, 248:488], sheet[16:256, 492:732]


def coloured(picture):
    """Which quarters have a colour, as (is it lower, is it further right)."""
    grey = picture[[[60, 60], [180, 180]], [[60, 180], [60, 180]]]
    return [tuple(place) for place in np.argwhere(np.ptp(grey, axis=-1) > 60).tolist()]


def test_a_coronal_slab_is_looked_at_from_the_front_head_up_and_right_on_the_left(tmp_path):
    # RAS: the patient's left is at low x, the head at high z.
    classes = torch.zeros(24, 4, 24, dtype=torch.long)
    classes[:12, 2, 12:] = 2
    truth, found = draw(tmp_path, classes, torch.zeros_like(classes), torch.eye(4))
    assert coloured(truth) == [(0, 1)]
    assert coloured(found) == []


def test_the_slice_with_most_of_the_truth_is_shown_and_classes_keep_their_colours(tmp_path):
    classes = torch.zeros(24, 24, 8, dtype=torch.long)
    classes[:, :, 1] = torch.arange(24).gt(20)
    classes[4:20, 4:20, 5] = 1
    truth, found = draw(tmp_path, classes, classes * 2, torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0])))
    assert np.ptp(truth[120, 120]) > 60
    assert np.ptp(truth[5, 5]) < 5
    assert np.abs(truth[120, 120] - found[120, 120]).max() > 60
