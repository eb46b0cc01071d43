"""Keys around the training: tokenizer, checkpoints, logging, generation, evaluation, launcher."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron.config.schema.key_group import (
    Fraction,
    Group,
    NotNegativeFloat,
    NotNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    WholeNumber,
    registered,
)


class TokenizerKeys(Group):
    """Which tokenizer made the data and reads the prompts."""

    tokenizer_type: Annotated[str, registered("tokenizer")] = "GPT2BPETokenizer"
    """HFTokenizer (tokenizer.json), GPT2BPETokenizer and HFGPT2Tokenizer (vocab.json and merges.txt),
    CharLevelTokenizer (bytes), TiktokenTokenizer, SPMTokenizer."""

    vocab_file: PathText | None = None
    """Vocabulary or tokenizer file; for TiktokenTokenizer also the name of an encoding."""

    merge_file: PathText | None = None
    """merges.txt of the GPT-2 tokenizers."""

    end_of_document_token: str | None = None
    """Text of the token that ends a document. Unset: the tokenizer's own; it must exist either way."""


class CheckpointKeys(Group):
    """What is kept, where, and from where a run goes on."""

    save: PathText | None = None
    """Folder of this run's checkpoints. Unset: no checkpoints."""

    load: PathText | None = None
    """Folder to go on from. Equal to save and still empty: start fresh. For generation and evaluation, unset: save."""

    checkpoint_factor: PositiveInt | None = None
    """Steps between checkpoints. Unset: only at the end."""

    checkpoint_scale: Literal["linear", "log"] = "linear"
    """linear: every checkpoint_factor steps; log: after 1, f, f², f³, ... steps, f being checkpoint_factor."""

    extra_save_iters: tuple[NotNegativeInt, ...] = ()
    """Steps to save at besides; these checkpoints are never deleted. 0: the weights from the seed."""

    keep_last_n_checkpoints: PositiveInt | None = None
    """Older checkpoints are deleted, but for those of extra_save_iters and the best. Unset: all are kept."""

    keep_best_checkpoint: bool = False
    """Save after a validation with the lowest loss so far, let the file `best` name it, and do not delete it."""

    async_save: bool = False
    """Copy the state to host memory (12 bytes per parameter, shared out over the ranks) and write while training."""

    verify: Literal["quick", "full"] = "quick"
    """What is checked of a checkpoint before it is loaded: sizes of its files, or their hashes as well."""

    finetune: bool = False
    """Take weights only from load, and start at step 0."""

    allow_changes: tuple[Literal["seed", "data", "tokenizer", "model"], ...] = ()
    """What may differ from the run that wrote the checkpoint to go on from; anything else is refused. model: settings
    that change what the weights compute and not their shapes, such as rotary_emb_base; finetune needs it as well."""

    no_load_optim: bool = False
    """Do not take the optimizer's state from load."""

    no_load_rng: bool = False
    """Changes nothing: no random state is saved, since dropout and data order are functions of seed and step."""

    iteration: PositiveInt | None = None
    """Step of the checkpoint to load. Unset: the latest."""


class LoggingKeys(Group):
    """Where numbers go."""

    log_interval: PositiveInt = 100
    """Steps between log lines."""

    log_dir: PathText | None = None
    """Folder of metrics.jsonl and of each rank's log. Unset: logs in save; without save: nothing is written."""

    tensorboard_dir: PathText | None = None
    """Write for TensorBoard as well, into this folder."""

    use_wandb: bool = False
    """Write to Weights & Biases as well (WANDB_MODE=offline works)."""

    wandb_project: str = "deepy"
    """Project at Weights & Biases."""

    wandb_group: str | None = None
    """Group at Weights & Biases."""

    wandb_run_name: str | None = None
    """Name of the run at Weights & Biases."""

    wandb_team: str | None = None
    """Team (entity) at Weights & Biases."""

    wandb_host: str | None = None
    """Address of a Weights & Biases server of one's own."""

    peak_theoretical_tflops: PositiveFloat | None = None
    """TFLOP/s one device can do; turns on MFU in the log line."""


class ProfilingKeys(Group):
    """Where time and memory of a training go."""

    wall_clock_breakdown: bool = False
    """Tell the time of a step by phases: waiting for data, forward, backward, optimizer. The device is waited for
    between them, which costs some speed on a GPU."""

    profile: bool = False
    """Trace some steps with torch's profiler: a trace of each rank and a table of its ten most expensive kernels, in
    the folder profile of log_dir (or of logs in save)."""

    profile_step_start: NotNegativeInt = 10
    """Steps done when profiling begins."""

    profile_step_stop: PositiveInt = 12
    """Steps done when it ends: with 10 and 12, steps 11 and 12 of the log are profiled."""

    memory_profiling: bool = False
    """Record the memory of the same steps: on a GPU torch's snapshot of every allocation, on a CPU a table of the ten
    operators that allocate most."""

    memory_profiling_path: PathText | None = None
    """Folder for it. Unset: the folder profile of log_dir (or of logs in save)."""


class GenerationKeys(Group):
    """generate.py."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = None
    """Where prompts come from. Unset: input-file if there is a sample_input_file, else unconditional."""

    temperature: NotNegativeFloat = 0.0
    """Divides logits before sampling. With temperature, top_k and top_p all 0: greedy."""

    top_k: NotNegativeInt = 0
    """Sample among this many likeliest tokens; 0: no limit."""

    top_p: Fraction = 0.0
    """Sample among the likeliest tokens that make up this probability; 0: no limit."""

    maximum_tokens: PositiveInt = 64
    """Longest continuation, in tokens."""

    prompt_end: str = "\n"
    """Separates prompts in the input file, and ends a prompt typed in."""

    sample_input_file: PathText | None = None
    """File of prompts."""

    sample_output_file: PathText = "samples.txt"
    """File of JSON lines."""

    num_samples: PositiveInt = 1
    """Texts per prompt, or in all when unconditional."""

    recompute: bool = False
    """Compute everything anew for each token instead of keeping keys and values."""

    return_logits: bool = False
    """Write the logits of every generated token too."""

    generation_batch_size: PositiveInt = 8
    """Prompts handled together."""


def _separate_words(value: object) -> object:
    """The words of a text or list with commas, each one of its own."""
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
        return value
    return tuple(part.strip() for word in words for part in word.split(",") if part.strip())


class EvaluationKeys(Group):
    """evaluate.py."""

    eval_tasks: Annotated[tuple[str, ...] | None, BeforeValidator(_separate_words)] = None
    """Tasks, groups or tags of the lm-evaluation-harness, in a list or separated by commas; `*` and `?` match as in
    file names. Unset: perplexity."""

    eval_num_fewshot: NotNegativeInt | None = None
    """Examples before each question, but for tasks that insist on 0. Unset: what each task says."""

    eval_limit: PositiveFloat | None = None
    """Documents of each task, or below 1 a share of them. Unset: all."""

    eval_include_path: PathText | None = None
    """Folder with task files of one's own, which outrank the harness's."""

    eval_results_prefix: PathText = ""
    """Begins the name of the results file."""

    eval_split: Literal["train", "valid", "test"] = "valid"
    """Part of the data whose perplexity is measured, without eval_tasks."""


class LauncherKeys(Group):
    """How ranks are started."""

    launcher: Annotated[str, registered("launcher")] | None = None
    """local: all ranks on this machine. pdsh: the hosts of the hostfile, by ssh. openmpi: mpirun. slurm: srun inside an
    allocation. Unset: pdsh with a hostfile of several hosts, slurm in the script of several nodes, else local."""

    launcher_args: str | None = None
    """Further arguments of pdsh, mpirun or srun, such as "--mca btl_tcp_if_include eth0"."""

    comment: str | None = None
    """Comment of the job, which launcher slurm gives to srun (--comment)."""

    num_gpus: PositiveInt | None = None
    """Processes per node, on a CPU machine too. Unset: one per visible GPU, or two on a CPU."""

    num_nodes: PositiveInt | None = None
    """Machines of the run."""

    master_addr: str | None = None
    """Address of rank 0. Unset: the first host."""

    master_port: Annotated[WholeNumber, Field(gt=0, lt=65536)] | None = None
    """Port of rank 0. Unset: a free one."""

    hostfile: PathText | None = None
    """Lines such as "node1 slots=8". Unset: the file in DLTS_HOSTFILE, or /job/hostfile where it exists."""

    include: str | None = None
    """Hosts and devices to use, as "node1@node2:0,2"; "localhost:0,2" without a hostfile."""

    exclude: str | None = None
    """Hosts and devices to leave out, as "node1@node2:1"."""

    forward_environment: tuple[str, ...] = ()
    """Environment variables that every node gets, beside NCCL_*, GLOO_*, DS_*, OMP_*, WANDB_*, HF_* and their like."""

    gpu_memory: PositiveFloat | None = None
    """Memory of one device in GiB, such as 80: --dry-run then says whether the run fits."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Unset: nccl on GPUs, gloo otherwise."""

    watchdog_timeout: Annotated[float, Field(ge=0, le=1e8)] | None = None
    """Seconds that a step may take before all ranks are asked what they do; 0: never. Unset: ten times the running
    median, at least 300."""

    watchdog_action: Literal["end", "wait"] = "end"
    """After the roll-call of a hang: end the run with exit code 1, or wait on."""

    time_limit_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Minutes after which the run ends at a step boundary, with a checkpoint. Unset: no limit."""
