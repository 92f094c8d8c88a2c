"""What a batch costs in micro-batches of one image: a loss for each, one loss with all graphs in memory, both passes.

    python -m benchmarks.accumulation --out benchmarks/results/accumulation_cpu.csv

The model is the small SAM of the examples with LoRA in the encoder and a trained decoder, and four boxes an image.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.command_line import parsed
from benchmarks.torchvision_compat import ensure_importable
from renyi_kd import Accumulation, InfoSAMLoss, tap

PROGRAM = "benchmarks.accumulation"
MINI_SAM = Path(__file__).parent.parent / "examples/assets/mini_sam"
A_LOSS_EACH = "a loss each"
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where.

    Attributes:
        out: CSV file to append the rows to.
        counts: micro-batches of each step, of one image.
        image_size: side of the images in pixels, that of the model.
        threads: of the CPU.
        trials: turns of each way.

    """

    out: Path | None = None
    counts: tuple[int, ...] = (2, 4, 8)
    image_size: int = 192
    threads: int = 1
    trials: int = 5


def runs(count: int, image_size: int) -> dict[str, measure.Run]:
    """Return a step of each way, gradients included."""
    ensure_importable()
    from peft import LoraConfig, get_peft_model
    from transformers import SamModel

    torch.manual_seed(0)
    pretrained = SamModel.from_pretrained(MINI_SAM).eval()
    lora = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(copy.deepcopy(pretrained), lora).train()
    teacher, student, infosam_loss = (
        tap(pretrained),
        tap(model),
        InfoSAMLoss(pretrained.config.vision_config.output_channels),
    )
    accumulation = Accumulation(infosam_loss, teacher, student)
    corner = torch.rand(count, 1, 4, 2) * image_size / 2
    boxes = torch.cat([corner, corner + image_size / 3], -1)
    images = torch.randn(count, 1, 3, image_size, image_size)
    batches = [{"pixel_values": image, "input_boxes": box} for image, box in zip(images, boxes, strict=True)]

    def task_loss(batch: Batch) -> Tensor:
        loss: Tensor = student(batch).pred_masks.square().mean() / count
        return loss

    def a_loss_each() -> None:
        for batch in batches:
            (task_loss(batch) + infosam_loss(teacher, student, batch) / count).backward()

    def all_graphs() -> None:
        task = sum(map(task_loss, batches))
        (task + infosam_loss(teacher, student)).backward()

    def both_passes() -> None:
        for batch in batches:
            accumulation.collect(batch)
        for batch in accumulation.replay():
            (task_loss(batch) + accumulation.loss() / count).backward()

    def step(way: Callable[[], None]) -> None:
        model.zero_grad(), infosam_loss.zero_grad()
        way()

    ways = {A_LOSS_EACH: a_loss_each, "all graphs in memory": all_graphs, "Accumulation": both_passes}
    return {name: partial(step, way) for name, way in ways.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Time every number of micro-batches, print the rows, and append them to the file."""
    options = parsed(Options, PROGRAM, __doc__, argv)
    torch.set_num_threads(options.threads)
    environment = measure.environment()
    for count in options.counts:
        ways = runs(count, options.image_size)
        samples = measure.interleaved_ms(ways, options.trials)
        rows = []
        for name, times in samples.items():
            # In turns, so that what slows one slows its neighbour as well.
            of_turns = sorted(own / other for own, other in zip(times, samples[A_LOSS_EACH], strict=True))
            memory = {"peak_mib": measure.peak_mib(ways[name], "cpu")}
            row = {"micro_batches": count, "way": name, **measure.percentiles(times)}
            rows.append({**row, "ratio": of_turns[len(of_turns) // 2], **memory})
            last = rows[-1]
            print(f"{count} {name}: {last['ms_p50']:.0f} ms, {last['ratio']:.2f}, {last['peak_mib']:.0f} MiB")
        if options.out is not None:
            measure.append_rows(options.out, [{**row, **environment} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
