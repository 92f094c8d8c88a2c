"""Training that is killed and goes on from its checkpoint, beside training that nothing interrupts.

    python -m tests.support.resume FOLDER

Runs are forked, for importing PyTorch takes longer than all of them.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from renyi_kd import InfoSAMLoss, tap
from renyi_kd.objective import Distillation
from tests.support import randn
from tests.support.loops import MiniSam

ROOT = Path(__file__).parent.parent.parent
FORMS: tuple[str, ...] = get_args(Distillation)
N_STEPS = 10
# After how many checkpoints: somewhere in the step after the first, and while the second is written.
KILLS = (1, 2)
N_PROCESSES = 2
WRAPPERS = ("ddp", "fsdp2")


def run_all(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def main() -> None:
    folder = Path(sys.argv[1])
    # What the first loss and the first step of an optimiser import, once for all.
    InfoSAMLoss(4)
    importlib.import_module("torch._dynamo")

    for form in FORMS:
        wait(fork(train, folder / f"{form} whole.pt", form))
        path = folder / f"{form} killed.pt"
        for n_written in KILLS:
            before = written(path)
            pid = fork(train, path, form)
            wait_until(lambda path=path, before=before: written(path) != before)
            if n_written == 1:
                time.sleep(random.uniform(0, 0.01))
            else:
                wait_until(path.with_suffix(".new").exists)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            (folder / f"{form} steps.txt").open("a").write(f"{len(torch.load(path)['history'])}\n")
        wait(fork(train, path, form))
    for wrapper in WRAPPERS:
        for pid in [fork(train_together, folder, wrapper, rank) for rank in range(N_PROCESSES)]:
            wait(pid)


def fork(function: Callable[..., None], *args: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        # Without the ends of a process that was forked, which are the parent's.
        os._exit(code)
    return pid


def wait(pid: int) -> None:
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("a run has failed")


def wait_until(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened() and time.monotonic() < until:
        time.sleep(0.0005)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that there is a whole one at any time."""
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.rename(path)


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def train(path: Path, form: Distillation) -> None:
    """Train to the end from the last checkpoint, if there is one, and write one after each step."""
    teacher_model, student_model = (seeded(seed) for seed in (0, 1))
    infosam_loss = InfoSAMLoss(4, distillation=form, bank_size=3, gradient_share=0.1)
    both = nn.ModuleList([student_model, infosam_loss])
    average = AveragedModel(both, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-2)
    history: list[dict[str, Any]] = []
    states = {"both": both, "average": average, "optimizer": optimizer}
    if path.exists():
        saved = torch.load(path)
        for name, module in states.items():
            module.load_state_dict(saved[name])
        history = saved["history"]
    teacher, student = tap(teacher_model), tap(student_model)
    for step in range(len(history), N_STEPS):
        images = randn(1 + step % 2, 3, 6, 7, seed=step)
        loss = student(images).square().mean() + infosam_loss(teacher, student)
        optimizer.zero_grad()
        loss.backward()
        gradients = [value.grad.clone() for value in both.parameters() if value.grad is not None]
        optimizer.step()
        average.update_parameters(both)
        parameters = [value.detach().clone() for value in (*both.parameters(), *average.parameters())]
        history.append(
            {"loss": loss.detach(), "gradients": gradients, "parameters": parameters, **infosam_loss.scalars()}
        )
        save({"history": history, **{name: module.state_dict() for name, module in states.items()}}, path)


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MiniSam()


def train_together(folder: Path, wrapper: str, rank: int) -> None:
    """Train the loss in several processes, and once more with a new one that goes on in the middle."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{wrapper} store", rank=rank, world_size=N_PROCESSES
    )
    runs = []
    models = seeded(0), seeded(1)
    for resumes in (False, True):
        wrapped, optimizer = loss_and_optimizer(wrapper)
        history = []
        for step in range(6):
            if resumes and step == 3:
                file = io.BytesIO()
                torch.save([wrapped.state_dict(), optimizer.state_dict()], file)
                file.seek(0)
                wrapped, optimizer = loss_and_optimizer(wrapper)
                for module, state in zip((wrapped, optimizer), torch.load(file), strict=True):
                    module.load_state_dict(state)
            history.append(step_together(wrapped, optimizer, models, rank, step))
        runs.append(history)
    torch.save(runs, folder / f"{wrapper} {rank}.pt")
    distributed.destroy_process_group()


def loss_and_optimizer(wrapper: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    infosam_loss = InfoSAMLoss(4, global_batch=wrapper == "ddp", bank_size=3, gradient_share=0.1)
    if wrapper == "ddp":
        wrapped: nn.Module = DistributedDataParallel(infosam_loss)
    else:
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(infosam_loss)
    return wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-3)


def step_together(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, models: Sequence[nn.Module], rank: int, step: int
) -> list[Tensor]:
    teacher, student = map(tap, models)
    images = randn(2, 3, 6, 7, seed=10 * step + rank)
    loss = (1 + 9 * rank) * student(images).square().mean() + wrapped(teacher, student)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    weights = [getattr(value, "full_tensor", lambda value=value: value)() for value in wrapped.parameters()]
    return [loss.detach(), *(weight.detach().clone() for weight in weights)]


if __name__ == "__main__":
    main()
