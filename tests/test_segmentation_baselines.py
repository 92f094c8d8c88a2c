"""Fine-tuning without a distiller but otherwise, and every distiller at a share of the task's gradient."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import peft_methods
from benchmarks.sam.models import load_sam
from benchmarks.segmentation import distillers, training
from benchmarks.segmentation.baselines import BASELINES, L2_SP_WEIGHT, L2SP, optimizer_and_schedule, restrict
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.distillers.share import AtShare, ShareControl
from benchmarks.segmentation.observation import Observation
from benchmarks.segmentation.settings import Settings
from renyi_kd import SAMFeatures
from renyi_kd.sam.reads import with_reads

NUCLEI = Path(__file__).parent.parent / "examples/assets/nuclei"
SIZE, DIM = 64, 4


@pytest.fixture(scope="module")
def sam():
    return load_sam("mini", None, SIZE)


def ready(sam, **changes):
    common = {"model": "mini", "weights": "0", "data": "nuclei", "lists": "0", "image_size": SIZE, "seed": 0}
    recipe = {"peft": "lora", "distiller": "none", "epochs": 0, "batch_size": 2, "steps": 3, "lr": 1e-3, **changes}
    train, test = (MaskDataset(NUCLEI, split, size=SIZE, limit=2) for split in ("train", "test"))
    settings = Settings(**common, **recipe)
    return training.Run(settings, sam, train, test, cache=None, device=torch.device("cpu"))


def distance(model: nn.Module, other: nn.Module, part: str) -> float:
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return sum((own - before).abs().sum().item() for (name, own), before in pairs if part in name)


# ---- baselines


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_trains(sam, baseline):
    run = ready(sam, distiller=baseline)
    before = copy.deepcopy(run.model)
    row = run()
    assert row.steps == 3
    assert len(row.history) == 3
    moved = {part: distance(run.model, before, part) for part in ("lora_B", "mask_tokens", "mask_decoder", "")}
    assert moved["mask_tokens"] > 0
    if baseline == "output_tokens":
        assert moved[""] == moved["mask_tokens"]
        assert run.frozen
    else:
        assert moved["lora_B"] > 0
        assert moved["mask_decoder"] > moved["mask_tokens"]
    assert (row.history[-1]["distilled"] > 0) == (baseline == "l2_sp")


def test_the_decoder_has_a_tenth_of_the_rate_from_first_to_last():
    model = nn.ModuleDict({"image_encoder": nn.Linear(2, 2), "mask_decoder": nn.Linear(2, 3)})
    optimizer, schedule = optimizer_and_schedule(model, [], "decoder_tenth", 1e-3, 8)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    assert sizes == [6, 9]
    plain, its_schedule = optimizer_and_schedule(model, [], "none", 1e-3, 8)
    for _ in range(9):
        encoder, decoder = (group["lr"] for group in optimizer.param_groups)
        assert encoder == pytest.approx(10 * decoder)
        assert encoder == pytest.approx(plain.param_groups[0]["lr"])
        for one in (optimizer, plain, schedule, its_schedule):
            one.step()


def test_tokens_alone_need_a_trained_decoder(sam):
    model = peft_methods.apply(copy.deepcopy(sam.model), "bitfit")
    with pytest.raises(ValueError, match="restrict: output_tokens must find trained mask tokens, got none; tune"):
        restrict(model, "output_tokens")


def test_l2_sp_is_the_squared_distance_of_what_the_weights_do(sam):
    model = peft_methods.apply(copy.deepcopy(sam.model), "lora").eval()
    anchor = L2SP(model)
    assert anchor().item() == 0
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    expected = 0.0
    for name, p in named.items():
        if ".lora_B." in name:
            expected += (p @ named[name.replace("lora_B", "lora_A")]).square().sum().item()
        elif ".lora_A." not in name:
            expected += (p - first[name]).square().sum().item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = anchor()
    assert loss.item() == pytest.approx(L2_SP_WEIGHT * expected, rel=1e-4)


def test_l2_sp_has_its_share_of_the_gradient_of_all_weights():
    model = nn.Linear(3, 2)
    anchor = L2SP(model, share=0.1)
    with torch.no_grad():
        model.weight += 1
        model.bias -= 2
    slope = torch.randn(2, 3)
    for _ in range(16):
        loss = anchor()
        ((slope * model.weight).sum() + 3 * model.bias.sum() + loss).backward()
        model.zero_grad()
    assert anchor.state()["gradient_share"] == pytest.approx(0.1, rel=1e-3)
    own = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(anchor(), tuple(model.parameters()))])
    task = (slope.square().sum() + 2 * 9).sqrt()
    assert (own.norm() / task).item() == pytest.approx(0.1, rel=1e-3)


# ---- shares


def observed(*, leaf: bool) -> Observation:
    """Return what a model computed; as a student, tensors that its task reads too."""

    def value(*shape):
        return torch.randn(*shape).requires_grad_(leaf) * 1.0

    features = SAMFeatures(value(2, DIM, 4, 4), value(2, 2, DIM), torch.arange(2))
    outputs = (value(2, 3, 8, 8), value(2, 16, 5))
    layers = (outputs[0], outputs[1].mT.unflatten(2, (4, 4)))
    return Observation(features, value(2, 1, 8, 8), layers, outputs)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("logit", ["logits"]),
        ("mobilesam", ["image_features"]),
        ("tinysam", ["image_features", "mask_tokens", "logits"]),
        ("semckd", ["outputs"]),
        ("ibd", ["logits", "outputs"]),
        ("infosam", ["image_features", "mask_tokens"]),
    ],
)
def test_the_largest_share_where_it_reads_the_student_is_the_one_asked_for(name, places):
    distiller = distillers.make(name, dim=DIM, layer_channels=(3, 5), share=0.03).requires_grad_(False)
    teacher, student = observed(leaf=False), observed(leaf=True)
    sources = {
        "image_features": [student.features.image_features],
        "mask_tokens": [student.features.mask_tokens],
        "logits": [student.logits],
        "outputs": student.layer_sources,
    }
    slopes = {place: [torch.randn_like(each) for each in found] for place, found in sources.items()}
    batch = {"masks": torch.ones(2, 1, 8, 8), "inside": torch.ones(2, 1, 8, 8)}

    def step() -> torch.Tensor:
        # As a tap gives them: new aliases in every step.
        seen = student._replace(features=with_reads(student.features))
        return distiller(teacher, seen, batch)

    for _ in range(40):
        task = sum(
            (slope * each).sum() for place in sources for slope, each in zip(slopes[place], sources[place], strict=True)
        )
        (task + step()).backward(retain_graph=True)
    loss, shares = step(), []
    for place in places:
        for each, slope in zip(sources[place], slopes[place], strict=True):
            shares.append((torch.autograd.grad(loss, each, retain_graph=True)[0].norm() / slope.norm()).item())
    assert max(shares) == pytest.approx(0.03, rel=1e-3)
    assert isinstance(distiller, AtShare) == (name != "infosam")


def test_a_weight_doubles_at_most_and_stays_where_nothing_is_measured():
    control = ShareControl(0.1)
    first = control.next_weight()
    assert [control.next_weight() for _ in range(3)] == [first] * 3
    assert math.isnan(control.state()["gradient_share"])

    class Measured:
        def __init__(self, *values):
            self.values = values

        def share(self):
            return [None if value is None else torch.tensor(value) for value in self.values]

    control.follow([Measured(None, 1e-9), Measured(1e-8, math.inf)], first)
    assert control.next_weight() == 2 * first
    control.follow([Measured(0.0, None)], 2 * first)
    assert control.next_weight() == 2 * first


@pytest.mark.parametrize("name", ["logit", "reviewkd", "mobilesam_relation", "infosam_jensen_renyi", "l2_sp"])
def test_runs_at_a_share_say_at_which_they_ran(sam, name):
    row = ready(sam, distiller=name, share=0.1)()
    assert row.settings.method == f"{name} at 0.1"
    assert row.settings.label.endswith(f"lora, all images, rate 0.001, {name} at 0.1, seed 0")
    weights = [one["weight"] for one in row.history]
    # From a first weight that is next to none, at most twice as much a step.
    assert weights[0] == 2**-10
    assert weights[1] <= 2**-9
    assert weights[2] <= 2**-8
    assert len(set(weights)) > 1


def test_the_share_of_published_weights_is_measured_and_changes_nothing():
    teacher, student = observed(leaf=False), observed(leaf=True)
    plain, watched = (distillers.make("logit", dim=DIM, measured=measured) for measured in (False, True))
    batch = {"masks": torch.ones(2, 1, 8, 8), "inside": torch.ones(2, 1, 8, 8)}
    own = plain(teacher, student, batch)
    (gradient,) = torch.autograd.grad(own, student.logits)
    loss = watched(teacher, student, batch)
    assert torch.equal(loss, own)
    slope = torch.randn_like(student.logits)
    ((slope * student.logits).sum() + loss).backward()
    assert watched.state() == {"weight": 1, "gradient_share": pytest.approx((gradient.norm() / slope.norm()).item())}


def test_distillers_keep_their_order():
    names = distillers.DISTILLERS
    assert names[:2] == ("none", "logit")
    assert names[-2:] == ("mobilesam_relation", "tinysam_relation")
    assert len(names) == len(set(names)) == 27
