"""Processes of which one dies, hangs, refuses or differs; the others save what they were told, and after how long.

    python -m tests.support.faults FOLDER

Each fault has three processes and a process group of its own, and all run at once. They are forked, for importing
PyTorch takes longer than all of them.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d

from renyi_kd import InfoSAMLoss, infosam_terms
from renyi_kd.samples import agreement, processes
from tests.support import in_training, relation_module, sam_features

ROOT = Path(__file__).parent.parent.parent
N_PROCESSES = 3
# Of groups in which a process is lost and still has its connections, and of the others, in seconds.
SHORT, LONG = 3, 40
# That of the fault, but for those of the store.
LOST = 1


def run_faults(folder: Path) -> dict[str, list[Any]]:
    """Return what the processes saved, by fault and rank; None for those that were lost."""
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
    return {
        fault: [json.loads(path.read_text()) if path.exists() else None for path in paths(folder, fault)]
        for fault in (*LOSSES, "differences")
    }


def paths(folder: Path, fault: str) -> list[Path]:
    return [folder / f"{fault}.{rank}.json" for rank in range(N_PROCESSES)]


def main() -> None:
    folder = Path(sys.argv[1])
    # What the first loss of a program imports, and the compiler, once for all.
    InfoSAMLoss(12)
    importlib.import_module("torch._dynamo")

    started = {}
    for fault in (*LOSSES, "differences"):
        for rank, path in enumerate(paths(folder, fault)):
            pid = os.fork()
            if pid == 0:
                run(fault, rank, folder, path)
            started[pid] = rank, fault
    until = time.monotonic() + 60
    while started and time.monotonic() < until:
        for pid, (rank, fault) in list(started.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del started[pid]
            elif rank == lost_of(fault) and all(other != fault for r, other in started.values() if r != rank):
                # It hangs or was stopped, and nobody waits for it any more.
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    if started:
        raise SystemExit(f"still there: {list(started.values())}")


def lost_of(fault: str) -> int | None:
    return None if fault == "differences" else 0 if "store" in fault else LOST


def run(fault: str, rank: int, folder: Path, path: Path) -> None:
    """Save what this process finds, and end it."""
    try:
        if "store" in fault:
            # Which lives in the first process. Its port is free where the system gives one.
            port = folder / "port"
            store = distributed.TCPStore("127.0.0.1", 0 if rank == 0 else int(wait_for(port)), is_master=rank == 0)
            if rank == 0:
                (folder / "port.new").write_text(str(store.port))
                (folder / "port.new").rename(port)
            settings: dict[str, Any] = {"store": store}
        else:
            settings = {"init_method": f"file://{folder}/{fault}"}
        distributed.init_process_group("gloo", rank=rank, world_size=N_PROCESSES, **settings)
        found = differences(rank) if fault == "differences" else loss_of_a_process(fault, rank)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.rename(path)
    except BaseException:
        traceback.print_exc()
    # Without the ends of a process that was forked, which are the parent's.
    os._exit(0)


def wait_for(path: Path) -> str:
    until = time.monotonic() + 20
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return path.read_text()


def step(infosam_loss: nn.Module, rank: int, scale: float = 1.0, **settings: Any) -> Tensor:
    teacher, student = sam_features(seed=rank, **settings), sam_features(seed=10 + rank, **settings)
    student = in_training(student._replace(mask_tokens=scale * student.mask_tokens))
    loss: Tensor = infosam_loss(teacher, student)
    (loss + student.image_features.square().mean() + student.mask_tokens.square().mean()).backward()
    return loss


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


# Losing a process


def loss_of_a_process(fault: str, rank: int) -> list[Any]:
    """Return the error of a step in which a process is lost, and after how many seconds it came."""
    shared = "share" in fault
    infosam_loss = InfoSAMLoss(12, gradient_share=0.1 if shared else None, global_batch=not shared)
    # To begin takes as long as it takes.
    step(infosam_loss, rank)
    distributed.barrier()
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LONG if "killed" in fault else SHORT))
    begun = time.monotonic()

    def lose() -> Any:
        if rank == lost_of(fault):
            LOSSES[fault]()
        # Nothing comes of one that was lost, also where it only is to be lost later.
        return step(infosam_loss, rank)

    found = [error_of(lose), time.monotonic() - begun]
    if rank != lost_of(fault):
        # As in a program that goes on after the error: nobody is freed at once by the end of another process.
        time.sleep(1)
    return found


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(60)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_in_the_exchange() -> None:
    exchange = processes.exchange_headers

    def exchange_and_die(*args: Any, **settings: Any) -> Any:
        exchange(*args, **settings)
        kill()

    processes.exchange_headers = exchange_and_die


def refuse_and_hang() -> None:
    """Raise where the others cannot be told by an exchange, and stay."""
    infosam_loss = InfoSAMLoss(12, gradient_share=0.1)
    infosam_loss.share_control.agreed = True
    error_of(lambda: infosam_loss("a model", None))
    hang()


LOSSES: dict[str, Callable[[], None]] = {
    "killed": kill,
    "hanging": hang,
    "stopped": stop,
    "killed in the exchange": kill_in_the_exchange,
    "killed with the store": kill,
    "killed under a share": kill,
    "hanging under a share": hang,
    "refusing under a share": refuse_and_hang,
}

# Differences, which all processes are told in the same step

SETTINGS: dict[str, tuple[Any, Any]] = {
    "lambda_r": (1.0, 0.3),
    "lambda_d": (0.5, 0.1),
    "alpha": (2.0, 1.0),
    "distillation": ("mutual_information", "cauchy_schwarz"),
    "detach_teacher_relation": (False, True),
    "token": (0, 1),
    "bank_size": (0, 2),
    "gradient_share": (None, 0.1),
}


def differences(rank: int) -> dict[str, str]:
    """Return the errors of steps in which one process differs from the others."""
    of_all: dict[str, Any] = {"global_batch": True}

    def one_differs(name: str) -> Callable[[], Any]:
        settings = {**of_all, name: SETTINGS[name][rank == LOST]}
        return lambda: step(InfoSAMLoss(12, **settings), rank, n_tokens=2)

    def in_part_of_the_processes() -> None:
        # Which every process makes.
        part = distributed.new_group([0, 2])
        if rank != LOST:
            agreement.agree("somebody", {"x": rank}, torch.device("cpu"), group=part)

    actions: dict[str, Callable[[], Any]] = {
        **{name: one_differs(name) for name in SETTINGS},
        "global_batch": lambda: step(InfoSAMLoss(12, gradient_share=0.1, global_batch=rank != LOST), rank),
        "share": lambda: step(InfoSAMLoss(12, gradient_share=(0.1, 0.3)[rank == LOST]), rank),
        "shapes": lambda: step(InfoSAMLoss(12, **of_all), rank, size=(2, 4 + (rank == LOST))),
        "dtypes": lambda: step(InfoSAMLoss(12, **of_all), rank, dtype=(torch.float32, torch.bfloat16)[rank == LOST]),
        "weights": lambda: step(
            InfoSAMLoss(12, **of_all, generator=torch.Generator().manual_seed(int(rank == LOST))), rank
        ),
        "weights changed in one process": lambda: change_weights(rank),
        "training apart": lambda: train_apart(rank),
        "refusal": lambda: step(InfoSAMLoss(12, check_finite=True, **of_all), rank, scale=(1, math.nan)[rank == LOST]),
        "refusal by type": lambda: (
            InfoSAMLoss(12, **of_all)("a model", None) if rank == LOST else step(InfoSAMLoss(12, **of_all), rank)
        ),
        "refusal of a function": lambda: infosam_terms(
            relation_module(),
            sam_features(seed=rank),
            in_training(sam_features(seed=rank)),
            alpha=2.0 if rank != LOST else -1.0,
            **of_all,
        ),
        "refusal under a share": lambda: (
            InfoSAMLoss(12, gradient_share=0.1)("a model", None)
            if rank == LOST
            else step(InfoSAMLoss(12, gradient_share=0.1), rank)
        ),
        "refusal of a compiled loss": lambda: refuse_compiled(rank),
        "in part": in_part_of_the_processes,
        # After all that the processes still work together.
        "nothing": lambda: step(InfoSAMLoss(12, gradient_share=0.1, **of_all), rank),
    }
    found = {}
    for name, action in actions.items():
        distributed.barrier()
        found[name] = error_of(action)
    return found


def refuse_compiled(rank: int) -> None:
    infosam_loss = torch.compile(InfoSAMLoss(12, global_batch=True), backend="eager")
    if rank == LOST:
        infosam_loss("a model", None)
    step(infosam_loss, rank)


def change_weights(rank: int) -> None:
    """Change one weight after a step, as where one process has read another checkpoint."""
    infosam_loss = InfoSAMLoss(12, global_batch=True)
    step(infosam_loss, rank)
    if rank == LOST:
        with torch.no_grad():
            infosam_loss.relation.key_proj.bias[3] += 1e-6
    step(infosam_loss, rank)


def train_apart(rank: int) -> None:
    """Train the relation module without DDP, each process by its own samples, with two micro-batches a step."""
    infosam_loss = InfoSAMLoss(12, global_batch=True)
    optimizer = torch.optim.SGD(infosam_loss.parameters(), lr=1e-6)
    step(infosam_loss, rank)
    step(infosam_loss, rank)
    optimizer.step()
    said = error_of(lambda: step(infosam_loss, rank))
    raise ValueError(f"after a step: {said}")


if __name__ == "__main__":
    main()
