"""Where the harness keeps the requests that it has built from documents (`eval_requests_cache`).

The harness finds them by the name of the task and the number of examples alone. Here the folder also depends on the
task's settings, on its local files, and on the harness's version, so that a changed task is built anew.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import is_file
from megatron.harness.tasks import configurations, texts
from megatron.tokenizer.base import digest


def use_requests_cache(folder: str, names: Sequence[str], manager: Any) -> None:
    """Have the harness keep requests of the tasks called `names` in a folder under `folder`.

    Raises UserError where it cannot be made.
    """
    import lm_eval
    from lm_eval.caching import cache

    settings = dict(configurations(names, manager))
    files = sorted({path for path in texts(list(settings.values())) if is_file(path)})
    times = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in files]
    key = digest(lm_eval.__version__, json.dumps([settings, times], sort_keys=True, default=str))
    path = Path(folder) / key[:16]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"eval_requests_cache ({folder}) cannot be written: {error.strerror}") from error
    cache.PATH = str(path)
