"""Training loops as people write them: the loss and every gradient of a step are those of a step by hand."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from renyi_kd import InfoSAMLoss, SAMFeatures, infosam_terms, tap
from tests.support import gradients as gradients_of
from tests.support import in_training, module_gradients, processes, relation_module
from tests.support.loops import (
    Loop,
    MiniSam,
    Step,
    assert_same_gradients,
    loops,
    run_hf,
    step_by_hand,
    step_with_taps,
    task_loss,
)
from tests.support.memory import living
from tests.support.models import DIM, hf_batch, hf_sam, hooks_of, meta_batch, meta_forward, meta_sam

LEARNING_RATE = 0.01


def assert_same_step(actual: Step, expected: Step, *, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.loss, expected.loss, rtol=rtol, atol=rtol)
    assert_same_gradients(actual.gradients, expected.gradients, rtol=rtol)


@pytest.fixture
def hf() -> Loop:
    return loops()["dicts"]


@pytest.mark.parametrize("name", loops())
def test_a_step_is_that_by_hand(name):
    loop = loops()[name]
    teacher, student, infosam_loss = loop.make(0), loop.make(1), InfoSAMLoss(DIM)
    expected = step_by_hand(teacher, student, loop, infosam_loss)
    with tap(teacher, call=loop.run) as tapped_teacher, tap(student, call=loop.run) as tapped_student:
        step = step_with_taps(tapped_teacher, tapped_student, loop.batch, infosam_loss)
    assert_same_step(step, expected)
    assert any("encoder" in key for key in step.gradients)
    assert any("relation" in key for key in step.gradients)


def test_accumulated_gradients_are_the_sum_of_the_steps():
    teacher, student, infosam_loss = hf_sam(0), hf_sam(1), InfoSAMLoss(DIM)
    batches = [hf_batch(2, seed=seed) for seed in range(3)]
    by_hand = [
        step_by_hand(teacher, student, Loop(hf_sam, batch, run_hf, [0, 1]), infosam_loss).gradients for batch in batches
    ]
    modules = nn.ModuleList([student, infosam_loss])
    modules.zero_grad()
    tapped_teacher, tapped_student = tap(teacher, call=run_hf), tap(student, call=run_hf)
    for batch in batches:
        loss = task_loss(tapped_student(batch)) + infosam_loss(tapped_teacher, tapped_student, batch)
        (loss / len(batches)).backward()
    accumulated = {name: parameter.grad for name, parameter in modules.named_parameters() if parameter.grad is not None}
    assert_same_gradients(accumulated, mean(by_hand), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_encoder_layers_give_the_same_step(hf, use_reentrant):
    teacher, student, infosam_loss = hf_sam(0), hf_sam(1), InfoSAMLoss(DIM)
    expected = step_by_hand(teacher, student, hf, infosam_loss)
    student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    student.vision_encoder.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    step = step_with_taps(tap(teacher, call=hf.run), tap(student, call=hf.run), hf.batch, infosam_loss)
    assert_same_step(step, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(hf, dtype):
    def in_autocast(model: nn.Module, batch: dict) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype):
            return run_hf(model, batch)

    teacher, student, infosam_loss = hf_sam(0), hf_sam(1), InfoSAMLoss(DIM)
    expected = step_by_hand(teacher, student, hf._replace(run=in_autocast), infosam_loss)
    tapped_teacher, tapped_student = tap(teacher), tap(student)
    optimizer = torch.optim.SGD([*student.parameters(), *infosam_loss.parameters()], lr=LEARNING_RATE)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    student.mask_decoder.output_hypernetworks_mlps[0].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].dtype)
    )
    inputs = {name: hf.batch[name] for name in ("pixel_values", "input_boxes")}
    with torch.autocast("cpu", dtype):
        masks = student(**inputs, multimask_output=False).pred_masks
        infosam = infosam_loss(tapped_teacher, tapped_student, inputs | {"multimask_output": False})
        loss = task_loss([masks]) + infosam
    assert seen[0] == dtype
    assert infosam.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    modules = (student, infosam_loss)
    unscaled = {
        f"{number}.{name}": parameter.grad.clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    assert_same_step(Step(infosam.detach(), unscaled), expected, rtol=0.02)
    before = student.mask_decoder.iou_token.weight.clone()
    scaler.step(optimizer), scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(before, student.mask_decoder.iou_token.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("what", ["model", "in place", "encoder", "decoder"])
def test_compiled_after_the_tap(hf, what):
    teacher, student, infosam_loss = hf_sam(0), hf_sam(1), InfoSAMLoss(DIM)
    expected = step_by_hand(teacher, student, hf, infosam_loss)
    tapped = tap(student)
    model = student
    if what == "model":
        model = torch.compile(student, backend="eager")
    else:
        {"in place": student, "encoder": student.vision_encoder, "decoder": student.mask_decoder}[what].compile(
            backend="eager"
        )
    for _ in range(2):
        masks = run_hf(model, hf.batch)
        loss = infosam_loss(tap(teacher, call=hf.run), tapped, hf.batch)
        step = Step(loss.detach(), module_gradients(loss + task_loss(masks), student, infosam_loss))
        assert_same_step(step, expected)


# several processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.run_checks(tmp_path_factory.mktemp("processes"))


def second_step_of(*parts: list[int]) -> list[dict[str, torch.Tensor]]:
    """Return the gradients of the second of two steps for each part, after a first that trains by their mean.

    A part is the processes whose batches are one.
    """
    torch.manual_seed(2)
    infosam_loss = InfoSAMLoss(DIM)
    teacher, student = hf_sam(0), hf_sam(1)
    parameters = {f"0.{name}": p for name, p in student.named_parameters()}
    parameters |= {f"1.{name}": p for name, p in infosam_loss.named_parameters()}

    def step(number: int, ranks: list[int]) -> dict[str, torch.Tensor]:
        batches = [hf_batch(2, seed=2 * number + rank) for rank in ranks]
        batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
        loop = Loop(hf_sam, batch, processes.run_multimask, list(range(2 * len(ranks))))
        return step_by_hand(teacher, student, loop, infosam_loss).gradients

    first = mean([step(0, ranks) for ranks in parts])
    with torch.no_grad():
        for name, value in first.items():
            parameters[name].sub_(processes.LEARNING_RATE * value)
    return [step(1, ranks) for ranks in parts]


@pytest.fixture(scope="module")
def second_steps():
    """Return the gradients of the second step of two processes that average them in both steps."""
    return second_step_of([0], [1])


def mean(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


@pytest.mark.parametrize(
    "check", ["ddp_tapped_after", "ddp_tapped_before", "ddp_accumulating", "fsdp2_tapped_after", "fsdp2_tapped_before"]
)
def test_processes_average_their_gradients(found, second_steps, check):
    expected = mean(second_steps)
    for of_rank in found:
        # Unused parameters have a gradient of zero where each process has its share of them.
        values = {name: value for name, value in of_rank[check].items() if name in expected}
        assert_same_gradients(values, expected, rtol=2e-3)
        assert not any(value.any() for name, value in of_rank[check].items() if name not in expected)


@pytest.fixture(scope="module")
def global_step():
    """Return the gradients of the second step of one process that has the batches of both."""
    return second_step_of([0, 1])[0]


@pytest.mark.parametrize(
    "check",
    ["ddp_over_the_global_batch", "ddp_accumulating_over_the_global_batch", "fsdp2_over_the_global_batch"],
)
def test_processes_train_as_one_over_the_global_batch(found, global_step, second_steps, check):
    for of_rank in found:
        values = {name: value for name, value in of_rank[check].items() if name in global_step}
        assert_same_gradients(values, global_step, rtol=2e-3)
        # Which is not what they do each for itself.
        with pytest.raises(AssertionError, match="off by"):
            assert_same_gradients(values, mean(second_steps), rtol=2e-2)


@pytest.fixture(scope="module")
def steps_of_micro_batches():
    """Return the gradients of one process with the graphs of all micro-batches: of own batches and of one of all."""
    teacher, student = (tap(hf_sam(seed).double(), call=processes.run_multimask) for seed in (0, 1))
    infosam_loss = InfoSAMLoss(DIM).double()

    def gradients(parts: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        tasks = [student(batch)[0].square().mean() / len(part) for part in parts for batch in part]
        return module_gradients(sum(tasks) / len(parts) + infosam_loss(teacher, student), student.model, infosam_loss)

    parts = [processes.micro_batches(rank) for rank in range(2)]
    return mean([gradients([part]) for part in parts]), gradients(parts)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("over_all", [False, True])
def test_processes_accumulate_the_loss_of_a_whole_batch(found, steps_of_micro_batches, wrapper, over_all):
    expected = steps_of_micro_batches[over_all]
    check = f"{wrapper}_accumulating_exactly" + ("_over_the_global_batch" if over_all else "")
    for of_rank in found:
        assert_same_gradients(
            {name: value for name, value in of_rank[check].items() if name in expected}, expected, rtol=1e-12
        )
        assert not any(value.any() for name, value in of_rank[check].items() if name not in expected)


def test_buffers_are_exchanged_as_in_a_plain_loop(found):
    for of_rank in found:
        plain, exact = of_rank["running_statistics_while_accumulating_exactly"]
        assert torch.equal(plain, exact)


def all_parts(seed: int, dtype: torch.dtype = torch.float64, **settings: Any) -> SAMFeatures:
    """Return the samples that the processes have of a seed, together."""
    parts = [processes.part(rank, seed=seed, **settings) for rank in range(2)]
    return SAMFeatures(
        torch.cat([of_rank.image_features for of_rank in parts]).to(dtype),
        torch.cat([of_rank.mask_tokens for of_rank in parts]).to(dtype),
        torch.tensor([0, 1, 2, 3] if "image_index" in settings else [0, 2, 1, 2]),
    )


def test_a_global_batch_of_unequal_parts(found):
    relation = relation_module(dtype=torch.float64)
    teacher, student = all_parts(0), in_training(all_parts(10))
    loss = infosam_terms(relation, teacher, student).loss
    of_student, of_module = gradients_of(loss, student, relation)
    one, other = (of_rank["unequal_parts_of_a_global_batch"] for of_rank in found)
    assert torch.equal(one["loss"], other["loss"])
    torch.testing.assert_close(one["loss"], loss.detach(), rtol=1e-12, atol=0)
    # A process has the gradient of its own part, times as many as will be averaged.
    for name, value in of_student.items():
        torch.testing.assert_close(torch.cat([one[0][name], other[0][name]]), 2 * value, rtol=1e-10, atol=1e-12)
    for name, value in of_module.items():
        torch.testing.assert_close((one[1][name] + other[1][name]) / 2, value, rtol=1e-10, atol=1e-12)
    for of_rank in found:
        compiled = of_rank["compiled_global_batch"]
        assert torch.equal(compiled["loss"], one["loss"])
        assert torch.equal(compiled["gradient"], of_rank["unequal_parts_of_a_global_batch"][0]["image_features"])
    without = [of_rank["global_batch_without_gradient"] for of_rank in found]
    assert all(torch.equal(of_rank["loss"], one["loss"]) for of_rank in without)
    assert torch.equal(without[0]["entropy"], without[1]["entropy"])
    assert 0 < without[0]["entropy"] < 2


def test_a_bank_holds_samples_of_all_processes(found):
    infosam_loss = InfoSAMLoss(12, bank_size=3).double()
    infosam_loss.relation = relation_module(dtype=torch.float64)
    expected = [infosam_loss(all_parts(seed), in_training(all_parts(seed + 10))).item() for seed in (0, 20, 40)]
    for of_rank in found:
        assert [loss.item() for loss in of_rank["bank_over_the_global_batch"]] == pytest.approx(expected, rel=1e-12)


def test_share_is_one_of_all_processes(found):
    infosam_loss = InfoSAMLoss(12).double()
    squares: dict[str, list[float]] = {"image_features": [0.0, 0.0], "mask_tokens": [0.0, 0.0]}
    for rank in range(2):
        teacher, student = (
            processes.part(0, seed=0, image_index=[0, 1]),
            in_training(processes.part(0, seed=10 + rank, image_index=[0, 1])),
        )
        losses = infosam_loss(teacher, student), processes.task_of_a_process(rank, student)
        for number, loss in enumerate(losses):
            for name in squares:
                gradient = torch.autograd.grad(loss, getattr(student, name), retain_graph=True)[0]
                squares[name][number] += gradient.square().sum().item()
    share = max(own / task for own, task in squares.values()) ** 0.5
    for weights in (of_rank["share_of_all_processes"] for of_rank in found):
        assert weights[:2] == [2.0**-10, 2.0**-9]
        assert weights[-2:] == pytest.approx([0.1 / share] * 2, rel=1e-6)


def pairs_of_one_process(weight: list[float] | None, lambda_r: float, **settings: Any) -> list[Any]:
    """Return what :func:`processes.step_of_pairs` does, of the samples of all processes."""
    relation, student = relation_module(dtype=torch.float64), in_training(all_parts(10, **settings))
    loss = infosam_terms(
        relation,
        all_parts(0, **settings),
        student,
        distillation="jensen_renyi",
        lambda_r=lambda_r,
        sample_weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
    ).loss
    return [loss.detach(), *gradients_of(loss, student, relation)]


@pytest.mark.parametrize(
    ("check", "weight"),
    [
        ("pairs_over_the_global_batch", None),
        ("weighted_pairs_over_the_global_batch", [0.25, 1.0, 0.0, 0.6]),
        ("pairs_weighted_in_several_dtypes_over_the_global_batch", [0.25, 1.0, 0.0, 0.5]),
    ],
)
def test_pairs_of_unequal_parts_are_those_of_one_process(found, check, weight):
    loss, of_student, of_module = pairs_of_one_process(weight, 0.3)
    one, other = (of_rank[check] for of_rank in found)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[0], loss, rtol=1e-12, atol=0)
    for name, value in of_student.items():
        torch.testing.assert_close(torch.cat([one[1][name], other[1][name]]), 2 * value, rtol=1e-10, atol=1e-12)
    for name, value in of_module.items():
        torch.testing.assert_close((one[2][name] + other[2][name]) / 2, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("check", "weight"), [("pairs_of_equal_shards", None), ("weighted_pairs_of_equal_shards", [0.25, 1.0, 0.0, 0.6])]
)
def test_pairs_of_equal_shards_need_no_global_batch(found, check, weight):
    loss, of_student, _ = pairs_of_one_process(weight, 0.0, image_index=[0, 1])
    one, other = (of_rank[check] for of_rank in found)
    torch.testing.assert_close((one[0] + other[0]) / 2, loss, rtol=1e-12, atol=0)
    for name, value in of_student.items():
        torch.testing.assert_close(torch.cat([one[1][name], other[1][name]]), 2 * value, rtol=1e-10, atol=1e-12)


def test_a_bank_of_all_processes_leaves_pairs_alone(found):
    expected = [
        infosam_terms(
            relation_module(dtype=torch.float64),
            all_parts(seed),
            in_training(all_parts(seed + 10)),
            distillation="jensen_renyi",
            sample_weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
        ).distillation.item()
        for seed, weight in ((0, [0.25, 1.0, 0.0, 0.6]), (20, None), (40, [0.25, 1.0, 0.0, 0.6]))
    ]
    for of_rank in found:
        values = [value.item() for value in of_rank["bank_of_pairs_over_the_global_batch"]]
        assert values == pytest.approx(expected, rel=1e-12)


def test_a_global_batch_in_half_precision(found):
    whole = all_parts(0, torch.float16), in_training(all_parts(10, torch.float16))
    expected = infosam_terms(relation_module(), *whole).loss.item()
    for of_rank in found:
        assert of_rank["global_batch_under_autocast"].item() == pytest.approx(expected, rel=1e-5)


def test_a_global_batch_of_all_tokens(found):
    relation, student = relation_module(dtype=torch.float64), in_training(all_parts(10, n_tokens=2))
    settings = {"alpha": 1.0, "detach_teacher_relation": True, "lambda_r": 0.3}
    loss = infosam_terms(relation, all_parts(0, n_tokens=2), student, **settings).loss
    of_student, of_module = gradients_of(loss, student, relation)
    of_ranks = [of_rank["global_batch_of_all_tokens"] for of_rank in found]
    for value, _, module in of_ranks:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        assert module.keys() == of_module.keys()
    for name, value in of_student.items():
        parts = torch.cat([gradient[name] for _, gradient, _ in of_ranks])
        torch.testing.assert_close(parts, 2 * value, rtol=1e-9, atol=1e-12)
    for name, value in of_module.items():
        torch.testing.assert_close(sum(module[name] for *_, module in of_ranks) / 2, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("global_batch_of_two_sizes", r"got maps: \[12, 2, 3\] in process 0 and \[12, 2, 4\] in process 1"),
        ("global_batch_of_two_dtypes", r"dtype of maps: torch.float16 in process 0 and torch.bfloat16 in process 1"),
        ("pairs_with_weights_in_one_process", r"got sample_weight: given in process 0 and none in process 1"),
        ("pairs_beside_another_form", r"got distillation: jensen_renyi in process 0 and debiased in process 1"),
        ("global_batch_with_gradient_in_one_process", r"got gradients: on in process 0 and off in process 1"),
        ("one_sample_of_a_process_without_the_global_batch", r"at least two samples .* global_batch=True"),
    ],
)
def test_every_process_is_told_why_there_is_no_global_batch(found, check, says):
    for of_rank in found:
        assert re.search(says, of_rank[check])


def test_a_process_that_refuses_its_features_keeps_none_waiting(found):
    waiting, refusing = (of_rank["global_batch_that_one_process_refuses"] for of_rank in found)
    assert "student.mask_tokens must be finite" in refusing
    assert (
        "got none of process 1, which raised ValueError: infosam_terms: student.mask_tokens must be finite" in waiting
    )


def test_the_relation_module_is_wrapped_like_the_model(found):
    one, other = (of_rank["ddp_with_an_own_relation_module"] for of_rank in found)
    drifted = {name.partition(".")[0] for name, value in one.items() if not torch.equal(value, other[name])}
    assert "1" in drifted


def test_a_model_that_is_called_past_its_ddp_is_not_synchronised(found):
    one, other = (of_rank["ddp_around_nothing_that_is_called"] for of_rank in found)
    assert not torch.equal(one["0.mask_decoder.iou_token.weight"], other["0.mask_decoder.iou_token.weight"])


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("ddp_without_a_search_for_unused_parameters", "find_unused_parameters=True"),
        ("ddp_without_a_task_loss", "not all `forward` outputs participate in"),
        ("ddp_of_detached_outputs", "mark a variable ready only once"),
        ("fsdp2_without_a_task_loss", "data is not allocated"),
    ],
)
def test_wrappers_need_the_task_loss_and_say_so(found, check, message):
    for of_rank in found:
        assert re.search(message, of_rank[check])


def test_a_task_loss_of_no_weight_is_enough(found):
    one, other = (of_rank["ddp_with_a_task_loss_of_no_weight"] for of_rank in found)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert one["0.mask_decoder.iou_token.weight"].any()


def replica_of(module: torch.nn.Module) -> torch.nn.Module:
    """Return what DataParallel makes of a module for another GPU, with the weights of the module itself."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = module._parameters
    replica._modules = {name: child and replica_of(child) for name, child in module._modules.items()}
    return replica


def test_a_run_after_that_of_replicas_is_one_like_any_other():
    model, batch = hf_sam(), hf_batch()
    student = tap(model)
    run_hf(replica_of(model), batch)
    with pytest.raises(RuntimeError, match="got a replica made by nn.DataParallel"):
        student.take()
    run_hf(model, batch)
    assert student.take().mask_tokens.shape == (2, 4, DIM)


@pytest.mark.parametrize("gradient", [True, False])
def test_replicas_of_data_parallel_are_refused(gradient):
    model, batch = hf_sam(), hf_batch()
    student = tap(model)
    replica = model._replicate_for_data_parallel()
    with torch.set_grad_enabled(gradient):
        run_hf(replica, batch)
    if gradient:
        with pytest.raises(RuntimeError, match="must run in one thread, got a replica made by nn.DataParallel"):
            student.take()
    run_hf(model, batch)
    assert student.take().mask_tokens.shape == (2, 4, DIM)


# frameworks


class Images(torch.utils.data.Dataset):
    """Single images with a box, as data loaders collate them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in hf_batch(1, seed=index).items()}


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Images(), batch_size=4)


def trained_by_hand(steps: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the task loss plus InfoSAM loss of each step of a plain loop on all images, and the weights after it."""
    teacher, (student, infosam_loss) = hf_sam(0), student_and_loss()
    parameters = {f"0.{name}": p for name, p in student.named_parameters()}
    parameters |= {f"1.{name}": p for name, p in infosam_loss.named_parameters()}
    loop = Loop(hf_sam, next(iter(loader())), run_hf, [0, 1, 2, 3])
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            task = task_loss(run_hf(student, loop.batch))
        step = step_by_hand(teacher, student, loop, infosam_loss)
        losses.append(step.loss + task)
        with torch.no_grad():
            for name, value in step.gradients.items():
                parameters[name].sub_(LEARNING_RATE * value)
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


def student_and_loss() -> tuple[nn.Module, InfoSAMLoss]:
    student = hf_sam(1)
    torch.manual_seed(2)
    return student, InfoSAMLoss(DIM)


def assert_same_weights(student: nn.Module, infosam_loss: InfoSAMLoss, expected: dict[str, torch.Tensor]) -> None:
    for number, module in enumerate((student, infosam_loss)):
        for name, value in module.named_parameters():
            torch.testing.assert_close(value.detach(), expected[f"{number}.{name}"], rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def fresh_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(fresh_accelerate, precision):
    def in_precision(model: nn.Module, batch: dict) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return run_hf(model, batch)

    (student, infosam_loss), pretrained = student_and_loss(), hf_sam(0)
    accelerator = fresh_accelerate.Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.SGD([*student.parameters(), *infosam_loss.parameters()], lr=LEARNING_RATE)
    batch = next(iter(loader()))
    loop = Loop(hf_sam, batch, in_precision, [0, 1, 2, 3])
    expected = step_by_hand(pretrained, student, loop, infosam_loss)
    optimizer.zero_grad()
    # The teacher gets the precision and the device of the student, and no DDP.
    teacher = tap(accelerator.prepare_model(pretrained, evaluation_mode=True))
    model, infosam_loss, optimizer, batches = accelerator.prepare(student, infosam_loss, optimizer, loader())
    tapped = tap(model)
    for batch in batches:
        output = model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"], multimask_output=False)
        infosam = infosam_loss(teacher, tapped, batch)
        accelerator.backward(infosam + task_loss([output.pred_masks]))
    assert output.pred_masks.dtype == torch.float32
    named = {f"0.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    named |= {f"1.{name}": p.grad for name, p in infosam_loss.named_parameters()}
    assert_same_step(Step(infosam.detach(), named), expected, rtol=2e-2 if precision == "bf16" else 1e-4)
    optimizer.step()
    assert list(accelerator.unwrap_model(model).state_dict()) == list(hf_sam().state_dict())


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("clears", [True, False])
def test_trainer_of_transformers(tmp_path, clears):
    import transformers

    losses, weights = trained_by_hand(steps=3)
    student, infosam_loss = student_and_loss()
    teacher, tapped = tap(hf_sam(0)), tap(student)

    class SamTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            names = ("pixel_values", "input_boxes")
            output = model(**{name: inputs[name] for name in names}, multimask_output=False)
            loss = task_loss([output.pred_masks]) + infosam_loss(teacher, tapped, inputs)
            return (loss, {"masks": output.pred_masks}) if return_outputs else loss

    class ClearGradients(transformers.TrainerCallback):
        def on_optimizer_step(self, *_args, **_keywords):
            infosam_loss.zero_grad()

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=3,
        logging_steps=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        label_names=["ground_truth"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = SamTrainer(
        student,
        arguments,
        train_dataset=Images(),
        eval_dataset=Images(),
        optimizers=(torch.optim.SGD([*student.parameters(), *infosam_loss.parameters()], lr=LEARNING_RATE), None),
        callbacks=[ClearGradients] if clears else [],
    )
    with contextlib.nullcontext() if clears else pytest.warns(UserWarning, match="those of the relation module"):
        trainer.train()
    history = trainer.state.log_history
    trained = [float(entry["loss"]) for entry in history if "loss" in entry]
    expected = [loss.item() for loss in losses]
    if not clears:
        # The trainer clears the gradients of its model alone: those of the relation module pile up.
        assert trained[:2] == pytest.approx(expected[:2], abs=1e-4)
        assert abs(trained[2] - expected[2]) > 1e-3
        return
    assert trained == pytest.approx(expected, abs=1e-4)
    # Evaluation sees the weights of the next step.
    evaluated = [float(entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    assert len(evaluated) == 3
    assert all(math.isfinite(value) for value in evaluated)
    assert_same_weights(student, infosam_loss, weights)
    saved = transformers.SamModel.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert saved.keys() == hf_sam().state_dict().keys()


LIGHTNING_WARNINGS = (
    "ignore:.*isinstance.treespec, LeafSpec.*is deprecated",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*`weights_only` was not set",
)


def lightning_filters(function):
    for text in LIGHTNING_WARNINGS:
        function = pytest.mark.filterwarnings(text)(function)
    return function


@lightning_filters
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    _, weights = trained_by_hand(steps=3)
    pretrained = hf_sam(0).eval()

    class FineTuning(lightning.LightningModule):
        def __init__(self, student: nn.Module, infosam_loss: InfoSAMLoss) -> None:
            super().__init__()
            self.sam, self.infosam_loss = student, infosam_loss
            # Taps are no modules: of these nothing is trained, saved or switched to another mode.
            self.teacher, self.student = tap(pretrained), tap(student)

        def on_fit_start(self) -> None:
            # Nor is the teacher moved.
            self.teacher.model.to(self.device)

        def training_step(self, batch: dict, _index: int) -> torch.Tensor:
            output = self.student(batch | {"multimask_output": False})
            return task_loss([output.pred_masks]) + self.infosam_loss(self.teacher, self.student)

        def validation_step(self, batch: dict, _index: int) -> None:
            self.log("loss", self.infosam_loss(self.teacher, self.student, batch))
            modes.append((pretrained.training, self.sam.training))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    modes: list[tuple[bool, bool]] = []
    module = FineTuning(*student_and_loss())
    before = {name: value.clone() for name, value in pretrained.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader(), loader())
    assert_same_weights(module.sam, module.infosam_loss, weights)
    assert modes == [(False, False)] * len(modes)
    assert trainer.callback_metrics["loss"].isfinite()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"sam", "infosam_loss"}
    assert len(saved) == len(before) + len(module.infosam_loss.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in pretrained.state_dict().items())
    assert all(parameter.grad is None for parameter in pretrained.parameters())

    # What the taps are spared: a teacher that is a module is saved along, and trains with its holder.
    module.naive_teacher = pretrained
    assert len(module.state_dict()) == len(saved) + len(before)
    module.train()
    assert pretrained.training


# many steps, and every way out


@pytest.mark.long
def test_memory_does_not_grow_over_thousands_of_steps():
    models, infosam_loss = [MiniSam(), MiniSam()], InfoSAMLoss(4)
    teacher, student = (tap(model) for model in models)
    batch, hooks = torch.randn(2, 3, 3, 3), hooks_of(models[1])

    for step in range(3_000):
        if step == 100:
            before = living()
        if step % 10 == 1:
            # The loss is forgotten: what was collected goes with the next step.
            student(batch).mean().backward()
        elif step % 10 == 3:
            with pytest.raises(FloatingPointError):
                student(batch.new_full(batch.shape, math.nan))
        elif step % 10 == 5:
            student(batch)
            student.clear()
        elif step % 10 == 7:
            with torch.no_grad():
                infosam_loss(teacher, student, batch)
        else:
            (student(batch).mean() + infosam_loss(teacher, student, batch)).backward()
            student.model.zero_grad(), infosam_loss.zero_grad()
    after = living()
    assert after[1] <= before[1]
    assert after[0] <= before[0] + 100
    assert hooks_of(models[1]) == hooks


def leaves_by_closing(model: nn.Module) -> None:
    student = tap(model)
    student(torch.randn(2, 3, 3, 3))
    student.close()


def leaves_by_being_forgotten(model: nn.Module) -> None:
    student = tap(model)
    student(torch.randn(2, 3, 3, 3))


def leaves_with_the_loss_that_holds_it(model: nn.Module) -> None:
    loss = InfoSAMLoss(4)(tap(MiniSam()), tap(model), torch.randn(2, 3, 3, 3))
    loss.backward()


def leaves_by_an_error_of_the_model(model: nn.Module) -> None:
    with contextlib.suppress(FloatingPointError), tap(model) as student:
        student(torch.full((2, 3, 3, 3), math.nan))


def leaves_by_an_interrupt(model: nn.Module) -> None:
    with contextlib.suppress(KeyboardInterrupt), tap(model) as student:
        student(torch.randn(2, 3, 3, 3))
        raise KeyboardInterrupt


def leaves_by_an_error_of_a_tap_that_is_only_forgotten(model: nn.Module) -> None:
    with contextlib.suppress(FloatingPointError):
        tap(model)(torch.full((2, 3, 3, 3), math.nan))


def leaves_by_a_place_that_is_not_there(model: nn.Module) -> None:
    with contextlib.suppress(ValueError):
        tap(model, image_features="image_encoder", mask_tokens="nowhere")


def leaves_by_a_copy(model: nn.Module) -> None:
    twin = copy.deepcopy(tap(model))
    assert hooks_of(twin.model) > 0
    twin.close()
    assert hooks_of(twin.model) == 0


@pytest.mark.parametrize(
    "leave",
    [
        leaves_by_closing,
        leaves_by_being_forgotten,
        leaves_with_the_loss_that_holds_it,
        leaves_by_an_error_of_the_model,
        leaves_by_an_interrupt,
        leaves_by_an_error_of_a_tap_that_is_only_forgotten,
        leaves_by_a_place_that_is_not_there,
        leaves_by_a_copy,
    ],
)
def test_no_hook_is_left(leave):
    model = MiniSam()
    leave(model)
    gc.collect()
    assert hooks_of(model) == 0


# bad input


def test_a_student_that_runs_after_the_loss_is_named():
    teacher, student, infosam_loss = tap(MiniSam()), tap(MiniSam()), InfoSAMLoss(4)
    batch = torch.randn(2, 3, 3, 3)
    (infosam_loss(teacher, student, batch) + student(batch).mean()).backward()
    with pytest.raises(RuntimeError, match="run the student, then compute the loss, then call backward once"):
        infosam_loss(teacher, student, batch)


def test_a_student_that_is_called_without_gradient_is_named():
    student = tap(MiniSam())
    with torch.no_grad():
        student(torch.randn(2, 3, 3, 3))
    with pytest.raises(RuntimeError, match="must run with gradient to be a student"):
        student.take()


def with_one_prompt(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return run_hf(model, batch | {"input_boxes": batch["input_boxes"][:, :1]})


@pytest.mark.parametrize(
    ("make_teacher", "make_student", "call", "batch", "message"),
    [
        (lambda: MiniSam(8), MiniSam, None, torch.randn(2, 3, 3, 3),
         r"image_features.* got \(2, 8, 2, 2\) and \(2, 4, 2, 2\)"),
        (MiniSam, MiniSam, lambda model, batch: model(batch[..., :2]), torch.randn(2, 3, 3, 3),
         r"must see what the student saw, got images of \(3, 3, 2\) where those of the student are of \(3, 3, 3\)"),
        (hf_sam, hf_sam, with_one_prompt, hf_batch(2, 2),
         r"must see what the student saw, got 8 numbers as boxes of its prompts where the student has 16"),
    ],
    ids=["width", "size", "prompts"],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_named(make_teacher, make_student, call, batch, message):
    teacher, student = tap(make_teacher(), call=call), tap(make_student())
    with pytest.raises(ValueError, match=message):
        InfoSAMLoss(4 if make_student is MiniSam else DIM)(teacher, student, batch)


@pytest.mark.parametrize(
    ("make_teacher", "make_student", "call", "batch", "message"),
    [
        (hf_sam, meta_sam, meta_forward, meta_batch(), "batch must be a mapping .* got a list of dicts"),
        (meta_sam, hf_sam, run_hf, hf_batch(), "batch must hold arguments of the model's forward.*'pixel_values'"),
    ],
    ids=["hf for meta", "meta for hf"],
)
def test_a_teacher_of_another_family_needs_a_call_of_its_own(make_teacher, make_student, call, batch, message):
    teacher, student, infosam_loss = make_teacher(), tap(make_student(), call=call), InfoSAMLoss(DIM)
    with pytest.raises(ValueError, match=f"{message}.*call="):
        infosam_loss(tap(teacher), student, batch)

    def translated(model: nn.Module, batch: Any) -> Any:
        if make_teacher is hf_sam:
            images, boxes = (torch.stack([item[name] for item in batch]) for name in ("image", "boxes"))
            return run_hf(model, {"pixel_values": images, "input_boxes": boxes})
        pairs = zip(batch["pixel_values"], batch["input_boxes"], strict=True)
        return meta_forward(model, [{"image": image, "boxes": boxes} for image, boxes in pairs])

    student.clear()
    infosam_loss(tap(teacher, call=translated), student, batch).backward()
