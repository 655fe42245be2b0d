"""Multi-head attention whose projections have a small difference per task."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.nn.containers import Tasks, read_names
from fastmtl.nn.layers.gate import TapsGate
from fastmtl.nn.layers.linear import TaskLinear
from fastmtl.nn.layers.weights import Rank, check_plain
from fastmtl.nn.module import TaskComposite, as_parameter

_WAY_OUT = "leave this layer out (`where=` of convert), or write it with an nn.Linear for each projection"


class _NotRead:
    """In the place of a fused weight: torch's fused paths, which would read it, turn away from such arguments."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError("in_proj_weight: expected the weights of q_proj, k_proj and v_proj, got their fused name")


class TaskMultiheadAttention(TaskComposite):
    """`nn.MultiheadAttention` whose four projections each see `weight + gate[t] * delta[t]`, t the sample's task.

    Args:
        embed_dim: columns of query, key, value and result.
        num_heads: a divisor of `embed_dim`.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        dropout: of the attention's weights, while training.
        bias: whether the projections have shared biases.
        batch_first: whether the batch is the first dimension of query, key and value, or the second.
        gate: of each projection, as for `TaskLinear`.
        rank: as for `TaskLinear`.
        scaling: as for `TaskLinear`.
        shared: as for `TaskLinear`.
        per_task_bias: as for `TaskLinear`.
        device: of all parameters.
        dtype: of all parameters.

    `forward` has the arguments and results of `nn.MultiheadAttention`'s: query `[N, L, E]`, key and value `[N, S, E]`
    (`[L, N, E]` and `[S, N, E]` with `batch_first=False`), masks, `need_weights`, and so on; it gives the result and
    the weights, or None. The ids are `[N]`, or `[N, L]` if key and value are as long as the query. Query and key must
    be batches.

    The projections are the `TaskLinear` layers `q_proj`, `k_proj`, `v_proj` and `out_proj`. A `state_dict` of the plain
    layer, with its fused `in_proj_weight`, loads.

    Raises:
        TypeError, ValueError: sizes that do not fit; what `TaskLinear` raises; (from forward) inputs or masks whose
            shape or dtype does not fit.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> attention = TaskMultiheadAttention(8, 2, ["left", "right"], batch_first=True)
        >>> x = torch.ones(2, 5, 8)
        >>> with tasks(torch.tensor([1, 0])):
        ...     y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 5]))
    """

    # nn.TransformerEncoderLayer and nn.TransformerEncoder ask for these before they read the weights past a forward
    in_proj_weight = _NotRead()
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        tasks: Tasks,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        gate: float | TapsGate | None = None,
        rank: Rank | None = None,
        scaling: float = 1.0,
        shared: bool = True,
        per_task_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        names = read_names(tasks)
        for argument, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{argument}: expected an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{argument}: expected at least 1, got {size}")
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first: expected a bool, got {type(batch_first).__name__}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = self.vdim = embed_dim
        self.dropout, self.batch_first = float(dropout), batch_first
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer = TaskLinear(
                embed_dim, embed_dim, names, bias, gate=gate, rank=rank, scaling=scaling, shared=shared,
                per_task_bias=per_task_bias, device=device, dtype=dtype,
            )  # fmt: skip
            self.register_module(name, layer)
        self._reset_as_plain()

    @classmethod
    def from_layer(cls, layer: nn.MultiheadAttention, tasks: Tasks, **options: Any) -> TaskMultiheadAttention:
        """The same layer with a delta of zero per task in each of its projections.

        It holds the very parameters of the output's projection. The fused weight of the others comes apart into copies,
        so an optimizer must be made, or told of them, afterwards.

        Args:
            layer: an `nn.MultiheadAttention` whose query, key and value have the same number of columns.
            tasks: as for the class.
            options: `gate`, `rank`, `scaling`, `shared` and `per_task_bias` of the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: one with `kdim`, `vdim`, `add_bias_kv` or `add_zero_attn`; a weight that is computed
                (parametrizations); hooks; or what the class raises.
        """
        check_plain(layer, nn.MultiheadAttention, "forward", weight=False)
        if not layer._qkv_same_embed_dim:
            raise ValueError(
                f"layer: expected kdim and vdim as embed_dim = {layer.embed_dim}, got {layer.kdim} and {layer.vdim}; "
                f"{_WAY_OUT}"
            )
        if layer.bias_k is not None or layer.bias_v is not None:
            raise ValueError(f"layer: expected add_bias_kv False, got True; {_WAY_OUT}")
        if layer.add_zero_attn:
            raise ValueError(f"layer: expected add_zero_attn False, got True; {_WAY_OUT}")
        fused, bias = layer._parameters.get("in_proj_weight"), layer._parameters.get("in_proj_bias")
        if fused is None:
            raise ValueError("layer: expected a plain parameter 'in_proj_weight', got one that is computed")
        check_plain(layer.out_proj, nn.Linear, "forward")
        made = cls(
            layer.embed_dim, layer.num_heads, tasks, layer.dropout, bias is not None, batch_first=layer.batch_first,
            **options, device="meta",
        )  # fmt: skip
        biases = (None, None, None) if bias is None else bias.tensor_split(3)
        for inner, w, b in zip(made.inner_layers, fused.tensor_split(3), biases, strict=False):
            plain = nn.Linear(layer.embed_dim, layer.embed_dim, b is not None, device="meta").train(layer.training)
            plain.weight = nn.Parameter(w.detach().clone(), fused.requires_grad)
            if b is not None and bias is not None:
                plain.bias = nn.Parameter(b.detach().clone(), bias.requires_grad)
            inner._take(plain)
        made.out_proj._take(layer.out_proj)
        return made.train(layer.training)

    @property
    def inner_layers(self) -> tuple[TaskLinear, TaskLinear, TaskLinear, TaskLinear]:
        """The layers that hold the parts of the tasks."""
        return self.q_proj, self.k_proj, self.v_proj, self.out_proj

    def reset_parameters(self) -> None:
        """As the plain layer for weights and biases, as `TaskLinear` for what belongs to tasks."""
        for layer in self.inner_layers:
            layer.reset_parameters()
        self._reset_as_plain()

    @torch.no_grad()
    def _reset_as_plain(self) -> None:
        bound = math.sqrt(6 / (4 * self.embed_dim))
        for layer in self.inner_layers:
            weights = [layer.weight] if layer.shared else [layer.delta[name] for name in self.tasks]
            biases = [layer.bias] if layer.shared else list((layer.task_bias or {}).values())
            if layer is not self.out_proj:
                # xavier_uniform_ of the fused weight
                nn.init.uniform_(weights[0], -bound, bound)
                for w in weights[1:]:
                    w.copy_(weights[0])
            for b in biases:
                if b is not None:
                    b.zero_()

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.MultiheadAttention:
        name = self.task_name(task)
        weights = [layer.effective_weight(name) for layer in self.inner_layers[:3]]
        biases = [layer.effective_bias(name) for layer in self.inner_layers[:3]]
        plain = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, biases[0] is not None, batch_first=self.batch_first,
            device="meta",
        )  # fmt: skip
        plain.in_proj_weight = as_parameter(torch.cat(weights))
        if biases[0] is not None:
            plain.in_proj_bias = as_parameter(torch.cat([b for b in biases if b is not None]))
        self.out_proj._merge_into(plain.out_proj, name, memo)
        return plain.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # the layers inside read on; the output's projection has the same name in the plain layer
        for kind in ("weight", "bias"):
            fused = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if fused is not None:
                for name, x in zip(("q_proj", "k_proj", "v_proj"), fused.tensor_split(3), strict=True):
                    state_dict[f"{prefix}{name}.{kind}"] = x.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # --- forward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(query, key, value)
        if not self.batch_first:
            # the same tensors stay the same
            turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = turned[id(query)], turned[id(key)], turned[id(value)]
        count, length, size = query.shape[0], query.shape[1], key.shape[1]
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected a mask beside is_causal=True, which is a hint about it, got None")
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            mask = self._mask(key_padding_mask, attn_mask, (count, length, size), q.dtype)
            is_causal = is_causal and key_padding_mask is None
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        # contiguous, as of the plain layer
        return y if self.batch_first else y.transpose(0, 1).contiguous(), weights

    def _check(self, query: Any, key: Any, value: Any) -> None:
        batch = 0 if self.batch_first else 1
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
            if x.is_nested:
                raise ValueError(f"{name}: expected a padded batch, got a nested tensor")
            if x.dim() != 3 or x.shape[2] != self.embed_dim:
                axes = "[N, L, " if self.batch_first else "[L, N, "
                raise ValueError(f"{name}: expected shape {axes}{self.embed_dim}], got {list(x.shape)}")
            if x.shape[batch] != query.shape[batch]:
                raise ValueError(f"{name}: expected {query.shape[batch]} samples as query, got {x.shape[batch]}")
        if value.shape != key.shape:
            raise ValueError(f"value: expected shape {list(key.shape)} as key, got {list(value.shape)}")

    def _mask(
        self, padding: Tensor | None, attention: Tensor | None, sizes: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks in one, to be added to `[N, heads, L, S]` scores."""
        count, length, size = sizes
        found = None
        if attention is not None:
            shapes = [length, size], [count * self.num_heads, length, size]
            if list(attention.shape) not in shapes:
                raise ValueError(f"attn_mask: expected shape {shapes[0]} or {shapes[1]}, got {list(attention.shape)}")
            found = _to_add(attention, "attn_mask", dtype)
            found = found if found.dim() == 2 else found.unflatten(0, (count, self.num_heads))
        if padding is not None:
            if list(padding.shape) != [count, size]:
                raise ValueError(f"key_padding_mask: expected shape {[count, size]}, got {list(padding.shape)}")
            keys = _to_add(padding, "key_padding_mask", dtype)[:, None, None]
            found = keys if found is None else found + keys
        return found

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.q_proj._repr_of_tasks()}"


def _to_add(mask: Any, argument: str, dtype: torch.dtype) -> Tensor:
    """A mask of bools (True: not to be seen) or of numbers to add."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument}: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{argument}: expected bool or floating-point numbers, got {mask.dtype}")
    return mask.to(dtype)
