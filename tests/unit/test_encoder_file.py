"""Encoder files, files that are whole or not there, and how a user's mistake is shown."""

import errno
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from limits import files_of_at_most
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from programs import kill_when_it_prints
from safetensors import safe_open
from safetensors.torch import save_file

from biovfm_monai.checkpoints import encoder_info, load_encoder, save_encoder
from biovfm_monai.data import training_transform
from biovfm_monai.errors import InputError, reason_of, report_input_errors
from biovfm_monai.files import append_json, write_atomically, write_json
from biovfm_monai.networks import ViT, vit_tiny

KINDS = {
    "2D": {"img_size": (16, 16)},
    "3D": {"img_size": (8, 16, 16)},
    "learned positions": {"img_size": (16, 24), "pos_embed": "learn"},
    "no bias": {"img_size": (16, 16), "qkv_bias": False, "mlp_ratio": 2.0},
}
ARGUMENTS = {"in_channels": 1, "img_size": [16, 16], "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def tiny(**options):
    return ViT(**{**ARGUMENTS, **options})


@pytest.fixture
def path(tmp_path):
    """A good encoder file."""
    save_encoder(tiny(), tmp_path / "encoder.safetensors", {"mean": 0.5}, {"method": "MAE"})
    return tmp_path / "encoder.safetensors"


def forge(path, header=None, state=None):
    """Rewrite an encoder file with another header or other weights."""
    header = encoder_info(path) if header is None else header
    save_file(load_encoder(path).state_dict() if state is None else state, path, {"biovfm_monai": json.dumps(header)})


def forge_network(path, target, **arguments):
    forge(path, {"network": {"_target_": target, **arguments}, "preprocessing": {}, "training": {}})


# Encoder files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_encoder_gives_the_same_tokens_when_loaded(tmp_path, kind):
    encoder, image = tiny(**KINDS[kind]).eval(), torch.randn(2, 1, *KINDS[kind]["img_size"])
    save_encoder(encoder, tmp_path / "a.safetensors")
    assert torch.equal(load_encoder(tmp_path / "a.safetensors")(image), encoder(image))


@pytest.mark.parametrize("kind", KINDS)
def test_saving_a_loaded_encoder_gives_the_same_header(tmp_path, kind):
    save_encoder(tiny(**KINDS[kind]), tmp_path / "a", {"mean": 0.5, "std": [1, 2]}, {"epochs": 3})
    header = encoder_info(tmp_path / "a")
    save_encoder(load_encoder(tmp_path / "a"), tmp_path / "b", header["preprocessing"], header["training"])
    assert encoder_info(tmp_path / "b") == header


def test_the_header_says_what_rebuilds_the_network_and_how_it_came_about(path):
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["biovfm_monai"])
    assert header["preprocessing"] == {"mean": 0.5}
    assert header["training"] == {"method": "MAE"}
    assert header["network"].pop("_target_") == "biovfm_monai.networks.ViT"
    assert tiny(**header["network"]).arguments == tiny().arguments


def test_a_loaded_encoder_is_in_eval_mode(path):
    assert not any(module.training for module in load_encoder(path).modules())


def test_the_encoder_of_a_preset_keeps_its_arguments(path):
    encoder = vit_tiny(1, (32, 32), depth=1)
    save_encoder(encoder, path)
    assert load_encoder(path).arguments == encoder.arguments


def test_saving_keeps_the_encoders_mode_and_weights(path):
    encoder = tiny().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    save_encoder(encoder, path)
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_a_missing_file_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match=r"absent: no such encoder file.*correct the path"):
        load_encoder(tmp_path / "absent")


@pytest.mark.parametrize(
    "keep", ["nothing", "half the length", "length", "half the header", "header", "half", "but one"]
)
def test_a_truncated_file_is_refused_with_its_name_and_a_remedy(path, keep):
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    sizes = {
        "nothing": 0, "half the length": 4, "length": 8, "half the header": 8 + header // 2, "header": 8 + header,
        "half": len(content) // 2, "but one": len(content) - 1,
    }  # fmt: skip
    path.write_bytes(content[: sizes[keep]])
    with pytest.raises(InputError, match=f"{path}: damaged or no safetensors file.*again"):
        load_encoder(path)


def test_a_safetensors_file_of_others_is_refused(path):
    save_file(tiny().state_dict(), path, {"format": "pt"})
    with pytest.raises(InputError, match=f"{path}: a safetensors file without our header"):
        load_encoder(path)


class Touch:
    """When unpickled, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_torch_pickle_is_refused_and_not_unpickled(path):
    trace = path.with_name("unpickled")
    torch.save({"weights": Touch(trace)}, path)
    with pytest.raises(InputError, match=f"{path}: damaged or no safetensors file"):
        load_encoder(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.nn.Linear", "biovfm_monai.checkpoints.load_encoder",
     "biovfm_monai.networks.vit.ViT", "biovfm_monai.networks.torch", "biovfm_monai.networks.__loader__", "ViT", ""],
)  # fmt: skip
def test_a_network_that_is_not_ours_is_refused(path, target):
    forge_network(path, target, **ARGUMENTS)
    with pytest.raises(InputError, match=f"asks for {target}, which this version does not have. Update"):
        load_encoder(path)


def test_a_header_runs_no_command(path):
    trace = path.with_name("ran")
    forge_network(path, "os.system", command=f"touch {trace}")
    with pytest.raises(InputError):
        load_encoder(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("argument", "reason"),
    [({"registers": 4}, "registers"), ({"pos_embed": "rotary"}, "rotary"), ({"num_heads": 5}, "5")],
)
def test_arguments_that_this_version_does_not_take_are_refused(path, argument, reason):
    forge_network(path, "biovfm_monai.networks.ViT", **{**ARGUMENTS, **argument})
    with pytest.raises(InputError, match=f"arguments that biovfm_monai.networks.ViT does not take.*{reason}.*Update"):
        load_encoder(path)


def test_weights_of_another_architecture_are_refused_with_every_key_that_differs(path):
    state = load_encoder(path).state_dict()
    del state["norm.weight"], state["norm.bias"]
    state |= {"head.weight": torch.ones(2), "cls_token": torch.ones(1, 1, 12)}
    forge(path, state=state)
    with pytest.raises(InputError) as caught:
        load_encoder(path)
    _, _, problems = str(caught.value).rstrip(".").rpartition(": ")
    assert set(problems.split("; ")) == {
        "missing norm.weight", "missing norm.bias", "unexpected head.weight",
        "cls_token is (1, 1, 12) instead of (1, 1, 24)",
    }  # fmt: skip


# Whole or not there


def test_a_written_file_replaces_the_old_one_and_makes_its_folders(tmp_path):
    for content in ("old", "new"):
        with write_atomically(tmp_path / "a/b/file") as draft:
            draft.write_text(content)
    assert [(p.name, p.read_text()) for p in (tmp_path / "a/b").iterdir()] == [("file", "new")]


def test_until_the_block_ends_the_old_content_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    with write_atomically(tmp_path / "file") as draft:
        draft.write_text("new")
        assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_keeps_the_old_content_and_leaves_no_draft(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def fail_half_way():
        with write_atomically(tmp_path / "file") as draft:
            draft.write_text("ne")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


WRITERS = {
    "an encoder": lambda path: save_encoder(tiny(), path),
    "JSON": lambda path: write_json(path, [0] * 2000),
    "a line of a log": lambda path: append_json(path, [0] * 2000),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_disk_without_room_is_said_with_the_files_name_and_leaves_no_draft(tmp_path, write):
    path = tmp_path / "file"
    with files_of_at_most(2000), pytest.raises(OSError, match="File too large") as caught:
        write(path)
    assert (
        reason_of(caught.value) == f"{path}: File too large. Give another folder, or make room or the right to use it."
    )
    assert [p.name for p in tmp_path.iterdir()] in ([], ["file"])


def test_a_disk_that_is_gone_is_said_with_the_files_name(tmp_path):
    with pytest.raises(OSError, match="Stale") as caught, write_atomically(tmp_path / "file"):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    expected = f"{tmp_path / 'file'}: {os.strerror(errno.ESTALE)}. Look whether its disk or network is there."
    assert reason_of(caught.value) == expected


def test_an_encoder_whose_header_is_no_json_leaves_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_encoder(tiny(), path, {"mean": torch.ones(1)})
    assert path.read_bytes() == before


HALF = """
import sys, time
from pathlib import Path
from biovfm_monai.files import write_atomically

path = Path(sys.argv[1])
with write_atomically(path) as draft:
    content = path.read_bytes()
    draft.write_bytes(content[: len(content) // 2])
    print("half", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def killed(path):
    """Encoder file whose rewriting was killed half way, and what it held before."""
    before = path.read_bytes()
    kill_when_it_prints("half", ["-c", HALF, path], path.parent)
    return path, before


def test_a_process_killed_while_writing_leaves_the_old_file_whole(killed):
    path, before = killed
    assert path.read_bytes() == before
    assert load_encoder(path).embed_dim == 24


def test_the_write_after_a_killed_one_succeeds_and_clears_its_draft(killed):
    path, _ = killed
    assert len(list(path.parent.iterdir())) == 2
    save_encoder(tiny(depth=2), path)
    assert list(path.parent.iterdir()) == [path]
    assert len(load_encoder(path).blocks) == 2


# How mistakes are shown


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is printed when nobody catches the exception of a call, with `report_input_errors`."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    report_input_errors()

    def show(call, *arguments):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whichever it is
            call(*arguments)
        sys.excepthook(caught.type, caught.value, caught.tb)
        return capsys.readouterr().err

    return show


WRAPPED = """
from biovfm_monai.errors import InputError, report_input_errors

report_input_errors()
try:
    try:
        raise InputError("a.png: rotten. Remove it.")
    except InputError as error:
        raise RuntimeError("applying transform") from error
except RuntimeError as error:
    raise RuntimeError("Failed to evaluate") from error
"""


def test_a_mistake_wrapped_twice_ends_the_process_with_one_line(run, tmp_path):
    result = run("-c", WRAPPED, cwd=tmp_path, timeout=90)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: a.png: rotten. Remove it.\n")


def test_another_error_ends_the_process_with_its_traceback(run, tmp_path):
    code = "from biovfm_monai.errors import *; report_input_errors(); 1 / 0"
    result = run("-c", code, cwd=tmp_path, timeout=90)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_mistake_inside_a_monai_transform_is_shown_as_one_line(shown):
    line = shown(training_transform(1), {"image": "/absent/a.png", "modality": "ct"})
    assert line == "error: /absent/a.png: no such file. Correct the path in the datalist.\n"


def test_a_mistake_inside_a_monai_config_is_shown_as_one_line(shown):
    parser = ConfigParser({"imports": ["$import biovfm_monai"], "a": "$biovfm_monai.data.load_datalist('/absent')"})
    line = shown(parser.get_parsed_content, "a")
    assert line == "error: /absent: no such folder. Give the folder that holds your images as --dataset_dir.\n"


def test_the_traceback_of_a_mistake_is_logged_for_debugging(shown, caplog):
    caplog.set_level(logging.DEBUG, "biovfm_monai")
    shown(load_encoder, "/absent")
    assert "in load_encoder" in caplog.text


def test_a_mistake_in_a_loaders_worker_is_shown_as_one_line(shown):
    items = [{"image": "/absent/a.png", "modality": "ct"}]
    loader = DataLoader(Dataset(items, training_transform(1)), num_workers=1)
    line = shown(lambda: list(loader))
    assert line == "error: /absent/a.png: no such file. Correct the path in the datalist.\n"


@pytest.mark.parametrize("header", ["{", "[]", '{"network": {}}', '{"network": {"_target_": "x"}, "training": {}}'])
def test_a_damaged_header_is_refused(path, header):
    save_file({"a": torch.zeros(1)}, path, metadata={"biovfm_monai": header})
    with pytest.raises(InputError, match=r"header is damaged.*export"):
        encoder_info(path)


def test_colleagues_can_read_a_written_file(path):
    other = path.with_name("ordinary")
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


def test_a_hook_that_was_there_before_still_gets_other_errors(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error))
    report_input_errors()
    error = ValueError("no InputError")
    sys.excepthook(ValueError, error, None)
    assert seen == [(ValueError, error, None)]


def test_a_run_stopped_from_the_keyboard_says_how_to_go_on(run, tmp_path):
    code = "from biovfm_monai.errors import *; report_input_errors(); raise KeyboardInterrupt"
    result = run("-c", code, cwd=tmp_path, timeout=90)
    assert result.returncode != 0
    assert result.stderr == "error: stopped from the keyboard. To go on from the last whole epoch, add --resume True.\n"
