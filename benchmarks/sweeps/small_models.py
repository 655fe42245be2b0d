"""Small models of `transformers`, one for each family that can be made small: two layers of width 32, random weights.

A family is a `model_type`. Its config is made with the library's defaults, and then every number in it (and in the
configs inside it) whose name says what it counts is made small. What that leaves impossible gets its numbers in
`SPECIAL`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS, LENGTH, WIDTH, PICTURE, PATCH, WORDS = 4, 6, 32, 16, 4, 40
GRID = PICTURE // PATCH
LARGEST = 4_500_000  # parameters

# which class of a family is taken: the first that there is
TABLES = tuple(
    f"MODEL_{kind}MAPPING_NAMES"
    for kind in (
        "FOR_SEQUENCE_CLASSIFICATION_", "FOR_IMAGE_CLASSIFICATION_", "FOR_CAUSAL_LM_", "FOR_MASKED_LM_",
        "FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_SPEECH_SEQ_2_SEQ_", "FOR_AUDIO_CLASSIFICATION_", "FOR_VIDEO_CLASSIFICATION_",
        "FOR_SEMANTIC_SEGMENTATION_", "FOR_DEPTH_ESTIMATION_", "",
    )
)  # fmt: skip

# numbers of a config by their whole names, the first that matches
_NUMBERS: dict[str, int] = {
    r"(.*_)?vocab_size(_.*)?|char_vocab_size|entity_vocab_size": WORDS,
    r"(.*_)?(num|n)_(key_value|kv)_heads?|multi_query_group_num|num_key_value_heads": 2,
    r"(.*_)?(num_|n_)?(attention_|attn_|\w+_)?heads?|(encoder|decoder)_attention_heads|nhead": HEADS,
    r"num_experts_per_tok(en)?|top_k|moe_topk|moe_k|num_selected_experts|moe_top_?k": 2,
    r"n_group|topk_group|first_k_dense_replace|n_shared_experts|num_shared_experts": 1,
    r"(.*_)?(n_routed|num|num_local|moe_num|n)_experts": HEADS,
    r"(.*_)?(head_dim|d_kv|head_size|d_head|kv_channels|lora_rank|num_mel_bins)": 8,
    r"(.*_)?(num_hidden|num|n|num_encoder|num_decoder|encoder|decoder)_layers?|(.*_)?depth|num_hidden_groups|num_blocks"
    r"|n_blocks|inner_group_num": 2,
    r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|dim_feedforward|dff"
    r"|feed_forward_dim|ffn_embed_dim|mlp_dim|ffn_inner_dim|feedforward_dim)": 48,
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|emb_dim|projection_dim|proj_dim"
    r"|embedding_dim|d_embed|output_dim|classifier_proj_size|embed_size|lru_width|decoder_dim|qk_dim|feature_size)"
    r"|dim": WIDTH,
    r"(.*_)?(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len(gth)?|n_ctx"
    r"|max_sequence_length|max_text_len.*)": 64,
    r"(.*_)?(image_size|img_size)|input_size": PICTURE,
    r"(.*_)?patch_size": PATCH,
    r"num_frames": 4,
    r"rotary_dim": 4,
    r"window_size|num_conv_pos_embedding_groups": 2,
    r"num_conv_pos_embeddings": 4,
}  # fmt: skip
_COMPILED = [(re.compile(pattern), number) for pattern, number in _NUMBERS.items()]
_HEADS = re.compile(r"(.*_)?(heads|num_heads|num_attention_heads)")
_STAGES = re.compile(r"(.*_)?(depths|layers|num_blocks|num_layers|n_layers|encoder_layers|stage_repeats|blocks)")
_WIDTHS = re.compile(
    r"(.*_)?(hidden_sizes|embed_dims?|channels|dims|conv_dim|neck_hidden_sizes|out_channels|widths?|hidden_dim)"
)

# their audio has time before frequency
_TIME_FIRST = re.compile(
    "parakeet|canary|cohere_asr|lasr|granite_speech|nemotron|speech_to_text|wav2vec2-bert|seamless"
)

# they turn three kinds of positions
_SECTIONS = re.compile("qwen2(_5)?_vl|glm4(6)?v|glm_(image|ocr)|glmga|paddleocr_vl")

# numbers of single families, by their place in the config
SPECIAL: dict[str, dict[str, Any]] = {
    # every stage halves the picture
    **{name: {"image_size": 64} for name in ("convnext", "convnextv2", "dinov3_convnext")},
    # a state of 64 for each word, of four heads
    **{name: {"mamba_n_heads": 4, "mamba_d_head": 16} for name in ("bamba", "granitemoehybrid")},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    # half of each head of 8 is turned
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 0]},
    "glm4v_moe_text": {"rope_parameters.mrope_section": [1, 1, 0]},
    "hgnet_v2": {"stem_channels": [3, 16, 16]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4},
    "esm": {"vocab_size": WORDS, "pad_token_id": 1, "mask_token_id": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "bit": {"num_groups": 4},
    "longcat_flash": {"zero_expert_num": 1},
    # words are padded to a whole number of these
    **{name: {"attention_window": 4} for name in ("led", "longformer")},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": (0, 1, 2, 3)},
    "glpn": {"image_size": 64},
    "hiera": {"image_size": (64, 64)},
    "efficientnet": {
        **{"in_channels": [WIDTH] + [16] * 6, "out_channels": [16] * 7},
        **{"width_coefficient": 1.0, "depth_coefficient": 1.0},
    },
    "bros": {"dim_bbox_sinusoid_emb_2d": 8, "dim_bbox_sinusoid_emb_1d": 1, "dim_bbox_projection": 8},
    "esmc": {"num_key_value_heads": HEADS},
    "audio-spectrogram-transformer": {"max_length": 32},
    "csm": {"codec_config.upsample_groups": 32},
    "emu3": {"pad_token_id": 0},
    "kyutai_speech_to_text": {"audio_pad_token_id": 1},
    **{name: {"rope_parameters.mrope_section": [1, 1, 1, 1]} for name in ("hunyuan_vl_text",)},
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": [1, 1, 1, 1]},
}


class Small(NamedTuple):
    """
    Attributes:
        kind: the class of the model.
        model: it, in float64, with every parameter away from zero.
    """

    kind: str
    model: nn.Module


class Unbuildable(Exception):
    """Why a family has no small model."""


def families() -> list[str]:
    """All of the library that have a model."""
    tables = [getattr(modeling_auto, table) for table in TABLES]
    return sorted(name for name in CONFIG_MAPPING if any(name in table for table in tables))


def build(family: str) -> Small:
    """A small model of a family.

    Raises:
        Unbuildable: there is none.
    """
    names = [table[family] for table in (getattr(modeling_auto, name) for name in TABLES) if family in table]
    kind = names[0] if isinstance(names[0], str) else names[0][0]
    torch.manual_seed(0)
    try:
        config = CONFIG_MAPPING[family]()
        shrink(config)
        for place, value in SPECIAL.get(family, {}).items():
            _set(config, place, value)
        made = getattr(transformers, kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in made(config).parameters())
        if size > LARGEST:
            raise Unbuildable(f"{size / 1e6:.1f} million parameters are left")
        model = made(config).double()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped products take no float64
    except Unbuildable:
        raise
    except Exception as error:
        raise Unbuildable(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    with torch.no_grad():
        for p in model.parameters():
            # zeros at the beginning would leave most of the backward pass without anything to do
            p.add_(torch.randn_like(p), alpha=0.05)
    return Small(kind, model)


def shrink(config: Any) -> None:
    """Makes the numbers of a config small, and those of the configs inside it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            for pattern, number in _COMPILED:
                if pattern.fullmatch(name):
                    _put(config, name, min(value, number) if value > 0 else value)
                    break
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            if _HEADS.fullmatch(name):
                _put(config, name, type(value)(HEADS for _ in value))
            elif _STAGES.fullmatch(name):
                _put(config, name, type(value)(1 for _ in value))
            elif _WIDTHS.fullmatch(name):
                _put(config, name, type(value)(16 * (1 + (v > value[0])) for v in value))
            elif re.fullmatch(r"(.*_)?(image_size|img_size|input_size)", name):
                _put(config, name, type(value)(PICTURE for _ in value))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= WORDS:
            _put(config, name, 1 + len(name) % 3)
    fields = vars(config)
    for name, value in (("pad_token_id", 0), ("head_dim", 8)):
        if name in fields and fields[name] is None:
            _put(config, name, value)
    if "use_cache" in fields:
        _put(config, "use_cache", False)
    if "qk_nope_head_dim" in fields and "qk_rope_head_dim" in fields:
        _put(config, "qk_head_dim", config.qk_nope_head_dim + config.qk_rope_head_dim)
        _put(config, "num_key_value_heads", config.num_attention_heads)
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and ("mrope_section" in rope or _SECTIONS.match(config.model_type)):
        rope["mrope_section"] = [2, 1, 1]
    if "mask_time_prob" in fields:
        _put(config, "mask_time_prob", 0.0)  # numpy draws these masks, and no seed of torch's repeats them
    if getattr(config, "layer_types", None):
        layers = getattr(config, "num_hidden_layers", 2)
        kinds = list(dict.fromkeys(config.layer_types))
        _put(config, "layer_types", [kinds[k % len(kinds)] for k in range(layers)])


def _put(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:
        vars(config)[name] = value


def _set(config: Any, place: str, value: Any) -> None:
    *path, last = place.split(".")
    for name in path:
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    if isinstance(config, dict):
        config[last] = value
    else:
        _put(config, last, value)


# --- what a model is given


def inputs(model: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of n samples for a model, by what its `forward` asks for."""
    asked = inspect.signature(model.forward).parameters
    config = model.config

    def values(*shape: int) -> Tensor:
        return torch.randn(n, *shape, dtype=torch.float64, generator=generator)

    words = torch.randint(5, WORDS, (n, LENGTH), generator=generator)
    ends = getattr(config, "eos_token_id", None)
    if isinstance(ends, int) and 0 < ends < WORDS:
        words[:, LENGTH - 2] = ends
    mask = torch.ones(n, LENGTH, dtype=torch.long)
    mask[n // 2 :, LENGTH - 1] = 0  # the second half of the batch is one word shorter
    given: dict[str, Tensor] = {}
    for name in ("grid_thw", "image_grid_thw"):
        if name in asked and "input_ids" not in asked:
            # patches of all pictures one after another: `result` makes one line of them
            patch, channels = _number(config, "patch_size", PATCH), _number(config, "num_channels", 3)
            pixels = channels * _number(config, "temporal_patch_size", 1) * patch * patch
            shape = (pixels,) if "hidden_states" in asked else (channels, patch, patch)
            given["hidden_states" if "hidden_states" in asked else "pixel_values"] = values(GRID * GRID, *shape)
            given[name] = torch.tensor([1, GRID, GRID]).expand(n, 3).clone()
            return given
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or ("pixel_values" in asked and "input_ids" not in asked):
        size = _number(config, "image_size", PICTURE)
        frames = [4] if "num_frames" in vars(config) else []
        given["pixel_values"] = values(*frames, _number(config, "num_channels", 3), size, size)
    elif main in ("input_values", "input_features"):
        mel = _number(config, "num_mel_bins", 8)
        shape = (64, mel) if _TIME_FIRST.match(config.model_type) else (mel, 64)
        if config.model_type == "audio-spectrogram-transformer":
            given[main] = values(config.max_length, mel)
        else:
            given[main] = values(*shape) if main == "input_features" else values(2000)
    elif main == "pixel_values_videos" or ("pixel_values_videos" in asked and "input_ids" not in asked):
        given["pixel_values_videos"] = values(_number(config, "num_frames", 4), 3, PICTURE, PICTURE)
    else:
        given["input_ids"] = words
        if "attention_mask" in asked:
            given["attention_mask"] = mask
    if "pixel_values" in asked and "input_ids" in asked and "pixel_values" not in given and _both(model):
        size = _number(config, "image_size", PICTURE)
        given["pixel_values"] = values(3, size, size)
    if "decoder_input_ids" in asked:
        given["decoder_input_ids"] = words.flip(1)
    if "bbox" in asked:
        given["bbox"] = torch.ones(n, LENGTH, 4, dtype=torch.long)
    if "input_ids" in asked and main == "pixel_values" and _both(model):
        given["input_ids"], given["attention_mask"] = words, mask
    return given


def _both(model: nn.Module) -> bool:
    """Whether a model takes words and pictures at once, and pictures without a place among the words."""
    return all(p in vars(model.config) for p in ("text_config", "vision_config")) and hasattr(model, "logit_scale")


def _number(config: Any, name: str, otherwise: int) -> int:
    for each in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        found = getattr(each, name, None)
        if isinstance(found, (list, tuple)):
            found = found[0]
        if isinstance(found, int):
            return found
    return otherwise


def result(model: nn.Module, given: dict[str, Tensor], n: int) -> Tensor:
    """What a loss is made of: the first of a model's results that needs a gradient and has a part for every sample.

    Raises:
        Unbuildable: there is none.
    """
    lines = any(name.endswith("grid_thw") for name in given)
    if lines:
        given = {name: x if name.endswith("grid_thw") else x.flatten(0, 1) for name, x in given.items()}
    out = model(**given)
    for x in out.values() if hasattr(out, "values") else out:
        if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point() and x.dim():
            if x.shape[0] == n:
                return x
            if lines and x.shape[0] % n == 0:
                return x.unflatten(0, (n, -1))
    raise Unbuildable("no result has a part for every sample")
