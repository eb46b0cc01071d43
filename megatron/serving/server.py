"""serve.py: rank 0 answers HTTP and drives the decoding engine; the other ranks follow."""

import os
import signal
from importlib.util import find_spec

from megatron.config.schema.config import Config
from megatron.engine.distributed import stop
from megatron.errors import UserError
from megatron.generation.engine import Engine, EngineSettings
from megatron.inference import FoundModel, find_trained_model, open_trained_model
from megatron.logging import configure

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(config: Config) -> None:
    """Serve the model in `load` until SIGTERM or Ctrl-C. Every rank calls it.

    Raises UserError before anything is served: for a wrong configuration or checkpoint, an address that cannot be
    listened on, and one that other machines reach without keys.
    """
    rank = int(os.environ.get("RANK", "0"))
    configure(rank)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"serve.py needs {', '.join(missing)}; pip install 'deepy[serve]' installs them")
    found = find_trained_model(config)
    settings = _engine_settings(config, found)
    if rank == 0:
        from megatron.serving.leader import lead  # which imports these packages

        lead(config, found, settings)
    else:
        _follow(config, found, settings)
    stop()


def _follow(config: Config, found: FoundModel, settings: EngineSettings) -> None:
    engine = Engine(open_trained_model(found, config.launcher.distributed_backend), settings)
    for number in (signal.SIGTERM, signal.SIGINT):  # some launchers signal all ranks: rank 0 decides when it is time
        signal.signal(number, signal.SIG_IGN)
    engine.follow()


def _engine_settings(config: Config, found: FoundModel) -> EngineSettings:
    """Raises UserError where the model has a shorter context than serve_context says."""
    wanted, context = config.serving.serve_context, found.plan.model.max_position_embeddings
    if wanted is not None and wanted > context:
        raise UserError(f"serve_context ({wanted}) is more than the model's context ({context}); lower it")
    keys = config.generation
    slots = max(keys.generation_batch_size, found.plan.layout.pipe)  # every stage has a text
    return EngineSettings(slots, wanted or context, keys.prefill_chunk_size)
