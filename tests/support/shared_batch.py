"""A batch that several processes share over gloo, in shards of any size; each saves what it found.

    python -m tests.support.shared_batch FOLDER

Four processes are started once, all as forks of one that has imported everything. Two of them, or three, are groups.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.processes import Batch, Bytes, CountedTraffic, total, traffic
from renyi_kd import InfoSAMLoss, SAMFeatures, infosam_terms
from renyi_kd.objective import Distillation
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.samples.columns import channels_of_all, sum_of_parts
from tests.support import gradients, in_training, randn, relation_module

# After which forks end whose fellows have died.
TIMEOUT = timedelta(seconds=60)
ROOT = Path(__file__).parent.parent.parent
N_PROCESSES = 4
# Ranks of each group: in those of two and three a process has another number than in the whole.
GROUPS = {2: [2, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3]}
DIM, SIZE, N_INPUTS = 6, (2, 3), 3


class Case(NamedTuple):
    """What the processes of a group do together.

    Attributes:
        shards: for each process the prompts of each of its images: a number, which may be 0.
        form: of the distillation term.
        wrapper: of student and loss; None for features that are leaves.
        n_tokens: of a sample.
        swapped: whether the samples of a shard stand in another order than their images.

    """

    shards: Sequence[Sequence[int]]
    form: Distillation
    wrapper: str | None
    n_tokens: int
    swapped: bool

    @property
    def n_processes(self) -> int:
        return len(self.shards)

    def images(self, rank: int) -> list[int]:
        """Return the image of each sample of a process."""
        images = [image for image, n_prompts in enumerate(self.shards[rank]) for _ in range(n_prompts)]
        return images[::-1] if self.swapped else images


class Student(nn.Module):
    """The least that makes maps and tokens of images and prompts."""

    def __init__(self, dim: int, n_tokens: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(N_INPUTS, dim, 2)
        self.decoder = nn.Linear(N_INPUTS, n_tokens * dim)
        self.n_tokens = n_tokens

    def forward(self, pixels: Tensor, prompts: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(pixels)
        tokens = self.decoder(prompts).unflatten(1, (self.n_tokens, -1))
        return maps, tokens + maps.mean((2, 3))[images, None].tanh()


def student_of(case: Case) -> Student:
    student = Student(DIM, case.n_tokens).double()
    with torch.no_grad():
        for seed, parameter in enumerate(student.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed, dtype=torch.float64))
    return student


def loss_of(case: Case, **settings: Any) -> InfoSAMLoss:
    infosam_loss = InfoSAMLoss(
        DIM, distillation=case.form, token="all", lambda_r=0.3, lambda_d=1.0, **settings
    ).double()
    infosam_loss.relation = relation_module(DIM, dtype=torch.float64)
    return infosam_loss


class Inputs(NamedTuple):
    """What a student sees, with the features of the teacher."""

    pixels: Tensor
    prompts: Tensor
    images: Tensor
    teacher: SAMFeatures


def inputs_of(case: Case, rank: int) -> Inputs:
    """Return those of a shard."""
    images, n_images = torch.tensor(case.images(rank), dtype=torch.int64), len(case.shards[rank])
    seed = 100 * rank
    maps = randn(n_images, DIM, *SIZE, seed=seed, dtype=torch.float64)
    return Inputs(
        randn(n_images, N_INPUTS, SIZE[0] + 1, SIZE[1] + 1, seed=seed + 1, dtype=torch.float64),
        randn(len(images), N_INPUTS, seed=seed + 2, dtype=torch.float64),
        images,
        SAMFeatures(
            # Processes need not lay out their maps alike.
            maps.contiguous(memory_format=torch.channels_last) if rank % 2 else maps,
            randn(len(images), case.n_tokens, DIM, seed=seed + 3, dtype=torch.float64),
            index_of(images, n_images),
        ),
    )


def index_of(images: Tensor, n_images: int) -> Tensor | None:
    """Return the index of features, which says nothing where each image has one sample."""
    return None if torch.equal(images, torch.arange(n_images)) else images


def together(parts: Sequence[Inputs]) -> Inputs:
    """Return the inputs of all shards as those of one process."""
    pixels, prompts, _, teachers = zip(*parts, strict=True)
    firsts = [sum(len(part.pixels) for part in parts[:rank]) for rank in range(len(parts))]
    images = torch.cat([first + part.images for first, part in zip(firsts, parts, strict=True)])
    maps, tokens, _ = zip(*teachers, strict=True)
    return Inputs(
        torch.cat(pixels), torch.cat(prompts), images, SAMFeatures(torch.cat(maps), torch.cat(tokens), images)
    )


def features_of(student: nn.Module, inputs: Inputs) -> SAMFeatures:
    maps, tokens = student(inputs.pixels, inputs.prompts, inputs.images)
    return SAMFeatures(maps, tokens, index_of(inputs.images, len(inputs.pixels)))


def step_of(
    case: Case,
    inputs: Inputs,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Return the loss of a step and its gradients, of student and module or, where nothing is wrapped, of features."""
    student, infosam_loss = student_of(case), loss_of(case, **settings)
    if case.wrapper is None:
        features = in_training(features_of(student, inputs))
        terms = infosam_terms(
            infosam_loss.relation,
            inputs.teacher,
            features,
            distillation=case.form,
            lambda_r=0.3,
            lambda_d=1.0,
            **settings,
        )
        of_student, of_module = gradients(terms.loss, features, infosam_loss.relation)
        return {"loss": terms.loss.detach(), **of_student, **of_module}
    wrapped = [student, infosam_loss] if wrap is None else [wrap(student), wrap(infosam_loss)]
    loss = wrapped[1](inputs.teacher, features_of(wrapped[0], inputs))
    loss.backward()
    named = dict(student.named_parameters()) | dict(infosam_loss.named_parameters())
    return {"loss": loss.detach(), **{name: whole(parameter.grad) for name, parameter in named.items()}}


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def ddp(group: distributed.ProcessGroup) -> Callable[[nn.Module], nn.Module]:
    return lambda module: DistributedDataParallel(module, process_group=group)


def fsdp2(group: distributed.ProcessGroup) -> Callable[[nn.Module], nn.Module]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    return lambda module: fully_shard(module, mesh=mesh)


def steps_of_cases(cases: Sequence[Case], group: distributed.ProcessGroup, rank: int) -> list[dict[str, Any]]:
    """Return the step of every case, and the bytes that were counted where nothing is wrapped."""
    wrappers = {"ddp": ddp(group), "fsdp2": fsdp2(group), None: None}
    # That of four is the default one, which needs no name.
    settings = {"global_batch": True, "process_group": None if group.size() == N_PROCESSES else group}
    found = []
    for case in cases:
        # Wrappers have collectives of their own.
        counted = CountedTraffic(rank, case.n_processes)
        with counted if case.wrapper is None else nullcontext():
            step = step_of(case, inputs_of(case, rank), wrappers[case.wrapper], **settings)
        found.append({"step": step, "counted": counted.numbers})
    return found


def formula(case: Case, rank: int) -> Bytes:
    """Return the bytes that a process exchanges in the step of a case."""
    n_images = tuple(len(shard) for shard in case.shards)
    n_samples = tuple(len(case.images(other)) for other in range(case.n_processes))
    batch = Batch(n_images, n_samples, DIM, SIZE[0] * SIZE[1], case.n_tokens, element_bytes=8)
    return total(traffic(batch, rank, "channels"))


# Images of each process; the last begins with none and has more than the others.
N_IMAGES = {2: [2, 1], 3: [1, 0, 3], 4: [2, 0, 1, 3]}
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def maps_of(rank: int, n_images: int, n_channels: int, dtype: torch.dtype) -> Tensor:
    maps = randn(n_images, n_channels, *SIZE, seed=rank, dtype=dtype)
    return maps.contiguous(memory_format=torch.channels_last) if rank % 2 else maps


def exchanged(group: distributed.ProcessGroup, rank: int) -> dict[Any, Any]:
    """Return the channels that a process gets of maps in every dtype, and the Gram matrix.

    Three channels are fewer than processes.
    """
    found = {}
    n_images = N_IMAGES[group.size()]
    for n_channels in (3, 7):
        for dtype in DTYPES:
            own = maps_of(rank, n_images[rank], n_channels, dtype)
            channels = channels_of_all(own, n_images, group=group)
            part = batch_gram(channels) if channels.shape[1] else torch.zeros(2 * [sum(n_images)], dtype=torch.float64)
            found[n_channels, dtype] = channels, sum_of_parts(part, group=group)
    return found


def said(call: Callable[[], Any]) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def too_few(group: distributed.ProcessGroup, rank: int) -> list[str]:
    """Return what is said of no samples at all, and of one where samples are compared."""
    return [
        said(lambda case=case: step_of(case, inputs_of(case, rank), global_batch=True, process_group=group))
        for case in (
            Case([[]] * group.size(), "jensen_renyi", None, 1, False),
            Case([[], *[[0]] * (group.size() - 2), [1]], "mutual_information", None, 1, False),
        )
    ]


def beside_others(group: distributed.ProcessGroup, rank: int) -> dict[str, Any]:
    """Return losses of a case with other settings of the loss: a bank, and weights that are looked at."""
    case = few_shards(group.size())
    inputs = inputs_of(case, rank)
    features = in_training(features_of(student_of(case), inputs))
    settings = {"global_batch": True, "process_group": group}
    banked = loss_of(case, bank_size=3, **settings)
    weighed = loss_of(case._replace(form="jensen_renyi"), check_finite=True, **settings)
    weight = weight_of(case, rank)
    return {
        # The second finds the samples of the first.
        "banked": [banked(inputs.teacher, features).item() for _ in range(2)],
        "weighed": weighed(inputs.teacher, features, sample_weight=weight).item(),
    }


def few_shards(n_processes: int) -> Case:
    """Return shards of which the last but one has no samples."""
    return Case([[1], [2, 1], [], [1]][-n_processes:], "mutual_information", None, 1, False)


def weight_of(case: Case, rank: int) -> Tensor:
    return randn(len(case.images(rank)), seed=rank, dtype=torch.float64).abs()


def followed(group: distributed.ProcessGroup, rank: int) -> float:
    """Return the weight of a loss that follows a share of all processes of a group, of which one has no samples."""
    case = Case([[], *[[1, 1]] * (group.size() - 1)], "mutual_information", "ddp", 1, False)
    inputs, student = inputs_of(case, rank), student_of(case)
    infosam_loss = loss_of(case, global_batch=True, process_group=group, gradient_share=0.1)
    for _ in range(3):
        features = features_of(student, inputs)
        # A sum over no samples is no mean.
        task = features.image_features.sum() + features.mask_tokens.sum()
        (infosam_loss(inputs.teacher, features) + task).backward()
    return infosam_loss.scalars()["weight"]


def with_a_group(group: distributed.ProcessGroup) -> dict[str, Any]:
    """Return what becomes of a loss with a group that is printed, copied, pickled, or has no use for it."""
    infosam_loss = InfoSAMLoss(DIM, global_batch=True, process_group=group)
    alone = InfoSAMLoss(DIM, global_batch=True)
    return {
        "repr": repr(infosam_loss),
        "repr without": repr(alone),
        "alone": said(lambda: InfoSAMLoss(DIM, process_group=group)),
        "alone as a function": said(lambda: infosam_terms(infosam_loss.relation, *2 * [None], process_group=group)),
        "copied": copy.deepcopy(infosam_loss).process_group is infosam_loss.process_group is group,
        "pickled": said(lambda: pickle.dumps(infosam_loss)),
        "pickled without": pickle.loads(pickle.dumps(alone)).global_batch,
    }


def run(rank: int, folder: Path) -> None:
    """Do everything in one of the processes, and save what was found."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_PROCESSES, timeout=TIMEOUT
    )
    cases: list[Case] = torch.load(folder / "cases.pt", weights_only=False)
    found: dict[Any, Any] = {}
    for n, ranks in GROUPS.items():
        group = distributed.group.WORLD if n == N_PROCESSES else distributed.new_group(ranks, timeout=TIMEOUT)
        if rank not in ranks:
            found[n] = said(lambda group=group: InfoSAMLoss(DIM, global_batch=True, process_group=group))
            continue
        own = ranks.index(rank)
        found[n] = {
            "steps": steps_of_cases([case for case in cases if case.n_processes == n], group, own),
            "exchanged": exchanged(group, own),
            "too few": too_few(group, own),
            "beside others": beside_others(group, own),
            "followed": followed(group, own),
            "with a group": with_a_group(group),
        }
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def found_by_processes(folder: Path, cases: Sequence[Case]) -> list[dict[Any, Any]]:
    """Let the processes do everything, and return what each found."""
    torch.save(list(cases), folder / "cases.pt")
    command = [sys.executable, "-W", "error::FutureWarning", "-m", __name__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(N_PROCESSES)]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # Before the forks, so that they are imported once; collectives import the compiler.
    import_module("torch.distributed.fsdp")
    import_module("torch._dynamo")

    processes = []
    for rank in range(N_PROCESSES):
        process = os.fork()
        if process == 0:
            run(rank, folder)
            sys.stdout.flush()
            os._exit(0)
        processes.append(process)
    failed = False
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status and not failed:
            failed = True
            for other in processes:
                os.kill(other, 9)
    sys.exit(failed)


if __name__ == "__main__":
    main()
