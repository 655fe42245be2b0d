"""Torch functions by what they do to the axis of the samples."""

from __future__ import annotations

import types
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


# dunder methods, and second names of one function
_ALIASES = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add",
    "__sub__": "sub", "__rsub__": "sub", "__isub__": "sub", "rsub": "sub", "subtract": "sub",
    "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul", "multiply": "mul",
    "__truediv__": "div", "__itruediv__": "div", "true_divide": "div", "divide": "div",
    "__rtruediv__": "rdiv", "__rdiv__": "rdiv", "__div__": "div", "__idiv__": "div",
    "__neg__": "neg", "negative": "neg", "__pos__": "positive", "__abs__": "abs", "absolute": "abs",
    "__pow__": "pow", "__rpow__": "pow", "__ipow__": "pow", "float_power": "pow",
    "__floordiv__": "floor_divide", "__rfloordiv__": "floor_divide", "__mod__": "remainder",
    "__matmul__": "matmul", "__rmatmul__": "rmatmul", "mm": "matmul", "bmm": "matmul", "mv": "matmul", "dot": "matmul",
    "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "__invert__": "bitwise_not",
    "__rand__": "bitwise_and", "__ror__": "bitwise_or", "__rxor__": "bitwise_xor",
    "__getitem__": "getitem", "__setitem__": "setitem",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim",
    "ravel": "flatten", "linear_": "linear", "_softmax": "softmax", "special_expit": "sigmoid",
    "cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss", "nll_loss2d": "nll_loss",
    "_scaled_dot_product_attention": "scaled_dot_product_attention",
    "clip": "clamp", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "fix": "trunc",
    "special_log_softmax": "log_softmax", "special_softmax": "softmax", "special_logsumexp": "logsumexp",
    "linalg_vector_norm": "norm", "linalg_norm": "norm", "vector_norm": "norm",
    "rnn_tanh": "rnn", "rnn_relu": "rnn",
}  # fmt: skip

# properties and questions, whose results carry no gradient
PLAIN = frozenset(
    _words("""
    shape.get device.get dtype.get requires_grad.get is_leaf.get grad_fn.get ndim.get layout.get grad.get
    grad.set is_cuda.get is_cpu.get is_mps.get is_meta.get is_sparse.get is_quantized.get is_nested.get
    is_mkldnn.get is_xpu.get is_xla.get is_mtia.get is_hpu.get is_ipu.get is_maia.get is_vulkan.get is_ort.get
    is_sparse_csr.get name.get _version.get output_nr.get _backward_hooks.get _base.get itemsize.get nbytes.get
    volatile.get _grad.get _grad.set _grad_fn.get requires_grad.set names.get retains_grad.get _cdata.get
    _post_accumulate_grad_hooks.get size dim ndimension numel nelement stride storage_offset element_size
    is_floating_point is_complex is_contiguous is_same_size is_signed is_inference is_conj is_neg is_shared
    is_pinned is_nonzero data_ptr untyped_storage storage get_device item tolist numpy __len__ __bool__ __int__
    __float__ __index__ __repr__ __format__ __hash__ __contains__ __array__ __dlpack__ __dlpack_device__
    register_hook register_post_accumulate_grad_hook retain_grad is_tensor is_storage has_names equal allclose
    is_grad_enabled get_default_dtype result_type can_cast promote_types iinfo finfo dense_dim sparse_dim
    is_coalesced _is_view is_set_to broadcast_shapes is_autocast_enabled autocast_increment_nesting
    autocast_decrement_nesting _use_count __reduce_ex__ set_autocast_enabled set_autocast_dtype
    set_autocast_cache_enabled is_autocast_cache_enabled get_autocast_dtype clear_autocast_cache
    get_autocast_gpu_dtype get_autocast_cpu_dtype _has_compatible_shallow_copy_type
    """)
)

# in the formulas of our ops, where what they were given meets the gradients of what they returned
BACKWARDS = frozenset(
    f"{op}_backward.default"
    for op in ("task_conv2d", "task_linear", "task_lora", "task_scale_shift", "task_batch_norm")
)

# draw random numbers
RANDOM = frozenset(
    _words("""
    dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d
    rrelu bernoulli normal uniform gumbel_softmax multinomial poisson _standard_gamma
    """)
)

POINTWISE = frozenset(
    _words("""
    broadcast_tensors copy abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and
    bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clone contiguous copysign cos cosh
    cpu cuda deg2rad detach digamma div rdiv double bfloat16 half float int long bool short char byte to type
    type_as elu eq erf erfc erfinv exp exp2 expm1 fill floor floor_divide fmax fmin fmod frac ge
    gelu gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot isclose isfinite isinf isnan
    isneginf isposinf isreal ldexp le leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit log_sigmoid lt masked_fill maximum minimum
    mish mul mvlgamma nan_to_num ne neg nextafter positive pow rad2deg real reciprocal relu relu6 remainder
    round rrelu rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign special_entr
    special_erf special_erfc special_erfcx special_expm1 special_log1p special_i0 special_i0e special_ndtr
    special_xlog1py special_xlogy special_exp2 special_gammaln sqrt square sub tan tanh tanhshrink
    threshold trunc where xlogy dropout native_dropout alpha_dropout bernoulli zeros_like ones_like full_like
    rand_like randn_like empty_like polygamma zero requires_grad pin_memory data.get real.get
    complex polar conj conj_physical resolve_conj resolve_neg imag imag.get
    fake_quantize_per_tensor_affine quantize_per_tensor dequantize normal uniform scaled_by_gate
    _standard_gamma
    """)
)

# of a sum over samples these make a sum over samples
LINEAR = frozenset(
    _words("""
    add sub neg positive clone contiguous to float double half bfloat16 type type_as view reshape flatten
    squeeze unsqueeze expand expand_as broadcast_to transpose t permute movedim sum mean nansum getitem select
    narrow unbind split chunk stack cat hstack vstack view_as reshape_as atleast_1d cpu cuda sum_to_size
    real.get T.get mT.get masked_select index_select
    """)
)

# (names, how many of the last dimensions they work on): everything before is independent, and keeps its place
SPATIAL: dict[str, int] = {}
for _k, _names in (
    (1, """max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d lp_pool1d max_pool1d_with_indices one_hot
           multinomial"""),
    (2, """max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d fractional_max_pool2d tril triu
           max_pool2d_with_indices scaled_dot_product_attention matrix_exp linalg_inv inverse
           linalg_cholesky linalg_solve linalg_det logdet det"""),
    (3, """max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d pixel_shuffle pixel_unshuffle
           max_pool3d_with_indices"""),
):  # fmt: skip
    for _name in _words(_names):
        SPATIAL[_name] = _k

# work on everything behind the first dimension (which is the samples')
BATCH_FIRST = frozenset(
    _words("""
    interpolate upsample upsample_nearest upsample_bilinear fold im2col col2im
    affine_grid dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout local_response_norm
    instance_norm group_norm native_group_norm channel_shuffle
    max_unpool1d max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa
    """)
)

# losses without parameters: those that compare element by element, and those that take a sample as a whole
ELEMENTWISE_LOSSES = frozenset(
    _words("""
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div poisson_nll_loss gaussian_nll_loss soft_margin_loss
    hinge_embedding_loss margin_ranking_loss binary_cross_entropy binary_cross_entropy_with_logits
    """)
)
SAMPLE_LOSSES = frozenset(
    _words("""
    cross_entropy nll_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss
    cosine_embedding_loss triplet_margin_loss triplet_margin_with_distance_loss ctc_loss
    """)
)
LOSSES = ELEMENTWISE_LOSSES | SAMPLE_LOSSES

# over one dimension or several: (linear in their input)
REDUCTIONS: dict[str, bool] = dict.fromkeys(("sum", "mean", "nansum", "nanmean"), True) | dict.fromkeys(
    _words("""
    amax amin max min logsumexp norm var std var_mean std_mean prod any all argmax argmin median nanmedian mode
    aminmax count_nonzero quantile nanquantile kthvalue
    """),
    False,
)

# along one dimension, whose length may change
ALONG = frozenset(
    _words("""
    softmax log_softmax softmin gumbel_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort topk msort
    flip normalize diff cosine_similarity pairwise_distance glu
    """)
)


def name_of(func: Any) -> str:
    """One name for a torch function and the tensor method of the same meaning; properties end in `.get` or `.set`."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        # a property in Python has no name of its own before 3.13
        owner = func.__self__.fget if isinstance(func.__self__, property) else func.__self__
        return owner.__name__ + (".get" if name == "__get__" else ".set")
    found = _ALIASES.get(name)
    if found is not None:
        return found
    if name.endswith("_") and not name.startswith("__"):
        name = name.rstrip("_")
        return _ALIASES.get(name, name)
    return name


def writes(func: Any) -> bool:
    """Whether a function changes its first argument in place."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_WRITING)
    return name.endswith("_")


_NOT_WRITING = frozenset(("__index__", "__int__", "__invert__", "__iter__"))


def in_python(func: Any) -> bool:
    """Whether it is one of torch's functions that are written in Python and look for overrides."""
    return isinstance(func, types.FunctionType) and func.__module__ in _PYTHON


_PYTHON = frozenset(("torch.nn.functional", "torch.functional", "torch._tensor"))

# torch.compile takes what these answer for constants: torch.compiler.assume_constant_result, without importing dynamo
for _f in (name_of, writes, in_python):
    _f._dynamo_marked_constant = True  # type: ignore[union-attr]
