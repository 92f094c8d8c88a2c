"""Two processes that train together over gloo; each saves what it found.

    python -m tests.support.processes FOLDER RANK

Every check is run once here, for starting the processes takes longer than all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from renyi_kd import Accumulation, InfoSAMLoss, SAMFeatures, infosam_terms, tap
from tests.support import gradients, in_training, relation_module, sam_features, to
from tests.support.started import run_processes

N_PROCESSES = 2
LEARNING_RATE = 0.01


def run_checks(folder: Path) -> list[dict[str, Any]]:
    """Run all checks in two processes and return what each process saved."""
    return run_processes(__name__, folder, N_PROCESSES)


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    from benchmarks.torchvision_compat import ensure_importable

    ensure_importable()
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
    except (RuntimeError, ValueError, AttributeError) as error:
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
    **settings: Any,
) -> dict[str, Tensor]:
    """Train for two steps, each process on batches of its own, and return the gradients of the second step.

    ``settings`` are those of the loss.
    """
    from tests.support.models import DIM, hf_batch, hf_sam

    sam = hf_sam(1)
    torch.manual_seed(2)
    infosam_loss: nn.Module = InfoSAMLoss(DIM, **settings)
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


def ddp_over_the_global_batch(rank: int) -> Any:
    return train(rank, ddp, global_batch=True)


def ddp_accumulating_over_the_global_batch(rank: int) -> Any:
    return train(rank, ddp, n_accumulated=2, global_batch=True)


def fsdp2_over_the_global_batch(rank: int) -> Any:
    return train(rank, fsdp2, global_batch=True)


def micro_batches(rank: int) -> list[dict[str, Tensor]]:
    """Return two micro-batches of a process in fp64, of different numbers of images."""
    from tests.support.models import hf_batch

    batches = [hf_batch(1, seed=rank), hf_batch(1 + rank, seed=2 + rank)]
    return [{name: value.double() for name, value in batch.items()} for batch in batches]


def accumulate(rank: int, wrap: Callable[[nn.Module], nn.Module], **settings: Any) -> dict[str, Tensor]:
    """Return the gradients of a step of two micro-batches whose graphs are not in memory together."""
    from tests.support.models import DIM, hf_sam

    sam, infosam_loss = hf_sam(1).double(), InfoSAMLoss(DIM, **settings).double()
    named = {0: sam, 1: infosam_loss}
    model, infosam_loss = wrap(sam), wrap(infosam_loss)
    teacher, student = (tap(each, call=run_multimask) for each in (hf_sam(0).double(), model))
    accumulation = Accumulation(infosam_loss, teacher, student)
    for batch in micro_batches(rank):
        accumulation.collect(batch)
    for number, batch in enumerate(accumulation.replay()):
        with ExitStack() as stack:
            if number == 0 and hasattr(model, "no_sync"):
                stack.enter_context(model.no_sync())
                stack.enter_context(infosam_loss.no_sync())
            loss = student(batch)[0].square().mean() + accumulation.loss()
            (loss / 2).backward()
    parameters = {f"{number}.{name}": p for number, each in named.items() for name, p in each.named_parameters()}
    return {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}


def ddp_accumulating_exactly(rank: int) -> Any:
    return accumulate(rank, ddp)


def ddp_accumulating_exactly_over_the_global_batch(rank: int) -> Any:
    return accumulate(rank, ddp, global_batch=True)


def fsdp2_accumulating_exactly(rank: int) -> Any:
    return accumulate(rank, fsdp2)


def fsdp2_accumulating_exactly_over_the_global_batch(rank: int) -> Any:
    return accumulate(rank, fsdp2, global_batch=True)


def running_statistics_while_accumulating_exactly(rank: int) -> Any:
    """Return those of a plain loop of DDP, and of one with a first pass that is longer in the second process."""
    from tests.support.loops import MiniSam

    found = []
    for exact in (False, True):
        torch.manual_seed(0)
        sam, other = MiniSam(), MiniSam()
        sam.image_encoder = nn.Sequential(sam.image_encoder, nn.BatchNorm2d(4))
        model = ddp(sam)
        infosam_loss = ddp(InfoSAMLoss(4))
        accumulation = Accumulation(infosam_loss, tap(other), tap(model))
        for step in range(3):
            batches = [torch.randn(2, 3, 5, 5) + rank + step for _ in range(2 + rank)]
            if exact:
                for batch in batches:
                    accumulation.collect(batch)
            for number, batch in enumerate(accumulation.replay() if exact else batches):
                with ExitStack() as stack:
                    if number < len(batches) - 1:
                        stack.enter_context(model.no_sync())
                        stack.enter_context(infosam_loss.no_sync())
                    loss = model(batch).square().mean()
                    if exact:
                        loss = loss + accumulation.loss()
                    loss.backward()
        found.append(sam.image_encoder[1].running_mean)
    return found


# Samples of each process by their image: a single one, and three of two images.
PARTS = [[0], [1, 0, 1]]


def part(rank: int, seed: int, **settings: Any) -> SAMFeatures:
    return sam_features(seed=seed + rank, dtype=torch.float64, **{"image_index": PARTS[rank], **settings})


def unequal_parts_of_a_global_batch(rank: int) -> Any:
    relation = relation_module(dtype=torch.float64)
    student = in_training(part(rank, seed=10))
    terms = infosam_terms(relation, part(rank, seed=0), student, global_batch=True)
    return {"loss": terms.loss.detach(), **dict(enumerate(gradients(terms.loss, student, relation)))}


def compiled_global_batch(rank: int) -> Any:
    relation = relation_module(dtype=torch.float64)

    def loss(teacher: SAMFeatures, student: SAMFeatures) -> Tensor:
        return infosam_terms(relation, teacher, student, global_batch=True).loss

    student = in_training(part(rank, seed=10))
    value = torch.compile(loss, backend="eager")(part(rank, seed=0), student)
    value.backward()
    return {"loss": value.detach(), "gradient": student.image_features.grad}


def global_batch_under_autocast(rank: int) -> Any:
    """Features of the half precision that autocast does not have."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [to(part(rank, seed=seed), torch.float16) for seed in (0, 10)]
        return infosam_terms(relation_module(), parts[0], in_training(parts[1]), global_batch=True).loss.detach()


def global_batch_of_all_tokens(rank: int) -> Any:
    relation = relation_module(dtype=torch.float64)
    student = in_training(part(rank, seed=10, n_tokens=2))
    settings = {"alpha": 1.0, "detach_teacher_relation": True, "lambda_r": 0.3}
    loss = infosam_terms(relation, part(rank, seed=0, n_tokens=2), student, global_batch=True, **settings).loss
    return [loss.detach(), *gradients(loss, student, relation)]


def global_batch_that_one_process_refuses(rank: int) -> Any:
    student = in_training(part(rank, seed=10))
    if rank == 1:
        student.mask_tokens.detach()[0] = torch.nan
    infosam_terms(relation_module(), part(rank, seed=0), student, global_batch=True, check_finite=True)


def global_batch_with_gradient_in_one_process(rank: int) -> Any:
    with torch.set_grad_enabled(rank == 0):
        infosam_terms(relation_module(), part(rank, seed=0), in_training(part(rank, seed=10)), global_batch=True)


def global_batch_without_gradient(rank: int) -> Any:
    infosam_loss = InfoSAMLoss(12, global_batch=True).double()
    infosam_loss.relation = relation_module(dtype=torch.float64)
    with torch.no_grad():
        loss = infosam_loss(part(rank, seed=0), part(rank, seed=10))
    return {"loss": loss, "entropy": infosam_loss.diagnostics().teacher_entropy}


def bank_over_the_global_batch(rank: int) -> Any:
    infosam_loss = InfoSAMLoss(12, global_batch=True, bank_size=3).double()
    infosam_loss.relation = relation_module(dtype=torch.float64)
    return [
        infosam_loss(part(rank, seed=seed), in_training(part(rank, seed=seed + 10))).detach() for seed in (0, 20, 40)
    ]


def one_sample_of_a_process_without_the_global_batch(rank: int) -> Any:
    return infosam_terms(relation_module(), part(0, seed=0), in_training(part(0, seed=10)))


def global_batch_of_two_sizes(rank: int) -> Any:
    parts = [part(rank, seed=seed, size=(2, 3 + rank)) for seed in (0, 10)]
    return infosam_terms(relation_module(), parts[0], in_training(parts[1]), global_batch=True)


def global_batch_of_two_dtypes(rank: int) -> Any:
    parts = [to(part(rank, seed=seed), (torch.float16, torch.bfloat16)[rank]) for seed in (0, 10)]
    return infosam_terms(relation_module(), parts[0], in_training(parts[1]), global_batch=True)


def share_of_all_processes(rank: int) -> Any:
    """Return the weights of some steps, where each process has features and a task of its own."""
    infosam_loss = InfoSAMLoss(12, gradient_share=0.1).double()
    wrapped = ddp(infosam_loss)
    teacher, student = part(0, seed=0, image_index=[0, 1]), in_training(part(0, seed=10 + rank, image_index=[0, 1]))
    weights = []
    for step in range(16):
        loss = wrapped(teacher, student)
        weights.append(infosam_loss.scalars()["weight"])
        (loss + task_of_a_process(rank, student)).backward()
        if step == 14 and rank == 0:
            # As where only the first process writes checkpoints.
            infosam_loss.state_dict()
    return weights


def task_of_a_process(rank: int, student: SAMFeatures) -> Tensor:
    return (1 + 9 * rank) * (student.image_features.mean() + student.mask_tokens.mean())


# Of the samples of each process.
SAMPLE_WEIGHTS = [[0.25], [1.0, 0.0, 0.6]]


def weight_of(rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(SAMPLE_WEIGHTS[rank], dtype=dtype)


def step_of_pairs(rank: int, weight: Tensor | None, *, global_batch: bool = True, **settings: Any) -> Any:
    """Return the loss of a step with the Jensen-Rényi divergence, and the gradients of student and module."""
    relation, student = relation_module(dtype=torch.float64), in_training(part(rank, seed=10, **settings))
    objective: dict[str, Any] = {"distillation": "jensen_renyi", "lambda_r": 0.3 if global_batch else 0.0}
    teacher = part(rank, seed=0, **settings)
    terms = infosam_terms(relation, teacher, student, sample_weight=weight, global_batch=global_batch, **objective)
    return [terms.loss.detach(), *gradients(terms.loss, student, relation)]


def pairs_over_the_global_batch(rank: int) -> Any:
    return step_of_pairs(rank, None)


def weighted_pairs_over_the_global_batch(rank: int) -> Any:
    return step_of_pairs(rank, weight_of(rank))


def pairs_weighted_in_several_dtypes_over_the_global_batch(rank: int) -> Any:
    # Of which both are whole numbers of quarters.
    weight = torch.tensor([[0.25], [1.0, 0.0, 0.5]][rank], dtype=(torch.float16, torch.float64)[rank])
    return step_of_pairs(rank, weight)


def pairs_of_equal_shards(rank: int) -> Any:
    return step_of_pairs(rank, None, global_batch=False, image_index=[0, 1])


def weighted_pairs_of_equal_shards(rank: int) -> Any:
    weight = torch.tensor([[0.25, 1.0], [0.0, 0.6]][rank], dtype=torch.float64)
    return step_of_pairs(rank, weight, global_batch=False, image_index=[0, 1])


def pairs_with_weights_in_one_process(rank: int) -> Any:
    return step_of_pairs(rank, weight_of(rank) if rank == 0 else None)


def pairs_beside_another_form(rank: int) -> Any:
    form = ("jensen_renyi", "debiased")[rank]
    parts = part(rank, seed=0), in_training(part(rank, seed=10))
    return infosam_terms(relation_module(), *parts, distillation=form, global_batch=True)


def bank_of_pairs_over_the_global_batch(rank: int) -> Any:
    infosam_loss = InfoSAMLoss(12, global_batch=True, bank_size=3, distillation="jensen_renyi").double()
    infosam_loss.relation = relation_module(dtype=torch.float64)
    return [
        infosam_loss.terms(
            part(rank, seed=seed), in_training(part(rank, seed=seed + 10)), sample_weight=weight
        ).distillation.detach()
        for seed, weight in ((0, weight_of(rank)), (20, None), (40, weight_of(rank)))
    ]


CHECKS = (
    pairs_over_the_global_batch,
    weighted_pairs_over_the_global_batch,
    pairs_weighted_in_several_dtypes_over_the_global_batch,
    pairs_of_equal_shards,
    weighted_pairs_of_equal_shards,
    pairs_with_weights_in_one_process,
    pairs_beside_another_form,
    bank_of_pairs_over_the_global_batch,
    ddp_over_the_global_batch,
    ddp_accumulating_over_the_global_batch,
    fsdp2_over_the_global_batch,
    unequal_parts_of_a_global_batch,
    compiled_global_batch,
    global_batch_under_autocast,
    global_batch_of_all_tokens,
    global_batch_that_one_process_refuses,
    global_batch_with_gradient_in_one_process,
    global_batch_without_gradient,
    bank_over_the_global_batch,
    share_of_all_processes,
    one_sample_of_a_process_without_the_global_batch,
    global_batch_of_two_sizes,
    global_batch_of_two_dtypes,
    ddp_tapped_after,
    ddp_tapped_before,
    ddp_accumulating,
    ddp_accumulating_exactly,
    ddp_accumulating_exactly_over_the_global_batch,
    fsdp2_accumulating_exactly,
    fsdp2_accumulating_exactly_over_the_global_batch,
    running_statistics_while_accumulating_exactly,
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
