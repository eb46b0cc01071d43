"""Keys of tokenizer, checkpoints, logging, evaluation and launcher."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron.config.schema.key_group import (
    Group,
    NotNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    WholeNumber,
    registered,
)
from megatron.events import Kind


class TokenizerKeys(Group):
    """The tokenizer of data and prompts."""

    tokenizer_type: Annotated[str, registered("tokenizer")] = "GPT2BPETokenizer"
    """HFTokenizer (tokenizer.json), GPT2BPETokenizer and HFGPT2Tokenizer (vocab.json and merges.txt),
    CharLevelTokenizer (bytes), TiktokenTokenizer, SPMTokenizer."""

    vocab_file: PathText | None = None
    """Vocabulary or tokenizer file; for TiktokenTokenizer also the name of an encoding, for HFTokenizer and the GPT-2
    tokenizers also the folder of a model. HFTokenizer leaves out added tokens without a row in the model whose
    config.json lies beside the file."""

    merge_file: PathText | None = None
    """merges.txt of the GPT-2 tokenizers."""

    end_of_document_token: str | None = None
    """Text of the token that ends a document, which must be in the vocabulary. Unset: the tokenizer's own."""

    chat_template: PathText | None = None
    """File with the template in Jinja that writes a chat as text, for generation. Unset: the tokenizer's own, next to
    vocab_file."""


class CheckpointKeys(Group):
    """Saving checkpoints, and resuming from them."""

    save: PathText | None = None
    """Folder for the checkpoints of this run. Unset: none are saved."""

    load: PathText | None = None
    """Folder to resume from. If it is save and still empty, the run starts fresh. Unset, for generation and evaluation:
    save. hf:DIR or hf:NAME: a model of Hugging Face, whose weights a run starts from at step 0, once, and resumes from
    save afterwards; keys of the model and the tokenizer that are not set are those of its folder."""

    save_hf: PathText | None = None
    """A new folder for the model as Hugging Face has it, written after train_iters steps in the run's precision, and
    compared with the trained weights (docs/hugging-face.md). Unset: none."""

    checkpoint_factor: PositiveInt | None = None
    """Steps between checkpoints. Unset: only at the end."""

    checkpoint_scale: Literal["linear", "log"] = "linear"
    """linear: every checkpoint_factor steps; log: after 1, f, f², f³, ... steps, f being checkpoint_factor."""

    extra_save_iters: tuple[NotNegativeInt, ...] = ()
    """Additional steps to save at; these checkpoints are never deleted. 0: the initial weights."""

    keep_last_n_checkpoints: PositiveInt | None = None
    """Delete older checkpoints, except those of extra_save_iters and the best. Unset: all are kept."""

    keep_best_checkpoint: bool = False
    """Save after each validation with the lowest loss so far; the file `best` names the checkpoint, which is kept."""

    async_save: bool = False
    """Copy the state to host memory (12 bytes per parameter, sharded over the ranks; allocated at the start, and pinned
    on a GPU) and write it in the background."""

    verify: Literal["quick", "full"] = "quick"
    """Check the sizes of a checkpoint's files before loading (quick), or their hashes too (full)."""

    finetune: bool = False
    """Load only the weights, and start at step 0."""

    allow_changes: tuple[Literal["seed", "data", "tokenizer", "model"], ...] = ()
    """Differences from the run that wrote the checkpoint that are accepted; others are refused. model: settings that
    change what the weights compute but not their shapes, such as rotary_emb_base; also required with finetune."""

    no_load_optim: bool = False
    """Do not load the optimizer state."""

    no_load_rng: bool = False
    """No effect: random state is not saved, because dropout and data order are functions of seed and step."""

    iteration: PositiveInt | None = None
    """Step of the checkpoint to load. Unset: the latest."""


class LoggingKeys(Group):
    """Logs and metrics."""

    log_interval: PositiveInt = 100
    """Steps between log lines."""

    log_dir: PathText | None = None
    """Folder of metrics.jsonl and the logs of the ranks. Unset: logs in save; without save, nothing is written."""

    log_param_norm: bool = False
    """Also write the norm of each parameter (parameter_norms/NAME) with each log line."""

    log_grad_norm: bool = False
    """Also write the norm of each parameter's gradient, before the clip (gradient_norms/NAME)."""

    log_optimizer_states: bool = False
    """Also write the norms of the optimizer's moments (optimizer_state_norms/NAME_MOMENT)."""

    log_activations: bool = False
    """Also write the root mean square and the largest magnitude of each block's output (activations_rms/blocks.N,
    activations_max/blocks.N)."""

    log_gradient_noise_scale: bool = False
    """Also write the gradient noise scale (https://arxiv.org/abs/1812.06162), in samples (train/noise_scale). It takes
    4 bytes per parameter, divided over the ranks like the optimizer's state, and adds the gradients of each step."""

    gradient_noise_scale_n_batches: Annotated[WholeNumber, Field(ge=2)] = 5
    """Steps whose gradients are added up to the big batch that the noise scale compares single steps with."""

    use_csv: bool = False
    """Also write metrics.csv beside metrics.jsonl: a row of step, name and value for each value."""

    report: bool = True
    """Write report.html, with report.md and report.csv, to log_dir (or logs in save) after each checkpoint and at the
    end, in a process of the lowest priority (docs/watching.md)."""

    console: Literal["panel", "lines"] = "panel"
    """panel: on a terminal, keep the state of the run, or the progress of other work, at its bottom, below the log
    lines; elsewhere log lines only. lines: log lines only, everywhere."""

    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard event files. Unset: none."""

    use_wandb: bool = False
    """Also log to Weights & Biases (WANDB_MODE=offline works)."""

    wandb_project: str = "deepy"
    """Weights & Biases project."""

    wandb_group: str | None = None
    """Weights & Biases group."""

    wandb_run_name: str | None = None
    """Weights & Biases run name."""

    wandb_team: str | None = None
    """Weights & Biases team (entity)."""

    wandb_host: str | None = None
    """Address of a self-hosted Weights & Biases server."""

    use_mlflow: bool = False
    """Also log to MLflow."""

    mlflow_tracking_uri: str | None = None
    """Address of the MLflow server, or a folder. Unset: as MLFLOW_TRACKING_URI or MLflow's own default say."""

    mlflow_experiment: str = "deepy"
    """MLflow experiment, which is created if it is missing."""

    mlflow_run_name: str | None = None
    """MLflow run name. Unset: MLflow makes one up."""

    use_comet: bool = False
    """Also log to Comet; without COMET_API_KEY an archive in log_dir, for comet upload."""

    comet_workspace: str | None = None
    """Comet workspace. Unset: the default of the account."""

    comet_project: str | None = None
    """Comet project. Unset: the default of the account."""

    comet_experiment_name: str | None = None
    """Name of the experiment at Comet. Unset: Comet makes one up."""

    comet_tags: tuple[str, ...] = ()
    """Tags of the experiment at Comet."""

    comet_others: dict[str, Any] | None = None
    """Other values that are recorded with the experiment at Comet. Unset: none."""

    use_trackio: bool = False
    """Also log to Trackio, into its local database (TRACKIO_DIR)."""

    trackio_project: str = "deepy"
    """Trackio project."""

    trackio_run_name: str | None = None
    """Name of the run in Trackio, which is continued if it exists. Unset: Trackio makes one up."""

    trackio_space_id: str | None = None
    """Space of Hugging Face that Trackio sends the run to. Unset: none."""

    prometheus_port: Annotated[WholeNumber, Field(gt=0, lt=65536)] | None = None
    """Port on which rank 0 shows the latest metrics to Prometheus, at /metrics. Unset: none."""

    prometheus_host: str = "127.0.0.1"
    """Address of that port; 0.0.0.0 for a Prometheus on another machine. There is no password."""

    prometheus_textfile: PathText | None = None
    """File, ending in .prom, for the textfile collector of Prometheus' node_exporter; replaced at each log line."""

    peak_theoretical_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one device, of which MFU is a share. Unset: known in fp16 and bf16 for common GPUs; on a CPU a
    matrix product is measured at the start."""


class AlertKeys(Group):
    """Alerts: what happens in a run, told to a webhook or a command (docs/watching.md)."""

    alert_webhook: str | None = None
    """Name of the environment variable that holds the address to post alerts to; not the address, which may be a
    secret. Unset: none."""

    alert_format: Literal["json", "slack"] = "json"
    """What is posted: an object with run, host, kind, step, time, text and details, or a message as Slack takes it."""

    alert_command: str | None = None
    """Shell command that deepy.py runs for each alert, which it gets as JSON on its standard input. Unset: none."""

    alert_kinds: tuple[Kind, ...] = (
        *("finish", "failure", "not_finite", "spike", "rewind", "hang", "straggler", "replicas_differ", "restart"),
    )
    """Kinds of events to send."""

    alert_limit: PositiveInt = 10
    """Most alerts of one kind within 24 hours, and a third of the most of all kinds. What exceeds it is counted, and
    told with the next alert. finish and failure are always sent, and the most of all kinds keeps back no hang, restart
    or replicas_differ."""


class ProfilingKeys(Group):
    """Profiling of time and memory in training."""

    wall_clock_breakdown: bool = False
    """Show the time of each phase of a step in the log line: waiting for data, forward, backward, optimizer. The device
    is synchronized between phases, which costs some speed on a GPU. The metrics have the phases in any case."""

    profile: bool = False
    """Trace some steps with torch's profiler: for each rank, a trace and a table of its ten most expensive kernels, in
    the folder profile of log_dir (or of logs in save)."""

    profile_step_start: NotNegativeInt = 10
    """Completed steps when profiling begins."""

    profile_step_stop: PositiveInt = 12
    """Completed steps when profiling ends: with 10 and 12, steps 11 and 12 are profiled."""

    memory_profiling: bool = False
    """Profile the memory of the same steps: on a GPU torch's snapshot of all allocations, on a CPU a table of the ten
    operators that allocate most."""

    memory_profiling_path: PathText | None = None
    """Folder of memory profiles. Unset: the folder profile of log_dir (or of logs in save)."""


def _separate_words(value: object) -> object:
    """Split text at commas, also within a list."""
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
        return value
    return tuple(part.strip() for word in words for part in word.split(",") if part.strip())


def _one_or_several(value: object) -> object:
    """A single text as a list of one."""
    return (value,) if isinstance(value, str) else value


class EvaluationKeys(Group):
    """evaluate.py."""

    eval_tasks: Annotated[tuple[str, ...] | None, BeforeValidator(_separate_words)] = None
    """Tasks, groups or tags of the lm-evaluation-harness, in a list or separated by commas; `*` and `?` match as in
    file names. Unset: perplexity."""

    eval_tasks_interval: PositiveInt | None = None
    """train.py: steps between evaluations of eval_tasks, which are also evaluated after the last step. Unset: none."""

    eval_num_fewshot: NotNegativeInt | None = None
    """Few-shot examples before each question, except for tasks that require 0. Unset: the default of each task."""

    eval_limit: PositiveFloat | None = None
    """Documents of each task; below 1: a fraction of them. Unset: all."""

    eval_include_path: PathText | None = None
    """Folder with your own task files, which override the harness's."""

    eval_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Texts of eval_tasks that each replica computes at once; auto: 64, or as many as fit into free memory."""

    eval_chat_template: bool = False
    """Write each question of eval_tasks as a chat, with the tokenizer's chat template (or chat_template)."""

    eval_fewshot_as_multiturn: bool = True
    """With eval_chat_template: few-shot examples are earlier turns of the chat, instead of a part of the question."""

    eval_log_samples: bool = False
    """Also write every document, prompt, answer and score of eval_tasks, as JSON lines, a file for each task."""

    eval_requests_cache: PathText | None = None
    """Folder in which the harness keeps the requests that it builds from the documents of eval_tasks. Unset: none."""

    eval_results_prefix: PathText = ""
    """Prefix of the name of the results file."""

    eval_split: Literal["train", "valid", "test"] = "valid"
    """Split whose perplexity is measured, without eval_tasks and eval_data."""

    eval_data: Annotated[tuple[PathText, ...] | None, BeforeValidator(_one_or_several)] = None
    """Text whose perplexity is measured instead of eval_split, each by itself: prefixes of .bin and .idx files, or
    files ending in .txt (one document), .jsonl (with a field text) or .parquet; .txt.gz, .jsonl.zst and so on."""

    eval_references: PathText | None = None
    """File of references, which the model's answers to prompts are compared with by BLEU, chrF and exact match, instead
    of perplexity: .jsonl with prompt and reference (or a list, references) in each line; or text with a reference in
    each line, for the prompts of sample_input_file. Answers are generated as the keys of generate.py say."""

    eval_stride: PositiveInt | None = None
    """Tokens that each window of perplexity adds to the one before, which is its context: the smaller, the more context
    each token has, and the more is computed. Unset: seq_length, so that no token is read twice."""


class LauncherKeys(Group):
    """Launching of ranks."""

    launcher: Annotated[str, registered("launcher")] | None = None
    """local: all ranks on this node. pdsh: hosts of the hostfile, by ssh. openmpi: mpirun. slurm: srun inside an
    allocation. Unset: pdsh with a hostfile of several hosts, slurm in a batch script of several nodes, else local."""

    launcher_args: str | None = None
    """Additional arguments of pdsh, mpirun or srun, such as "--mca btl_tcp_if_include eth0"."""

    comment: str | None = None
    """Comment of the job, which launcher slurm gives to srun (--comment)."""

    num_gpus: Annotated[PositiveInt, Field(le=4096)] | None = None
    """Processes per node, on CPU nodes too. Unset: one per visible GPU, or two on a CPU."""

    num_nodes: Annotated[PositiveInt, Field(le=100_000)] | None = None
    """Number of nodes."""

    master_addr: str | None = None
    """Address of rank 0. Unset: the first host."""

    master_port: Annotated[WholeNumber, Field(gt=0, lt=65536)] | None = None
    """Port of rank 0. Unset: a free one."""

    hostfile: PathText | None = None
    """File with lines such as "node1 slots=8". Unset: the file in DLTS_HOSTFILE, or /job/hostfile if it exists."""

    include: str | None = None
    """Hosts and devices to use, such as "node1@node2:0,2"; "localhost:0,2" without a hostfile."""

    exclude: str | None = None
    """Hosts and devices to exclude, such as "node1@node2:1"."""

    forward_environment: tuple[str, ...] = ()
    """Environment variables to forward to every node, in addition to NCCL_*, GLOO_*, DS_*, OMP_*, WANDB_*, HF_* and
    similar ones."""

    gpu_memory: PositiveFloat | None = None
    """Memory of one device in GiB, such as 80: --dry-run then reports whether the run fits."""

    max_gpu_memory_in_use: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The largest share of a GPU's memory that other processes may hold when a run starts; beyond it the run is refused
    before its ranks start. 1: not checked."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication backend. Unset: nccl on GPUs, gloo otherwise."""

    watchdog_timeout: Annotated[float, Field(ge=0, le=1e8)] | None = None
    """Maximum seconds of a step; then all ranks report what they are doing. 0: no limit. Unset: ten times the running
    median, at least 300."""

    watchdog_action: Literal["end", "wait"] = "end"
    """After the report of a hang: end the run with exit code 1, or keep waiting."""

    max_restarts: NotNegativeInt = 0
    """How often train.py is started again from its last checkpoint after an accident: a rank or a node that dies, hangs
    or loses its network (docs/outliving.md). Nodes of the hostfile beyond num_nodes are spares."""

    time_limit_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Minutes after which the run ends at a step boundary, with a checkpoint. Unset: no limit."""
