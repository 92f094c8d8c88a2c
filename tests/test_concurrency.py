"""Threads, data loader workers and processes beside a training: nothing of one reaches another."""

from __future__ import annotations

import copy
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from renyi_kd import AdapterDisabled, CachedTeacher, InfoSAMLoss, SAMFeatures, infosam_terms, tap
from renyi_kd.sam.threads import observed_elsewhere, observing
from tests.support import relation_module
from tests.support.long_run import DIM, SIZE, MiniSAM, task

Batch = dict[str, Tensor]
SECONDS = 10.0


def batch_of(seed: int, n_images: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(n_images, 3, SIZE, SIZE, generator=generator),
        "boxes": torch.rand(n_images, 1, 4, generator=generator),
    }


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions at once, each in a thread, and return what they return; an error of one is raised."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    if errors:
        raise errors[0]
    return results


def gradients_of(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    """Return gradients without adding them to those that other threads may add to."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@contextmanager
def meeting_in(*modules: nn.Module) -> Iterator[None]:
    """Let two threads wait for each other after every call of these modules, so that both are inside a forward."""
    barrier = threading.Barrier(2, timeout=SECONDS)

    def wait(*_: Any) -> None:
        barrier.wait()

    handles = [module.register_forward_hook(wait) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# threads, each with its own models


def train(seed: int, n_steps: int = 12) -> list[Tensor]:
    """Train with all that is kept from step to step, and return every loss and the weights."""
    student, teacher = tap(MiniSAM(seed)), tap(MiniSAM(seed + 1))
    infosam_loss = InfoSAMLoss(DIM, bank_size=4, gradient_share=0.1)
    parameters = [*student.model.parameters(), *infosam_loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    losses = []
    for step in range(n_steps):
        batch = batch_of(100 * seed + step)
        loss = task(student(batch)) + infosam_loss(teacher, student, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        losses += [torch.tensor(value) for value in infosam_loss.scalars().values()]
    return [*losses, *(parameter.detach() for parameter in parameters)]


def test_two_threads_train_as_one_after_the_other():
    expected = [train(seed) for seed in (1, 5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found = in_threads(lambda: train(1), lambda: train(5))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_a_loss_and_taps_of_another_thread():
    """Made in one thread, used in another, and differentiated in a third, as autograd's threads for GPUs do."""
    batches = [batch_of(seed) for seed in range(3)]

    def make() -> tuple[Any, Any, InfoSAMLoss]:
        return tap(MiniSAM(0)), tap(MiniSAM(1)), InfoSAMLoss(DIM, gradient_share=0.1)

    def step(teacher: Any, student: Any, infosam_loss: InfoSAMLoss, batch: Batch) -> Tensor:
        return task(student(batch)) + infosam_loss(teacher, student, batch)

    def state(made: Any) -> list[Tensor]:
        gradients = [parameter.grad for parameter in made[1].model.parameters() if parameter.grad is not None]
        return [*gradients, *(torch.tensor(value) for value in made[2].scalars().values())]

    expected, found = make(), in_threads(make)[0]
    for batch in batches:
        step(*expected, batch).backward()
        loss = in_threads(lambda batch=batch: step(*found, batch))[0]
        in_threads(loss.backward)
    assert_same(state(found), state(expected))


def test_checkpointing_that_is_run_again_in_another_thread():
    """What is run again in a backward is no call, in whichever thread autograd runs it."""
    model = MiniSAM(1)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        maps, prompts = model.image_encoder(batch["images"]), model.prompt_encoder(batch["boxes"])[:, :, None]
        return checkpoint(model.mask_decoder, maps, prompts, use_reentrant=False)

    teacher, student = tap(MiniSAM(0), call=forward), tap(model, call=forward)
    infosam_loss, batch = InfoSAMLoss(DIM), batch_of(0)
    loss = task(student(batch)) + infosam_loss(teacher, student, batch)
    in_threads(loss.backward)
    assert not student.pending
    assert model.mask_decoder.transformer.weight.grad is not None


# threads that share a model


@pytest.mark.parametrize("n_taps", [1, 2])
def test_two_threads_with_one_student_have_a_step_each(n_taps):
    model, batches = MiniSAM(1), [batch_of(0), batch_of(1)]
    taps = [tap(model) for _ in range(n_taps)]
    taps, losses = [taps[0], taps[-1]], [InfoSAMLoss(DIM) for _ in range(2)]
    teachers = [tap(MiniSAM(0)) for _ in range(2)]

    def step(index: int) -> list[Tensor]:
        output = taps[index](batches[index])
        loss = task(output) + losses[index](teachers[index], taps[index])
        return [loss.detach(), *gradients_of(loss, model, losses[index])]

    expected = [step(index) for index in range(2)]
    for each in taps:
        each.clear()
    with meeting_in(model.image_encoder, model.mask_decoder.transformer):
        found = in_threads(lambda: step(0), lambda: step(1))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_a_validation_in_another_thread_leaves_the_step_as_it_is():
    model, batch = MiniSAM(1), batch_of(0)
    student, teacher, infosam_loss = tap(model), tap(MiniSAM(0)), InfoSAMLoss(DIM)

    def step() -> list[Tensor]:
        loss = task(student(batch)) + infosam_loss(teacher, student)
        return [loss.detach(), *gradients_of(loss, model)]

    def validate() -> None:
        with torch.no_grad():
            model(**batch_of(1))

    expected = step()
    with meeting_in(model.image_encoder, model.mask_decoder.transformer):
        found = in_threads(step, validate)[0]
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["tap", "two taps", "cached"])
def test_two_threads_share_a_teacher(kind, tmp_path):
    model = MiniSAM(0)
    # In training mode it would drop half of what it computes.
    model.image_encoder = nn.Sequential(model.image_encoder, nn.Dropout(0.5))
    model.train()
    encoder = model.image_encoder
    teachers = [tap(model)] * 2 if kind != "two taps" else [tap(model), tap(model)]
    if kind == "cached":
        teachers = [CachedTeacher(teachers[0], tmp_path / "shared")] * 2
    students, losses = [tap(MiniSAM(seed)) for seed in (1, 2)], [InfoSAMLoss(DIM) for _ in range(2)]
    batches: list[dict[str, Any]] = [
        {**batch_of(seed), "sample_id": [f"{seed}.{image}" for image in range(3)]} for seed in (0, 1)
    ]

    def steps(index: int) -> list[Tensor]:
        values = []
        for _ in range(3):
            loss = losses[index](teachers[index], students[index], batches[index])
            values += [loss.detach(), *gradients_of(loss, students[index].model)]
        return values

    if kind == "cached":
        alone: Any = CachedTeacher(tap(copy.deepcopy(model)), tmp_path / "alone")
        expected = []
        for index in range(2):
            values = []
            for _ in range(3):
                loss = losses[index](alone, students[index], batches[index])
                values += [loss.detach(), *gradients_of(loss, students[index].model)]
            expected.append(values)
    else:
        expected = [steps(index) for index in range(2)]
    for module in (encoder[0], model.mask_decoder.transformer):
        module.register_forward_hook(lambda *_: time.sleep(0.002))
    found = in_threads(lambda: steps(0), lambda: steps(1))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(encoder)


@pytest.mark.parametrize("check_pixels", [True, False])
def test_a_step_that_fails_leaves_nothing_to_a_thread_that_waits_for_it(check_pixels, tmp_path, monkeypatch):
    model = MiniSAM(0)
    first, second = ({**batch_of(seed, 2), "sample_id": [f"{seed}.0", f"{seed}.1"]} for seed in (0, 1))
    expected = CachedTeacher(tap(model), tmp_path / "alone").observe(second)
    teacher = CachedTeacher(tap(model), tmp_path / "shared", check_pixels=check_pixels)
    teacher.observe(first)
    inside, waits, waiting = threading.Event(), threading.Event(), threading.local()

    def announced(model: nn.Module) -> Any:
        if getattr(waiting, "here", False):
            waits.set()
        return observing(model)

    def fail(*_: Any) -> None:
        if not getattr(waiting, "here", False):
            inside.set()
            assert waits.wait(SECONDS)
            raise RuntimeError("no such prompts")

    monkeypatch.setattr("renyi_kd.teachers.cached.observing", announced)
    handle = model.register_forward_pre_hook(fail)

    def observe_first() -> None:
        with pytest.raises(RuntimeError, match="no such prompts"):
            teacher.observe(first)

    def observe_second() -> SAMFeatures:
        waiting.here = True
        assert inside.wait(SECONDS)
        return teacher.observe(second)

    found = in_threads(observe_first, observe_second)[1]
    handle.remove()
    assert torch.equal(found.image_features, expected.image_features)
    # And so is what was written of it.
    kept = CachedTeacher(tap(model), tmp_path / "shared", check_pixels=False).observe(second)
    assert torch.equal(kept.image_features, expected.image_features)


def test_a_student_that_ran_in_another_thread_is_named():
    student, batch = tap(MiniSAM(1)), batch_of(0)
    infosam_loss, teacher = InfoSAMLoss(DIM), tap(MiniSAM(0))
    ready, over = threading.Event(), threading.Event()

    def run() -> tuple[Tensor, SAMFeatures]:
        student(batch)
        ready.set()
        assert over.wait(SECONDS)
        return student.take()

    def loss() -> None:
        assert ready.wait(SECONDS)
        try:
            for given in (batch, None):
                with pytest.raises(RuntimeError, match=r"in the thread .* student ran.*1 in another.*take\(\)"):
                    infosam_loss(teacher, student, given)
        finally:
            over.set()

    features, _ = in_threads(run, loss)
    # What the message says to do.
    assert torch.equal(infosam_loss(teacher, features, batch), infosam_loss(teacher, student, batch))


def test_what_a_thread_left_behind_goes_with_it():
    student, batch = tap(MiniSAM(1)), batch_of(0)
    in_threads(lambda: bool(student(batch).any()))
    assert not student.pending
    assert InfoSAMLoss(DIM)(tap(MiniSAM(0)), student, batch).requires_grad


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_one_model_is_not_trained_and_observed_at_once(first):
    model, batch = MiniSAM(1), batch_of(0)
    student, began, over = tap(model), threading.Event(), threading.Event()
    teacher, infosam_loss = AdapterDisabled(student, disable=nullcontext), InfoSAMLoss(DIM)

    def begin(*_: Any) -> None:
        if not began.is_set():
            began.set()
            assert over.wait(SECONDS)

    handle = model.image_encoder.register_forward_hook(begin)

    def train() -> None:
        student(batch)
        infosam_loss(teacher, student, batch)

    def second() -> None:
        try:
            assert began.wait(SECONDS)
            with pytest.raises(RuntimeError, match="must not be trained while another thread runs it"):
                train() if first == "teacher" else teacher.observe(batch)
        finally:
            over.set()

    in_threads(train if first == "student" else lambda: teacher.observe(batch), second)
    handle.remove()
    student.clear()
    train()


def test_threads_that_only_ask_do_not_see_each_other():
    model = nn.Linear(1, 1)
    with observing(model):
        assert not observed_elsewhere(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        found = in_threads(*[lambda: sum(observed_elsewhere(model) for _ in range(20000))] * 2)
    finally:
        sys.setswitchinterval(interval)
    assert found == [0, 0]


def test_who_observes_is_seen_until_the_outermost_end():
    model, answers = nn.Linear(1, 1), []

    def ask() -> None:
        answers.extend(in_threads(lambda: observed_elsewhere(model)))

    ask()
    with observing(model):
        ask()
        with observing(model):
            ask()
        ask()
        assert not observed_elsewhere(model)
    ask()
    with suppress(KeyError), observing(model):
        raise KeyError
    ask()
    assert answers == [False, True, True, True, False, False]


# processes


class Images(Dataset[dict[str, Any]]):
    """Images of which each tells what a tap and a loss that the data set holds say of it."""

    def __init__(self, *held: Any) -> None:
        self.held = held

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = batch_of(index, 2)
        item: dict[str, Any] = {"images": batch["images"][0], "boxes": batch["boxes"][0], "index": index}
        if self.held:
            teacher, student, infosam_loss = self.held
            with torch.no_grad():
                item["loss"] = infosam_loss(teacher, student, batch)
        return item


def losses_of(loader: Any, teacher: Any, student: Any, infosam_loss: InfoSAMLoss) -> list[Tensor]:
    """Train over a loader, and return what its workers computed and every loss and gradient."""
    values = []
    for batch in loader:
        loss = task(student({name: batch[name] for name in ("images", "boxes")})) + infosam_loss(teacher, student)
        values += [*batch.get("loss", ()), loss.detach(), *gradients_of(loss, student.model, infosam_loss)]
    return values


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
@pytest.mark.parametrize("holds", [False, True], ids=["beside", "held"])
def test_workers_of_a_data_loader(context, holds):
    """Beside a tapped model and a loss whose step is under way, and with them in the data set."""
    teacher, student = tap(MiniSAM(0)), tap(MiniSAM(1))
    infosam_loss = InfoSAMLoss(DIM, bank_size=2, gradient_share=0.1)
    loss = task(student(batch_of(7))) + infosam_loss(teacher, student)
    loss.backward()
    student(batch_of(8))
    waiting = student._recording
    images = Images(teacher, student, infosam_loss) if holds else Images()
    loaders = [
        DataLoader(images, 2, num_workers=n, multiprocessing_context=context if n else None, timeout=60 if n else 0)
        for n in (0, 2)
    ]
    batches = list(loaders[1])
    assert student._recording is waiting
    assert len(waiting) == 1
    student.clear()
    expected = losses_of(loaders[0], teacher, student, copy.deepcopy(infosam_loss))
    assert_same(losses_of(batches, teacher, student, copy.deepcopy(infosam_loss)), expected)


def test_a_fork_between_two_steps():
    """Process and child go on each as if it were alone, also where another thread of the process is observing."""
    teacher, student = tap(MiniSAM(0)), tap(MiniSAM(1))
    infosam_loss = InfoSAMLoss(DIM, bank_size=2, gradient_share=0.1)

    def step(infosam_loss: InfoSAMLoss, seed: int) -> list[Tensor]:
        loss = task(student(batch_of(seed))) + infosam_loss(teacher, student)
        return [loss.detach(), *gradients_of(loss, student.model, infosam_loss)]

    def child(queue: Any) -> None:
        with torch.no_grad():
            queue.put(infosam_loss(teacher, student, batch_of(1)).item())
            # In the model that a thread of the parent's runs at this moment, and not in this process.
            queue.put(infosam_loss(held, student, batch_of(1)).item())

    step(infosam_loss, 0)
    expected = step(copy.deepcopy(infosam_loss), 1)
    with torch.no_grad():
        validated = infosam_loss(teacher, student, batch_of(1)).item()
    held = tap(MiniSAM(0))
    began, over = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        began.set()
        assert over.wait(SECONDS)

    handle = held.model.image_encoder.register_forward_hook(wait)
    thread = threading.Thread(target=held.observe, args=(batch_of(2),))
    thread.start()
    try:
        assert began.wait(SECONDS)
        handle.remove()
        student(batch_of(1))
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        assert [queue.get(timeout=SECONDS) for _ in range(2)] == [validated, validated]
        process.join(SECONDS)
        assert process.exitcode == 0
    finally:
        over.set()
        thread.join(SECONDS)
    student.clear()
    assert_same(step(infosam_loss, 1), expected)


def observe_all(folder: Path, offset: int, queue: Any) -> None:
    """Observe every batch, from another one on in every process."""
    model = MiniSAM(0)
    # Slower than a look at the folder, so that several processes miss the same image at once.
    model.image_encoder.register_forward_hook(lambda *_: time.sleep(0.01))
    teacher = CachedTeacher(tap(model), folder)
    found = {}
    for number in range(3):
        seed = (number + offset) % 3
        features = teacher.observe({**batch_of(seed), "sample_id": [f"{seed}.{image}" for image in range(3)]})
        found[seed] = [value.numpy() for value in features[:2]]
    queue.put(found)


def test_four_processes_share_a_cached_teacher(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=observe_all, args=(tmp_path / "shared", n, queue)) for n in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=SECONDS) for _ in processes]
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    alone: list[dict[int, Any]] = []
    observe_all(tmp_path / "alone", 0, SimpleNamespace(put=alone.append))
    for of_process in found:
        for seed, values in alone[0].items():
            for one, other in zip(of_process[seed], values, strict=True):
                np.testing.assert_array_equal(one, other)
    names = [sorted(path.name for path in (tmp_path / each).rglob("*")) for each in ("shared", "alone")]
    assert names[0] == names[1]
    assert len(names[0]) >= 9


def give_features(queue: Any, over: Any) -> None:
    teacher, student = tap(MiniSAM(0)), tap(MiniSAM(1))
    for seed in range(2):
        student(batch_of(seed))
        features = student.take()
        # PyTorch sends no graphs.
        maps, tokens = (each.detach() for each in features[:2])
        queue.put((teacher.observe(batch_of(seed)), features._replace(image_features=maps, mask_tokens=tokens)))
    # The receiver may still map the memory.
    assert over.wait(SECONDS)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_features_travel_through_queues(start):
    context = torch.multiprocessing.get_context(start)
    queue, over = context.Queue(), context.Event()
    process = context.Process(target=give_features, args=(queue, over))
    process.start()
    relation, teacher, student = relation_module(DIM), tap(MiniSAM(0)), tap(MiniSAM(1))
    for seed in range(2):
        given = queue.get(timeout=6 * SECONDS)
        batch = batch_of(seed)
        student(batch)
        own = infosam_terms(relation, teacher.observe(batch), student.take())
        with torch.no_grad():
            assert torch.equal(infosam_terms(relation, *given).loss, own.loss)
    over.set()
    process.join(SECONDS)
    assert process.exitcode == 0
