"""train.py: check everything that a run needs, build it in order, and hand it to the loop."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron.alerts.sender import open_alerts
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import checkpoint_config
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.build import Sources
from megatron.data.loader import micro_batches
from megatron.engine.distributed import be_deterministic, choose_matmul_precision, start_layout, stop
from megatron.engine.settings import DTYPES
from megatron.engine.training import TrainingEngine
from megatron.errors import DONE, FAILED, RunError, work_begins
from megatron.estimate.describe import plan_lines
from megatron.events import EventLog
from megatron.files import FolderLock, refuse_overwriting
from megatron.hugging_face.incoming import refuse_existing
from megatron.hugging_face.outgoing import Export, plan_export
from megatron.hugging_face.published import (
    PublishedModel,
    base_of_adapters,
    check_same_published,
    open_published,
    published_name,
)
from megatron.launch.protocol.attempt import Attempt
from megatron.launch.protocol.environment import environment_line
from megatron.launch.protocol.heartbeat import RUN_FOLDER, Heartbeat
from megatron.launch.report_process import ReportProcess
from megatron.logging import configure
from megatron.metrics.writers import METRICS_FILE, MetricWriters, WriterSettings, open_writers
from megatron.model.attention import describe_attention
from megatron.model.gpt import gpt_layers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.products import check_float8
from megatron.record.secrets import values_without_secrets
from megatron.record.start import Surroundings
from megatron.resources import check_same_model, open_data, open_tokenizer
from megatron.tokenizer.base import Tokenizer
from megatron.training.batch import BatchBuilder, training_batches
from megatron.training.clock import Clock
from megatron.training.export import export_at_end
from megatron.training.hooks.base import MicroBatches, Run, build_hooks
from megatron.training.hooks.divergence import keep_suspect_batch
from megatron.training.hooks.profiling import ProfileRequest
from megatron.training.identity import check_same_run
from megatron.training.liveness import Liveness
from megatron.training.loop import final_step, train_steps
from megatron.training.rewinding import Rewinding
from megatron.training.schedule_change import resumed_changes
from megatron.training.start import agreed, begin, check_writable, checkpoint_to_load, keys_of_attempt
from megatron.training.start_record import look_around, record_start
from megatron.training.stopping import StopRequest, StopVote

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What each rank opens and checks without the others."""

    plan: Plan
    tokenizer: Tokenizer
    sources: Sources
    checkpoint: Path | None  # to resume from
    published: PublishedModel | None = None  # to start from, where there is no checkpoint
    export: Export | None = None  # to write at the end


def train(config: Config) -> None:
    """Train a model as configured. Collective over all ranks.

    Raises UserError, before the first step, for what the user can correct; RunError if the training itself fails.
    """
    rank = int(os.environ.get("RANK", "0"))
    configure(rank)
    attempt = Attempt.of_this_process()
    config = config.model_copy(update={"checkpoint": keys_of_attempt(config.checkpoint, attempt)})
    request, surroundings = StopRequest(config.launcher.time_limit_minutes), look_around(config.log_folder)
    written = {"save": config.checkpoint.save, "log_dir": config.log_folder} if rank == 0 else {}
    with ExitStack() as locked:
        locks = [
            locked.enter_context(FolderLock(Path(folder), key, attempt.abandoned))
            for key, folder in written.items()
            if folder is not None
        ]
        for lock in locks:
            lock.take()  # before the folders are read: a run that is about to end may still write there
        prepared = prepare(config, int(os.environ.get("WORLD_SIZE", "1")))
        for lock in locks:
            lock.take()  # `prepare` has created folders that were missing
        _train(config, prepared, request, surroundings, attempt)


def _train(
    config: Config,
    prepared: Prepared,
    request: StopRequest,
    surroundings: Surroundings | None,
    attempt: Attempt,
) -> None:
    """Set the process group up, train, and report how the run ended. Collective."""
    with request.listening():
        run, state = set_up(config, prepared, surroundings)
        keep_suspect_batch(run, state, attempt.suspect_step)
        vote = StopVote(request, run.engine.grid.host_group)
        with told_end(run, vote):
            batches = read_batches(run, state)
            hooks = build_hooks(run)
            rewinding = Rewinding(run, hooks, partial(read_batches, run))
            with closing(writers_of(run, state.step)) as writers:
                run.clock.lap()  # discard the time of the set-up
                with work_begins():
                    state = train_steps(run, state, batches, hooks, writers, vote, rewinding)
                    if prepared.export is not None and state.step == config.training.train_iters:
                        export_at_end(run, prepared.export, state)
            stop()
            finish(config, state.step, vote.reason)


@contextmanager
def told_end(run: Run, vote: StopVote) -> Iterator[None]:
    """Without deepy.py, which does it otherwise: record how the block ends, send alerts, and write the last report."""
    if RUN_FOLDER in os.environ or dist.get_rank() != 0:
        yield
        return
    folder = Path(run.config.log_folder) if run.config.log_folder else None
    last_report = ReportProcess(folder, log.warning) if folder is not None and run.config.logging.report else None
    with open_alerts(run.config.alerts, folder, follow=False) as alerts:
        run.events.listen(alerts.hear)
        try:
            yield
        except BaseException as error:
            run.events.record("failure", str(error) or type(error).__name__, code=FAILED)
            if last_report is not None:
                last_report.start()
            raise
        run.events.record("finish", f"stopped by {vote.reason}" if vote.reason else "done", code=DONE)
        if last_report is not None:
            last_report.start()
            if not vote.reason:  # a signal or a time limit leaves little time
                last_report.wait()


def finish(config: Config, step: int, stopped_by: str | None) -> None:
    """Log how the run ended. Raises RunError if it ended early and nothing was saved."""
    if stopped_by is None:
        log.info("done: step %d", step)
    elif config.checkpoint.save is not None:
        log.info("stopped by %s after step %d; its checkpoint is in %s", stopped_by, step, config.checkpoint.save)
    else:
        raise RunError(f"stopped by {stopped_by} after step {step}; save is not set, so nothing is kept")


def prepare(config: Config, world_size: int) -> Prepared:
    """Open and check everything that needs no other ranks. Raises UserError."""
    tokenizer = open_tokenizer(config)
    plan = resolve(config, world_size, tokenizer.vocab_size)
    sources = open_data(config, tokenizer.vocab_size)
    sources.samples("train")
    checkpoint = checkpoint_to_load(config.checkpoint)
    if checkpoint is not None:
        check_fits(config, plan, tokenizer, checkpoint)
    published = _published(config, plan) if checkpoint is None else None
    export = _export(config, plan, tokenizer)
    textfile = config.logging.prometheus_textfile
    written = {
        "save": config.checkpoint.save,
        "log_dir": config.log_folder,
        "tensorboard_dir": config.logging.tensorboard_dir,
        "the folder of prometheus_textfile": textfile and str(Path(textfile).parent),
    }
    for key, folder in written.items():
        if folder is not None:
            check_writable(Path(folder), key)
    if config.log_folder is not None:
        keys = config.tokenizer
        read = {"vocab_file": keys.vocab_file, "merge_file": keys.merge_file}
        refuse_overwriting(
            {"log_dir": Path(config.log_folder, METRICS_FILE)}, {key: path for key, path in read.items() if path}
        )
    for path in ProfileRequest.of(config).folders:
        check_writable(path, "the folder of the profile")
    return Prepared(plan, tokenizer, sources, checkpoint, published, export)


def _published(config: Config, plan: Plan) -> PublishedModel | None:
    """The published model to start from, if `load` names one. Raises UserError."""
    name = published_name(config.checkpoint.load)
    if name is None:
        return None
    published = open_published(name)
    check_same_published(plan.model, published, any_behavior="model" in config.checkpoint.allow_changes)
    return published


def _export(config: Config, plan: Plan, tokenizer: Tokenizer) -> Export | None:
    """The model as Hugging Face has it, if `save_hf` asks for one. Raises UserError."""
    if config.checkpoint.save_hf is None:
        return None
    refuse_existing(Path(config.checkpoint.save_hf))
    return plan_export(plan.model, config.tokenizer.vocab_file, tokenizer, plan.engine.precision)


def check_fits(config: Config, plan: Plan, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Raise UserError if this run may not resume from `checkpoint`."""
    if "model" not in config.checkpoint.allow_changes:
        check_same_model(plan.model, checkpoint)
    if not config.checkpoint.finetune:
        check_same_run(config, tokenizer, checkpoint)


def set_up(config: Config, prepared: Prepared, surroundings: Surroundings | None = None) -> tuple[Run, TrainState]:
    """Set the process group up, build the model and load the checkpoint. Collective.

    surroundings: for the record of the start, on rank 0.
    """
    plan, liveness = prepared.plan, Liveness(Heartbeat.of_this_process())
    nondeterministic = be_deterministic() if plan.engine.deterministic else []
    grid = start_layout(plan.layout, config.launcher.distributed_backend)
    products = choose_matmul_precision(plan.engine, grid.device)
    if plan.model.float8:
        check_float8(grid.device)
    check = partial(check_fits, config, plan, prepared.tokenizer)
    checkpoint = agreed(prepared.checkpoint, config.checkpoint, check)
    seed = plan.engine.seed if checkpoint is None and prepared.published is None else None
    engine = TrainingEngine(gpt_layers(plan.model, grid, seed, plan.engine.seed), grid, plan)
    state, beginning = begin(engine, checkpoint, config.checkpoint, prepared.published, base_of_adapters(config))
    for line in [*_description(prepared, grid), *products, *nondeterministic, *_where_files_go(config), beginning]:
        log.info("%s", line)
    if checkpoint is not None and not config.checkpoint.finetune:
        for line in resumed_changes(config, plan, checkpoint_config(checkpoint), state):
            log.info("%s", line)
    last_step = final_step(state.step, config.training.train_iters or 0, config.training.exit_interval)
    clock = Clock(grid.device)
    events = _events_of(config)
    events.record("resume" if state.step else "start", beginning, state.step)
    opened = (config, plan, prepared.tokenizer, prepared.sources, engine)
    run = Run(*opened, state.step, last_step, clock, liveness, events)
    record_start(run, state, checkpoint, beginning, surroundings)
    return run, state


def _description(prepared: Prepared, grid: ParallelGrid) -> list[str]:
    """Tokenizer, data, layout, batch, model, attention kernels and environment, for the log."""
    plan = prepared.plan
    attention = describe_attention(plan.model, grid.device, DTYPES[plan.engine.precision])
    return [
        prepared.tokenizer.describe(),
        *prepared.sources.description,
        *plan_lines(plan),
        *attention,
        environment_line(os.environ),
    ]


def read_batches(run: Run, state: TrainState) -> Iterator[MicroBatches]:
    """This rank's micro-batches of each step after `state`, reported to the watchdog."""
    samples = run.reading.watched(read_samples(run, state))
    steps = training_batches(samples, BatchBuilder.of(run), run.plan.batch.accumulation_steps)
    return run.liveness.watched(steps, state.step)


def read_samples(run: Run, state: TrainState) -> Iterator[Tensor]:
    """This rank's micro-batches of token ids, int64 [b, s + 1], from `state.consumed_samples` on."""
    grid, batch = run.engine.grid, run.plan.batch
    return micro_batches(
        run.sources.samples("train"),
        consumed_samples=state.consumed_samples,
        global_size=batch.global_size,
        micro_size=batch.micro_size,
        data_rank=grid.rank("data"),
        data_size=grid.size("data"),
        num_workers=run.config.data.num_workers,
        pin_memory=grid.device.type == "cuda",
    )


def _events_of(config: Config) -> EventLog:
    """Where rank 0 records events; the other ranks record none."""
    return EventLog(Path(config.log_folder) if config.log_folder and dist.get_rank() == 0 else None)


def writers_of(run: Run, first_step: int) -> MetricWriters:
    """The configured metric writers on rank 0, for a run that goes on after `first_step` steps; none elsewhere."""
    if dist.get_rank() != 0:
        return MetricWriters()
    folder = Path(run.config.log_folder) if run.config.log_folder else None
    config = values_without_secrets(run.config.to_flat())  # services show it to others
    return open_writers(WriterSettings(run.config.logging, folder, first_step, config), run.events)


def _where_files_go(config: Config) -> list[str]:
    if config.checkpoint.save is not None:
        return [f"checkpoints: {config.checkpoint.save}; metrics and logs: {config.log_folder}"]
    if config.log_folder is not None:
        return [f"metrics and logs: {config.log_folder}; save is not set: no checkpoints are written"]
    return ["neither save nor log_dir is set: no files are written"]
