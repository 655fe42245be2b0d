"""Per-task weights on the CPU: the batch in segments of one weight each.

`forward.py` and `backward.py` walk the segments (`batch.py`); `collected.py` holds what the second collects, and
`weight_grads.py` makes each task's gradient of a shared weight, `norm_grads.py` those of norms. `low_rank.py` is
`task_lora`, with a walk of its own.

Segments with many rows (output pixels) go through torch's own convolution: oneDNN is hard to beat, and what costs is
around it. One scratch weight holds `W + s_t Delta_t` of one task at a time, tasks that see W itself are one segment,
samples are copied only where calls on the runs in which they lie would cost more, and the weight gradient of a task is
spread over dDelta, dW and the gate while it is in the cache. Segments with few rows are bound by the weights, which
oneDNN would reorder first: they go through `csrc/cpu/task_weights/task_conv.cpp`, which reads each weight once and
copies no sample. Pixelwise filters on rows side by side may also be plain matrix products. How many rows are few, and
which way is the fastest, stands in a table that is measured (`ways.py`, docs/kernels/tuning.md).

Where oneDNN has no arithmetic for a 16-bit dtype, torch would add up in 16 bits. Such samples and gradients are widened
to float32 here, once for all tasks, and so is a weight while it is staged; results are rounded once (`widen`).
"""
