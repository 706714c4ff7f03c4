"""Labels in all the ways users have them, sections by subject, weights of classes, and what logits say of classes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from biovfm_monai.data import ClassLabeld, class_weights, load_classification
from biovfm_monai.errors import InputError
from biovfm_monai.losses import class_chances, class_loss, grades, num_logits

NAMES = ["mass", "node", "fluid"]


@pytest.mark.parametrize(
    ("task", "label", "expected"),
    [
        ("multiclass", "node", [0, 1, 0]),
        ("multiclass", 2, [0, 0, 1]),
        ("multiclass", "2", [0, 0, 1]),
        ("ordinal", np.uint8(1), [0, 1, 0]),
        ("multiclass", [0, 1, 0], [0, 1, 0]),
        ("multilabel", [1, 0, 1], [1, 0, 1]),
        ("multilabel", ["1", "0", "1.0"], [1, 0, 1]),
        ("multilabel", "fluid|mass", [1, 0, 1]),
        ("multilabel", ["node"], [0, 1, 0]),
        ("multilabel", "No Finding", [0, 0, 0]),
        ("multilabel", [], [0, 0, 0]),
    ],
)
def test_a_label_is_read_as_it_is_meant(task, label, expected):
    assert ClassLabeld("label", NAMES, task)({"label": label})["label"].tolist() == expected


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ("multiclass", 3), ("multiclass", -1), ("multiclass", 0.5), ("multiclass", "cyst"), ("multiclass", [1, 1, 0]),
        ("multilabel", 1), ("multilabel", [0, 2, 0]), ("multilabel", ["-1", "", "1"]), ("multilabel", "mass|cyst"),
        ("multiclass", ""), ("multiclass", [0, 1]),
    ],
)  # fmt: skip
def test_a_label_that_is_no_class_is_named_with_the_classes(task, label):
    with pytest.raises(InputError, match="0 mass, 1 node, 2 fluid"):
        ClassLabeld("label", NAMES, task)({"label": label})


def test_one_finding_alone_is_a_0_or_1():
    assert [ClassLabeld("label", ["mass"], "multilabel")({"label": n})["label"].item() for n in (0, "1")] == [0, 1]


def write_images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / name)
    return folder


def write_table(folder, rows):
    write_images(folder, [row["file"] for row in rows])
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_folders_of_classes_are_shared_out_three_one_one_class_by_class(tmp_path):
    write_images(tmp_path, [f"{name}/{n}.png" for name in NAMES for n in range(10)])
    parts = {
        part: load_classification(tmp_path, NAMES, section=part, modality="xray")
        for part in ("training", "validation", "test")
    }
    for part, count in (("training", 6), ("validation", 2), ("test", 2)):
        assert np.sum([item["label"] for item in parts[part]], axis=0).tolist() == [count] * 3
    assert len({item["image"] for items in parts.values() for item in items}) == 30


def test_no_subject_is_in_two_sections_and_a_fraction_is_of_subjects_and_nested(tmp_path):
    rows = [{"file": f"{n}.png", "label": NAMES[n // 2 % 3], "who": f"S{n // 2}"} for n in range(60)]
    write_table(tmp_path, rows)
    who = {f"{n}.png": f"S{n // 2}" for n in range(60)}

    def subjects(section, fraction=1.0):
        items = load_classification(
            tmp_path, NAMES, section=section, fraction=fraction, modality="xray", subject_column="who"
        )
        assert len(items) % 2 == 0
        return {who[item["image"].rpartition("/")[2]] for item in items}

    parts = [subjects(section) for section in ("training", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert subjects("training", 0.17) < subjects("training", 0.5) < parts[0]


def test_a_table_with_a_column_per_finding_and_one_of_sections(tmp_path):
    found = [("1", "0", "1"), ("0", "1", "0")]
    rows = [
        {"file": f"{split}{n}.png", "split": split, **dict(zip(NAMES, found[n], strict=True))}
        for split in ("training", "validation")
        for n in range(2)
    ]
    items = load_classification(write_table(tmp_path, rows), NAMES, "multilabel", "validation", modality="xray")
    assert [item["label"] for item in items] == [[1, 0, 1], [0, 1, 0]]
    assert all("validation" in item["image"] for item in items)


def test_a_table_without_labels_names_its_columns(tmp_path):
    write_table(tmp_path, [{"file": "0.png", "target": "1"}])
    with pytest.raises(InputError, match=r"has the columns file, target; .*--label_column"):
        load_classification(tmp_path, NAMES, modality="xray")


def test_unlabelled_images_are_all_used_for_inference_and_an_error_in_training(tmp_path):
    write_images(tmp_path, ["0.png", "1.png"])
    assert len(load_classification(tmp_path, NAMES, section="test", modality="xray", labelled=False)) == 2
    with pytest.raises(InputError, match="has no label"):
        load_classification(tmp_path, NAMES, modality="xray")


def test_a_finding_that_all_images_have_is_named(tmp_path):
    items = [{"image": f"{n}.png", "modality": "xray", "label": ["mass", *NAMES[1 + n % 2 :][:1]]} for n in range(4)]
    write_images(tmp_path, [item["image"] for item in items])
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items, "validation": items}))
    with pytest.raises(InputError, match="is not of class mass"):
        load_classification(tmp_path, NAMES, "multilabel")


def test_with_weights_each_class_counts_alike():
    items = [{"label": label} for label in ["mass"] * 6 + ["node"] * 3 + ["fluid"]]
    labels = torch.stack([ClassLabeld("label", NAMES)(item)["label"] for item in items])
    weight = class_weights(items, NAMES, "multiclass")
    assert (labels * weight).sum(0).tolist() == pytest.approx([10 / 3] * 3)
    findings = class_weights([{"label": [n < 2, True, n < 9]} for n in range(10)], NAMES, "multilabel")
    assert findings.tolist() == pytest.approx([8 / 2, 0, 1 / 9])


@pytest.mark.parametrize("task", ["multiclass", "ordinal"])
def test_probabilities_of_one_class_out_of_several_sum_to_one(task):
    torch.manual_seed(0)
    chances = class_chances(3 * torch.randn(50, num_logits(4, task)), task)
    assert chances.shape == (50, 4)
    assert (chances >= 0).all()
    torch.testing.assert_close(chances.sum(1), torch.ones(50))


def test_what_a_grades_probabilities_say_is_what_its_questions_say():
    logits = torch.sort(torch.randn(50, 3), descending=True).values
    chances = class_chances(logits, "ordinal")
    median = (chances.cumsum(1) < 0.5).sum(1)
    assert torch.equal(median, grades(logits))


def test_losses_are_torchs_own():
    logits, target = torch.randn(6, 3), F.one_hot(torch.arange(6) % 3, 3).float()
    torch.testing.assert_close(class_loss()(logits, target), F.cross_entropy(logits, torch.arange(6) % 3))
    expected = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(class_loss("multilabel")(logits, target), expected)
    above = torch.tensor([[0.0, 0], [1, 0], [1, 1]]).repeat(2, 1)
    expected = F.binary_cross_entropy_with_logits(logits[:, :2], above)
    torch.testing.assert_close(class_loss("ordinal")(logits[:, :2], target), expected)
