"""The same run on fewer ranks: fewer replicas, each with more micro-batches, and the same global batch."""

from megatron.config.plan import BatchPlan
from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.launch.planning import plan_of_ranks


def keeping_the_batch(config: Config, batch: BatchPlan, ranks: int) -> Config:
    """The configuration of a run with `batch` for fewer ranks: pipeline, tensor and context sizes stay.

    Micro-batches stay as large as they are, or become smaller where the batch cannot be divided otherwise.
    Raises UserError where the layout or the batch cannot be kept.
    """
    keys = config.parallelism
    unit = max(1, keys.pipe_parallel_size) * keys.context_parallel_size * keys.model_parallel_size
    if ranks < unit or ranks % unit:
        raise UserError(
            f"{ranks} ranks cannot hold pipe_parallel_size ({keys.pipe_parallel_size}) x context_parallel_size "
            f"({keys.context_parallel_size}) x model_parallel_size ({keys.model_parallel_size}) = {unit}"
        )
    replicas = ranks // unit
    if batch.global_size % replicas:
        raise UserError(f"train_batch_size ({batch.global_size}) cannot be divided among {replicas} replicas")
    share = batch.global_size // replicas
    micro = max(size for size in range(1, batch.micro_size + 1) if share % size == 0)
    sizes = {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
    }
    smaller = config.model_copy(update={"batch": config.batch.model_copy(update=sizes)})
    plan_of_ranks(smaller, "train.py", ranks)
    return smaller
