"""Attention with parameters in its mask, and torch's multi-head attention in single calls, so that each is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.task_gradients.one_pass.layers.broadcast import lift
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    from_parameters,
)
from fastmtl.task_gradients.one_pass.rules.registry import axes_of_result
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _attention(tracker: LayerTracker, call: TorchCall) -> Followed:
    """A mask that is computed from parameters, such as a relative position bias."""
    names = ("query", "key", "value", "attn_mask")
    given = {n: call.argument(k, n) for k, n in enumerate(names)}
    known = {n: tracker.axis_of(x) for n, x in given.items() if x is not None}
    carrier, axis = next((n, axis) for n, axis in known.items() if isinstance(axis, PerSample))
    right = given[carrier].dim() - axis.axis
    if right < 3:
        raise Unproven("attention over the axis of the samples")
    args, kwargs = call.args, call.kwargs
    for k, n in enumerate(names):
        if given[n] is not None and from_parameters(tracker, given[n]):
            args, kwargs = _with(args, kwargs, k, n, lift(tracker, given[n], right, axis))
    out = call.func(*args, **kwargs)
    return out, axes_of_result(call._replace(args=args, kwargs=kwargs, out=out))


def _with(
    args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of which one has another value."""
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return tuple(args), {**kwargs, name: value}


def _multi_head(tracker: LayerTracker, call: TorchCall) -> Followed:
    with tracker:
        out, weights = _multi_head_attention(*call.args, **call.kwargs)
    if weights is None:
        return (out, None), [tracker.axis_of(out)]
    return (out, weights), [tracker.axis_of(out), tracker.axis_of(weights)]


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` for batched input, time first: `[L, N, E]`."""
    if query.dim() != 3 or static_k is not None or static_v is not None:
        raise ValueError("one_pass: multi-head attention without a batch dimension, or with static_k or static_v")
    length, n, width = query.shape
    head_dim = width // num_heads
    q, k, v = _project(
        query, key, value, in_proj_weight, in_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
    )  # fmt: skip

    mask = _additive(attn_mask, q)
    padding = _additive(key_padding_mask, q)
    more = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, n, width)])
        v = torch.cat([v, bias_v.expand(1, n, width)])
        more += 1
    q, k, v = (x.reshape(x.shape[0], n, num_heads, head_dim).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        zero = torch.zeros(n, num_heads, 1, head_dim, dtype=k.dtype, device=k.device)
        k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
        more += 1
    if mask is not None:
        mask = _longer(mask, more)
        if mask.dim() == 3:
            mask = mask.reshape(n, num_heads, length, -1)
    if padding is not None:
        padding = _longer(padding, more).reshape(n, 1, 1, -1)
        mask = padding if mask is None else mask + padding

    dropout = dropout_p if training else 0.0
    if not need_weights:
        causal = is_causal and padding is None and not more  # the mask says no more than that
        out = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        weights = None
    else:
        scores = (q * head_dim**-0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        out = weights @ v
        if average_attn_weights:
            weights = weights.mean(1)
    out = out.permute(2, 0, 1, 3).reshape(length, n, width)
    return F.linear(out, out_proj_weight, out_proj_bias), weights


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    apart: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if apart is None:
        assert weight is not None
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
            return q, k, v
        if key is value:
            width = query.shape[-1]
            wq, rest = weight.split([width, 2 * width])
            bq, other = (None, None) if bias is None else bias.split([width, 2 * width])
            k, v = F.linear(key, rest, other).chunk(2, -1)
            return F.linear(query, wq, bq), k, v
        wq, wk, wv = weight.chunk(3)
    else:
        wq, wk, wv = apart  # type: ignore[assignment]
    bq, bk, bv = (None, None, None) if bias is None else bias.chunk(3)
    return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Where True, nothing is looked at: minus infinity."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _longer(mask: Tensor, more: int) -> Tensor:
    # not F.pad, which torch.compile does not show to modes
    return torch.cat([mask, mask.new_zeros((*mask.shape[:-1], more))], -1) if more else mask


LAYERS: dict[str, Layer] = {
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
}
