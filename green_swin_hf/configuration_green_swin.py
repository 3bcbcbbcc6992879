"""Configuration of GreenSwin: fields, the sizes derived from them, and their validation. No torch in here."""

import reprlib
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What distinguishes the published Swin variants from the defaults of `GreenSwinConfig` (Swin-T).
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": (2, 2, 18, 2)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}

# Where each Auto class finds its class beside saved weights, whichever model was saved: `auto_map` of `config.json`.
AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_green_swin.GreenSwinConfig",
    "AutoModel": "modeling_green_swin.GreenSwinModel",
    "AutoModelForMaskedImageModeling": "modeling_green_swin.GreenSwinForMaskedImageModeling",
    "AutoModelForImageClassification": "modeling_green_swin.GreenSwinForImageClassification",
    "AutoBackbone": "modeling_green_swin.GreenSwinBackbone",
}

_LARGEST_COUNT = 2**31 - 1  # beyond it sizes overflow long before any memory holds them
_LARGEST_NUMBER = 3e38
_MOST_STAGES = 16
# Computed from the fields; a `config.json` of stock Swin carries them as entries, which are dropped on reading.
_DERIVED_ENTRIES = ("model_type", "num_layers", "hidden_size", "stage_names", "path_norm")


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """`(rows, columns)` of a size given as one int or as a pair."""
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return int(rows), int(columns)


def clamp_window(grid_size: tuple[int, int], window_size: int) -> tuple[int, int]:
    """`(window_size, shift_size)` on a grid of `(rows, columns)` tokens, clamped exactly as Swin does it.

    A grid whose smaller side is no larger than the window gets windows of that side, and no shift:

    >>> clamp_window((56, 56), 7), clamp_window((7, 7), 7), clamp_window((4, 6), 7)
    ((7, 3), (7, 0), (4, 0))
    """
    if min(grid_size) <= window_size:
        return min(grid_size), 0
    return window_size, window_size // 2


def stage_grid_sizes(grid_size: tuple[int, int], num_stages: int) -> tuple[tuple[int, int], ...]:
    """Token grid `(rows, columns)` of each stage; patch merging pads an odd side, so halves round up."""
    grids = [grid_size]
    while len(grids) < num_stages:
        rows, columns = grids[-1]
        grids.append(((rows + 1) // 2, (columns + 1) // 2))
    return tuple(grids)


class GreenSwinConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of every GreenSwin model. The fields of `transformers.SwinConfig` keep their names, meanings and
    defaults; the fields below are added. The defaults are Swin-T; see [`GreenSwinConfig.from_variant`] for others.

    Args:
        image_size (`int` or pair of `int`, defaults to 224):
            Height and width in pixels; a multiple of `mask_unit_size`, though not in a file or after a change, which
            only masked images mind. Sets the size of the position tables; at run time other sizes work as well.
        patch_size (`int`, defaults to 4): Side of a patch in pixels; patches are square.
        num_channels (`int`, defaults to 3): Channels of the images.
        embed_dim (`int`, defaults to 96): Channels of stage 1; each further stage has twice as many.
        depths (sequence of `int`, defaults to `(2, 2, 6, 2)`): Blocks of each stage.
        num_heads (sequence of `int`, defaults to `(3, 6, 12, 24)`): Attention heads of each stage.
        window_size (`int`, defaults to 7):
            Side of a window in tokens. A stage whose grid (at `image_size`) is no larger gets windows of its own size.
        mlp_ratio, qkv_bias, hidden_dropout_prob, attention_probs_dropout_prob, drop_path_rate, hidden_act,
        use_absolute_embeddings, initializer_range, layer_norm_eps, out_features, out_indices:
            As in `SwinConfig`. `drop_path_rate` holds for both residual branches of a block and `layer_norm_eps` for
            every LayerNorm of the encoder.
        encoder_stride (`int`, *optional*):
            As in `SwinConfig`: side in pixels of what one token of the last stage predicts. Always `mask_unit_size`;
            another value is ignored with a warning.
        mask_ratio (`float`, defaults to 0.75): Share of mask units that is masked, in (0, 1).
        norm_pix_loss (`bool`, defaults to `True`): Normalise the target of each mask unit by its mean and variance.
        decoder_hidden_size (`int`, defaults to 512): Width of the decoder; a multiple of 4 and of its heads.
        decoder_num_hidden_layers (`int`, defaults to 1): Transformer blocks of the decoder.
        decoder_num_attention_heads (`int`, defaults to 16): Attention heads of the decoder.
        decoder_intermediate_size (`int`, defaults to 2048): Width of the decoder's MLP.
        group_size (`str` or `int`, defaults to `"window"`):
            Slots of a group of windows in masked attention: `"window"` (window area, the paper's choice),
            `"optimal"` (the paper's sweep) or a number, at least the area of the largest window.

    Raises:
        ValueError: a field is out of range or contradicts another; the message names both.

    Source: fields after `decoder_…` follow "Green Hierarchical Vision Transformer for Masked Image Modeling"
    (arXiv 2205.13515): mask unit = patch of the last stage, one decoder block of width 512, group size = window area.
    """

    model_type = "green_swin"
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 1
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    group_size: str | int = "window"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in _DERIVED_ENTRIES:
            kwargs.pop(name, None)
        self.validate_geometry(any_image_size=kwargs.pop("_any_image_size", False))
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "GreenSwinConfig":
        """As the base class; a file's `image_size` may be any, since models of whole images are saved with any."""
        return super().from_dict({**config_dict, "_any_image_size": True}, **kwargs)

    @classmethod
    def from_variant(cls, variant: str, window_size: int = 7, **overrides: Any) -> "GreenSwinConfig":
        """Configuration of a named Swin: `"tiny"`, `"small"`, `"base"` or `"large"`, with window 7 or any other.

        Raises:
            ValueError: no variant of that name.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
        return cls(**{"window_size": window_size, **VARIANTS[variant], **overrides})

    # Sizes below are computed on access, so that changing a field (as `config.update` does) cannot leave one stale.

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.stage_channels[-1]

    @property
    def stage_names(self) -> list[str]:
        return ["stem", *(f"stage{stage}" for stage in range(1, len(self.depths) + 1))]

    @property
    def patch_length(self) -> int:
        """Side of a patch in pixels, also where `patch_size` was given as a pair."""
        return as_pair(self.patch_size)[0]

    @property
    def mask_unit_size(self) -> int:
        """Side of a mask unit in pixels: one token of the last stage, so that it is whole at every stage."""
        return self.patch_length * 2 ** (len(self.depths) - 1)

    @property
    def mask_grid_size(self) -> tuple[int, int]:
        """Mask units `(rows, columns)` of an image of `image_size`."""
        rows, columns = as_pair(self.image_size)
        return rows // self.mask_unit_size, columns // self.mask_unit_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches `(rows, columns)` of an image of `image_size`."""
        rows, columns = as_pair(self.image_size)
        return -(-rows // self.patch_length), -(-columns // self.patch_length)

    @property
    def stage_window_sizes(self) -> tuple[int, ...]:
        """Window of each stage at `image_size`; the side `w` of its position table of `(2 w - 1)²` rows.

        >>> GreenSwinConfig(window_size=14).stage_window_sizes
        (14, 14, 14, 7)
        """
        grids = stage_grid_sizes(self.grid_size, len(self.depths))
        return tuple(clamp_window(grid, self.window_size)[0] for grid in grids)

    @property
    def encoder_stride(self) -> int:
        return self.mask_unit_size

    @encoder_stride.setter
    def encoder_stride(self, value: int) -> None:
        if value != self.mask_unit_size:
            unit = self.mask_unit_size
            logger.warning(f"encoder_stride {value} is ignored: GreenSwin predicts mask units of {unit} px")

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with the `encoder_stride` that stock Swin reads from the file."""
        return {**super().to_dict(), "encoder_stride": self.encoder_stride}

    def validate_geometry(self, any_image_size: bool = False) -> None:
        """Raise a `ValueError` naming field, value and rule where a field is out of range or contradicts another."""
        _check_sizes(self)
        _check_stages(self)
        if not any_image_size:
            _check_image_size(self)
        _check_rates(self)
        _check_activation(self)
        _check_decoder(self)
        _check_target(self)
        _check_group_size(self)


def shown(value: Any) -> str:
    """A value as a message shows it: one line of at most some 100 characters, whatever a file may hold."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    brief.maxlist = brief.maxtuple = brief.maxset = brief.maxdict = 8
    try:
        text = brief.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{field} {shown(value)} must be {rule}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_COUNT


def _check_sizes(config: GreenSwinConfig) -> None:
    for field in ("num_channels", "embed_dim", "window_size"):
        _require(_is_count(getattr(config, field)), field, getattr(config, field), "a positive integer below 2^31")
    for field in ("image_size", "patch_size"):
        size = getattr(config, field)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        is_size = len(sides) == 2 and all(map(_is_count, sides))
        _require(is_size, field, size, "a positive integer or a pair of them (rows, columns)")
    _require(len(set(as_pair(config.patch_size))) == 1, "patch_size", config.patch_size, "square")


def _check_stages(config: GreenSwinConfig) -> None:
    for field in ("depths", "num_heads"):
        values = getattr(config, field)
        is_list = isinstance(values, (list, tuple)) and 0 < len(values) <= _MOST_STAGES and all(map(_is_count, values))
        rule = f"a list of positive integers, one for each stage (at most {_MOST_STAGES})"
        _require(is_list, field, values, rule)
    rule = f"as long as depths {list(config.depths)}: one number of heads for each stage"
    _require(len(config.num_heads) == len(config.depths), "num_heads", list(config.num_heads), rule)
    for stage, (channels, heads) in enumerate(zip(config.stage_channels, config.num_heads, strict=True), start=1):
        rule = f"a divisor of the {channels} channels of stage {stage} (embed_dim {config.embed_dim})"
        _require(channels % heads == 0, f"num_heads[{stage - 1}]", heads, rule)


def _check_image_size(config: GreenSwinConfig) -> None:
    unit = config.mask_unit_size
    whole_units = all(side % unit == 0 for side in as_pair(config.image_size))
    rule = f"a multiple of mask_unit_size {unit} (patch_size {config.patch_length} times 2^{config.num_layers - 1})"
    _require(whole_units, "image_size", config.image_size, rule)


def _check_rates(config: GreenSwinConfig) -> None:
    for field in ("qkv_bias", "use_absolute_embeddings", "norm_pix_loss"):
        _require(isinstance(getattr(config, field), bool), field, getattr(config, field), "True or False")
    numbers = ("mask_ratio", "mlp_ratio", "layer_norm_eps", "initializer_range", "drop_path_rate")
    for field in (*numbers, "hidden_dropout_prob", "attention_probs_dropout_prob"):
        value = getattr(config, field)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(is_number, field, value, "a number (YAML reads 1e-6 as text and 1.0e-6 as a number)")
        _require(not abs(value) > _LARGEST_NUMBER, field, value, "finite, in float32 as well")
    _require(0 < config.mask_ratio < 1, "mask_ratio", config.mask_ratio, "greater than 0 and less than 1")
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        value = getattr(config, field)
        _require(0 <= value < 1, field, value, "at least 0 and less than 1")
    for field in ("mlp_ratio", "layer_norm_eps"):
        _require(getattr(config, field) > 0, field, getattr(config, field), "greater than 0")
    _require(config.initializer_range >= 0, "initializer_range", config.initializer_range, "at least 0")
    rule = f"at least 1 / embed_dim {config.embed_dim}, for an MLP of at least one unit (and less than 2^31)"
    width = int(config.mlp_ratio * config.embed_dim)
    _require(1 <= width <= _LARGEST_COUNT, "mlp_ratio", config.mlp_ratio, rule)


def _check_activation(config: GreenSwinConfig) -> None:
    from transformers.activations import ACT2FN  # imports torch, which only building a model needs otherwise

    rule = f"an activation of transformers: {', '.join(sorted(ACT2FN))}"
    is_known = isinstance(config.hidden_act, str) and config.hidden_act in ACT2FN
    _require(is_known, "hidden_act", config.hidden_act, rule)


def _check_decoder(config: GreenSwinConfig) -> None:
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        value = getattr(config, f"decoder_{field}")
        _require(_is_count(value), f"decoder_{field}", value, "a positive integer below 2^31")
    width, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
    _require(width % 4 == 0, "decoder_hidden_size", width, "a multiple of 4 (sine and cosine of row and column)")
    _require(width % heads == 0, "decoder_hidden_size", width, f"a multiple of decoder_num_attention_heads {heads}")


def _check_target(config: GreenSwinConfig) -> None:
    values = config.mask_unit_size**2 * config.num_channels
    rule = f"False for mask units of a single value (mask_unit_size 1, num_channels {config.num_channels})"
    _require(values > 1 or not config.norm_pix_loss, "norm_pix_loss", config.norm_pix_loss, rule)


def _check_group_size(config: GreenSwinConfig) -> None:
    area = max(config.stage_window_sizes) ** 2
    size = config.group_size
    is_valid = size in ("window", "optimal") if isinstance(size, str) else _is_count(size) and size >= area
    rule = f'"window", "optimal" or an integer of at least {area}, the area of the largest window'
    _require(is_valid, "group_size", size, rule)


__all__ = ["AUTO_MAP", "VARIANTS", "GreenSwinConfig", "as_pair", "clamp_window", "shown", "stage_grid_sizes"]
