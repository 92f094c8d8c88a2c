"""Many steps of a tiny SAM with all that a loss can keep from step to step, and what they leave behind.

    python -m tests.support.long_run FILE N_STEPS

writes a :class:`Run` as JSON. In a process of its own the memory is that of these steps alone.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from renyi_kd import Accumulation, InfoSAMLoss, tap
from tests.support.memory import living
from tests.support.models import hooks_of

DIM, SIZE, PATCH = 8, 16, 4
# The kinds of steps come round after so many.
CYCLE = 10


class Decoder(nn.Module):
    """A mask decoder with the parts by which those of the SAMs are known, each of the fewest operations."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Linear(DIM, DIM)
        self.iou_token = nn.Embedding(1, DIM)
        self.mask_tokens = nn.Embedding(1, DIM)
        self.output_hypernetworks_mlps = nn.ModuleList([nn.Linear(DIM, DIM)])
        self.raises = False

    def forward(self, image_embeddings: Tensor, sparse_prompt_embeddings: Tensor) -> Tensor:
        if self.raises:
            raise InterruptedError
        n_prompts = sparse_prompt_embeddings.shape[1]
        maps = image_embeddings.repeat_interleave(n_prompts, 0).flatten(2)
        prompts = sparse_prompt_embeddings.flatten(0, 2)
        tokens = self.transformer(prompts + self.mask_tokens.weight + maps.mean(2))
        return torch.einsum("sd, sdp -> sp", self.output_hypernetworks_mlps[0](tokens), maps)


class MiniSAM(nn.Module):
    """Images ``[b, 3, h, w]`` and boxes ``[b, p, 4]`` to logits ``[b p, pixels]``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image_encoder = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.prompt_encoder = nn.Linear(4, DIM)
        self.mask_decoder = Decoder()

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        logits: Tensor = self.mask_decoder(
            image_embeddings=self.image_encoder(images), sparse_prompt_embeddings=self.prompt_encoder(boxes)[:, :, None]
        )
        return logits


@dataclass
class Run:
    """What was measured, each once in so many steps, and what there was before and after them all.

    Attributes:
        resident: pages of the resident set.
        objects: that the garbage collector knows.
        seconds: of the processor, for a step.
        threads: of the process, as the system counts them.
        files: that are open.
        before: of ``threads``, ``files``, ``tensors`` and Python's ``named_threads`` before the run.
        after: likewise after it.
        hooks: in both models, while they were tapped and after the taps were closed.
        losses: the first and the last, that the run may be seen to have trained.

    """

    resident: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    hooks: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Training:
    """A student, its teacher, and losses with a bank, with a share, with both and in micro-batches."""

    def __init__(self) -> None:
        self.models = [MiniSAM(seed) for seed in range(2)]
        self.teacher, self.student = map(tap, self.models)
        self.full = InfoSAMLoss(DIM, bank_size=4, gradient_share=0.1)
        self.plain = InfoSAMLoss(DIM, distillation="jensen_renyi")
        self.accumulation = Accumulation(self.plain, self.teacher, self.student)
        self.parameters = [*self.models[1].parameters(), *self.full.parameters(), *self.plain.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, n_images: int = 2, n_prompts: int = 1) -> dict[str, Tensor]:
        """Return a batch of its own memory, as a loader gives it."""
        return {
            "images": torch.randn(n_images, 3, SIZE, SIZE, generator=self.generator),
            "boxes": torch.rand(n_images, n_prompts, 4, generator=self.generator),
        }

    def step(self, number: int) -> Tensor | None:
        """Do the step of this number and return its loss; None where it has none."""
        kind = number % CYCLE
        result: Tensor | None = None
        if kind == 4:
            for _ in range(2):
                self.accumulation.collect(self.batch())
            for batch in self.accumulation.replay():
                result = task(self.student(batch)) + self.accumulation.loss()
                (result / 2).backward()
        elif kind == 5:
            with torch.no_grad():
                self.student(batch := self.batch())
                return self.full(self.teacher, self.student, batch)
        elif kind == 6:
            # Without the loss, and in a tenth of these without a backward either.
            output = self.student(self.batch())
            if number // CYCLE % 10:
                task(output).backward()
            else:
                self.student.clear()
        elif kind == 7 and number // CYCLE % 100 == 0:
            self.models[number // (100 * CYCLE) % 2].mask_decoder.raises = True
            try:
                self._full_step(self.batch())
            except InterruptedError:
                pass
            else:
                raise AssertionError("the step must have raised")
            finally:
                for model in self.models:
                    model.mask_decoder.raises = False
            self.student.clear()
        elif kind == 8:
            loss = self.plain(self.teacher, self.student, batch := self.batch(1))
            self.student(batch := self.batch())
            loss = loss + self.plain(self.teacher, self.student, batch)
            loss.backward()
        else:
            result = self._full_step(self.batch(1, 1) if kind == 9 else self.batch(2, 1 + kind % 2))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def _full_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = task(self.student(batch)) + self.full(self.teacher, self.student, batch)
        loss.backward()
        return loss

    def close(self) -> None:
        """Take the taps away."""
        self.teacher.close()
        self.student.close()


def task(logits: Tensor) -> Tensor:
    """Return the loss of a task."""
    return logits.square().mean()


def run(n_steps: int, every: int) -> Run:
    """Do these steps and measure once in so many; ``every`` is a multiple of the cycle."""
    found = Run(before=alive())
    training = Training()
    began = time.process_time()
    for number in range(n_steps):
        result = training.step(number)
        if number == 0 or number == n_steps - CYCLE:
            assert result is not None
            found.losses.append(result.item())
        del result
        if number % every == every - 1:
            seconds = (time.process_time() - began) / every
            found.objects.append(living()[0])
            found.resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            found.seconds.append(seconds)
            found.threads.append(entries("/proc/self/task"))
            found.files.append(entries("/proc/self/fd"))
            began = time.process_time()
    found.hooks.append(sum(map(hooks_of, training.models)))
    training.close()
    found.hooks.append(sum(map(hooks_of, training.models)))
    del training
    found.after = alive()
    return found


def alive() -> dict[str, int]:
    """Return how much there is of what a run may leave behind."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return {
        "tensors": len(tensors),
        "named_threads": len(threading.enumerate()),
        "threads": entries("/proc/self/task"),
        "files": entries("/proc/self/fd"),
    }


def entries(folder: str) -> int:
    """Return how many entries a folder has; those of the process's own folders are its threads and open files."""
    return sum(1 for _ in Path(folder).iterdir())


def main() -> None:
    torch.set_num_threads(1)
    # What PyTorch makes at its first backward is there before and after.
    torch.ones((), requires_grad=True).exp().backward()
    measured = run(int(sys.argv[2]), 1000)
    Path(sys.argv[1]).write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
