"""Launch plans: the same bits as launches one by one, a plan for what differs, and nothing that outlives a step."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")
from triton import knobs

from renyi_kd import InfoSAMLoss, RelationModule, SAMFeatures, infosam_terms
from renyi_kd.ops import autograd, gpu, launches
from renyi_kd.ops.feature_terms import triton as feature_terms
from renyi_kd.ops.plan import Operation, Place
from tests.support import in_training, relation_module, sam_features
from tests.support.direct_launches import compiled_kernels
from tests.support.launches import launches as counted
from tests.support.tolerance import assert_close_on_scale

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    launches.plan.cache_clear()


@pytest.fixture
def direct() -> Iterator[list[str]]:
    """Launch compiled kernels, in the interpreter too; gives the names of those launched so, on a GPU none."""
    with compiled_kernels() if INTERPRETED else nullcontext([]) as names:
        yield names


def n_plans() -> int:
    return launches.plan.cache_info().currsize


def setting(dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[RelationModule, SAMFeatures, SAMFeatures]:
    teacher, student = (sam_features(3, seed=seed + k, dtype=dtype, dim=8, size=(2, 3)) for k in (0, 2))
    teacher, student = (SAMFeatures(*(x.to(DEVICE) for x in features[:2])) for features in (teacher, student))
    return relation_module(8).to(DEVICE), teacher, in_training(student)


def step(relation: RelationModule, teacher: SAMFeatures, student: SAMFeatures, **keywords) -> list[Tensor]:
    """Return terms and gradients."""
    terms = infosam_terms(relation, teacher, student, impl=keywords.pop("impl", "triton"), **keywords)
    leaves = [*student[:2], *relation.parameters()]
    return [*(value.detach() for value in terms), *torch.autograd.grad(terms.loss, leaves)]


def run_at_once(function, tensors, numbers, *settings) -> list[Tensor | None]:
    """Do what a plan does, every launch where it is written."""
    outputs = function(tensors, numbers, *settings)
    return [pack(x) if isinstance(x, list) else x for x in outputs]


def pack(tensors: list[Tensor]) -> Tensor:
    packed = launches.empty_packed(tensors)
    for view, x in zip(launches.unpacked(packed, tensors), tensors, strict=True):
        view.copy_(x)
    return packed


def step_at_once(*arguments, **keywords) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_terms, "run", run_at_once)
        return step(*arguments, **keywords)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == e.dtype, index
        assert a.stride() == e.stride(), index
        assert torch.equal(a, e), index


@pytest.mark.parametrize("form", ["mutual_information", "jensen_renyi"])
def test_plans_change_no_bit(form, direct):
    arguments, others = setting(), setting(seed=11)
    expected = {seed: step_at_once(*values, distillation=form) for seed, values in ((1, arguments), (11, others))}
    assert n_plans() == 0
    for seed, values in ((1, arguments), (11, others), (1, arguments)):
        assert_same(step(*values, distillation=form), expected[seed])
    # One forward, one backward.
    assert n_plans() == 2
    # After the first step, every launch of both is direct.
    assert not INTERPRETED or len(direct) == 2 * 8


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
        lambda x: x[:, :, :1],
        lambda x: x[:2],
    ],
    ids=["channels last", "gaps", "alignment", "height", "samples"],
)
def test_maps_that_differ_have_a_plan_of_their_own(change, direct):
    relation, *both = setting()
    step(relation, *both)
    changed = [SAMFeatures(change(x.detach()), tokens.detach()) for x, tokens, _ in both]
    changed = [x._replace(mask_tokens=x.mask_tokens[: len(x.image_features)].contiguous()) for x in changed]
    student = SAMFeatures(*(x.requires_grad_() for x in changed[1][:2]))
    arguments = relation, changed[0], student
    expected = step_at_once(*arguments)
    for _ in range(2):
        assert_same(step(*arguments), expected)
    assert n_plans() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_plan_is_of_dtypes(dtype):
    step(*setting(torch.float16))
    expected = step_at_once(*setting(dtype))
    assert_same(step(*setting(dtype)), expected)
    assert n_plans() == (2 if dtype == torch.float16 else 4)


def test_settings_that_change_from_step_to_step_make_no_new_plan(direct):
    relation, teacher, student = setting()
    for lambda_r, lambda_d, eps in ((1, 0.5, 1e-5), (0.25, 2.0, 1e-3), (0.0, 1, 1e-5)):
        relation.layer_norm_mask.eps = relation.layer_norm_feat.eps = eps
        weights = {"lambda_r": lambda_r, "lambda_d": lambda_d}
        assert_same(step(relation, teacher, student, **weights), step_at_once(relation, teacher, student, **weights))
        assert n_plans() == 2


def test_plans_have_a_bound():
    def double(tensors, numbers):
        return [tensors[0] * 2]

    for n in range(launches.MAX_PLANS + 5):
        (doubled,) = launches.run(double, [torch.ones(n + 1)], ())
    assert doubled.tolist() == [2.0] * (launches.MAX_PLANS + 5)
    assert n_plans() == launches.MAX_PLANS


@pytest.mark.parametrize(("first", "then"), [("one tensor", "apart"), ("halves", "one tensor"), ("apart", "halves")])
def test_what_shares_memory_in_one_step_need_not_in_the_next(first, then, direct):
    """A plan knows inputs by their places, not by where they lay when it was made."""
    relation, teacher, student = setting()
    maps, tokens = ([getattr(x, name).detach() for x in (teacher, student)] for name in SAMFeatures._fields[:2])
    arguments = {}
    for how in (first, then):
        pairs = {"one tensor": lambda x: (x[0], x[0]), "halves": lambda x: torch.stack(x).unbind(), "apart": tuple}
        teacher, student = map(SAMFeatures, pairs[how](maps), pairs[how](tokens))
        arguments[how] = relation, teacher, SAMFeatures(*(x.detach().requires_grad_() for x in student[:2]))
    for how in (first, then):
        assert_same(step(*arguments[how]), step_at_once(*arguments[how]))
    assert n_plans() == 2


def test_a_step_leaves_no_tensor_behind(direct):
    for _ in range(2):
        relation, teacher, student = setting()
        terms = infosam_terms(relation, teacher, student, impl="triton")
        terms.loss.backward()
        watched = [*teacher[:2], *student[:2], *relation.parameters(), *terms[:3], student.image_features.grad]
        watched = [weakref.ref(x) for x in watched]
        del relation, teacher, student, terms
        assert all(x() is None for x in watched)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_forward_is_planned(mode, direct):
    relation, teacher, student = setting()
    expected = step(relation, teacher, student)[:3]
    launches.plan.cache_clear()
    with mode():
        terms = infosam_terms(relation, teacher, student, impl="triton")
    assert_same(list(terms), expected)
    assert not terms.loss.requires_grad
    assert n_plans() == 1


def test_a_teacher_with_a_graph_gets_no_gradient():
    relation, teacher, student = setting()
    expected = step(relation, teacher, student)
    teacher = in_training(teacher)
    assert_same(step(relation, teacher, student), expected)
    infosam_terms(relation, teacher, student, impl="triton").loss.backward()
    assert teacher.image_features.grad is None
    with torch.no_grad():
        constant = SAMFeatures(*(x.detach() for x in student[:2]))
        terms = infosam_terms(relation.requires_grad_(False), teacher, constant, impl="triton")
    assert not terms.loss.requires_grad


@pytest.mark.parametrize("term", ["compression", "distillation"])
def test_each_term_has_its_own_gradient(term, direct):
    relation, teacher, student = setting()
    parameters = list(relation.parameters())
    found = {}
    for impl in ("triton", "triton", "reference"):
        value = getattr(infosam_terms(relation, teacher, student, impl=impl), term)
        found[impl] = torch.autograd.grad(-1.7 * value, parameters)
    scale = max(x.abs().max().item() for x in found["reference"])
    for a, e in zip(*found.values(), strict=True):
        assert_close_on_scale(a, e, name=f"{tuple(a.shape)}", rtol=1e-5, scale=scale)


def test_a_graph_that_is_kept_has_its_gradients_twice(direct):
    relation, teacher, student = setting()
    leaves = [*student[:2], *relation.parameters()]
    for _ in range(2):
        loss = infosam_terms(relation, teacher, student, impl="triton").loss
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_same(list(torch.autograd.grad(loss, leaves)), list(once))


def test_losses_may_be_changed_in_place(direct):
    relation, teacher, student = setting()
    expected = step(relation, teacher, student)
    terms = infosam_terms(relation, teacher, student, impl="triton")
    loss = terms.loss
    loss /= 2
    assert_same([terms.compression.detach(), terms.distillation.detach()], expected[1:3])
    (grad,) = torch.autograd.grad(loss, student.image_features)
    assert torch.equal(grad, expected[3] / 2)


def test_saved_tensors_may_come_back_laid_out_anew(direct):
    """As from memory on the host, where hooks of saved tensors keep no strides."""
    relation, *both = setting()
    teacher, student = (
        SAMFeatures(x.detach().contiguous(memory_format=torch.channels_last), tokens.detach()) for x, tokens, _ in both
    )
    student = SAMFeatures(*(x.requires_grad_() for x in student[:2]))
    expected = step(relation, teacher, student)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    )
    with hooks:
        found = step(relation, teacher, student)
    for a, e in zip(found, expected, strict=True):
        assert_close_on_scale(a, e, name=f"{tuple(a.shape)}", rtol=1e-6)


def test_two_threads_may_have_a_loss_each(direct):
    if not INTERPRETED:
        pytest.skip("on a GPU launches of Triton itself are not serialised here")
    arguments = {seed: setting(seed=seed) for seed in (1, 11)}
    expected = {seed: step_at_once(*values) for seed, values in arguments.items()}
    found: dict[int, list[list[Tensor]]] = {1: [], 11: []}

    def train(seed: int) -> None:
        for _ in range(3):
            found[seed].append(step(*arguments[seed]))

    threads = [threading.Thread(target=train, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, steps in found.items():
        assert len(steps) == 3
        for values in steps:
            assert_same(values, expected[seed])


def test_a_copied_loss_runs(direct):
    _, teacher, student = setting()
    loss = InfoSAMLoss(8, impl="triton").to(DEVICE)
    expected = loss(teacher, student)
    assert torch.equal(copy.deepcopy(loss)(teacher, student), expected)
    assert n_plans() == 1


def test_a_profiler_sees_every_launch(direct):
    """Triton's hooks listen to launches through Triton alone."""
    arguments = setting()
    for _ in range(2):
        expected = step(*arguments)
    n_direct = len(direct)
    heard = []
    hook = knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        assert_same(step(*arguments), expected)
    finally:
        hook.remove(heard.append)
    # The interpreter calls no hooks.
    assert len(direct) == n_direct if INTERPRETED else len(heard) == 8
    step(*arguments)
    assert not INTERPRETED or len(direct) == 2 * n_direct


def test_who_counts_operations_sees_the_operators():
    """They know their shapes and derivatives, an autograd function shows what is inside."""
    arguments = setting()
    expected = step(*arguments)
    with counted() as names:
        found = step(*arguments)
    assert_same(found, expected)
    assert len(names) == 9, names


def test_what_is_traced_is_found():
    x = torch.ones(2)
    assert not autograd.is_traced(x, torch.nn.Parameter(x))
    with counted():
        assert autograd.is_traced(x)
    asked = []
    torch.func.vmap(lambda x: asked.append(autograd.is_traced(x)) or x)(x)
    assert asked == [True]
    assert torch.compile(lambda x: x + autograd.is_traced(x), backend="eager", fullgraph=True)(x).tolist() == [2, 2]


def combined(tensors, numbers, factor):
    x, y = tensors
    both = torch.cat([x, y])
    both.mul_(factor)
    zeros = torch.zeros(3, device=x.device)
    total, room = torch.empty_like(x), x.new_empty(2, 3)
    total.copy_(both[: len(x)] + zeros)
    room[1].copy_(total)
    room[0].fill_(7)
    values, _ = both.sort()
    return [both[1:], None, room[1], values, values.view(2, 4), room.view(3, 2), [total]]


def test_operations_between_launches_are_repeated():
    for k in (1, 2, 3):
        inputs = [k * torch.arange(3.0), -k * torch.arange(1.0, 6.0)]
        both, nothing, *others, packed = launches.run(combined, inputs, (), 10)
        expected = run_at_once(combined, inputs, (), 10)
        assert nothing is None
        assert_same([both, *others], [expected[0], *expected[2:-1]])
        assert torch.equal(packed.view(torch.float32)[:3], expected[2])
    assert n_plans() == 1


@pytest.mark.parametrize("misuse", [lambda x: x + 1, lambda x: 2 * x, float, lambda x: torch.ones(2) * x])
def test_nothing_is_computed_from_a_number_that_changes(misuse):
    with pytest.raises(TypeError):
        launches.run(lambda tensors, numbers: [misuse(numbers[0])], [torch.ones(2)], (0.5,))


def test_what_is_packed_is_allocated_for_it():
    with pytest.raises(AssertionError, match="allocated"):
        launches.run(lambda tensors, numbers: [[tensors[0] + 1]], [torch.ones(2)], ())


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_which_gpus_multiply_fp32_on_tensor_cores(capability, expected, monkeypatch):
    gpu.has_tensor_cores.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    try:
        assert gpu.has_tensor_cores(torch.device("cuda")) is expected
        assert gpu.has_tensor_cores(torch.device("cpu")) is True
    finally:
        gpu.has_tensor_cores.cache_clear()


class Named(Tensor):
    """Plain memory, with a class of its own."""


def test_who_follows_operations_on_tensors_is_seen():
    x = torch.zeros(2)
    assert not autograd.is_traced(x, nn.Parameter(x), x.as_subclass(Named))
    with FakeTensorMode() as mode:
        assert autograd.is_traced(x)
    # Outside of the mode its tensors are still no plain memory.
    fake = mode.from_tensor(x)
    assert autograd.is_traced(fake)
    assert autograd.is_traced(x, fake)


def test_what_an_operation_makes_is_found_by_later_launches():
    first, second = Place(0, 0, (4,), (1,), torch.float32), Place(1, 0, (4,), (1,), torch.float32)
    operation = Operation(torch.add, [(first, second), {}], [(0, 2)])
    operation.addresses = [[(1, 0), (3, 8)]]
    memory, values = [torch.ones(4), torch.full((4,), 2.0), torch.zeros(0)], [None, None, None, None]
    operation(memory, [], values)
    assert torch.equal(memory[2], torch.full((4,), 3.0))
    assert values == [None, memory[2].data_ptr(), None, memory[2].data_ptr() + 8]


def test_an_output_that_is_a_part_of_its_memory_has_room_for_all_of_it():
    whole = Place(0, 0, (2, 3), (1, 2), torch.float32)
    assert launches._allocation(whole, 24) == ((2, 3), (1, 2), torch.float32)
    assert launches._allocation(whole, 40) == ((10,), (1,), torch.float32)
