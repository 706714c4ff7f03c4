"""The index: what is on disk, described in one datalist."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from image_files import write_dicom, write_nifti, write_png
from PIL import Image

from biovfm_monai.data import index, load_datalist
from biovfm_monai.errors import InputError


@pytest.fixture
def mess(tmp_path):
    """A folder as users have them: two patients' series, photographs, a film over time, and files that are no use."""
    folder = tmp_path / "a mess"
    for patient in ("Miller", "Smith"):
        for number in range(4):
            name = f"{number}.dcm"
            (folder / "scans" / patient).mkdir(parents=True, exist_ok=True)
            write_dicom(folder / "scans" / patient / name, f"1.{len(patient)}", number, PatientID=f"{patient}-4711")
    for number in range(8):
        (folder / f"fundus/sub-{number // 2:02}").mkdir(parents=True, exist_ok=True)
        write_png(folder / f"fundus/sub-{number // 2:02}/{number}.png", np.full((9, 7, 3), 20 * number, np.uint8))
    (folder / "mri").mkdir()
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7, 3), np.float32), np.diag([1, 1, 4, 1])), folder / "mri/dwi.nii.gz")
    write_png(folder / "Größe.png", np.eye(4, dtype=np.uint8))
    (folder / "fundus/empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("Smith")
    return folder


def rejections(folder):
    with (folder / "rejected.csv").open(encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", ["datalist.json", "datalist.parquet"])
def test_everything_is_either_an_item_or_named_with_the_reason(mess, tmp_path, name):
    table = index([mess], tmp_path / "out" / name)
    items = load_datalist(tmp_path / "out")
    assert len(items) == 2 + 8 + 3
    reasons = rejections(tmp_path / "out")
    assert set(reasons) == {str(mess / "Größe.png"), str(mess / "fundus/empty.png"), str(mess / "notes.txt")}
    assert "cannot tell the modality" in reasons[str(mess / "Größe.png")]
    assert "empty" in reasons[str(mess / "fundus/empty.png")]
    assert "rejected.csv: 3 left out, 1 of them no images" in table
    assert Image.open(tmp_path / "out/thumbnails.png").width > 3 * 128


def test_the_table_counts_images_and_slices_by_modality_and_kind(mess, tmp_path):
    lines = index([mess], tmp_path / "datalist.json").splitlines()
    cells = [line.replace(",", "").split() for line in lines[1:4]]
    assert cells[0][:4] == ["ct", "3D", "2-4", "x"]
    assert cells[0][6:10] == ["2", "8", "1", "3"]
    assert cells[1] == ["fundus", "2D", "8", "8", "8"]
    assert cells[2][6:10] == ["3", "15", "1", "4"]


@pytest.mark.parametrize("name", ["datalist.json", "datalist.parquet"])
def test_both_forms_give_the_same_items(mess, tmp_path, name):
    index([mess], tmp_path / "out" / name, salt="secret")
    items = {str(item["image"]): item for item in load_datalist(tmp_path / "out")}
    volume = items[str(mess / "scans/Miller")]
    assert {**volume, "subject": None} == {
        "image": str(mess / "scans/Miller"), "modality": "ct", "shape": [8, 6, 4], "channels": 1, "dtype": "int16",
        "spacing": [1.0, 1.0, 3.0], "anisotropy": 1, "source": "a mess", "subject": None,
    }  # fmt: skip
    assert items[f"{mess}/mri/dwi.nii.gz::1"]["alike"] == 3


def test_nothing_of_a_patient_is_written(mess, tmp_path):
    for name in ("datalist.json", "datalist.parquet"):
        index([mess / "scans"], tmp_path / "out" / name, settings={"Smith": None})
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"4711" not in content


def test_subjects_of_one_salt_are_the_same_and_of_none_are_not(mess, tmp_path):
    def subjects(name, **options):
        index([mess / "scans"], tmp_path / name / "datalist.json", **options)
        return [item["subject"] for item in load_datalist(tmp_path / name)]

    first = subjects("a", salt="x")
    assert len(set(first)) == 2
    assert subjects("b", salt="x") == first
    assert not set(first) & set(subjects("c", salt="y"))
    assert not set(subjects("d")) & set(subjects("e"))


def test_a_subject_is_in_one_section_whatever_else_is_there(tmp_path):
    def split(folder):
        index([folder], tmp_path / "out/datalist.json", modality="fundus", validation=0.3, test=0.3)
        sections = json.loads((tmp_path / "out/datalist.json").read_text())
        return {item["image"]: name for name, items in sections.items() for item in items}

    def add(subjects):
        for subject in subjects:
            for eye in "LR":
                path = tmp_path / f"ds/sub-{subject:02}_{eye}.png"
                path.parent.mkdir(exist_ok=True)
                write_png(path, np.full((4, 4), subject, np.uint8))

    add(range(20))
    before = split(tmp_path / "ds")
    assert set(before.values()) == {"training", "validation", "test"}
    for path, section in before.items():
        assert before[path.replace("_L", "_R")] == section
    add(range(20, 40))
    after = split(tmp_path / "ds")
    assert {path: after[path] for path in before} == before


def test_settings_fill_in_fields_by_path_and_leave_images_out(mess, tmp_path):
    settings = {
        "Größe": {"modality": "oct", "label": 3},
        r"fundus/sub-(\d+)/": {"subject": r"eye-\1", "source": "clinic"},
        "sub-03": None,
    }
    index([mess], tmp_path / "out/datalist.parquet", settings=settings)
    items = load_datalist(tmp_path / "out")
    (eye,) = [item for item in items if item["modality"] == "oct"]
    assert eye["label"] == 3
    fundus = [item for item in items if item["modality"] == "fundus"]
    assert {(item["subject"], item["source"]) for item in fundus} == {(f"eye-0{n}", "clinic") for n in range(3)}
    assert "as asked for 'sub-03'" in rejections(tmp_path / "out")[str(mess / "fundus/sub-03/6.png")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"a(": {}}}, "setting 'a\\('"),
        ({"settings": {"a": {"name": "x"}}}, "no field 'name' to set, but alike, label"),
        ({"validation": 0.6, "test": 0.5}, "validation 0.6 and test 0.5"),
        ({"modality": "sonar"}, "no image found"),
        ({"out": "list.txt"}, r"list.txt: a datalist is .json or .parquet"),
    ],
)
def test_options_that_mean_nothing_are_refused(mess, tmp_path, options, message):
    out = tmp_path / options.pop("out", "datalist.json")
    with pytest.raises(InputError, match=message):
        index([mess / "mri" if "modality" not in options else mess / "Größe.png"], out, **options)


def test_a_table_of_paths_gives_its_rows_fields_and_no_others(mess, tmp_path):
    (mess / "list.csv").write_text(
        "image,label,subject,split,date of birth\n"
        "fundus/sub-00/0.png,2,a,test,1.1.1970\n"
        "scans/Smith,[0.5],b,,\n"
        f"{mess}/mri/dwi.nii.gz::2,good,,,\n"
        "gone.png,,,,\n"
    )
    index([mess / "list.csv"], tmp_path / "out/datalist.json", modality="fundus")
    text = (tmp_path / "out/datalist.json").read_text()
    sections = json.loads(text)
    assert "1970" not in text
    (tested,) = sections["test"]
    assert (tested["label"], tested["subject"], tested["source"]) == (2, "a", "list")
    scan, volume = sections["training"]
    assert (scan["label"], scan["modality"], scan["subject"]) == ([0.5], "ct", "b")
    assert (volume["label"], volume["image"]) == ("good", f"{mess}/mri/dwi.nii.gz::2")
    assert "no such file" in rejections(tmp_path / "out")[f"{mess}/gone.png"]


def test_a_datalist_of_the_decathlon_can_be_indexed(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for name in ("a", "b"):
        write_nifti(tmp_path / f"imagesTr/{name}.nii.gz", np.zeros((4, 5, 6)))
    content = {
        "name": "Hippocampus", "labels": {"0": "background"}, "numTraining": 1,
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}], "test": ["./imagesTr/b.nii.gz"],
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    index([tmp_path / "dataset.json"], tmp_path / "out/datalist.json", modality="mri")
    sections = json.loads((tmp_path / "out/datalist.json").read_text())
    assert [item["image"].rpartition("/")[2] for item in sections["training"] + sections["test"]] == [
        "a.nii.gz",
        "b.nii.gz",
    ]


def test_slices_named_one_by_one_are_found_again(mess, tmp_path):
    other = write_dicom(mess / "scans/Smith/other.dcm", "1.9")
    index([mess / "scans/Smith"], tmp_path / "one/datalist.json")
    index([tmp_path / "one/datalist.json"], tmp_path / "two/datalist.json")
    first, second = (load_datalist(tmp_path / name) for name in ("one", "two"))
    assert [item["image"] for item in first] == [item["image"] for item in second]
    assert len(first) == 2
    assert str(other) in [item["image"] for item in first]


def test_the_command_prints_the_table(mess, tmp_path, run):
    done = run("-m", "biovfm_monai.cli", "index", mess, "--settings", "{'Gr':None}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/datalist.json: ready." in done.stdout
    assert (tmp_path / "datalist.json").is_file()


def test_a_patient_is_in_one_section_in_every_run_and_every_folder(tmp_path):
    for root, folder in enumerate(("a", "b"), 1):
        for number in range(12):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_dicom(tmp_path / folder / f"p{number}/x.dcm", f"{root}.{number}", PatientID=f"P{number}")

    def sections(name):
        index([tmp_path / "a", tmp_path / "b"], tmp_path / name / "datalist.json", test=0.5)
        found = json.loads((tmp_path / name / "datalist.json").read_text())
        return {item["image"][-8:]: section for section, items in found.items() for item in items}, found

    (first, found), (again, _) = sections("one"), sections("two")
    assert first == again
    assert set(first.values()) == {"training", "test"}
    subjects = [{item["subject"] for item in items} for items in found.values()]
    assert not subjects[0] & subjects[1]
    assert sum(map(len, found.values())) == 24
    assert "P3" not in json.dumps([item["subject"] for items in found.values() for item in items])


def test_parts_of_a_file_are_told_apart(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 14), np.float32), np.eye(4)), tmp_path / "cine.nii.gz")
    content = {"training": [{"image": "cine.nii.gz::3"}], "test": [{"image": "cine.nii.gz::13"}]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    index([tmp_path / "list.json"], tmp_path / "out/datalist.json", modality="mri")
    sections = json.loads((tmp_path / "out/datalist.json").read_text())
    names = {name: [item["image"].rpartition("::")[2] for item in items] for name, items in sections.items()}
    assert names == {"training": ["3"], "test": ["13"]}


def test_a_datalist_is_not_written_over_by_one_of_nothing_and_its_own_files_are_no_images(mess, tmp_path):
    out = mess / "fundus/datalist.json"
    index([mess / "fundus"], out)
    before = json.loads(out.read_text())
    index([mess / "fundus"], out)
    assert json.loads(out.read_text()) == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image found"):
        index([tmp_path / "empty"], out)
    assert json.loads(out.read_text()) == before


def test_all_slices_of_a_folder_can_be_named_one_by_one(mess, tmp_path):
    names = [str(mess / f"scans/Smith/{number}.dcm") for number in range(4)]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": names, "subject": 12}]}))
    index([tmp_path / "list.json"], tmp_path / "out/datalist.parquet")
    (item,) = load_datalist(tmp_path / "out")
    assert (item["image"], item["subject"]) == (names, "12")
