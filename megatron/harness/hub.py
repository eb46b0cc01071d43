"""Tasks whose datasets have to come from the Hugging Face hub, refused by name where it cannot be reached."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from megatron.errors import UserError
from megatron.files import exists
from megatron.harness.tasks import configurations, texts

SECONDS = 10  # to wait for an answer of the hub


def require_datasets(names: Sequence[str], manager: Any) -> None:
    """Raise UserError with a line for each task called `names` whose dataset is neither here nor can be fetched.

    Nothing is loaded. manager: the harness's TaskManager. Tasks written in Python say nothing about their data.
    """
    missing = {
        task: dataset for task, config in configurations(names, manager) if (dataset := _to_fetch(config)) is not None
    }
    if missing and (reason := _why_unreachable()):
        raise UserError(
            *(
                f"eval_tasks: {task} needs {dataset} from the Hugging Face hub, which cannot be reached ({reason}); "
                "evaluate once where it can, and copy the folder HF_HOME"
                for task, dataset in sorted(missing.items())
            )
        )


def _to_fetch(config: Mapping[str, Any]) -> str | None:
    """The dataset of a task's settings, if it is on the hub and not in the cache; a file's address counts as one."""
    from datasets.load import CachedDatasetModuleFactory
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    path, settings = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str) or "custom_dataset" in config or exists(path):
        return None
    if path in _PACKAGED_DATASETS_MODULES:
        remote = [each for each in texts(settings.get("data_files")) if "://" in each]
        return remote[0] if remote else None
    with suppress(FileNotFoundError, AssertionError):  # the assertion is about a name with several "/"
        CachedDatasetModuleFactory(path, cache_dir=settings.get("cache_dir")).get_module()
        return None
    return path


def _why_unreachable() -> str | None:
    """Why the hub cannot be reached, asked once; None if it can."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of requests or httpx, by version
        return f"{type(error).__name__}"
    return None
