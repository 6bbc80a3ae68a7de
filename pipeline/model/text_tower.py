"""The text tower of jina-clip-v1: JinaBERT, a post-norm encoder with symmetric ALiBi, a gated MLP and mean pooling.

Module and parameter names equal the published keys behind `text_model.transformer.`, so that weights load by equal key
sets. Constants and shapes are those of the published configuration; nothing here is registered as a buffer: ALiBi is
computed from the configuration on the device and in the dtype where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.model.attention import AlibiMask, AttentionKind, attend
from pipeline.model.config import Section

PUBLISHED_TEXT_TOWERS = ("jinaai/jina-bert-flash-implementation", "jinaai/jina-bert-v2-base-en-flash")
"""The two names under which revisions of jina-clip-v1 refer to this architecture."""

_FIXED: dict[str, object] = {
    "hidden_act": "gelu",
    "mlp_type": "glu",
    "use_qk_norm": False,
    "emb_pooler": None,
    "position_embedding_type": "alibi",
    "pad_vocab_size_multiple": 1,
    "window_size": [-1, -1],
}
"""Settings of the text tower with one supported value each."""

_UNUSED_KWARGS = frozenset(
    {"attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "use_flash_attn", "model_type"}
    | {"initializer_range", "num_loras", "architectures", "auto_map"}
    | {"torch_dtype", "transformers_version", "dense_seq_output", "last_layer_subset", "fused_bias_fc", "fused_mlp"}
    | {
        "fused_dropout_add_ln",
        "lora_adaptations",
        "lora_rank",
        "lora_dropout_p",
        "lora_alpha",
        "max_position_embeddings",
    }
)
"""Known keys that change nothing at inference: dropouts, kernels, LoRA settings of a class that is not used."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Sizes of the text tower; the defaults are the published text tower's own `config.json`."""

    vocab_size: int = 30528
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"config.json: hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads."
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ModelError(f"config.json: pad_token_id {self.pad_token_id} lies outside the vocabulary.")

    @classmethod
    def from_config(cls, text_config: object) -> TextConfig:
        """Read the `text_config` object of a jina-clip `config.json`.

        Raises:
            ModelError: another text tower, another pooler or projection, an unknown or unsupported setting.
        """
        outer = Section("text_config", text_config)
        outer.only("model_type", "jina_clip_text")
        outer.only("hf_model_name_or_path", *PUBLISHED_TEXT_TOWERS, required=True)
        outer.only("pooler_type", "mean_pooler", None)
        outer.only("proj_type", None)
        outer.only("proj_bias", False)
        outer.only("default_instruction_task", None)
        outer.only("default_lora_task", None)
        kwargs = Section("text_config.hf_model_config_kwargs", outer.values.get("hf_model_config_kwargs", {}))
        read = frozenset(cls.__dataclass_fields__)
        kwargs.known(read | _FIXED.keys() | _UNUSED_KWARGS)
        for key, supported in _FIXED.items():
            kwargs.only(key, supported)
        config = cls(
            vocab_size=kwargs.positive_int("vocab_size", cls().vocab_size),
            hidden_size=kwargs.positive_int("hidden_size", cls().hidden_size),
            num_hidden_layers=kwargs.positive_int("num_hidden_layers", cls().num_hidden_layers),
            num_attention_heads=kwargs.positive_int("num_attention_heads", cls().num_attention_heads),
            intermediate_size=kwargs.positive_int("intermediate_size", cls().intermediate_size),
            type_vocab_size=kwargs.positive_int("type_vocab_size", cls().type_vocab_size),
            layer_norm_eps=kwargs.positive_float("layer_norm_eps", cls().layer_norm_eps),
            pad_token_id=_token_id(kwargs.values),
        )
        if outer.positive_int("embed_dim") != config.hidden_size:
            raise ModelError(
                "config.json: text_config.embed_dim differs from the text tower's hidden_size; no projection."
            )
        return config

    def to_config(self) -> dict[str, object]:
        """The `text_config` object of a `config.json` that says this configuration in the published layout."""
        return {
            "model_type": "jina_clip_text",
            "embed_dim": self.hidden_size,
            "hf_model_name_or_path": PUBLISHED_TEXT_TOWERS[0],
            "hf_model_config_kwargs": {"use_flash_attn": False, **asdict(self)},
            "pooler_type": "mean_pooler",
            "proj_bias": False,
            "proj_type": None,
        }


def _token_id(kwargs: Mapping[str, object]) -> int:
    value = kwargs.get("pad_token_id", 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"config.json: pad_token_id must be an integer, not {value!r}.")
    return value


def add_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm(x + update)`, with the sum and the norm in float32.

    A post-norm layer rounds its whole stream twice. Rounding the sum as well cost bfloat16 half of its distance: the
    worst short text under seeded weights had cosine 0.9988 to float32, and has 0.9993 this way.
    """
    total = x.float() + update.float()
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(total, norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


class MLP(nn.Module):
    """GLU with exact GELU: the first half of `gated_layers` is the gate, the second the value.

    Two products, one for each half: their results are whole, where halves of one result are read with gaps between.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        gate, value = (F.linear(x, half) for half in self.gated_layers.weight.chunk(2))  # 2 x (N, intermediate)
        return cast(Tensor, self.wo(F.gelu(gate) * value))


class Attention(nn.Module):
    """Self-attention whose positions come from the ALiBi mask alone."""

    def __init__(self, config: TextConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.n_heads, self.kind = config.num_attention_heads, kind
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, masks: Sequence[AlibiMask]) -> Tensor:
        """(N, D) to (N, D): the texts of each mask in turn, all their tokens one after another."""
        qkv = self.Wqkv(x)  # (N, 3 D)
        parts = qkv.split([mask.n_tokens for mask in masks])
        mixed = [self._mixed(part, mask) for part, mask in zip(parts, masks, strict=True)]
        return cast(Tensor, self.out_proj(torch.cat(mixed)))

    def _mixed(self, qkv: Tensor, mask: AlibiMask) -> Tensor:
        length = mask.is_pad.shape[1]
        rows = qkv.view(-1, length, 3, self.n_heads, qkv.shape[1] // (3 * self.n_heads))  # (B, T, 3, heads, head_dim)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, heads, T, head_dim)
        parts = [attend(q[:, :, start:end], k, v, block, self.kind) for start, end, block in mask.blocks()]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # (B, heads, T, head_dim)
        return y.transpose(1, 2).flatten(2).flatten(0, 1)  # (B T, D)


class Block(nn.Module):
    """One post-norm layer."""

    def __init__(self, config: TextConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.mixer = Attention(config, kind)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, masks: Sequence[AlibiMask]) -> Tensor:
        """(N, D) to (N, D)."""
        x = add_norm(x, self.mixer(x, masks), self.norm1)
        return add_norm(x, self.mlp(x), self.norm2)


class TextTower(nn.Module):
    """Token ids to one vector a text.

    Args:
        config: the sizes.
        attention: `sdpa` for inference, `plain` for training on a CPU.
    """

    def __init__(self, config: TextConfig, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
                "token_type_embeddings": nn.Embedding(config.type_vocab_size, config.hidden_size),
            }
        )
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = [Block(config, attention) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.apply(_initialise)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed a batch of token ids.

        Args:
            input_ids: int64 (B, T), padded on the right with `pad_token_id`.
            attention_mask: part of the published signature and not read: as published, the mask is derived from the
                ids.

        Returns:
            float32 (B, D), the mean over the tokens that are not padding, before normalisation. A row of padding alone
            has no mean: on the CPU it is refused, elsewhere, where looking would stall the device, it is zeros, which
            every caller that normalises refuses.

        Raises:
            ValueError: a row holds nothing but padding.
        """
        del attention_mask
        return self.embed_groups([input_ids])

    def embed_groups(self, groups: Sequence[Tensor]) -> Tensor:
        """Embed texts in groups of one length, each `forward`'s input, as one batch.

        Everything but attention sees the tokens as one row after another, so that texts of any lengths share their
        matrix products without padding.

        Args:
            groups: int64 (B_g, T_g) each.

        Returns:
            float32 (sum of B_g, D), as of `forward`, groups in order.

        Raises:
            ValueError: a row holds nothing but padding.
        """
        pads = [ids == self.config.pad_token_id for ids in groups]  # (B_g, T_g) each
        looks = pads[0].device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and any(bool(pad.all(dim=1).any()) for pad in pads):
            raise ValueError("a row of input_ids holds padding only; it has no embedding")
        x = self.embeddings["word_embeddings"](torch.cat([ids.flatten() for ids in groups]))  # (N, D)
        # Every token is of type 0, and its row is added always: there is no position embedding.
        x = self.emb_ln(x + cast(Any, self.embeddings["token_type_embeddings"]).weight[0])
        n_heads = self.config.num_attention_heads
        masks = [AlibiMask(pad, n_heads, x.dtype, is_whole=looks and not bool(pad.any())) for pad in pads]
        for block in cast(nn.ModuleList, self.encoder["layers"]):
            x = block(x, masks)
        parts = x.split([mask.n_tokens for mask in masks])
        return torch.cat([_mean(part.view(*pad.shape, -1), pad) for part, pad in zip(parts, pads, strict=True)])


def _mean(x: Tensor, is_pad: Tensor) -> Tensor:
    """Over the tokens (B, T, D) that are not padding, in float32 whatever the weights are in: (B, D)."""
    keep = (~is_pad)[:, :, None]  # (B, T, 1)
    total = x.float().masked_fill(~keep, 0.0).sum(dim=1)
    return total / keep.sum(dim=1).clamp(min=1)


def _initialise(module: nn.Module) -> None:
    """Start weights for training from scratch: BERT's normal(0, 0.02); loading replaces them."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
