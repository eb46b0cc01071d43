"""Where a run begins, and what is refused before it does."""

from pathlib import Path

import pytest

from megatron.checkpoint.folder import publish
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.errors import UserError
from megatron.training.start import check_writable, checkpoint_to_load


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


def checkpoint(folder: Path, *steps: int) -> Path:
    """A folder with checkpoints that are whole, `latest` on the last one."""
    for step in steps:
        unfinished = folder / "unfinished"
        unfinished.mkdir(parents=True)
        publish(unfinished, folder / f"global_step{step}", {"progress.json": {}, "config.json": {}}, {})
    return folder


def chosen(**keys: object) -> Path | None:
    return checkpoint_to_load(CheckpointKeys(**{key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}))


def test_without_load_a_run_starts_fresh(folder):
    assert chosen() is None
    assert chosen(save=folder / "new") is None


def test_the_same_command_begins_a_run_and_goes_on_with_it(folder):
    assert chosen(save=folder / "run", load=folder / "run") is None
    checkpoint(folder / "run", 10, 20)
    assert chosen(save=folder / "run", load=folder / "run").name == "global_step20"
    assert chosen(save=folder / "run", load=folder / "run" / ".." / "run").name == "global_step20"


def test_any_other_load_without_a_checkpoint_is_an_error_that_names_it(folder):
    with pytest.raises(UserError, match="gone"):
        chosen(save=folder / "run", load=folder / "gone")
    with pytest.raises(UserError, match="gone"):
        chosen(load=folder / "gone")


def test_load_beside_another_save_is_taken(folder):
    checkpoint(folder / "a", 5)
    assert chosen(save=folder / "b", load=folder / "a") == folder / "a" / "global_step5"


def test_an_iteration_is_chosen_or_refused(folder):
    checkpoint(folder / "a", 5, 10)
    assert chosen(load=folder / "a", iteration=5) == folder / "a" / "global_step5"
    with pytest.raises(UserError, match="there are: 5, 10"):
        chosen(load=folder / "a", iteration=7)


def test_a_fresh_start_does_not_mix_with_the_checkpoints_of_another_run(folder):
    checkpoint(folder / "a", 5)
    checkpoint(folder / "b", 9)
    with pytest.raises(UserError, match="already holds global_step5"):
        chosen(save=folder / "a")
    with pytest.raises(UserError, match="already holds global_step5"):
        chosen(save=folder / "a", load=folder / "b")


def test_a_folder_with_only_damaged_checkpoints_is_an_error(folder):
    (checkpoint(folder / "a", 5) / "global_step5" / "progress.json").unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        chosen(save=folder / "a", load=folder / "a")


def test_finetune_needs_weights_to_start_from(folder):
    with pytest.raises(UserError, match="has no checkpoint"):
        chosen(save=folder / "a", load=folder / "a", finetune=True)
    checkpoint(folder / "b", 3)
    assert chosen(save=folder / "a", load=folder / "b", finetune=True).name == "global_step3"


def test_a_folder_that_cannot_be_made_is_named_with_its_key(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"save .*file/run"):
        check_writable(folder / "file" / "run", "save")
    check_writable(folder / "deep" / "run", "save")
    assert (folder / "deep" / "run").is_dir()
