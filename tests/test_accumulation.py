"""Accumulation: micro-batches whose gradients add up to those of the whole batch, without its graphs in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renyi_kd import Accumulation, AdapterDisabled, InfoSAMLoss, SAMFeatures, tap
from renyi_kd.micro_batches import MicroBatches, _same_index
from renyi_kd.sam.rehearsal import random_state
from tests.support import module_gradients, sam_features
from tests.support.loops import MiniSam, Step, assert_same_gradients, run_hf, task_loss
from tests.support.memory import PeakBytes
from tests.support.models import DIM, hf_batch, hf_sam, with_lora

FP64 = torch.float64
# Numbers of images.
UNEVEN = (3, 1, 2)


class Setup:
    """A teacher, a student and a loss, always the same ones for the same settings."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = MiniSam,
        *,
        dim: int = 4,
        dtype: torch.dtype = FP64,
        call: Any = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda loss: loss,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.models = [make().to(dtype) for _ in range(2)]
        self.teacher, self.student = (tap(model, call=call) for model in self.models)
        self.inner = InfoSAMLoss(dim, **settings).to(dtype)
        self.infosam_loss = wrap(self.inner)
        self.accumulation = Accumulation(self.infosam_loss, self.teacher, self.student)

    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.models[1], self.inner

    def gradients(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": value.grad.clone()
            for number, module in enumerate(self.modules())
            for name, value in module.named_parameters()
            if value.grad is not None
        }

    def zero_grad(self) -> None:
        for module in self.modules():
            module.zero_grad()

    def plain(self, batches: Sequence[Any], weights: Sequence[Tensor] | None = None) -> Step:
        """Return the step with the graphs of all micro-batches in memory."""
        self.zero_grad()
        task = sum(task_of(self.student(batch)) for batch in batches) / len(batches)
        weight = None if weights is None else torch.cat(list(weights))
        loss = self.infosam_loss(self.teacher, self.student, sample_weight=weight)
        (task + loss).backward()
        return Step(loss.detach(), self.gradients())

    def exact(self, batches: Sequence[Any], weights: Sequence[Tensor | None] | None = None) -> Step:
        self.zero_grad()
        for batch, weight in zip(batches, weights or [None] * len(batches), strict=True):
            self.accumulation.collect(batch, sample_weight=weight)
        losses = []
        for batch in self.accumulation.replay():
            task = task_of(self.student(batch))
            losses.append(self.accumulation.loss())
            ((task + losses[-1]) / len(batches)).backward()
        assert len({loss.item() for loss in losses}) == 1
        return Step(losses[0].detach(), self.gradients())


def task_of(output: Any) -> Tensor:
    return task_loss([output] if isinstance(output, Tensor) else output)


def images(sizes: Sequence[int] = UNEVEN, *, seed: int = 0, side: int = 6, dtype: torch.dtype = FP64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, side, side, generator=generator, dtype=FP64).to(dtype) for n in sizes]


def assert_same_step(actual: Step, expected: Step, *, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual.loss, expected.loss, rtol=rtol, atol=rtol)
    assert_same_gradients(actual.gradients, expected.gradients, rtol=rtol)


def in_fp64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in batch.items()}


FORMS = {
    "paper": {},
    "of another order": {"alpha": 1.3},
    "constant teacher": {"detach_teacher_relation": True},
    "cauchy_schwarz": {"distillation": "cauchy_schwarz"},
    "debiased": {"distillation": "debiased", "alpha": 3.0},
    "jensen_renyi": {"distillation": "jensen_renyi"},
    "all tokens": {"token": "all", "distillation": "debiased"},
    "a term that the module takes no part in": {"distillation": "jensen_renyi", "lambda_r": 0.0},
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_all_graphs_in_memory(form):
    """Micro-batches of different numbers of images and of prompts, one of them of a single sample."""
    batches = [in_fp64(hf_batch(*numbers, seed=seed)) for seed, numbers in enumerate([(2, 2), (1, 1), (1, 3)])]
    setup = Setup(lambda: hf_sam(int(torch.randint(9, ()))), dim=DIM, call=run_hf, **FORMS[form])
    weighted = FORMS[form].get("distillation") == "jensen_renyi"
    weights = [torch.rand(n, dtype=FP64) for n in (4, 1, 3)] if weighted else None
    expected = setup.plain(batches, weights)
    assert_same_step(setup.exact(batches, weights), expected)
    assert any("vision_encoder" in name for name in expected.gradients)


def test_micro_batches_that_all_have_several_prompts_an_image():
    batches = [in_fp64(hf_batch(*numbers, seed=seed)) for seed, numbers in enumerate([(2, 2), (1, 3)])]
    setup = Setup(lambda: hf_sam(int(torch.randint(9, ()))), dim=DIM, call=run_hf)
    assert_same_step(setup.exact(batches), setup.plain(batches))


def test_a_frozen_encoder_gets_no_gradient():
    setup, batches = Setup(), images()
    setup.models[1].image_encoder.requires_grad_(False)
    expected = setup.plain(batches)
    assert not any("image_encoder" in name for name in expected.gradients)
    assert_same_step(setup.exact(batches), expected)


def test_weights_that_move_between_two_first_passes_are_noticed():
    setup, batches = Setup(), images()
    setup.accumulation.collect(batches[0])
    with torch.no_grad():
        next(setup.models[1].parameters()).add_(1)
    setup.accumulation.collect(batches[1])
    setup.student(next(setup.accumulation.replay()))
    with pytest.raises(RuntimeError, match="student must stay as it is from collect.. to the last loss.., got weights"):
        setup.accumulation.loss()


def test_values_are_compared_in_the_first_three_steps():
    setup = Setup()
    compared = []
    for seed in range(5):
        compared.append(setup.accumulation._passes.cache.micro_batches._compares_values)
        setup.exact(images(seed=seed))
    assert compared == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [(None, None, True), ([0, 0], [0, 0], True), ([0, 0], [0, 1], False), (None, [0, 1], False), ([0, 1], None, False)],
)
def test_images_of_both_passes_are_compared(first, second, same):
    one, other = (None if index is None else torch.tensor(index) for index in (first, second))
    assert _same_index(one, other) is same


def test_gradients_are_those_of_one_batch():
    setup, batches = Setup(), images()

    def task(masks: Tensor) -> Tensor:
        return masks.square().sum()

    whole = torch.cat(batches)
    loss = task(setup.student(whole)) + setup.infosam_loss(setup.teacher, setup.student, whole)
    expected = Step(loss.detach(), module_gradients(loss, *setup.modules()))
    setup.zero_grad()
    for batch in batches:
        setup.accumulation.collect(batch)
    total = 0.0
    for batch in setup.accumulation.replay():
        loss = task(setup.student(batch)) + setup.accumulation.loss() / len(batches)
        loss.backward()
        total += loss.detach()
    assert_same_step(Step(total, setup.gradients()), expected)


class Dropping(MiniSam):
    """Draws random numbers in encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Dropout(0.3), self.image_encoder, nn.Dropout(0.3))
        self.mask_decoder.transformer = nn.Sequential(self.mask_decoder.transformer, nn.Dropout(0.3))


def test_both_passes_draw_alike_and_leave_the_random_numbers_of_a_plain_loop():
    found = []
    for way in (Setup.plain, Setup.exact, Setup.exact):
        setup = Setup(Dropping)
        torch.manual_seed(3 if len(found) < 2 else 4)
        found.append((way(setup, images()), torch.rand(())))
    (expected, after), (step, after_it), (other, _) = found
    assert_same_step(step, expected)
    assert after == after_it
    with pytest.raises(AssertionError):
        assert_same_gradients(other.gradients, expected.gradients, rtol=1e-2)


def test_what_a_loop_draws_between_its_micro_batches_does_not_matter():
    setup = Setup(Dropping)
    torch.manual_seed(3)
    expected = setup.plain(images())
    setup.zero_grad()
    torch.manual_seed(3)
    for batch in images():
        setup.accumulation.collect(batch)
    for batch in setup.accumulation.replay():
        ((task_of(setup.student(batch)) + setup.accumulation.loss()) / len(UNEVEN)).backward()
        torch.rand(7)
    assert_same_gradients(setup.gradients(), expected.gradients, rtol=1e-12)


class Generators:
    """Stands in for torch.cuda and torch.mps: the random state of each device, which is a number here."""

    def __init__(self) -> None:
        self.states = {"cuda:0": 10, "cuda:1": 20, "mps": 30}

    def get_rng_state(self, device: torch.device | str = "mps") -> int:
        return self.states[str(device)]

    def set_rng_state(self, state: int, device: torch.device | str = "mps") -> None:
        self.states[str(device)] = state


def test_random_numbers_are_those_of_every_device_of_model_and_batch(monkeypatch):
    generators = Generators()
    monkeypatch.setattr(torch, "get_device_module", lambda _device: generators)
    on = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:1", "cpu", "cuda:1")]
    model = SimpleNamespace(parameters=lambda: on, buffers=lambda: [SimpleNamespace(device=torch.device("mps"))])
    state = random_state(model, {"image": torch.ones(2)})
    generators.states = dict.fromkeys(generators.states, 0)
    drawn = torch.rand(3)
    state.restore()
    assert generators.states == {"cuda:0": 0, "cuda:1": 20, "mps": 30}
    assert torch.equal(torch.rand(3), drawn)


class Counting(MiniSam):
    """Advances running statistics, and holds a buffer that its forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("last", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        features = self.norm(self.image_encoder(image))
        if self.training:
            self.last = self.last + features.detach().square().mean()
        return self.mask_decoder(features)


def test_buffers_are_advanced_once():
    plain, exact = Setup(Counting), Setup(Counting)
    expected, step = plain.plain(images()), exact.exact(images())
    assert_same_step(step, expected)
    for name, value in plain.models[1].named_buffers():
        assert torch.equal(dict(exact.models[1].named_buffers())[name], value), name
    assert exact.models[1].norm.num_batches_tracked == len(UNEVEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_autocast(dtype):
    """To the rounding of fp32: the features of both ways, and so what is rounded to half precision, are the same."""

    def in_autocast(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(batch)

    setup = Setup(call=in_autocast, dtype=torch.float32)
    batches = images(dtype=torch.float32)
    setup.student(batches[0])
    assert setup.student.take().image_features.dtype == dtype
    expected = setup.plain(batches)
    assert_same_step(setup.exact(batches), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_any_dtype_are_joined_under_autocast(dtype):
    """Under it a CPU joins no numbers in float16 by itself."""
    parts = [sam_features(2, seed=seed, dim=4, size=(2, 2), dtype=dtype) for seed in range(2)]
    micro_batches = MicroBatches(compares_values=False)
    for part in parts:
        micro_batches.add(part, part, None)
    with torch.autocast("cpu", torch.bfloat16):
        teacher = micro_batches.join().teacher
    for whole, name in zip(teacher[:2], ("image_features", "mask_tokens"), strict=True):
        assert whole.dtype == dtype
        assert whole.equal(torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    """Which wraps the forward of model and loss, and divides what is differentiated."""
    accelerate = pytest.importorskip("accelerate")

    def in_autocast(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(batch)

    batches = images(dtype=torch.float32)
    expected = Setup(dtype=torch.float32, call=in_autocast).plain(batches)
    setup = Setup(dtype=torch.float32)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        settings = {"mixed_precision": precision, "gradient_accumulation_steps": len(batches)}
        accelerator = accelerate.Accelerator(cpu=True, **settings)
        model, infosam_loss = accelerator.prepare(setup.models[1], setup.inner)
        teacher = tap(accelerator.prepare_model(setup.models[0], evaluation_mode=True))
        accumulation = Accumulation(infosam_loss, teacher, tap(model))
        for batch in batches:
            accumulation.collect(batch)
        for batch in accumulation.replay():
            accelerator.backward(task_of(model(batch)) + accumulation.loss())
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert_same_gradients(setup.gradients(), expected.gradients, rtol=1e-5)


def test_a_grad_scaler_scales_it_too():
    """Gradients too small for fp16, which the features are in, are those of the plain way."""

    def in_autocast(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(batch)

    settings = {"lambda_r": 2e-8, "lambda_d": 1e-8}
    setup = Setup(call=in_autocast, dtype=torch.float32, **settings)
    batches = images(dtype=torch.float32)
    optimizer = torch.optim.SGD([value for module in setup.modules() for value in module.parameters()], lr=0.1)
    found = []
    for exact in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        optimizer.zero_grad()
        if exact:
            for batch in batches:
                setup.accumulation.collect(batch)
            for batch in setup.accumulation.replay():
                setup.student(batch)
                scaler.scale(setup.accumulation.loss() / len(batches)).backward()
        else:
            for batch in batches:
                setup.student(batch)
            scaler.scale(setup.infosam_loss(setup.teacher, setup.student)).backward()
        scaler.unscale_(optimizer)
        found.append(setup.gradients())
    expected, step = found
    encoder = "0.image_encoder.weight"
    assert 0 < expected[encoder].abs().max() < 2.0**-24
    torch.testing.assert_close(step[encoder], expected[encoder], rtol=2.0**-7, atol=2.0**-7 * 2.0**-24)


@pytest.mark.parametrize("settings", [{}, {"gradient_share": 0.1}, {"bank_size": 4}], ids=str)
def test_steps_are_those_of_the_plain_way(settings):
    """Some steps of training, with what the loss keeps from one to the next, and what it tells of them."""
    plain, exact = Setup(**settings), Setup(**settings)
    for number in range(4):
        batches = images(seed=number)
        steps = [plain.plain(batches), exact.exact(batches)]
        assert_same_step(steps[1], steps[0], rtol=1e-10)
        assert exact.inner.scalars() == pytest.approx(plain.inner.scalars(), rel=1e-10)
        for setup in (plain, exact):
            with torch.no_grad():
                for value in (each for module in setup.modules() for each in module.parameters()):
                    value.sub_(0 if value.grad is None else 0.01 * value.grad)
    if "gradient_share" in settings:
        assert exact.inner.scalars()["weight"] > 2.0**-10


def test_a_teacher_without_a_copy_of_the_weights():
    """Which runs the student's own modules, in the first pass alone."""
    torch.manual_seed(0)
    student = tap(with_lora(hf_sam(1)).double(), call=run_hf)
    setup = Setup()
    setup.models[1], setup.student, setup.teacher = student.model, student, AdapterDisabled(student)
    setup.inner = setup.infosam_loss = InfoSAMLoss(DIM).double()
    setup.accumulation = Accumulation(setup.infosam_loss, setup.teacher, student)
    batches = [in_fp64(hf_batch(2, seed=seed)) for seed in range(2)]
    assert_same_step(setup.exact(batches), setup.plain(batches))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled():
    plain = Setup()
    setup = Setup(wrap=lambda loss: torch.compile(loss, backend="eager"))
    setup.models[1].compile(backend="eager")
    assert_same_step(setup.exact(images()), plain.plain(images()), rtol=1e-10)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant):
    setup = Setup(hf_sam, dim=DIM, call=run_hf)
    batches = [in_fp64(hf_batch(2, seed=seed)) for seed in range(2)]
    expected = setup.plain(batches)
    setup.models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_step(setup.exact(batches), expected)


def test_a_pass_of_the_students_own_without_gradient_does_not_count():
    class Twice(MiniSam):
        def forward(self, image: Tensor) -> Tensor:
            with torch.no_grad():
                first = super().forward(image)
            return super().forward(image + first.mean())

    # Each adds masks of its own.
    setup = Setup(Twice, compare_inputs="never")
    assert_same_step(setup.exact(images()), setup.plain(images()))


def test_features_may_be_overwritten_between_the_passes():
    class Reusing(MiniSam):
        """Hands its decoder a buffer, as CUDA graphs do."""

        def forward(self, image: Tensor) -> Tensor:
            features = self.image_encoder(image)
            if not torch.is_grad_enabled():
                buffer = self.__dict__.setdefault("own", features.clone())
                features = buffer.copy_(features)
            return self.mask_decoder(features)

    batches = images((2, 2, 2))
    setup, plain = Setup(Reusing), Setup()
    assert_same_step(setup.exact(batches), plain.plain(batches))


def test_second_derivatives_are_refused():
    setup = Setup()
    for batch in images():
        setup.accumulation.collect(batch)
    for batch in setup.accumulation.replay():
        setup.student(batch)
        loss = setup.accumulation.loss()
        with pytest.raises(NotImplementedError, match="Accumulation: backward must run without create_graph=True"):
            torch.autograd.grad(loss, list(setup.models[1].image_encoder.parameters()), create_graph=True)


# What it costs.


def test_the_student_runs_twice_and_the_teacher_once():
    setup, counts = Setup(), {"teacher": 0, "student": 0}
    for name, model in zip(counts, setup.models, strict=True):

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        model.image_encoder.register_forward_hook(count)
    setup.exact(images())
    assert counts == {"teacher": len(UNEVEN), "student": 2 * len(UNEVEN)}


class Deep(MiniSam):
    """Keeps many times as much for its backward as its image features are."""

    def __init__(self) -> None:
        super().__init__(16)
        layers = [layer for _ in range(8) for layer in (nn.Conv2d(16, 16, 1), nn.GELU())]
        self.image_encoder = nn.Sequential(self.image_encoder, *layers)


def peak(way: Callable[..., Step], count: int) -> int:
    setup, batches = Setup(Deep, dim=16), images([1] * count, side=33)
    with PeakBytes() as found:
        way(setup, batches)
    return found.bytes


def test_memory_grows_by_features_and_not_by_graphs():
    of_map = 8 * 16 * 32 * 32
    exact, plain = (peak(way, 8) - peak(way, 2) for way in (Setup.exact, Setup.plain))
    # The features of teacher and student, the gradient, and less than one more for what the loss works with.
    assert 2 * 6 * of_map < exact < 4 * 6 * of_map
    assert plain > 16 * 6 * of_map


def test_no_graph_and_no_feature_outlives_the_step():
    setup = Setup()
    setup.exact(images())
    passes = setup.accumulation._passes
    assert passes.collected == []
    assert len(passes.cache.micro_batches) == 0
    assert not setup.student.pending


# Misuse.


def collected(setup: Setup | None = None, **settings: Any) -> Setup:
    setup = setup or Setup(**settings)
    for batch in images():
        setup.accumulation.collect(batch)
    return setup


def second_pass(setup: Setup, run: Callable[[int, Tensor], Any]) -> None:
    for number, batch in enumerate(setup.accumulation.replay()):
        run(number, batch)
        setup.accumulation.loss().backward()


def without_a_first_pass() -> None:
    Setup().accumulation.replay()


def without_a_second_pass() -> None:
    collected().accumulation.loss()


def with_two_losses_of_a_micro_batch() -> None:
    setup = collected()
    batch = next(setup.accumulation.replay())
    setup.student(batch)
    setup.accumulation.loss(), setup.accumulation.loss()


def with_a_micro_batch_without_loss() -> None:
    replay = collected().accumulation.replay()
    next(replay), next(replay)


def with_a_replay_begun_twice() -> None:
    accumulation = collected().accumulation
    accumulation.replay(), accumulation.replay()


def with_a_second_pass_left_early() -> None:
    setup = collected()
    for batch in setup.accumulation.replay():
        setup.student(batch)
        setup.accumulation.loss()
        break
    setup.accumulation.collect(images()[0])


def with_a_student_that_ran_before() -> None:
    setup = Setup()
    setup.student(images()[0])
    setup.accumulation.collect(images()[0])


def with_a_student_that_does_not_run() -> None:
    second_pass(collected(), lambda _number, _batch: None)


def with_a_student_that_runs_on_something_else() -> None:
    setup = collected()
    second_pass(setup, lambda number, batch: setup.student(images(seed=1)[number]))


def with_micro_batches_in_another_order() -> None:
    setup = collected()
    second_pass(setup, lambda number, batch: setup.student(images()[2 - number]))


def with_a_step_for_each_micro_batch() -> None:
    setup = collected()
    optimizer = torch.optim.SGD(setup.models[1].parameters(), lr=1e-9)

    def run(number: int, batch: Tensor) -> None:
        setup.student(batch)
        if number:
            optimizer.step()

    second_pass(setup, run)


def without_gradient() -> None:
    setup = collected()
    for batch in setup.accumulation.replay():
        setup.student(batch)
        with torch.no_grad():
            setup.accumulation.loss()


def with_an_encoder_without_gradient() -> None:
    setup = collected()
    encoder = setup.models[1].image_encoder
    second_pass(setup, lambda _number, batch: (encoder.requires_grad_(False), setup.student(batch)))


def with_random_numbers_of_its_own() -> None:
    class Drawing(MiniSam):
        generator = torch.Generator().manual_seed(0)

        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image + torch.rand(image.shape, generator=self.generator))

    setup = Setup(Drawing, compare_inputs="never")
    second_pass(collected(setup), lambda _number, batch: setup.student(batch))


def with_a_backward_in_the_forward() -> None:
    def call(model: nn.Module, batch: Tensor) -> Tensor:
        masks = model(batch)
        if torch.is_grad_enabled():
            masks.sum().backward()
        return masks

    collected(call=call)


def with_two_image_sizes() -> None:
    accumulation = Setup().accumulation
    accumulation.collect(images(side=6)[0]), accumulation.collect(images(side=5)[0])


def with_weights_for_some() -> None:
    accumulation = Setup(distillation="jensen_renyi").accumulation
    batch, other = images((2, 2))
    accumulation.collect(batch), accumulation.collect(other, sample_weight=torch.ones(2, dtype=FP64))


def with_weights_in_a_form_without() -> None:
    Setup().accumulation.collect(images((2,))[0], sample_weight=torch.ones(2, dtype=FP64))


def with_a_single_sample_in_all() -> None:
    setup = Setup()
    setup.accumulation.collect(images((1,))[0])
    second_pass(setup, lambda _number, batch: setup.student(batch))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (without_a_first_pass, "replay must follow a first pass, once, got no micro-batches"),
        (without_a_second_pass, "loss must be computed once for each micro-batch of replay.., got none of it"),
        (with_two_losses_of_a_micro_batch, "loss must be computed once .* got a second one"),
        (with_a_micro_batch_without_loss, "loss must be computed once .* got none for micro-batch 1 of 3"),
        (with_a_replay_begun_twice, "replay must follow a first pass, once, got a second call"),
        (with_a_second_pass_left_early, "collect must follow the end of replay.., got .* with 2 of 3 micro-batches"),
        (with_a_student_that_ran_before, "collect must run the student itself, got one that has run"),
        (with_a_student_that_does_not_run, "tap: .*run"),
        (with_a_student_that_runs_on_something_else, "got other image features and mask tokens, .* % apart in micro-b"),
        (with_micro_batches_in_another_order, r"got image features of \(2, 4, 5, 5\) where they were of \(3, 4, 5, 5"),
        (with_a_step_for_each_micro_batch, "the student must stay as it is .* got weights that were written to"),
        (without_gradient, "loss must be computed with gradient, got torch.no_grad"),
        (with_an_encoder_without_gradient, "must give the features of the first, got image features without gradient"),
        (with_random_numbers_of_its_own, "must give the features of the first, got other .* draw what is random from"),
        (with_a_backward_in_the_forward, "first pass must run without backward, got one inside the student's forward"),
        (with_two_image_sizes, "micro-batches must be of one kind, got .* after "),
        (with_weights_for_some, "micro-batches must be of one kind, got .* with weights after .* without weights"),
        (with_weights_in_a_form_without, "sample_weight must go with distillation='jensen_renyi'"),
        (with_a_single_sample_in_all, "InfoSAMLoss: the batch must hold at least two samples"),
    ],
)
def test_misuse_is_named(misuse, message):
    with pytest.raises((RuntimeError, ValueError), match=message) as raised:
        misuse()
    assert re.match("Accumulation|InfoSAMLoss|tap", str(raised.value))


def test_what_is_no_loss_teacher_or_student_is_refused():
    teacher, student, infosam_loss = tap(MiniSam()), tap(MiniSam()), InfoSAMLoss(4)
    features = SAMFeatures(torch.randn(2, 4, 3, 3), torch.randn(2, 1, 4))
    for arguments, name in (
        ((nn.Linear(2, 2), teacher, student), "infosam_loss must be an InfoSAMLoss"),
        ((None, teacher, student), "infosam_loss must be an InfoSAMLoss"),
        ((infosam_loss, features, student), "teacher must be a tap, got SAMFeatures"),
        ((infosam_loss, teacher, student.model), "student must be a tap, got MiniSam"),
    ):
        with pytest.raises(TypeError, match=name):
            Accumulation(*arguments)


def test_a_step_that_is_skipped_is_cleared():
    setup = collected()
    setup.accumulation.clear()
    assert_same_step(setup.exact(images()), copy.deepcopy(setup.plain(images())))


def test_after_an_error_of_the_student_the_first_pass_goes_on():
    setup = Setup()
    setup.accumulation.collect(images()[0])
    with pytest.raises(FloatingPointError):
        setup.accumulation.collect(torch.full((1, 3, 6, 6), torch.nan, dtype=FP64))
    for batch in images()[1:]:
        setup.accumulation.collect(batch)
    second_pass(setup, lambda _number, batch: setup.student(batch))
