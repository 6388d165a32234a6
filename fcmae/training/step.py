"""One optimizer step, as training runs it and benchmarks measure it."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fcmae import precision as precisions
from fcmae.tasks.task import Losses
from fcmae.training.cuda_graphs import EagerBackward, GraphedBackward
from fcmae.training.exchange import GradientExchange, TorchDDP
from fcmae.training.finite import infectious


class TrainingStep:
    """The forward and backward passes of a step's micro-batches, and the exchange of gradients after the last.

    Args:
        loss: the mean loss of a micro-batch on the device, and its parts by name.
        accum_steps: micro-batches per step.
        graphed: replay the passes from a CUDA graph.
        exchange: sums the gradients over the ranks; None = one rank.
        scaler: scales losses in fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Sequence[Tensor]], Losses],
        device: torch.device,
        precision: str,
        *,
        accum_steps: int = 1,
        graphed: bool = False,
        exchange: GradientExchange | TorchDDP | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.device, self.accum_steps = device, accum_steps
        ranks = 1 if exchange is None or exchange.averages else exchange.size
        exchanging: Callable = contextlib.nullcontext if exchange is None else exchange
        loss = loss if exchange is None else exchange.through(loss)

        # Not a method: whoever holds it would hold the step, and a loop's loader with it.
        def run_pass(batch: Sequence[Tensor], last: bool) -> dict[str, Tensor]:
            with exchanging(last):
                with precisions.training(device, precision):
                    value, parts = loss(batch)
                    value = value / accum_steps
                shown = {f"loss_{name}": part.detach() / accum_steps for name, part in parts.items() if len(parts) > 1}
                shared = infectious(value) / ranks
                (shared if scaler is None else scaler.scale(shared)).backward()
            return {"loss": value.detach(), **shown}

        self.run_pass = run_pass
        """One pass, launched from the host."""
        self.backward: EagerBackward[dict[str, Tensor]] | GraphedBackward[dict[str, Tensor]]
        if graphed:
            self.backward = GraphedBackward(run_pass, model, accum_steps > 1, exchange)
        else:
            self.backward = EagerBackward(run_pass, model)

    def record(self, batch: Sequence[Tensor]) -> None:
        """Records the CUDA graph, before the first step, from a micro-batch like those to come."""
        assert isinstance(self.backward, GraphedBackward)
        self.backward.record(batch)

    def __call__(self, batches: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Leaves the gradients in ``.grad``. Returns ``loss``, this rank's mean, and its parts as ``loss_NAME``."""
        self.backward.start_step()
        losses: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for micro, batch in enumerate(batches):
            for name, value in self.backward(batch, last=micro == self.accum_steps - 1).items():
                losses[name] += value
        return losses

    def close(self) -> None:
        """Releases the CUDA graphs."""
        self.backward.close()
