"""What a model is made of, as plain data. Numbers of the presets stand in `presets.py`."""

from __future__ import annotations

from dataclasses import dataclass

#: Rows of the second embedding table, in this order: row i has id `vocab_size + i`. Further rows are reserve.
NEW_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
)
#: Tokens that see each other in both directions inside one example.
VISION_TOKENS = (
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
)
CONNECTORS = ("attention_pooling", "linear", "mlp", "resampler")
COMPONENTS = ("vision", "connector", "language", "base_embeddings")


@dataclass(frozen=True)
class VisionArchitecture:
    """A pre-norm vision transformer over the patches of one square crop."""

    image_size: int
    """Side of a crop in pixels; a multiple of `patch_size`, or its remainder is cut (384 / 14 = 27 patches of 378)."""
    patch_size: int
    """Side of a patch in pixels."""
    width: int
    """Hidden size."""
    heads: int
    """Attention heads; head size = width / heads."""
    mlp: int
    """Width of the feed-forward layer."""
    layers: int
    """Layers of the source model. Layers after the last one that the connector needs are not built."""
    activation: str
    """gelu_tanh (SigLIP) or quick_gelu (CLIP)."""
    norm_eps: float
    """Added to the variance in every LayerNorm."""
    class_token: bool
    """A learned token before the patches (CLIP); the connector never sees it."""
    pre_norm: bool
    """A LayerNorm between the embeddings and the first layer (CLIP)."""
    post_norm: bool
    """A LayerNorm after the last layer, where no layer is tapped (SigLIP; CLIP normalises its class token only)."""
    patch_bias: bool
    """The patch embedding has a bias (SigLIP)."""
    mean: tuple[float, float, float]
    """Subtracted from each channel of pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Divides each channel after the mean."""

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in a crop, the class token not counted."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: pixels x channels."""
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class ConnectorArchitecture:
    """From patches of the vision tower to vectors of the language model's width."""

    kind: str
    """One of CONNECTORS."""
    taps: tuple[int, ...]
    """Vision layers (0-based) whose outputs are concatenated, in this order. () = the last layer, after its
    norm where the tower has one."""
    image_pool: int
    """Side of the window of patches pooled into one vector, for images. 1 = no pooling. Not used by the resampler."""
    video_pool: int
    """The same for video frames."""
    width: int
    """Attention width of `attention_pooling` and of the resampler."""
    heads: int
    """Attention heads of `attention_pooling` and of the resampler."""
    mlp: int
    """Hidden width of the projector (SwiGLU in `attention_pooling`, GELU in `mlp`)."""
    queries: int
    """Vectors per crop from the resampler. 0 elsewhere."""
    layers: int
    """Layers of the resampler. 0 elsewhere."""


@dataclass(frozen=True)
class LanguageArchitecture:
    """A Qwen3- or Qwen2.5-shaped decoder."""

    hidden: int
    """Hidden size."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; divides `heads`."""
    head_dim: int
    """Size of a head; heads x head_dim may differ from `hidden`."""
    mlp: int
    """Width of the SwiGLU feed-forward layer (one half of the fused gate and up)."""
    vocab_size: int
    """Base rows of the embedding = rows of the head."""
    new_rows: int
    """Rows of the second embedding table (NEW_TOKENS and reserve)."""
    tied_head: bool
    """The head is the base embedding table."""
    rope_theta: float
    """Base of the rotary frequencies."""
    norm_eps: float
    """Added to the mean square in every RMSNorm."""
    qk_norm: bool
    """RMSNorm on each query and key head before RoPE (Qwen3)."""
    qkv_bias: bool
    """Bias on the query, key and value projections (Qwen2.5)."""
    max_positions: int
    """Longest sequence the model was made for."""


@dataclass(frozen=True)
class Architecture:
    """A whole model."""

    vision: VisionArchitecture
    connector: ConnectorArchitecture
    language: LanguageArchitecture
    init_std: float = 0.02
    """Spread of random initial weights. 0 = for training from scratch: 1 / sqrt(inputs of the layer), as at a width of
    100 a spread of 0.02 makes image features ten thousand times smaller than embeddings, and the positions of patches
    as sines of their row and column, without which a small tower takes long to tell where something is."""

    @property
    def tower_depth(self) -> int:
        """Layers of the tower that are built, and stored in Molmo2 checkpoints: none after the deepest tap."""
        return 1 + max(self.connector.taps) if self.connector.taps else self.vision.layers

    @property
    def feature_width(self) -> int:
        """Numbers of a patch between tower and connector: tapped layers side by side."""
        return self.vision.width * max(1, len(self.connector.taps))

    def token_id(self, name: str) -> int:
        """Id of one of NEW_TOKENS."""
        return self.language.vocab_size + NEW_TOKENS.index(name)
