"""Two processes that train together over gloo; each saves what it found.

    python -m tests.support.processes FOLDER RANK

Every check is run once here, for starting the processes takes longer than all of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent.parent
N_PROCESSES = 2
LEARNING_RATE = 0.01


def run_checks(folder: Path) -> list[dict[str, Any]]:
    """Run all checks in two processes and return what each process saved."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(N_PROCESSES)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            if process.returncode:
                raise RuntimeError(said)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_PROCESSES)]


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    from examples.torchvision_compat import ensure_importable

    ensure_importable()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_PROCESSES
    )
    torch.save({check.__name__: found(check, rank) for check in CHECKS}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def found(check: Callable[[int], Any], rank: int) -> Any:
    """Return what a check returns, or the message of its error."""
    torch.distributed.barrier()
    try:
        return check(rank)
    except (RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def train(
    rank: int,
    wrap: Callable[[nn.Module], nn.Module],
    *,
    task_weight: float | None = 1.0,
    tap_first: bool = False,
    inside: bool = False,
    wrap_loss: bool = True,
    n_accumulated: int = 1,
) -> dict[str, Tensor]:
    """Train for two steps, each process on batches of its own, and return the gradients of the second step."""
    from renyi_kd import InfoSAMLoss, tap
    from tests.support.models import DIM, hf_batch, hf_sam

    sam = hf_sam(1)
    torch.manual_seed(2)
    infosam_loss: nn.Module = InfoSAMLoss(DIM)
    teacher = tap(hf_sam(0))
    if tap_first:
        student = tap(sam)
    wrapped = wrap(sam)
    relation = infosam_loss.relation
    if wrap_loss:
        infosam_loss = wrap(infosam_loss)
    if not tap_first:
        student = tap(sam if inside else wrapped)
    model = sam if inside else wrapped
    optimizer = torch.optim.SGD([*sam.parameters(), *relation.parameters()], lr=LEARNING_RATE)
    for step in range(2):
        batch = hf_batch(2, seed=2 * step + rank)
        optimizer.zero_grad()
        for number in range(n_accumulated):
            with ExitStack() as stack:
                if number < n_accumulated - 1:
                    stack.enter_context(model.no_sync())
                    stack.enter_context(infosam_loss.no_sync())
                masks = run_multimask(model, batch)[0]
                loss = infosam_loss(teacher, student, batch)
                if task_weight is not None:
                    loss = loss + task_weight * masks.square().mean()
                (loss / n_accumulated).backward()
        if step == 0:
            optimizer.step()
    named = {f"0.{name}": p for name, p in sam.named_parameters()} | {
        f"1.relation.{name}": p for name, p in relation.named_parameters()
    }
    return {name: whole(p.grad) for name, p in named.items() if p.grad is not None}


def run_multimask(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    return [model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"]).pred_masks]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def ddp(model: nn.Module, **settings: Any) -> nn.Module:
    return DistributedDataParallel(model, **{"find_unused_parameters": True, **settings})


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    if hasattr(model, "mask_decoder"):
        for part in (*model.vision_encoder.layers, model.mask_decoder):
            fully_shard(part)
    return fully_shard(model)


def ddp_tapped_after(rank: int) -> Any:
    return train(rank, ddp)


def ddp_tapped_before(rank: int) -> Any:
    return train(rank, ddp, tap_first=True)


def ddp_accumulating(rank: int) -> Any:
    return train(rank, ddp, n_accumulated=2)


def ddp_with_an_own_relation_module(rank: int) -> Any:
    return train(rank, ddp, wrap_loss=False)


def ddp_around_nothing_that_is_called(rank: int) -> Any:
    return train(rank, ddp, inside=True)


def ddp_without_a_search_for_unused_parameters(rank: int) -> Any:
    return train(rank, lambda model: ddp(model, find_unused_parameters=False))


def ddp_without_a_task_loss(rank: int) -> Any:
    return train(rank, ddp, task_weight=None)


def ddp_of_detached_outputs(rank: int) -> Any:
    class Detached(nn.Module):
        def __init__(self, sam: nn.Module) -> None:
            super().__init__()
            self.sam = sam

        def forward(self, **inputs: Any) -> Any:
            output = self.sam(**inputs)
            output.pred_masks = output.pred_masks.detach()
            output.iou_scores = output.iou_scores.detach()
            return output

    return train(rank, lambda model: ddp(Detached(model) if hasattr(model, "mask_decoder") else model))


def ddp_with_a_task_loss_of_no_weight(rank: int) -> Any:
    return train(rank, ddp, task_weight=0.0)


def fsdp2_tapped_after(rank: int) -> Any:
    return train(rank, fsdp2)


def fsdp2_tapped_before(rank: int) -> Any:
    return train(rank, fsdp2, tap_first=True)


def fsdp2_without_a_task_loss(rank: int) -> Any:
    return train(rank, fsdp2, task_weight=None)


CHECKS = (
    ddp_tapped_after,
    ddp_tapped_before,
    ddp_accumulating,
    ddp_with_an_own_relation_module,
    ddp_around_nothing_that_is_called,
    ddp_without_a_search_for_unused_parameters,
    ddp_without_a_task_loss,
    ddp_of_detached_outputs,
    ddp_with_a_task_loss_of_no_weight,
    fsdp2_tapped_after,
    fsdp2_tapped_before,
    fsdp2_without_a_task_loss,
)

if __name__ == "__main__":
    main()
