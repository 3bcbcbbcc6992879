"""GreenSwin: Swin whose masked image modeling computes the visible tokens only.

Whole images and visible tokens run through the same parameters and the same encoder; a layout (`token_layout`) says
how tokens reach their windows and how siblings are merged. Modules carry the parameter names of published Swin files.

Letters in comments: B images, R rows of hidden states and T tokens of a row (whole images or one mask for the batch:
R = B and a row is an image; a mask per image: R = 1 and the row is the whole batch), L tokens of an image, U mask units
of an image, V visible units of a row, G windows or groups, S slots of each, C channels, h heads, d channels of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN, GELUActivation
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_green_swin import AUTO_MAP, GreenSwinConfig, stage_grid_sizes
from .gpu_attention import fused_attention, reads_coordinates, require_triton
from .sparse_plan import SparseGeometry, SparsePlan, build_sparse_plan, sample_masks
from .token_layout import Layout, VisibleLayout, dense_layouts, visible_layouts


@dataclass
class GreenSwinModelOutput(ModelOutput):
    """
    Output of [`GreenSwinModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`):
            Tokens of the last stage after the final norm: all of them in raster order, or with a mask the visible
            mask units in raster order, padded with zeros where images differ in their number.
        pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`): Mean over an image's (visible) tokens.
        hidden_states (`tuple` of `torch.Tensor` of shape `(batch_size, tokens, channels)`, *optional*):
            The embeddings and the output of each stage, patch merging included; stages + 1 in all.
        attentions (`tuple` of `torch.Tensor` of shape `(windows of the batch, heads, slots, slots)`, *optional*):
            Attention probabilities of the last block of each stage.
        reshaped_hidden_states (`tuple` of `torch.Tensor` of shape `(batch_size, channels, rows, columns)`, *optional*):
            `hidden_states` as feature maps; only for whole images.
        visible_token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            With a mask: which rows of `last_hidden_state` are tokens, not padding.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None
    visible_token_mask: Tensor | None = None


@dataclass
class GreenSwinMaskedImageModelingOutput(ModelOutput):
    """
    Output of [`GreenSwinForMaskedImageModeling`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            Mean squared error over the pixels of the masked units, float32; `None` without a mask.
        reconstruction (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            `logits` laid out as an image, in the scale of the target: with `norm_pix_loss` each unit has about zero
            mean and unit variance. In training visible units are zero, in evaluation all units are predicted.
        logits (`torch.Tensor` of shape `(batch_size, num_units, mask_unit_size² * num_channels)`):
            Predictions for each mask unit, its pixels in the order (row, column, channel).
        bool_masked_pos (`torch.BoolTensor` of shape `(batch_size, num_units)`, *optional*): The masks, True = masked.
        hidden_states, attentions, reshaped_hidden_states: those of the encoder, see [`GreenSwinModelOutput`].
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    logits: Tensor | None = None
    bool_masked_pos: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class GreenSwinImageClassifierOutput(ModelOutput):
    """
    Output of [`GreenSwinForImageClassification`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Given with `labels`.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Scores before the softmax.
        hidden_states, attentions, reshaped_hidden_states: those of the encoder, see [`GreenSwinModelOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


# Images and mask units


def gather_units(images: Tensor, unit_size: int, unit_index: Tensor, is_shared: bool) -> Tensor:
    """Mask units of a batch of images by index: [R, V, channels, unit_size, unit_size].

    Args:
        images: [B, channels, height, width].
        unit_size: side of a mask unit in pixels.
        unit_index: [V] int64, raster index in the units of an image (`is_shared`, R = B) or of the batch (R = 1).
    """
    units = _as_units(images, unit_size).permute(0, 1, 2, 5, 3, 4)  # [B, down, across, channels, unit_size, unit_size]
    down, across = units.shape[1:3]
    row, column = unit_index // across % down, unit_index % across
    if is_shared:
        return units[:, row, column]
    return units[unit_index // (down * across), row, column][None]


def patchify(images: Tensor, unit_size: int) -> Tensor:
    """Images as rows of mask units: [B, channels, height, width] to [B, U, unit_size² * channels].

    Units are in raster order, the pixels of each in the order (row, column, channel). Inverse: `unpatchify`.
    """
    return _as_units(images, unit_size).flatten(3).flatten(1, 2)


def _as_units(images: Tensor, unit_size: int) -> Tensor:
    """A view of images as mask units: [B, down, across, unit_size, unit_size, channels]."""
    return images.unflatten(3, (-1, unit_size)).unflatten(2, (-1, unit_size)).permute(0, 2, 4, 3, 5, 1)


def unpatchify(units: Tensor, grid_size: tuple[int, int], unit_size: int) -> Tensor:
    """The inverse of `patchify`: [B, U, unit_size² * channels] to [B, channels, height, width].

    Args:
        grid_size: mask units (rows, columns) of an image.
    """
    units = units.unflatten(2, (unit_size, unit_size, -1)).unflatten(1, grid_size)
    return units.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit_statistics(units: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels of each unit, at least float32: [..., P] to two [..., 1].

    As in MAE: unbiased variance plus 1e-6.
    """
    units = _at_least_float32(units)
    mean = units.mean(dim=-1, keepdim=True)
    # two plain passes: `torch.var` is an order of magnitude slower on a CPU
    variance = (units - mean).square().sum(dim=-1, keepdim=True) / (units.shape[-1] - 1)
    return mean, (variance + 1e-6).sqrt()


def recomputed_in_backward(
    result: Tensor, function: Callable[[Tensor], Tensor], source: Tensor
) -> AbstractContextManager[Any]:
    """Context in which autograd keeps `source` in the place of `result`, and calls `function` on it in backward.

    For the GELU of an MLP: source and result are half of what a block keeps. Other activations may keep their result
    themselves and gain nothing. Where somebody else decides what is kept (gradient checkpointing, offloading,
    torch.compile, torch.func), it is left to them.
    """
    if not isinstance(function, GELUActivation) or torch.compiler.is_compiling() or _saving_is_handled():
        return nullcontext()
    result_ref = weakref.ref(result)  # or the result would live as long as the context's functions

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        whole = tensor if tensor._base is None else tensor._base
        # a contiguous view of the whole result is the result in another shape
        is_result = whole is result_ref() and tensor.numel() == whole.numel() and tensor.is_contiguous()
        return tensor.shape if is_result else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(source).view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _saving_is_handled() -> bool:
    """Whether hooks on saved tensors are in use already, of which only the innermost would be called, or forbidden."""
    hooks: Any = torch._C._autograd
    if not hasattr(hooks, "_top_saved_tensors_default_hooks"):  # torch has no public question for it
        return True
    return not hooks._saved_tensors_hooks_is_enabled() or hooks._top_saved_tensors_default_hooks(True) is not None


# Attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, implementation: str | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention inside each window: values [R, h, G, S, d] and, from the eager path, probabilities.

    Args:
        query, key, value: [R, h, G, S, d].
        bias: added to the scaled scores, [h, G or 1, S, S].
        dropout: probability of dropping an attention weight.
        implementation: "eager" (or `None`) for matrix products and a softmax, anything else for torch's fused kernels,
            which also take what `fused_attention` does not.
    """
    # On a CPU the fused kernels are slower than plain products when the bias needs a gradient, and in bfloat16 when
    # anything does: their backward by 8 to 15 times for the 49 units of a decoder (measured on Zen 4).
    bias_is_learned = bias is not None and bias.requires_grad
    trains_slowly = bias_is_learned or (query.requires_grad and query.dtype == torch.bfloat16)
    if implementation not in (None, "eager") and not (trains_slowly and query.device.type == "cpu"):
        return _attend_fused(query, key, value, bias, dropout), None
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))  # [R, h, G, S, S]
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype.itemsize < 4 else None)
    probabilities = probabilities.to(value.dtype)
    weights = nn.functional.dropout(probabilities, dropout) if dropout else probabilities
    return torch.matmul(weights, value), probabilities


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """The fused kernels take four dimensions, so heads and groups are folded into one."""
    groups = query.shape[1:3]
    if bias is not None:
        bias = bias.expand(*groups, *bias.shape[2:]).flatten(0, 1)[None].to(query.dtype)  # [1, h G, S, S]
    query, key, value = (tensor.flatten(1, 2) for tensor in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    return attended.unflatten(1, groups)


class GreenSwinSelfAttention(nn.Module):
    """Multi-head attention inside windows with a relative position bias (paper, sec. 3: group window attention)."""

    def __init__(self, config: GreenSwinConfig, stage: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads[stage]
        channels, window = config.stage_channels[stage], config.stage_window_sizes[stage]
        self.query = nn.Linear(channels, channels, bias=config.qkv_bias)
        self.key = nn.Linear(channels, channels, bias=config.qkv_bias)
        self.value = nn.Linear(channels, channels, bias=config.qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.num_heads))

    def forward(self, hidden_states: Tensor, layout: Layout, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        tokens = layout.prepare(hidden_states)
        query, key, value = (project(tokens) for project in (self.query, self.key, self.value))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        implementation = "eager" if output_attentions else self.config._attn_implementation
        table = self.relative_position_bias_table
        if isinstance(layout, VisibleLayout):
            fused = fused_attention(implementation, query, key, value, table, layout.plan, dropout)
            if fused is not None:
                return fused, None
        query, key, value = (layout.gather(tokens, self.num_heads) for tokens in (query, key, value))  # [R, h, G, S, d]
        bias = layout.position_bias(table)
        attended, probabilities = attend(query, key, value, bias, dropout, implementation)
        if output_attentions and probabilities is not None:
            probabilities = probabilities.transpose(1, 2).flatten(0, 1)  # [R G, h, S, S]
        return layout.scatter(attended), probabilities if output_attentions else None


class GreenSwinSelfOutput(nn.Module):
    def __init__(self, config: GreenSwinConfig, stage: int):
        super().__init__()
        channels = config.stage_channels[stage]
        self.dense = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class GreenSwinAttention(nn.Module):
    def __init__(self, config: GreenSwinConfig, stage: int):
        super().__init__()
        self.self = GreenSwinSelfAttention(config, stage)
        self.output = GreenSwinSelfOutput(config, stage)

    def forward(self, hidden_states: Tensor, layout: Layout, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        attended, probabilities = self.self(hidden_states, layout, output_attentions)
        return self.output(attended), probabilities


class GreenSwinIntermediate(nn.Module):
    def __init__(self, config: GreenSwinConfig, stage: int):
        super().__init__()
        channels = config.stage_channels[stage]
        self.dense = nn.Linear(channels, int(config.mlp_ratio * channels))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense(hidden_states)


class GreenSwinOutput(nn.Module):
    def __init__(self, config: GreenSwinConfig, stage: int):
        super().__init__()
        channels = config.stage_channels[stage]
        self.activation = ACT2FN[config.hidden_act]
        self.dense = nn.Linear(int(config.mlp_ratio * channels), channels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        activated = self.activation(hidden_states)
        with recomputed_in_backward(activated, self.activation, hidden_states):
            return self.dropout(self.dense(activated))


class GreenSwinDropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images, also where a row holds the tokens of a batch."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor, layout: Layout, batch_size: int) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return hidden_states
        keep = torch.rand(batch_size, device=hidden_states.device) >= self.drop_prob
        return layout.scale_images(hidden_states, keep.to(hidden_states.dtype) / (1 - self.drop_prob))

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class GreenSwinLayer(GradientCheckpointingLayer):
    """One block: window attention and MLP, each behind a norm and on a residual branch with stochastic depth."""

    def __init__(self, config: GreenSwinConfig, stage: int, drop_path: float):
        super().__init__()
        channels = config.stage_channels[stage]
        self.layernorm_before = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = GreenSwinAttention(config, stage)
        self.layernorm_after = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.intermediate = GreenSwinIntermediate(config, stage)
        self.output = GreenSwinOutput(config, stage)
        self.drop_path = GreenSwinDropPath(drop_path)

    def forward(
        self, hidden_states: Tensor, layout: Layout, batch_size: int, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        attended, probabilities = self.attention(self.layernorm_before(hidden_states), layout, output_attentions)
        hidden_states = hidden_states + self.drop_path(attended, layout, batch_size)
        transformed = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        return hidden_states + self.drop_path(transformed, layout, batch_size), probabilities


class GreenSwinPatchMerging(nn.Module):
    """Four siblings of C channels to one token of 2 C."""

    def __init__(self, config: GreenSwinConfig, stage: int):
        super().__init__()
        channels = config.stage_channels[stage]
        self.norm = nn.LayerNorm(4 * channels, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, siblings: Tensor) -> Tensor:
        return self.reduction(self.norm(siblings))  # [R, T / 4, 4 C] -> [R, T / 4, 2 C]


class GreenSwinStage(nn.Module):
    def __init__(self, config: GreenSwinConfig, stage: int, drop_path: Sequence[float]):
        super().__init__()
        self.blocks = nn.ModuleList(GreenSwinLayer(config, stage, rate) for rate in drop_path)
        is_last = stage == len(config.depths) - 1
        self.downsample = None if is_last else GreenSwinPatchMerging(config, stage)

    def forward(
        self, hidden_states: Tensor, layouts: tuple[Layout, Layout], batch_size: int, output_attentions: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens after patch merging, tokens before it, attention probabilities of the last block."""
        probabilities = None
        for index, block in enumerate(self.blocks):
            hidden_states, probabilities = block(hidden_states, layouts[index % 2], batch_size, output_attentions)
        if self.downsample is None:
            return hidden_states, hidden_states, probabilities
        return self.downsample(layouts[0].merge_siblings(hidden_states)), hidden_states, probabilities


@dataclass
class _StageOutputs:
    """What the stages of one forward pass left: tokens after and before patch merging, attention probabilities."""

    last: Tensor
    merged: list[Tensor]
    unmerged: list[Tensor]
    attentions: list[Tensor]


class GreenSwinEncoder(nn.Module):
    def __init__(self, config: GreenSwinConfig):
        super().__init__()
        num_blocks = sum(config.depths)
        rates = [config.drop_path_rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.layers = nn.ModuleList(
            GreenSwinStage(config, stage, rates[start : start + depth])
            for stage, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )

    def forward(
        self, hidden_states: Tensor, layouts: Sequence[tuple[Layout, Layout]], batch_size: int, output_attentions: bool
    ) -> _StageOutputs:
        merged, unmerged, attentions = [], [], []
        for stage, stage_layouts in zip(self.layers, layouts, strict=True):
            hidden_states, before_merging, probabilities = stage(
                hidden_states, stage_layouts, batch_size, output_attentions
            )
            merged.append(hidden_states)
            unmerged.append(before_merging)
            if probabilities is not None:
                attentions.append(probabilities)
        return _StageOutputs(hidden_states, merged, unmerged, attentions)


# Embeddings


class GreenSwinPatchEmbeddings(nn.Module):
    """Linear projection of patches: a convolution over whole images, the same weights on gathered visible patches."""

    def __init__(self, config: GreenSwinConfig):
        super().__init__()
        self.patch_size = config.patch_length
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, self.patch_size, stride=self.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patches of whole images [B, channels, H, W], or of visible mask units [R, V, channels, side, side].

        One entrance for both: FSDP brings the weights where a module is called, not one of its other methods.

        Returns:
            [B, C, rows, columns], or [R, T, C] in the order of the pool.
        """
        return self._dense(pixels) if pixels.dim() == 4 else self._visible(pixels)

    def _dense(self, pixel_values: Tensor) -> Tensor:
        """Whole images, padded to whole patches."""
        below, right = (-side % self.patch_size for side in pixel_values.shape[2:])
        padded = nn.functional.pad(pixel_values, (0, right, 0, below))
        return self.projection(padded.to(self.projection.weight.dtype))

    def _visible(self, units: Tensor) -> Tensor:
        levels = (units.shape[-1] // self.patch_size).bit_length() - 1
        split = (*[2] * levels, self.patch_size)
        units = units.unflatten(4, split).unflatten(3, split)
        # from coarse to fine, the column bit above the row bit (see `sparse_plan`), then (channel, row, column) inside
        bits = [axis for level in range(levels) for axis in (4 + levels + level, 3 + level)]
        patches = units.permute(0, 1, *bits, 2, 3 + levels, 4 + 2 * levels).reshape(
            units.shape[0], -1, self.projection.weight[0].numel()
        )
        weight = self.projection.weight.flatten(1)
        return nn.functional.linear(patches.to(weight.dtype), weight, self.projection.bias)


class GreenSwinEmbeddings(nn.Module):
    def __init__(self, config: GreenSwinConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.patch_embeddings = GreenSwinPatchEmbeddings(config)
        num_patches = self.grid_size[0] * self.grid_size[1]
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, num_patches, config.embed_dim)) if config.use_absolute_embeddings else None
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, plan: SparsePlan | None, unit_size: int
    ) -> tuple[Tensor, tuple[int, int]]:
        """Tokens and their grid: of whole images in raster order [B, L, C], or with a plan the visible ones."""
        if plan is None:
            return self._dense(pixel_values, interpolate_pos_encoding)
        tokens = self._visible(pixel_values, plan, unit_size, interpolate_pos_encoding)
        return tokens, plan.stages[0].grid_size

    def _dense(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[Tensor, tuple[int, int]]:
        patches = self.patch_embeddings(pixel_values)
        grid_size = (patches.shape[2], patches.shape[3])
        tokens = self.norm(patches.flatten(2).transpose(1, 2))
        if self.position_embeddings is not None:
            tokens = tokens + self._positions(grid_size, interpolate_pos_encoding)
        return self.dropout(tokens), grid_size

    def _visible(
        self, pixel_values: Tensor, plan: SparsePlan, unit_size: int, interpolate_pos_encoding: bool
    ) -> Tensor:
        """Visible tokens in the order of the pool: [R, T, C]. Masked pixels are not read."""
        units = gather_units(pixel_values, unit_size, plan.visible_unit_index, plan.is_shared)
        tokens = self.norm(self.patch_embeddings(units))
        if self.position_embeddings is not None:
            positions = self._positions(plan.stages[0].grid_size, interpolate_pos_encoding)
            tokens = tokens + positions.index_select(1, plan.stages[0].position)
        return self.dropout(tokens)

    def _positions(self, grid_size: tuple[int, int], interpolate: bool) -> Tensor:
        positions = self.position_embeddings
        assert positions is not None
        if grid_size == self.grid_size:
            return positions
        if not interpolate:
            raise ValueError(
                f"pixel_values have {grid_size[0]}x{grid_size[1]} patches, the position embeddings "
                f"{self.grid_size[0]}x{self.grid_size[1]}; pass interpolate_pos_encoding=True or resize the images"
            )
        grid = positions.unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=grid_size, mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2)


# Models


class GreenSwinPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers needs to know of every GreenSwin model."""

    config: GreenSwinConfig
    config_class = GreenSwinConfig
    base_model_prefix = "swin"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["GreenSwinStage"]  # noqa: RUF012 (transformers' own attribute)
    _supports_sdpa = True
    _supports_flex_attn = True
    # Older Swin files carry the index, SimMIM's the mask token of dense masked training; the decoder of a pretrained
    # file serves pretraining only.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"relative_position_index",
        r"embeddings\.mask_token",
        r"^decoder\.",
    ]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for a call that our attention does not make; `attend` reads the config

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == "triton_window":  # ours alone, unknown to transformers' registry
            require_triton()
            return requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the base class, which puts the code beside the weights of a class registered for an Auto class.

        transformers notes the saved class alone; with the whole map every Auto class loads the folder.
        """
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GreenSwinSelfAttention):
            init.zeros_(module.relative_position_bias_table)
        elif isinstance(module, GreenSwinEmbeddings) and module.position_embeddings is not None:
            init.zeros_(module.position_embeddings)
        elif isinstance(module, GreenSwinDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)


def _refuse_masks(arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` for a mask under a name that a model does not take, which would be lost without a word."""
    for name in arguments:
        if "mask" in name or name == "sparse_plan":
            raise ValueError(
                f"{name} is no argument of this model; masks are bool_masked_pos or sparse_plan of GreenSwinModel and "
                "GreenSwinForMaskedImageModeling, the other models see whole images"
            )


class GreenSwinModel(GreenSwinPreTrainedModel):
    """
    The encoder: Swin on whole images, or on the visible patches only when a mask is given.

    The two agree where every stage's grid is a multiple of its window; elsewhere the dense path pads the last windows
    with zeros that take part in attention, as stock Swin does, and the visible-only path has no such padding.

    With a mask for each image, images share groups: their values never mix, but a pixel that is not finite makes the
    whole batch so.

    Args:
        config (`GreenSwinConfig`): Sizes of the model.
        add_pooling_layer (`bool`, defaults to `True`): Whether to return `pooler_output`.
        add_final_norm (`bool`, defaults to `True`): Whether `last_hidden_state` goes through a last LayerNorm.
    """

    def __init__(self, config: GreenSwinConfig, add_pooling_layer: bool = True, add_final_norm: bool = True):
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = GreenSwinEmbeddings(config)
        self.encoder = GreenSwinEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        sparse_plan: SparsePlan | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        always_partition: bool = False,
        output_hidden_states_before_downsampling: bool = False,
        **kwargs: Any,
    ) -> GreenSwinModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images.
            bool_masked_pos (`torch.Tensor` of shape `(rows, num_units)` or `(rows, num_patches)`):
                Masks, True or 1 = masked, constant inside each mask unit; one row for all images, or one for each.
                Only visible patches are encoded. Height and width must be multiples of `mask_unit_size` then. The plan
                is built from the masks on the CPU.
            sparse_plan (`SparsePlan`): The plan of the masks, when it was already built (see `build_sparse_plan`), on
                the device of the images; no work is left for the host then.
            output_attentions, output_hidden_states (`bool`): As in every transformers model.
            interpolate_pos_encoding (`bool`): Resize absolute position embeddings to the images.
            always_partition (`bool`):
                Keep window and shift on grids no larger than the window, as stock Swin's backbone; whole images only.
            output_hidden_states_before_downsampling (`bool`): `hidden_states` before patch merging instead of after.

        Raises:
            ValueError: images, masks and plan do not fit each other or the model.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        _refuse_masks(kwargs)
        pixel_values = self.checked_images(pixel_values)
        batch_size = pixel_values.shape[0]  # `len` would make it a constant of an exported program
        plan = self.resolve_plan(pixel_values, bool_masked_pos, sparse_plan)
        tokens, grid_size = self.embeddings(pixel_values, interpolate_pos_encoding, plan, self.config.mask_unit_size)
        if plan is None:
            layouts = self._dense_layouts(grid_size, always_partition, pixel_values.device)
        else:
            with_index = bool(output_attentions) or not reads_coordinates(
                self.config._attn_implementation, pixel_values.device
            )
            layouts = [visible_layouts(plan, stage, with_index) for stage in range(self.config.num_layers)]
        stages = self.encoder(tokens, layouts, batch_size, bool(output_attentions))
        last = stages.last if self.layernorm is None else self.layernorm(stages.last)
        states = None
        if output_hidden_states:
            states = (tokens, *(stages.unmerged if output_hidden_states_before_downsampling else stages.merged))
        output = GreenSwinModelOutput(hidden_states=states)
        if output_attentions:
            output.attentions = tuple(stages.attentions)
        if plan is not None:
            return self._complete_visible(last, output, plan, batch_size)
        grids = stage_grid_sizes(grid_size, self.config.num_layers)
        return self._complete_dense(last, output, grids, output_hidden_states_before_downsampling)

    def resolve_plan(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None, sparse_plan: SparsePlan | None
    ) -> SparsePlan | None:
        """The plan for a batch on its device: the one given, one built from the masks, or `None` without either.

        Raises:
            ValueError: both are given, or they do not fit the images.
        """
        if sparse_plan is not None and bool_masked_pos is not None:
            raise ValueError("bool_masked_pos and sparse_plan are both given; pass only one, a plan holds its masks")
        if sparse_plan is None and bool_masked_pos is None:
            return None
        batch_size = pixel_values.shape[0]
        geometry = SparseGeometry.from_config(self.config, (pixel_values.shape[2], pixel_values.shape[3]))
        if bool_masked_pos is not None:
            sparse_plan = build_sparse_plan(bool_masked_pos, geometry)
            if len(bool_masked_pos) not in (1, batch_size):
                raise ValueError(
                    f"bool_masked_pos has {len(bool_masked_pos)} rows for {batch_size} images; "
                    "give one row for all images or one for each"
                )
        assert sparse_plan is not None
        sparse_plan.check_batch(batch_size, geometry)
        if sparse_plan.visible_unit_index.device != pixel_values.device:
            return sparse_plan.to(pixel_values.device, non_blocking=True)
        return sparse_plan

    def checked_images(self, pixel_values: Tensor | None) -> Tensor:
        """`pixel_values`, or a `ValueError` where they are missing or have another shape than the model takes."""
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass images of shape (batch, channels, height, width)")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; the model takes "
                f"(batch, {self.config.num_channels}, height, width)"
            )
        return pixel_values

    def _dense_layouts(
        self, grid_size: tuple[int, int], always_partition: bool, device: torch.device
    ) -> list[tuple[Layout, Layout]]:
        grids = stage_grid_sizes(grid_size, self.config.num_layers)
        stages = zip(grids, self.config.stage_window_sizes, strict=True)
        return [dense_layouts(grid, window, always_partition, device) for grid, window in stages]

    def _complete_dense(
        self, last: Tensor, output: GreenSwinModelOutput, grids: Sequence[tuple[int, int]], before_merging: bool
    ) -> GreenSwinModelOutput:
        """Adds the last hidden state, the mean over tokens and the feature maps."""
        output.last_hidden_state = last
        if self.add_pooling_layer:
            output.pooler_output = last.mean(dim=1)
        if output.hidden_states is not None:
            state_grids = [grids[0], *grids] if before_merging else [*grids, grids[-1]]
            output.reshaped_hidden_states = tuple(
                state.transpose(1, 2).unflatten(2, grid)
                for state, grid in zip(output.hidden_states, state_grids, strict=True)
            )
        return output

    def _complete_visible(
        self, last: Tensor, output: GreenSwinModelOutput, plan: SparsePlan, batch_size: int
    ) -> GreenSwinModelOutput:
        """Lays the pool out as images and adds the mean over visible tokens."""
        output.last_hidden_state = plan.to_images(last, batch_size)
        output.visible_token_mask = plan.token_mask(batch_size)
        if self.add_pooling_layer:  # padding is zero
            counts = output.visible_token_mask.sum(dim=1, keepdim=True)
            output.pooler_output = output.last_hidden_state.sum(dim=1) / counts
        if output.hidden_states is not None:
            output.hidden_states = tuple(plan.to_images(state, batch_size) for state in output.hidden_states)
        return output


class GreenSwinDecoderLayer(GradientCheckpointingLayer):
    """A plain transformer block; queries can be fewer than keys, for what nobody asks need not be computed."""

    def __init__(self, config: GreenSwinConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.config = config
        self.num_heads = config.decoder_num_attention_heads
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.decoder_intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.decoder_intermediate_size, width)

    def forward(self, hidden_states: Tensor, plan: SparsePlan | None = None) -> Tensor:
        """[B, U, D] to [B, U, D], or with a plan to its masked units only: [B, masked, D]."""
        normed = self.layernorm_before(hidden_states)
        queries = normed
        if plan is not None:
            hidden_states, queries = _masked_units(hidden_states, plan), _masked_units(normed, plan)
        query, key, value = (
            tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2).unsqueeze(2)  # [B, h, 1, U, d]
            for tokens in (self.query(queries), self.key(normed), self.value(normed))
        )
        attended, _ = attend(query, key, value, None, 0.0, self.config._attn_implementation)
        hidden_states = hidden_states + self.output(attended.squeeze(2).transpose(1, 2).flatten(2))
        raised = self.up(self.layernorm_after(hidden_states))
        activated = self.activation(raised)
        with recomputed_in_backward(activated, self.activation, raised):
            return hidden_states + self.down(activated)


def _masked_units(units: Tensor, plan: SparsePlan) -> Tensor:
    """Rows of the masked units: [B, U, P] to [B, masked of an image, P], all images with the same number of them."""
    rows = units if plan.is_shared else units.reshape(1, -1, units.shape[-1])
    return rows.index_select(1, plan.masked_unit_index).reshape(units.shape[0], -1, units.shape[-1])


def position_encoding(grid_size: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """Fixed 2-D sine-cosine positions, [rows * columns, width]: first half for the column, second for the row.

    As in MAE: frequencies 10000^(-i / (width / 4)), sines before cosines. On the device and in the type of `like`.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=like.device, dtype=dtype) / (width // 4))
    row, column = (torch.arange(side, device=like.device, dtype=dtype) for side in grid_size)
    row_angles, column_angles = row[:, None] * frequencies, column[:, None] * frequencies
    row_code = torch.cat([row_angles.sin(), row_angles.cos()], dim=1)[:, None].expand(*grid_size, -1)
    column_code = torch.cat([column_angles.sin(), column_angles.cos()], dim=1)[None].expand(*grid_size, -1)
    return torch.cat([column_code, row_code], dim=-1).flatten(0, 1).to(like.dtype)


class GreenSwinDecoder(nn.Module):
    """From latents of visible units to pixels: every latent at its own unit among mask tokens (paper, sec. 3).

    A plain transformer with fixed positions; only for pretraining.
    """

    def __init__(self, config: GreenSwinConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(GreenSwinDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.predictor = nn.Linear(width, config.mask_unit_size**2 * config.num_channels)

    def forward(
        self, latents: Tensor, grid_size: tuple[int, int], plan: SparsePlan | None, masked_only: bool
    ) -> Tensor:
        """Predicted pixels of mask units: [B, U, P], or [B, masked, P] when `masked_only`.

        Args:
            latents: [B, longest or U, C] from the encoder.
            grid_size: mask units (rows, columns) of an image.
            plan: where the latents belong; `None` when all units are visible, in raster order.
            masked_only: predict masked units only; asks for the same number of them in every image.
        """
        units = self.embed(latents)
        if plan is not None:
            units = self._place(units, plan)
        units = units + position_encoding(grid_size, units.shape[-1], units)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            units = layer(units, plan if is_last and masked_only else None)
        return self.predictor(self.layernorm(units))

    def _place(self, latents: Tensor, plan: SparsePlan) -> Tensor:
        """Latents at their own units, mask tokens elsewhere: [B, longest, D] to [B, U, D]."""
        batch_size, pool = latents.shape[0], plan.to_pool(latents)
        num_units = batch_size * plan.num_units // pool.shape[0]
        units = self.mask_token.to(pool.dtype).expand(pool.shape[0], num_units, -1)
        return units.index_copy(1, plan.visible_unit_index, pool).view(batch_size, plan.num_units, -1)


class GreenSwinForMaskedImageModeling(GreenSwinPreTrainedModel):
    """
    GreenSwin with a light decoder that predicts the pixels of masked units from the visible patches alone.

    Without a mask, training draws one for each image (`config.mask_ratio`); evaluation sees the whole image and
    returns no loss.
    """

    def __init__(self, config: GreenSwinConfig):
        super().__init__(config)
        self.swin = GreenSwinModel(config, add_pooling_layer=False)
        self.decoder = GreenSwinDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        sparse_plan: SparsePlan | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> GreenSwinMaskedImageModelingOutput:
        """
        Args: those of [`GreenSwinModel`].

        Raises:
            ValueError: as [`GreenSwinModel`].
        """
        _refuse_masks(kwargs)
        pixel_values = self.swin.checked_images(pixel_values)
        if self.training and bool_masked_pos is None and sparse_plan is None:
            geometry = SparseGeometry.from_config(self.config, (pixel_values.shape[2], pixel_values.shape[3]))
            bool_masked_pos = sample_masks(pixel_values.shape[0], geometry.unit_grid_size, self.config.mask_ratio)
        plan = self.swin.resolve_plan(pixel_values, bool_masked_pos, sparse_plan)
        outputs = self.swin(
            pixel_values,
            sparse_plan=plan,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        rows, columns = (-(-side // self.config.mask_unit_size) for side in pixel_values.shape[2:])
        grid_size = (rows, columns)
        masked_only = self.training and plan is not None and plan.has_equal_counts and plan.num_masked > 0
        predicted = self.decoder(outputs.last_hidden_state, grid_size, plan, masked_only)
        loss, logits = None, predicted
        if plan is not None:
            loss, logits = self._score(predicted, pixel_values, plan, masked_only)
        reconstruction = unpatchify(logits, grid_size, self.config.mask_unit_size)
        return GreenSwinMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction[:, :, : pixel_values.shape[2], : pixel_values.shape[3]],
            logits=logits,
            bool_masked_pos=None if plan is None else plan.bool_masked_pos.expand(pixel_values.shape[0], -1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )

    def _score(
        self, predicted: Tensor, pixel_values: Tensor, plan: SparsePlan, masked_only: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss over the masked units in float32, and the predictions of all units (zero where none was made)."""
        index, pixels = plan.masked_unit_index, predicted.shape[-1]
        rows = predicted.shape[0] if plan.is_shared else 1
        pool = predicted.reshape(rows, -1, pixels)  # [R, masked or units of the pool, P]
        target = gather_units(pixel_values, self.config.mask_unit_size, index, plan.is_shared)
        target = _at_least_float32(target.permute(0, 1, 3, 4, 2).flatten(2))  # [R, masked of the pool, P]
        if self.config.norm_pix_loss and plan.num_masked:
            mean, deviation = unit_statistics(target)
            target = (target - mean) / deviation
        masked = pool if masked_only else pool.index_select(1, index)
        squared_error = (_at_least_float32(masked) - target).square()
        loss = squared_error.sum() / max(squared_error.numel(), 1)
        if not masked_only:
            return loss, predicted
        all_units = pool.new_zeros(rows, pixel_values.shape[0] * plan.num_units // rows, pixels)
        return loss, all_units.index_copy(1, index, pool).view(pixel_values.shape[0], -1, pixels)


class GreenSwinForImageClassification(GreenSwinPreTrainedModel):
    """GreenSwin with a linear classifier on the mean of the last stage's tokens."""

    def __init__(self, config: GreenSwinConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.swin = GreenSwinModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> GreenSwinImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Classes in 0 … num_labels - 1; numbers to regress on when `num_labels` is 1.
            output_attentions, output_hidden_states, interpolate_pos_encoding: as in [`GreenSwinModel`].
        """
        _refuse_masks(kwargs)
        outputs = self.swin(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return GreenSwinImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class GreenSwinBackbone(BackboneMixin, GreenSwinPreTrainedModel):
    """Feature maps of the stages, each behind a LayerNorm, for detection and segmentation.

    As stock Swin's backbone it keeps window and shift on grids no larger than the window, padding them. Its folder
    loads into stock `SwinBackbone`, which names a final norm missing that neither uses.
    """

    has_attentions = True
    # Of a whole encoder's file, the final norm is not used here.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        *GreenSwinPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^swin\.layernorm\.",
    ]

    def __init__(self, config: GreenSwinConfig):
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.stage_channels]
        self.swin = GreenSwinModel(config, add_pooling_layer=False, add_final_norm=False)
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for stage, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BackboneOutput:
        """
        Args: those of [`GreenSwinModel`], for whole images of any size.

        Returns:
            `BackboneOutput`: `feature_maps`, one `(batch_size, channels, rows, columns)` for each of `out_features`;
            `hidden_states` are feature maps as well.
        """
        outputs = self.swin(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=True,
            interpolate_pos_encoding=interpolate_pos_encoding,
            always_partition=True,
            output_hidden_states_before_downsampling=True,
            return_dict=True,
        )
        maps = dict(zip(self.stage_names, outputs.reshaped_hidden_states, strict=True))
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        feature_maps: Any = tuple(self._normed(stage, maps[stage]) for stage in self.out_features)
        return BackboneOutput(
            feature_maps=feature_maps,
            hidden_states=outputs.reshaped_hidden_states if keep_states else None,
            attentions=outputs.attentions,
        )

    def _normed(self, stage: str, feature_map: Tensor) -> Tensor:
        tokens = self.hidden_states_norms[stage](feature_map.permute(0, 2, 3, 1))
        return tokens.permute(0, 3, 1, 2).contiguous()


__all__ = [
    "GreenSwinBackbone",
    "GreenSwinForImageClassification",
    "GreenSwinForMaskedImageModeling",
    "GreenSwinImageClassifierOutput",
    "GreenSwinMaskedImageModelingOutput",
    "GreenSwinModel",
    "GreenSwinModelOutput",
    "GreenSwinPreTrainedModel",
    "patchify",
    "unit_statistics",
    "unpatchify",
]
