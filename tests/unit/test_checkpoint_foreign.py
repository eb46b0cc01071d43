"""Checkpoints of other programs are named, never called damaged, and never mixed with ours."""

import logging
from pathlib import Path

import pytest

from megatron.checkpoint.folder import find_checkpoint, publish
from megatron.checkpoint.foreign import foreign_checkpoint
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.errors import UserError
from megatron.training.start import checkpoint_to_load

DEEPSPEED = ["global_step10/mp_rank_00_model_states.pt", "latest"]
# What the program is called, and files that it writes into the folder of a run.
FORMATS = {
    "neox": (
        "GPT-NeoX",
        [*DEEPSPEED, "global_step10/layer_00-model_00-model_states.pt", "global_step10/configs/a.yml"],
    ),
    "deepspeed": ("DeepSpeed", [*DEEPSPEED, "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt"]),
    "bf16_zero": ("DeepSpeed", ["global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"]),
    "tag": ("DeepSpeed", ["best_model/mp_rank_00_model_states.pt", "latest=best_model"]),
    "universal": (
        "DeepSpeed (universal",
        [
            "global_step10_universal/zero/a.weight/fp32.pt",
            "global_step10_universal/mp_rank_00_model_states.pt",
            "latest_universal",
        ],
    ),
    "megatron": ("Megatron-LM", ["iter_0000010/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"]),
    "megatron_pipe": ("Megatron-LM", ["iter_0000010/mp_rank_00_001/distrib_optim.pt"]),
    "core": (
        "Megatron-core",
        [*(f"iter_0000010/{name}" for name in ("common.pt", "metadata.json", ".metadata", "__0_0.distcp"))],
    ),
    "titan": ("torchtitan", ["step-10/.metadata", "step-10/__0_0.distcp"]),
    "dcp": ("torch.distributed.checkpoint", ["global_step10/.metadata", "global_step10/__0_0.distcp"]),
    "hugging_face": ("Hugging Face", ["config.json", "model.safetensors"]),
    "shards": ("Hugging Face", ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]),
    "trainer": ("Hugging Face", ["checkpoint-500/config.json", "checkpoint-500/model-00001-of-00002.safetensors"]),
    "litgpt": ("LitGPT", ["final/lit_model.pth", "final/model_config.yaml"]),
    "litgpt_step": ("LitGPT", ["step-00000010/lit_model.pth"]),
    "llama": ("Llama", ["consolidated.00.pth", "params.json"]),
    "olmo": ("OLMo-core", ["step10/model_and_optim/.metadata", "step10/train/rank0.pt", "step10/config.json"]),
    "nanogpt": ("nanoGPT", ["ckpt.pt"]),
}


def write(folder: Path, files: list[str]) -> Path:
    for name in files:
        name, _, content = name.partition("=")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content or ("global_step10" if name == "latest" else ""))
    return folder


def write_own(folder: Path, *steps: int) -> Path:
    for step in steps:
        unfinished = folder / "unfinished"
        unfinished.mkdir(parents=True)
        publish(unfinished, folder / f"global_step{step}", {"progress.json": {}, "config.json": {}}, {})
    return folder


def chosen(**keys: object) -> Path | None:
    return checkpoint_to_load(CheckpointKeys(**{key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}))


def refused(**keys: object) -> str:
    with pytest.raises(UserError) as error:
        chosen(**keys)
    assert "damaged" not in str(error.value) and "remove" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_foreign_checkpoint_is_refused_with_its_program_for_load_and_save(tmp_path, name):
    program, files = FORMATS[name]
    folder = write(tmp_path / "run", files)
    for keys in ({"load": folder, "save": folder}, {"load": folder}, {"save": folder}):
        said = refused(**keys)
        assert program in said and "which Deepy does not read" in said and "choose another folder for" in said
    assert program in refused(load=folder, save=tmp_path / "new", finetune=True)


@pytest.mark.parametrize("name", FORMATS)
def test_load_may_point_into_a_foreign_checkpoint(tmp_path, name):
    program, files = FORMATS[name]
    folder = write(tmp_path / "run", files)
    for file in (path for path in folder.rglob("*") if foreign_checkpoint(path)):
        assert program.partition(" (")[0].split("-")[0] in refused(load=file) or "torch.dist" in refused(load=file)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("neox", "tools/convert_from_neox.py converts it"),
        ("litgpt", "tools/convert_from_litgpt.py converts it"),
        ("hugging_face", "tools/convert_from_hf.py converts a model"),
        ("core", "Megatron-Bridge's convert_checkpoints.py export writes it in Hugging Face's format"),
    ],
)
def test_the_message_names_what_brings_the_weights_here(tmp_path, name, way):
    write(tmp_path, FORMATS[name][1])
    assert f"which Deepy does not read ({way})" in refused(load=tmp_path)


def test_an_iteration_that_is_foreign_is_named(tmp_path):
    write_own(write(tmp_path, FORMATS["neox"][1]), 20)
    assert "global_step10 is a checkpoint of GPT-NeoX" in refused(load=tmp_path, iteration=10)
    assert chosen(load=tmp_path, iteration=20) == tmp_path / "global_step20"


def test_next_to_a_foreign_checkpoint_our_own_is_loaded_and_the_other_passed_over(tmp_path, caplog):
    write_own(write(tmp_path, ["global_step30/mp_rank_00_model_states.pt"]), 20)
    assert chosen(load=tmp_path, save=tmp_path / "new") == tmp_path / "global_step20"
    assert "global_step30 is a checkpoint of GPT-NeoX or another program with DeepSpeed" in caplog.text
    assert "it is passed over" in caplog.text


def test_nothing_is_saved_next_to_a_foreign_checkpoint_of_the_same_names(tmp_path):
    write_own(write(tmp_path, ["global_step30/mp_rank_00_model_states.pt"]), 20)
    assert refused(load=tmp_path, save=tmp_path).startswith(f"save ({tmp_path}): {tmp_path}/global_step30 is a checkp")


def test_a_foreign_checkpoint_that_latest_names_is_not_replaced_by_an_older_one_of_ours(tmp_path):
    write(write_own(tmp_path, 5), FORMATS["neox"][1])
    assert "global_step10 is a checkpoint of GPT-NeoX" in refused(load=tmp_path)


def test_our_own_checkpoint_stays_ours_whatever_files_are_put_into_it(tmp_path):
    write(write_own(tmp_path, 5), ["global_step5/model.safetensors", "global_step5/mp_rank_00_model_states.pt"])
    assert chosen(load=tmp_path, save=tmp_path) == tmp_path / "global_step5"


def test_our_own_checkpoint_without_its_manifest_is_damaged_and_not_foreign(tmp_path):
    write(write_own(tmp_path, 5), ["global_step5/state/.metadata", "global_step5/state/__0_0.distcp"])
    (tmp_path / "global_step5" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        chosen(load=tmp_path)


@pytest.mark.parametrize("files", [["config.json"], ["data/model.safetensors"], ["zero/a"], ["stdlib.jsonl", "logs/x"]])
def test_what_other_files_are_in_a_folder_does_not_matter(tmp_path, files):
    write(tmp_path, files)
    assert chosen(load=tmp_path, save=tmp_path) is None


@pytest.mark.parametrize("inside", ["global_step5", "global_step5/state", "global_step5/state/__0_0.distcp"])
def test_a_path_into_our_own_checkpoint_is_answered_with_the_folder_and_the_iteration(tmp_path, inside):
    write(write_own(tmp_path, 5), ["global_step5/state/__0_0.distcp"])
    assert refused(load=tmp_path / inside, save=tmp_path / inside).endswith(
        f"give the folder that holds it: {tmp_path}, with iteration=5"
    )


def test_nothing_is_saved_inside_of_a_checkpoint(tmp_path):
    write_own(tmp_path, 5)
    save = tmp_path / "global_step5" / "new"
    assert refused(load=tmp_path, save=save).startswith(
        f"save ({save}) lies inside the checkpoint {tmp_path}/global_st"
    )


def test_a_file_is_not_a_folder_of_checkpoints(tmp_path):
    write(tmp_path, ["train.log"])
    assert refused(load=tmp_path / "train.log").endswith("train.log is a file, not a folder of checkpoints")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfglobal_step5",
        b"global_step5\r\n",
        "\ufeffglobal_step5".encode("utf-16-le"),
        b"./global_step5/",
        b"{folder}/global_step5",
        b"../run/global_step5",
    ],
    ids=["mark", "carriage return", "utf-16", "dot", "absolute", "parent"],
)
def test_latest_names_its_checkpoint_however_it_is_written(tmp_path, caplog, content):
    folder = write_own(tmp_path / "run", 5, 10)
    (folder / "latest").write_bytes(content.replace(b"{folder}", str(folder).encode()))
    assert find_checkpoint(folder) == folder / "global_step5"
    assert caplog.text == ""


@pytest.mark.parametrize("content", [b"/elsewhere/global_step5", b"../global_step5", b"\x1f\x8b\0", b"a" * 9000, b"\0"])
def test_a_latest_that_leads_elsewhere_or_is_no_text_is_warned_of(tmp_path, caplog, content):
    folder = write_own(tmp_path / "run", 5, 10)
    (folder / "latest").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(folder) == folder / "global_step10"
    assert "is not in that folder: taking the newest whole checkpoint" in caplog.text
