"""Mixins for the `Trainer` of `transformers`: surgery on several losses, or on samples of a task each."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmtl.methods import Weighting
from fastmtl.parameters import Params
from fastmtl.surgery.result import Surgery
from fastmtl.task_gradients.bank import GradientBank
from fastmtl.task_gradients.one_pass.context import one_pass

# beside the state of the optimizer, in the folder of a checkpoint
METHOD_FILE = "surgery_method.pt"


class _SurgeryTraining:
    """What both have in common. `Any`: the attributes of a `Trainer`, which stands behind this class."""

    method: str | Weighting = "pcgrad"
    shared: Params | None = None
    surgery: Surgery | None = None
    accelerator: Any
    args: Any
    is_deepspeed_enabled: bool
    _bank: Any = None
    _model: Any = None  # the one that the bank is of

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if issubclass(base, _SurgeryTraining) and base is not cls:
                return
            if base.__name__ == "Trainer" and base.__module__.startswith("transformers."):
                mixin = next(x.__name__ for x in cls.__mro__ if x.__module__ == __name__)
                raise TypeError(
                    f"class {cls.__name__}: {mixin} must come before the Trainer, whose training_step would take its "
                    f"place: class {cls.__name__}({mixin}, Trainer)"
                )

    def _check_training(self) -> None:
        """Raises where the training that was asked for leaves no place for a surgery, or would ignore a part of it."""
        who, optimizer = type(self).__name__, str(getattr(self.args.optim, "value", self.args.optim))
        if self.is_deepspeed_enabled:
            raise RuntimeError(f"{who}: DeepSpeed owns the gradients; train with DDP or fully_shard")
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"{who}: one process on {self.args.n_gpu} GPUs is nn.DataParallel, whose replicas hold no gradients; "
                "start a process for each GPU (torchrun), or show one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if "layerwise" in optimizer or "lomo" in optimizer:
            raise ValueError(
                f"{who}: optim={optimizer!r} changes parameters during the backward pass, before there can be a surgery"
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """That of the `Trainer`, which enters it for each training and each batch size that it tries."""
        self._check_training()
        self._bank = self._model = None
        try:
            return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._bank = self._model = None

    @contextlib.contextmanager
    def _step_of(self, model: Any) -> Iterator[None]:
        """No bank of another model inside, and none left of a step that raises."""
        if model is not self._model:
            self._bank, self._model = None, model
        try:
            yield
        except BaseException:
            self._bank = None
            raise

    def _loss_scale(self) -> float | None:
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.get_scale()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if hasattr(self.method, "state_dict") and self.args.should_save:
            torch.save(self.method.state_dict(), Path(output_dir, METHOD_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or not hasattr(self.method, "load_state_dict"):
            return
        file = Path(checkpoint, METHOD_FILE)
        if file.exists():
            self.method.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        else:
            warnings.warn(
                f"{checkpoint} has no {METHOD_FILE}: {type(self.method).__name__} goes on from the state that it has",
                stacklevel=2,
            )

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
    `compute_loss`, which returns the sum of the losses here. Checkpoints hold the state of the method.

    Attributes:
        method: as for `fastmtl.backward`; of the class or of the trainer.
        shared: the shared parameters (or their module), as for `fastmtl.GradientBank`. None: those that two or more
            losses reach. Needed for compiled models.
        surgery: what the latest surgery has seen. It is added to the logged loss, as `surgery/...`.

    Raises:
        TypeError: (of the class) the `Trainer` comes first. (In a step) `task_losses` returns no dict.
        ValueError: (when training begins) `label_smoothing_factor` or `compute_loss_func`, which `task_losses` takes
            the place of; an optimizer that steps during the backward pass. (In a step) no task has a loss; a task that
            the first step had not named.
        RuntimeError: (when training begins) DeepSpeed, which owns the gradients; one process on several GPUs.

    Source: as `fastmtl.GradientBank`.

    Example:
        >>> class MyTrainer(LossesTraining):  # behind it: transformers.Trainer
        ...     def task_losses(self, model, inputs):
        ...         scores = model(**inputs)
        ...         return {"left": scores[:, 0].mean(), "right": scores[:, 1].mean()}
        >>> MyTrainer.method
        'pcgrad'
    """

    # as of the `Trainer`: whether the losses are parts of that of the whole step; None: where they had the number
    loss_is_scaled_for_ga: bool | None = None

    def task_losses(self, model: Any, inputs: dict[str, Any]) -> Mapping[str, Tensor | None]:
        """The losses of a batch by task, to be written by the user.

        Args:
            model: the model as the `Trainer` has prepared it (in DDP, compiled): call this one.
            inputs: the batch, on the device.
            num_items_in_batch: handed over if the method takes it: what the `Trainer` has counted, the labels other
                than -100 under `labels` in all micro-batches of the step, on all ranks (0-d); None where it counts
                none, as for a model that neither takes `**kwargs` nor has `accepts_loss_kwargs = True`.

        Returns:
            Scalars by the task's name, the same names in every step; None: the batch has nothing of that task. With
            accumulation a task's loss is the mean over the micro-batches, so each is to be a mean of its own. Where
            `num_items_in_batch` is handed over and not None it is their sum, and that over ranks: each loss is to be
            a sum divided by that number.
        """
        raise NotImplementedError(f"{type(self).__name__}.task_losses: return a dict from the task's name to its loss")

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """The sum of the losses, for evaluation. It knows no outputs: `prediction_loss_only=True`."""
        losses = self._losses(model, inputs, kwargs.get("num_items_in_batch"))
        total = sum(x for x in losses.values() if x is not None)
        return (total, {}) if return_outputs else total

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A forward pass and the backward passes of a micro-batch; behind the last one of a step, the surgery."""
        trainer: Any = self
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):  # optimizers without a schedule have modes, too
            trainer.optimizer.train()
        inputs = trainer._prepare_inputs(inputs)
        with self._step_of(model):
            # the bank averages over ranks
            with self.accelerator.no_sync(model):
                with trainer.compute_loss_context_manager():
                    losses = self._losses(model, inputs, num_items_in_batch)
                if self._bank is None:
                    self._bank = GradientBank(model, list(losses), shared=self.shared)
                scaled = self.loss_is_scaled_for_ga
                if scaled is None:
                    scaled = num_items_in_batch is not None and self._takes_number()
                parts = 1 if scaled else trainer.current_gradient_accumulation_steps
                here = {name: x / parts for name, x in losses.items() if x is not None}
                for k, (name, loss) in enumerate(here.items()):
                    with self._bank.task(name):
                        self.accelerator.backward(loss, retain_graph=k < len(here) - 1)
            if self.accelerator.sync_gradients:
                self.surgery = self._bank.apply(self.method, loss_scale=self._loss_scale())
        return sum(loss.detach() for loss in here.values())

    def _check_training(self) -> None:
        super()._check_training()
        trainer: Any = self
        given = [
            name
            for name, is_given in (
                ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
                ("compute_loss_func", trainer.compute_loss_func is not None),
            )
            if is_given
        ]
        if given:
            raise ValueError(
                f"{type(self).__name__}: {given[0]} does not reach task_losses, which makes the losses here: leave it "
                "out, and write it there (F.cross_entropy has label_smoothing=)"
            )

    def _takes_number(self) -> bool:
        return "num_items_in_batch" in inspect.signature(self.task_losses).parameters

    def _losses(self, model: Any, inputs: dict[str, Any], number: Tensor | None) -> Mapping[str, Tensor | None]:
        given = {"num_items_in_batch": number} if self._takes_number() else {}
        losses = self.task_losses(model, inputs, **given)
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"task_losses: expected a dict from the task's name to its loss, got {type(losses).__name__}"
            )
        if not any(x is not None for x in losses.values()):
            raise ValueError("task_losses: expected the loss of at least one task, got none")
        if given and number is not None and self.args.average_tokens_across_devices:
            # it counts the labels of all ranks, over which the gradients are averaged
            losses = {name: None if x is None else x * self.accelerator.num_processes for name, x in losses.items()}
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
        TypeError: (of the class) the `Trainer` comes first. (When training begins) there are no `tasks`.
        ValueError: (when training begins) an optimizer that steps during the backward pass.
        RuntimeError: (when training begins) DeepSpeed, which owns the gradients; one process on several GPUs.
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

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The step of the `Trainer` inside `one_pass`; behind the last micro-batch, the surgery."""
        with self._step_of(model):
            ids, inputs = self._apart(inputs)
            with one_pass(model, ids, self.tasks, shared=self.shared, bank=self._bank, **self.options) as bank:
                loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
            self._bank = bank
            if self.accelerator.sync_gradients:
                self.surgery = bank.apply(self.method, loss_scale=self._loss_scale())
                self._bank = None
        return loss

    def _check_training(self) -> None:
        if getattr(self, "tasks", None) is None:
            raise TypeError(
                f"{type(self).__name__}.tasks: expected the names of the tasks, or their number, as an attribute of "
                "the class or of the trainer"
            )
        super()._check_training()

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
