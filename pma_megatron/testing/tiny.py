"""A tiny real Megatron run on the CPU: GPT, DDP, optimizer, LR schedule, checkpoints.

Everything is megatron-core's own; only the loop around it is here. Build one `TinyTrainer` in each
rank of a gloo job (see `run_ranks`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pma_megatron.megatron.replicas import forward_hooks_off, rates_kept
from pma_megatron.testing import core_api, corpus, cpu, state, store
from pma_megatron.testing.config import TinyConfig


class TinyTrainer:
    """One rank of a tiny run; every method is called by all ranks together.

    `iteration` and `consumed_samples` count as Megatron's; `grad_norm` is the global L2 norm of the
    last iteration's gradient before clipping, NaN before the first; `args` is stored with each
    checkpoint, on top of the Megatron arguments. Needs an initialised process group whose size is a
    multiple of the model-parallel sizes; sets up Megatron's parallel state, so there is one trainer
    per process at a time.

    Raises ValueError when the batch sizes do not divide over the data-parallel ranks.
    """

    def __init__(self, config: TinyConfig) -> None:
        cpu.install()
        self.config = config
        self.iteration = 0
        self.consumed_samples = 0
        self.grad_norm = math.nan
        self.floating_point_operations = 0
        self.args: dict[str, Any] = {}
        self._initialise_parallel()
        self.models = core_api.build_model(config, self._core_config)
        self.optimizer = core_api.build_optimizer(config, self.models)
        self.scheduler = self._build_scheduler()
        self._core_config.grad_scale_func = self.optimizer.scale_loss

    def train(self, iterations: int) -> list[float]:
        """Train on and return the loss of each iteration, the same on all ranks."""
        losses = []
        for _ in range(iterations):
            losses.append(self._step())
            self.scheduler.step(increment=self.config.global_batch_size)
            self.iteration += 1
            self.consumed_samples += self.config.global_batch_size
            self.floating_point_operations += self._operations_per_iteration()
        return losses

    def step_with_lr_zero(self) -> float:
        """One optimizer step with learning rate and weight decay 0; returns its loss.

        Model weights are written anew from the main params. Moments, the optimizer's step count and
        `expert_bias` move; the main params, `iteration`, samples and schedule stay.
        """
        groups = list(self.optimizer.param_groups)
        before = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        loss = self._step()
        for group, (lr, weight_decay) in zip(groups, before, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        return loss

    def evaluate(self, batches: int = 4) -> float:
        """Mean loss over the first `batches` global batches of the held-out text."""
        losses = []
        with forward_hooks_off(self.models), core_api.evaluating(self.models):
            for index in range(batches):
                first = index * self.config.global_batch_size
                losses.append(self._forward_backward(first, held_out=True))
        return sum(losses) / len(losses)

    def held_out_losses(self, batches: int = 4) -> Iterator[torch.Tensor]:
        """The losses that `evaluate` averages, one per microbatch, to take gradients of.

        For a trainer on one rank.
        """
        for model in self.models:
            model.eval()
        try:
            for index in range(batches):
                first = index * self.config.global_batch_size
                for inputs, labels in self._microbatch_stream(first, held_out=True):
                    yield _mean_loss(_losses(inputs, labels, self.models[0]))[0]
        finally:
            for model in self.models:
                model.train()

    def save(self, root: str | Path) -> Path:
        """Write a checkpoint of this iteration below `root`, as Megatron-LM training does."""
        with forward_hooks_off(self.models):
            return store.save(self, Path(root))

    def load(self, root: str | Path, iteration: int | None = None) -> int:
        """Resume from a checkpoint below `root`, by default the tracker's; returns the iteration.

        Raises FileNotFoundError when there is no tracker and no `iteration`.
        """
        with forward_hooks_off(self.models):
            return store.load(self, Path(root), iteration)

    def roll_back(self, root: str | Path, iteration: int) -> None:
        """Model, optimizer and random states of a checkpoint; data and LR schedule move on."""
        stands = self.iteration, self.consumed_samples, self.floating_point_operations
        steps = self.scheduler.num_steps
        with rates_kept(self.optimizer):
            self.load(root, iteration)
        self.iteration, self.consumed_samples, self.floating_point_operations = stands
        self.scheduler.num_steps = steps
        self.scheduler.step(increment=0)

    def main_params(self) -> dict[str, torch.Tensor]:
        """fp32 main params of this rank's model shard by parameter name, whole on every rank."""
        tensors = state.optimizer_tensors(self.models, self.optimizer)
        return {name: values["param"] for name, values in tensors.items()}

    def model_params(self) -> dict[str, torch.Tensor]:
        """Weights that the forward pass uses (bf16 or fp32), by parameter name."""
        return state.model_params(self.models)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Buffers that checkpoints hold (`expert_bias`), by name."""
        return state.buffers(self.models)

    def optimizer_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """`exp_avg` and `exp_avg_sq` of this rank's model shard by parameter name, fp32."""
        tensors = state.optimizer_tensors(self.models, self.optimizer)
        return {
            name: {key: value for key, value in values.items() if key != "param"}
            for name, values in tensors.items()
        }

    def places(self) -> dict[str, list[state.StoredPiece]]:
        """Where each parameter and buffer of this rank lies in the tensors of a checkpoint."""
        return state.places(self.models, core_api.content_metadata(self.config))

    def snapshot(self) -> dict[str, Any]:
        """All of the above as plain tensors, dicts and tuples, to be stored beside a checkpoint.

        Keys: `iteration`, `consumed_samples`, `ranks`, `main_params`, `model_params`, `buffers`,
        `optimizer_state`, `places` (fields of `state.StoredPiece` by name).
        """
        tensors = state.optimizer_tensors(self.models, self.optimizer)
        places = self.places()
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "ranks": self.ranks(),
            "main_params": {name: values.pop("param") for name, values in tensors.items()},
            "model_params": self.model_params(),
            "buffers": self.buffers(),
            "optimizer_state": tensors,
            "places": {name: [asdict(piece) for piece in places[name]] for name in places},
        }

    def ranks(self) -> dict[str, int]:
        """This rank's place in each kind of parallelism: `tp`, `pp`, `ep`, `dp`, `expert_dp`."""
        from megatron.core import parallel_state

        return {
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "ep": parallel_state.get_expert_model_parallel_rank(),
            "dp": parallel_state.get_data_parallel_rank(),
            "expert_dp": parallel_state.get_expert_data_parallel_rank(),
        }

    def learning_rate(self) -> float:
        """Rate that the next iteration uses."""
        return float(self.optimizer.param_groups[0]["lr"])

    def close(self) -> None:
        """Take Megatron's parallel state down, so that another trainer can be built."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()

    def _initialise_parallel(self) -> None:
        from megatron.core import parallel_state
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        config = self.config
        per_step = config.micro_batch_size * (dist.get_world_size() // config.model_parallel_size)
        if per_step == 0 or config.global_batch_size % per_step:
            raise ValueError(
                f"global_batch_size={config.global_batch_size} is not a multiple of "
                f"micro_batch_size x data-parallel size = {per_step}"
            )
        self._microbatches = config.global_batch_size // per_step
        core_api.call(
            parallel_state.initialize_model_parallel,
            **vars(config),
            expert_tensor_parallel_size=1 if config.num_experts else None,
        )
        destroy_num_microbatches_calculator()
        seed = config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        self._core_config = core_api.transformer_config(config)

    def _build_scheduler(self) -> Any:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        config, batch = self.config, self.config.global_batch_size
        style: dict[str, Any] = {"lr_decay_style": "constant", "lr_decay_steps": 1 << 40}
        if config.decay != "constant":
            style = {
                "lr_decay_style": "WSD",
                "lr_decay_steps": (config.decay_start_iter + config.decay_iters) * batch,
                "wsd_decay_steps": config.decay_iters * batch,
                "lr_wsd_decay_style": config.decay,
            }
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=0.0,
            lr_warmup_steps=config.warmup_iters * batch,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
            **style,
        )

    def _step(self) -> float:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._forward_backward(self.consumed_samples, held_out=False)
        _, grad_norm, _ = self.optimizer.step()
        self.grad_norm = float(grad_norm)
        return loss

    def _forward_backward(self, first_sample: int, *, held_out: bool) -> float:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        chunks = [self._microbatch_stream(first_sample, held_out) for _ in self.models]
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=chunks if len(chunks) > 1 else chunks[0],
            model=self.models if len(chunks) > 1 else self.models[0],
            num_microbatches=self._microbatches,
            seq_length=self.config.seq_length,
            micro_batch_size=self.config.micro_batch_size,
            forward_only=held_out,
        )
        # Only the last stage has losses; the sum over all ranks makes them everyone's.
        total = torch.zeros(2, dtype=torch.float64)
        if core_api.is_last_stage():
            total[0] = sum(float(report["lm loss"]) for report in reports)
            total[1] = len(reports)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _microbatch_stream(self, first: int, held_out: bool) -> Iterator[tuple[torch.Tensor, ...]]:
        config = self.config
        for numbers in self._sample_numbers(first):
            yield corpus.batch(
                numbers,
                seq_length=config.seq_length,
                seed=config.seed,
                vocab_size=config.vocab_size,
                held_out=held_out,
            )

    def _sample_numbers(self, first: int) -> Iterator[list[int]]:
        """This data-parallel rank's samples of the global batch from `first` on, by microbatch."""
        from megatron.core import parallel_state

        micro = self.config.micro_batch_size
        size = parallel_state.get_data_parallel_world_size() * micro
        start = first + parallel_state.get_data_parallel_rank() * micro
        for index in range(self._microbatches):
            yield [start + index * size + j for j in range(micro)]

    def _operations_per_iteration(self) -> int:
        """Rough, but the same on all ranks: six per token and weight."""
        config = self.config
        weights = config.num_layers * 12 * config.hidden_size**2
        weights += 2 * config.vocab_size * config.hidden_size
        return 6 * config.global_batch_size * config.seq_length * weights


def _forward_step(data: Iterator[tuple[torch.Tensor, ...]], model: Any) -> tuple[Any, Any]:
    inputs, labels = next(data)
    return _losses(inputs, labels, model), _mean_loss


def _losses(inputs: torch.Tensor, labels: torch.Tensor, model: Any) -> Any:
    inputs, labels = inputs.cuda(), labels.cuda()  # on the CPU these stay where they are
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels)


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"lm loss": loss.detach().clone()}  # the schedule scales `loss` in place
