"""Mixins for the `Trainer` of `transformers`: surgery on several losses, or on samples of a task each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastmtl.methods import Weighting
from fastmtl.parameters import Params
from fastmtl.surgery.result import Surgery
from fastmtl.task_gradients.bank import GradientBank
from fastmtl.task_gradients.one_pass.bank import OnePassBank
from fastmtl.task_gradients.one_pass.context import one_pass


class _SurgeryTraining:
    """What both have in common. `Any`: the attributes of a `Trainer`, which stands behind this class."""

    method: str | Weighting = "pcgrad"
    shared: Params | None = None
    surgery: Surgery | None = None
    accelerator: Any
    args: Any

    def _loss_scale(self) -> float | None:
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.get_scale()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the latest surgery has seen to the lines of the training's loss. Waits for the device then."""
        if "loss" in logs and self.surgery is not None:
            logs = logs | {name: float(x) for name, x in self.surgery.log_dict("surgery/").items()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class LossesTraining(_SurgeryTraining):
    """Has a `Trainer` of `transformers` take a step on several losses, with gradient surgery on what they share.

    Write `class MyTrainer(LossesTraining, Trainer)` with a method `task_losses`. A step is a forward pass and a
    backward pass for each loss; with `gradient_accumulation_steps` there is one surgery, on the gradients of all
    micro-batches.
    Mixed precision, clipping and data-parallel training are those of the `Trainer`. Evaluation is too: it calls
    `compute_loss`, which returns the sum of the losses here.

    Attributes:
        method: as for `fastmtl.backward`; of the class or of the trainer.
        shared: the shared parameters (or their module), as for `fastmtl.GradientBank`. None: those that two or more
            losses reach. Needed for compiled models.
        surgery: what the latest surgery has seen. It is added to the logged loss, as `surgery/...`.

    Raises:
        TypeError: (in a step) `task_losses` returns no dict.
        ValueError: (in a step) no task has a loss; a task that the first step had not named.
        RuntimeError: (in a step) under DeepSpeed, which owns the gradients.

    Source: as `fastmtl.GradientBank`.

    Example:
        >>> class MyTrainer(LossesTraining):  # behind it: transformers.Trainer
        ...     def task_losses(self, model, inputs):
        ...         scores = model(**inputs)
        ...         return {"left": scores[:, 0].mean(), "right": scores[:, 1].mean()}
        >>> MyTrainer.method
        'pcgrad'
    """

    _bank: GradientBank | None = None

    def task_losses(self, model: Any, inputs: dict[str, Any]) -> Mapping[str, Tensor | None]:
        """The losses of a batch by task, to be written by the user.

        Args:
            model: the model as the `Trainer` has prepared it (in DDP, compiled): call this one.
            inputs: the batch, on the device.

        Returns:
            Scalars by the task's name, the same names in every step; None: the batch has nothing of that task.
        """
        raise NotImplementedError(f"{type(self).__name__}.task_losses: return a dict from the task's name to its loss")

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """The sum of the losses, for evaluation. It knows no outputs: `prediction_loss_only=True`."""
        total = sum(x for x in self._losses(model, inputs).values() if x is not None)
        return (total, {}) if return_outputs else total

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A forward pass and the backward passes of a micro-batch; behind the last one of a step, the surgery."""
        trainer: Any = self
        if trainer.is_deepspeed_enabled:
            raise RuntimeError(f"{type(self).__name__}: DeepSpeed owns the gradients; train with DDP or fully_shard")
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):  # optimizers without a schedule have modes, too
            trainer.optimizer.train()
        inputs = trainer._prepare_inputs(inputs)
        # the bank averages over ranks
        with self.accelerator.no_sync(model):
            with trainer.compute_loss_context_manager():
                losses = self._losses(model, inputs)
            if self._bank is None:
                self._bank = GradientBank(model, list(losses), shared=self.shared)
            here = {
                name: x / trainer.current_gradient_accumulation_steps for name, x in losses.items() if x is not None
            }
            for k, (name, loss) in enumerate(here.items()):
                with self._bank.task(name):
                    self.accelerator.backward(loss, retain_graph=k < len(here) - 1)
        if self.accelerator.sync_gradients:
            self.surgery = self._bank.apply(self.method, loss_scale=self._loss_scale())
        return sum(loss.detach() for loss in here.values())

    def _losses(self, model: Any, inputs: dict[str, Any]) -> Mapping[str, Tensor | None]:
        losses = self.task_losses(model, inputs)
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"task_losses: expected a dict from the task's name to its loss, got {type(losses).__name__}"
            )
        if not any(x is not None for x in losses.values()):
            raise ValueError("task_losses: expected the loss of at least one task, got none")
        return losses


class OnePassTraining(_SurgeryTraining):
    """Has a `Trainer` of `transformers` take a step on a batch in which each sample has a task, by one pass.

    Write `class MyTrainer(OnePassTraining, Trainer)` with `tasks`. The model and the loss are those of the `Trainer`;
    items hold the id of their task under `ids_key`, which the model does not get. `TrainingArguments` must have
    `remove_unused_columns=False`. With `gradient_accumulation_steps` there is one surgery, on the gradients of all
    micro-batches.

    Attributes:
        tasks: the names of the T tasks, or T.
        ids_key: where the ids `[N]` stand in a batch; 0 to T - 1, or -1 for a sample of no task.
        method: as for `fastmtl.backward`; of the class or of the trainer.
        shared: the parameters (or their module) in the bank, as for `fastmtl.one_pass`. None: all of the model.
        options: further arguments of `fastmtl.one_pass`, such as `{"memory": "stream"}`.
        surgery: what the latest surgery has seen. It is added to the logged loss, as `surgery/...`.

    Raises:
        KeyError: (in a step) the batch has no ids.
        TypeError, ValueError: (in a step) as `fastmtl.one_pass`.

    Source: as `fastmtl.one_pass`.

    Example:
        >>> class MyTrainer(OnePassTraining):  # behind it: transformers.Trainer
        ...     tasks = ("news", "reviews")
        >>> MyTrainer.ids_key
        'task_ids'
    """

    tasks: int | Sequence[str]
    ids_key: str = "task_ids"
    options: Mapping[str, Any] = {}
    _bank: OnePassBank | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The step of the `Trainer` inside `one_pass`; behind the last micro-batch, the surgery."""
        ids, inputs = self._apart(inputs)
        with one_pass(model, ids, self.tasks, shared=self.shared, bank=self._bank, **self.options) as bank:
            loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._bank = bank
        if self.accelerator.sync_gradients:
            self.surgery = bank.apply(self.method, loss_scale=self._loss_scale())
            self._bank = None
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """That of the `Trainer`, without the ids."""
        _, inputs = self._apart(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _apart(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if self.ids_key not in inputs:
            raise KeyError(
                f"{self.ids_key!r}: the batch has no ids of tasks, only {', '.join(inputs)}; "
                "TrainingArguments(remove_unused_columns=False) keeps them"
            )
        rest = {name: x for name, x in inputs.items() if name != self.ids_key}
        return inputs[self.ids_key].to(self.args.device), rest
