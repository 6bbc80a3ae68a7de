"""The image tower of jina-clip-v1: EVA02-CLIP, a pre-norm vision transformer with 2-D rotary positions, SwiGLU and
sub-LayerNorms, read at the class token.

Module and parameter names equal the published keys behind `vision_model.`. The rotary table is computed from the
configuration and never registered as a buffer: one that is not saved comes back uninitialised from meta-device loaders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.model.attention import AttentionKind, attend
from pipeline.model.config import Section

NORM_EPS = 1e-6
"""Every LayerNorm of this tower; the published code builds them all with it."""
ROPE_THETA = 10_000.0

_FIXED: dict[str, object] = {
    **dict.fromkeys(("naive_swiglu", "qkv_bias", "rope_embeddings", "subln"), True),
    **dict.fromkeys(("fused_layer_norm", "post_norm"), False),
    **dict.fromkeys(("ls_init_value", "proj_type"), None),
}
"""Switches of the EVA02 family with one supported value each; all must be present, because absent ones mean others."""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Sizes of the image tower; the defaults are the published `vision_config`.

    `rope_grid` is the side of the grid that the rotary positions were trained on (`pt_hw_seq_len`), `has_scaled_rope`
    whether positions of another grid are scaled onto that one (`intp_freq`).
    """

    width: int = 768
    layers: int = 12
    head_width: int = 64
    image_size: int = 224
    patch_size: int = 16
    mlp_ratio: float = 2.6667
    rope_grid: int = 14
    has_scaled_rope: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ModelError(
                f"config.json: image_size {self.image_size} is no multiple of patch_size {self.patch_size}."
            )
        if self.width % self.head_width or self.head_width % 4:
            raise ModelError(f"config.json: head_width {self.head_width} must divide width {self.width} and by 4.")
        if not self.has_scaled_rope and self.rope_grid != self.grid:
            raise ModelError(
                f"config.json: without intp_freq, pt_hw_seq_len ({self.rope_grid}) must equal the "
                f"{self.grid} patches of a side."
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def hidden_size(self) -> int:
        """Width inside the MLP; the published code truncates the product."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_config(cls, vision_config: object) -> ImageConfig:
        """Read the `vision_config` object of a jina-clip `config.json`.

        Raises:
            ModelError: a missing size or switch, or a value that asks for another architecture.
        """
        section = Section("vision_config", vision_config)
        section.only("model_type", "jina_clip_vision")
        for key, supported in _FIXED.items():
            section.only(key, supported, required=True)
        config = cls(
            width=section.positive_int("width"),
            layers=section.positive_int("layers"),
            head_width=section.positive_int("head_width"),
            image_size=section.positive_int("image_size"),
            patch_size=section.positive_int("patch_size"),
            mlp_ratio=section.positive_float("mlp_ratio"),
            rope_grid=section.positive_int("pt_hw_seq_len"),
            has_scaled_rope=section.boolean("intp_freq"),
        )
        if section.positive_int("embed_dim") != config.width:
            raise ModelError(
                "config.json: vision_config.embed_dim differs from its width; projections are not supported."
            )
        return config

    def to_config(self) -> dict[str, object]:
        """The `vision_config` object of a `config.json` that says this configuration in the published layout."""
        return _FIXED | {
            "model_type": "jina_clip_vision",
            "embed_dim": self.width,
            "head_width": self.head_width,
            "image_size": self.image_size,
            "intp_freq": self.has_scaled_rope,
            "layers": self.layers,
            "mlp_ratio": self.mlp_ratio,
            "patch_size": self.patch_size,
            "pt_hw_seq_len": self.rope_grid,
            "width": self.width,
        }


def rope_table(config: ImageConfig, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32 (grid * grid, head_width) each, patches in row-major order.

    The first half of the channels turns by the patch's row, the second by its column; each angle stands twice, for the
    two adjacent channels of the pair that it turns.
    """
    half = config.head_width // 2
    frequencies = ROPE_THETA ** (-torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)  # (half / 2,)
    positions = torch.arange(config.grid, dtype=torch.float64, device=device)
    if config.has_scaled_rope:
        positions = positions / config.grid * config.rope_grid
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=1)  # (grid, half)
    rows = angles[:, None, :].expand(config.grid, config.grid, half)
    columns = angles[None, :, :].expand(config.grid, config.grid, half)
    table = torch.cat([rows, columns], dim=-1).reshape(config.grid**2, config.head_width)  # (patches, head_width)
    return table.cos().float(), table.sin().float()


def turn_table(config: ImageConfig) -> Tensor:
    """Each token's turn of each channel pair, (cos, sin): float32 (1 + patches, 1, head_width / 2, 2).

    The class token, token 0, stays where it is; a turn by nothing costs less than leaving it out.
    """
    pairs = torch.stack([part[:, ::2] for part in rope_table(config)], dim=-1)  # (patches, head_width / 2, 2)
    still = torch.tensor([1.0, 0.0]).expand(1, *pairs.shape[1:])
    return torch.cat([still, pairs])[:, None].contiguous()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn adjacent channel pairs of each token, in float32.

    A pair is a complex number and its turn one product: a tenth of the time of the same in real arithmetic, which
    needs five passes over memory. Compilers and exporters, which know no complex numbers, get the real one to fuse.

    Args:
        x: (B, 1 + patches, heads, head_width).
        turns: see `turn_table`.

    Returns:
        The same shape and dtype.
    """
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)  # (B, T, heads, head_width / 2, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU with a LayerNorm before the last projection; `w1` is the SiLU branch."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden_size)
        self.w2 = nn.Linear(config.width, config.hidden_size)
        self.ffn_ln = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.w3 = nn.Linear(config.hidden_size, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return cast(Tensor, self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x))))


class Attention(nn.Module):
    """Self-attention with rotary positions, a LayerNorm on the joined heads, and no bias on the keys."""

    def __init__(self, config: ImageConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.head_width, self.kind = config.head_width, kind
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.inner_attn_ln = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q = self._heads(F.linear(x, self.q_proj.weight, self.q_bias))
        k = self._heads(F.linear(x, self.k_proj.weight))
        v = self._heads(F.linear(x, self.v_proj.weight, self.v_bias))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, turns), rotate(k, turns), v))
        y = attend(q, k, v, None, self.kind)  # (B, heads, T, head_width)
        y = y.transpose(1, 2).flatten(2)  # (B, T, D)
        return cast(Tensor, self.proj(self.inner_attn_ln(y)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width)  # (B, T, heads, head_width)


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ImageConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config, kind)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.attn(self.norm1(x), turns)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class ImageTower(nn.Module):
    """Normalised pixels to one vector an image.

    Args:
        config: the sizes.
        attention: `sdpa` for inference, `plain` for training on a CPU.
    """

    def __init__(self, config: ImageConfig, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.config = config
        self._turns: dict[torch.device, Tensor] = {}
        patch = config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, kernel_size=patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.blocks = nn.ModuleList([Block(config, attention) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.apply(_initialise)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed a batch of images.

        Args:
            pixel_values: (B, 3, image_size, image_size), RGB, normalised, in the dtype of the weights.

        Returns:
            float32 (B, D), the class token after the last norm, before normalisation.

        Raises:
            ValueError: the images are of another size.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must be (B, 3, {size}, {size}), not {tuple(pixel_values.shape)}")
        x = self.patch_embed["proj"](pixel_values)  # (B, D, grid, grid)
        x = x.flatten(2).transpose(1, 2)  # (B, patches, D), patches in row-major order
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # (B, 1 + patches, D)
        turns = self._rope(x.device)
        for block in self.blocks:
            x = block(x, turns)
        return cast(Tensor, self.norm(x[:, 0]).float())  # (B, D)

    def _rope(self, device: torch.device) -> Tensor:
        if device not in self._turns:
            self._turns[device] = turn_table(self.config).to(device)
        return self._turns[device]


def _initialise(module: nn.Module) -> None:
    """Start weights for training from scratch: normal(0, 0.02); loading replaces them."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
