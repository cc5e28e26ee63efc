"""Every setting, as frozen dataclasses. The text under a field is its `--help`: unit, meaning, special values.

A field says what one thing is; rules that look at two sections stand in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how long it may take."""

    dir: str = ""
    """Run directory. Empty = runs/<run.name>."""
    name: str = "run"
    """Name of the run, for the directory and the logs."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    resume: str = "auto"
    """auto: go on from the run directory's latest checkpoint if configuration, data and tokenizer match, else refuse;
    never: start anew, refuse a directory that holds checkpoints; must: refuse to start without a checkpoint."""
    accept: tuple[str, ...] = ()
    """Differences to the checkpoint that do not stop a resume, by the names that the refusal lists: settings, or
    manifest, mixture, tokenizer. With other data the run goes on at the next window of the new order."""
    time_limit: str = ""
    """Longest time from the start of the process: minutes (90), HH:MM:SS or days-HH:MM:SS, in quotes in a recipe. In
    time for the last save, the run saves, asks in exit.json for a requeue and ends with exit code 85. Empty = none."""

    @property
    def path(self) -> Path:
        """Where the run lives."""
        return Path(self.dir or f"runs/{self.name}")


@dataclass(frozen=True)
class ModelConfig:
    """What is built, and what of it trains."""

    preset: str = "tiny"
    """Name of a preset in config/presets.py."""
    connector: str = ""
    """attention_pooling, linear, mlp or resampler. Empty = the preset's."""
    vision_layers: tuple[int, ...] | None = None
    """Vision layers (0-based) whose outputs feed the connector, in this order. Empty list = the last layer, after its
    norm. Not set = the preset's."""
    image_pool: int = 0
    """Side of the window of patches pooled into one vector, for images; 1 = no pooling. 0 = the preset's."""
    video_pool: int = 0
    """The same for video frames."""
    freeze: tuple[str, ...] = ("base_embeddings",)
    """Components that do not train: vision, connector, language, base_embeddings (with a tied head: the head too)."""


@dataclass(frozen=True)
class InitConfig:
    """Where the weights of a new run come from."""

    checkpoint: str = ""
    """Directory of a checkpoint (or of checkpoints: its latest) whose weights, not its schedule, the run starts from.
    Empty = random weights."""


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over processes. Data parallelism is what remains of the world size."""

    tensor: int = 1
    """Ranks that share each layer's weights. Divides the decoder's query heads, MLP width and vocabulary."""
    sequence: bool = False
    """Shard the decoder's norms and residuals along the sequence over the tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages. Vision and connector stand on the first."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule). 1 = off."""
    pipeline_layers: tuple[int, ...] = ()
    """Decoder layers of each stage (of each chunk, stage by stage within chunk, if interleaved). Empty = even."""
    context: int = 1
    """Ranks that share one row, each holding a contiguous part of it."""
    context_method: str = "auto"
    """How attention sees the whole row. ulysses: ranks exchange tokens for heads, which must go round; gather: ranks
    gather the keys and values of the row; ring: they pass them around, and hold two ranks' at a time; auto: heads among
    as many ranks as they go round for, gather among the rest."""
    vision: str = "data"
    """data: each rank of a replica encodes its share of the crops with the whole tower and connector. tensor: their
    weights are sharded over the tensor-parallel ranks, which encode the same crops, those of their context rank."""
    overlap_grad_reduce: bool | None = None
    """Add gradients up over data and context ranks, bucket by bucket, while the backward pass of the last micro-batch
    still runs. Not set = where the run uses CUDA: on a CPU the sums take their time from the backward pass."""
    bucket_size: int = 0
    """Numbers of a gradient bucket, where that overlaps; of the first pipeline stage, for each later chunk of layers
    is one bucket. 0 = 40 million, or a million for each data-parallel rank if that is more."""


@dataclass(frozen=True)
class DataConfig:
    """What is read and how rows are made."""

    manifest: str = "sample"
    """Directory of indexed shards (holds manifest.json); or, built on first use, `sample`: the bundled sample data, or
    `film`: a real film of ten minutes."""
    mixture: str = "sample"
    """Mixture file (YAML: groups, rates, members), or the name of one in examples/recipes/mixtures/."""
    tokenizer: str = "sample"
    """tokenizer.json or a directory that holds it; `sample`: the small one trained on the sample data."""
    split: str = "train"
    """Split of the manifest to train on."""
    sequence_length: int = 512
    """Tokens in a packed row."""
    max_crops: int = 16
    """Crops in a packed row."""
    image_crops: int = 8
    """Most high-resolution crops of one image; 0 = only the whole image as a single crop."""
    max_images: int = 5
    """Most images of a sample; further ones are left out. 0 = no limit."""
    high_resolution_crops: int = 24
    """Most high-resolution crops of a single image in the share of visits that a mixture member's `high_resolution`
    names."""
    multi_image_crops: int = 0
    """Most high-resolution crops of each image where a sample has several. 0 = as data.image_crops."""
    max_frames: int = 0
    """Most frames of a video, each one crop. 0 = as many as a row holds crops (data.max_crops)."""
    frames_per_second: float = 2.0
    """Frames taken of a second of video, and the last one; fewer, evenly spread, where data.max_frames is reached."""
    window: int = 1024
    """Samples drawn, tokenized and packed together; nothing is carried from one window to the next."""
    balance_batches: int = 1
    """Global batches of a window, or about so many, among which rows are exchanged so that those of one batch cost
    about as much, while each batch keeps the mixture's shares. 1 = rows in the order in which they were packed."""
    plan_cache: str = "run"
    """Directory in which the ranks share planned windows, so that each is planned once. `run`: plans/ in the run's
    directory; nothing: every rank plans for itself."""
    workers: int = 0
    """Processes that decode ahead of training. 0 = decode in the training process."""
    seed: int = 0
    """Keys the order of samples and every random choice about a sample."""
    bad_samples: str = "stop"
    """What follows from a sample that cannot be loaded. stop: an error that names it; skip: it is trained on without
    loss, nothing else moves, and metrics.jsonl counts it, ledger.jsonl names it."""
    bad_ceiling: float = 0.01
    """Share of the samples drawn so far, of 1,000 at least, that may be skipped; beyond it the run stops."""
    prompts: str = "style_and_length"
    """How a user turn begins: `style_and_length` (pre-training: `style N:`) or `style` (`style:`)."""
    loss_weighting: str = "uniform"
    """Weight of a loss token: uniform (1), root_subsegments (1/sqrt K) or root_tokens (2/sqrt n/sqrt K), with n loss
    tokens in the branch and K branches. A mixture member may set a flat weight instead."""


@dataclass(frozen=True)
class TrainConfig:
    """The amount and the arithmetic of training."""

    steps: int = 100
    """Optimizer steps."""
    global_batch: int = 8
    """Packed rows per step, over all data-parallel ranks."""
    rampup_steps: int = 0
    """Steps over which the rows of a step grow from rampup_from to global_batch. 0 = global_batch from the start."""
    rampup_from: int = 0
    """Rows of the first step."""
    rampup_by: int = 0
    """Rows by which it grows at a time. Both are multiples of what the data-parallel ranks take at once."""
    micro_batch: int = 1
    """Packed rows per forward pass on one rank."""
    seed: int = 6198
    """Keys weight initialisation and dropout."""
    precision: str = "float32"
    """float32, bf16, or fp8: bf16 with the layers that the section fp8 names in FP8."""
    recompute: str = "none"
    """Activations recomputed in backward: none, selective (core attention) or full (whole layers)."""
    z_loss: float = 1e-4
    """Weight of logsumexp squared beside the cross-entropy."""
    logit_chunk: int = 1024
    """Loss tokens whose logits are in memory at once."""
    residual_dropout: float = 0.0
    """Probability of dropping a channel of a decoder layer's output before the residual add, all tokens."""
    response_dropout: float = 0.0
    """The same, only at tokens with a loss weight."""


@dataclass(frozen=True)
class KernelsConfig:
    """Whose code computes what. auto: the fastest of what is installed and runs on this device; the start says which
    and why. A name that is not installed is an error."""

    spec: str = "auto"
    """Layers of vision tower, connector and decoder: local (Megatron's) or transformer_engine. Weights, checkpoints and
    results are the same, up to rounding."""
    norm: str = "auto"
    """LayerNorm and RMSNorm, but for those that Transformer Engine's layers have inside: torch, apex or
    transformer_engine."""
    optimizer: str = "auto"
    """Adam: torch, apex or transformer_engine."""
    gradients: str = "auto"
    """Weight gradients: fused (added to the float32 buffer inside the matrix product; needs apex's extension, or
    kernels.spec=transformer_engine) or separate."""
    attention: str = "auto"
    """blocks: torch's attention, piece by piece, on any device; flex: FlexAttention, compiled; flash: flash-attn for
    rows of text alone and for the vision tower, flex for the others. auto: on CUDA flash if it is installed, else flex;
    on a CPU blocks."""


@dataclass(frozen=True)
class Fp8Config:
    """What train.precision=fp8 computes in FP8: linear layers of Transformer Engine, forward and backward."""

    recipe: str = "tensorwise"
    """How numbers are scaled: tensorwise (a scale for each tensor, from its numbers), delayed (from those of earlier
    steps), blockwise (Hopper; blocks of 128), mxfp8 (Blackwell; blocks of 32)."""
    format: str = "hybrid"
    """e4m3, or hybrid: e4m3, and e5m2 for gradients."""
    components: tuple[str, ...] = ("language",)
    """Parts of the model: language, vision. All others stay in bf16."""
    first_layers_bf16: int = 1
    """Decoder layers at the start that stay in bf16."""
    last_layers_bf16: int = 1
    """Decoder layers at the end that stay in bf16."""
    shadow_every: int = 0
    """Steps between lines of fp8.jsonl: how far what each decoder layer gives is from what bf16 gives, on the step's
    first rows. 0 = never."""


@dataclass(frozen=True)
class ComponentOptimConfig:
    """Learning rate of one component. Warm-up is linear from 0."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps until the peak."""
    weight_decay: float | None = None
    """Of this component. Not set = optim.weight_decay; likewise the next three."""
    betas: tuple[float, float] | None = None
    """Decay of the first and second moment."""
    eps: float | None = None
    """Added to the root of the second moment."""
    clip_norm: float | None = None
    """Largest gradient norm, where optim.clip_by is component."""


@dataclass(frozen=True)
class EmbeddingsOptimConfig:
    """The base embeddings: the same, where they differ from the decoder."""

    lr: float | None = None
    """Peak learning rate. Not set = optim.language.lr; likewise the others, but for weight_decay."""
    min_lr: float | None = None
    """Learning rate at the last step."""
    warmup_steps: int | None = None
    """Steps until the peak."""
    weight_decay: float | None = None
    """Of the table. Not set = none, whatever optim.weight_decay is: rows of rare tokens would shrink to nothing."""
    betas: tuple[float, float] | None = None
    """Decay of the first and second moment."""
    eps: float | None = None
    """Added to the root of the second moment."""
    clip_norm: float | None = None
    """Largest gradient norm, where optim.clip_by is component."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, one group per component; gradients are clipped per component."""

    vision: ComponentOptimConfig = field(default_factory=ComponentOptimConfig)
    """The vision tower."""
    connector: ComponentOptimConfig = field(default_factory=ComponentOptimConfig)
    """The connector and the new embedding rows."""
    language: ComponentOptimConfig = field(default_factory=ComponentOptimConfig)
    """The decoder and its head."""
    base_embeddings: EmbeddingsOptimConfig = field(default_factory=EmbeddingsOptimConfig)
    """The base embeddings where they train; a tied head is the same table."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never on norms, biases and embeddings."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest gradient norm of a component (vision; connector with the new rows; language; base_embeddings). 0 = no
    clipping."""
    clip_by: str = "component"
    """component: each by its own norm; global: all by the norm of all together."""
    schedule: str = "cosine"
    """From the peak to min_lr: cosine, linear, constant (stay at the peak) or wsd (stay, then linear at the end)."""
    decay_steps: int = 0
    """With the schedule wsd: steps at the end of the run that decay."""

    def of(self, component: str) -> ComponentOptimConfig:
        """The settings of a component, each one set: by itself, or by what it follows."""
        own = getattr(self, component)
        table = component == "base_embeddings"
        followed = replace(self.of("language"), weight_decay=0.0) if table else self
        given = {each.name: getattr(own, each.name) for each in fields(own)}
        return ComponentOptimConfig(
            **{name: getattr(followed, name) if value is None else value for name, value in given.items()}
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: int = 1000
    """Steps between checkpoints. 0 = only after the last step."""
    keep: int = 2
    """Newest checkpoints kept. 0 = all."""
    keep_every: int = 0
    """Checkpoints of steps that divide by this are kept too, for ever. 0 = none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory. The first and the last checkpoint of
    a process are written while it waits."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens when loss or gradient norms are not finite, or spike. Each time, the step is dumped for
    tools/replay.py."""

    not_finite: str = "stop"
    """stop; skip: the step updates nothing; rollback: go back to the last checkpoint, and on with the next rows."""
    spike: str = "note"
    """The same for a spike; note: apply the step; off: do not look."""
    history: int = 100
    """Steps whose median and median absolute deviation say what is usual; from the 20th on."""
    loss_deviations: float = 8.0
    """Robust standard deviations above the median that make a loss a spike."""
    norm_deviations: float = 30.0
    """The same for the gradient norm of a component: these vary more."""
    most_in_a_row: int = 5
    """Steps skipped in a row, or rollbacks without a new checkpoint, after which the run stops."""
    hang_s: float = 1200.0
    """Longest time of a rank in one phase (data, forward, a collective, a save, ...). Then the run ends, on every rank,
    with a table of what each was doing. 0 = no watchdog."""
    dumps: int = 20
    """Most dumps of a run; what comes after them is only noted."""


@dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out rows, and scores of tasks, during training."""

    every: int = 0
    """Steps between evaluations. 0 = never."""
    rows: int = 32
    """Packed held-out rows in an evaluation."""
    split: str = "validation"
    """Split of the manifest they come from."""
    tasks: tuple[str, ...] = ()
    """Tasks whose questions are answered and scored with each evaluation, by the names of tools/evaluate.py: pointing,
    easy_vqa, ... Their samples come from eval.split. Not with context or sequence parallelism."""
    task_samples: int = 64
    """Most samples of each task. 0 = all."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between progress lines. metrics.jsonl and TensorBoard get every step."""
    norms_every: int = 0
    """Steps between lines of norms.jsonl: gradient and weight norm of each module that trains. 0 = never."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb: str = ""
    """Project of Weights & Biases that gets the same numbers; its package must be installed. Empty = none."""
    profile: tuple[int, ...] = ()
    """Steps traced with torch's profiler, on every rank: profile/ in the run directory, for chrome://tracing."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is built."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where weights come from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is spread."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it trains."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """What is computed in FP8."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Whose code computes what."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens at spikes."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """When to evaluate."""
    log: LogConfig = field(default_factory=LogConfig)
    """What to log."""

    def alone(self) -> Config:
        """The same model in one process of any machine: no layout, no package's kernels, bf16 in the place of FP8."""
        train = replace(self.train, precision="bf16" if self.train.precision == "fp8" else self.train.precision)
        return replace(self, parallel=ParallelConfig(), kernels=KernelsConfig(), fp8=Fp8Config(), train=train)
