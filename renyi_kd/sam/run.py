"""Running a model on a batch of any common form, or on what another model was run on."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from renyi_kd.sam.step import Call, Step

CallFunction = Callable[[nn.Module, Any], Any]

# The modules that pass on all that they are given, by their classes, and where they keep what they wrap.
_TRANSPARENT = {
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}


def run_model(model: nn.Module, batch: Any) -> Any:
    """Run the model on a mapping, a tensor, a tuple or list of arguments, or a list of dicts (Meta's format).

    Of a mapping the names that the forward takes are passed; all of them where it takes any name; and the mapping as a
    whole where the forward takes one argument that the mapping does not name.

    Raises:
        TypeError: the batch is none of these.
        ValueError: it holds no argument of the forward, or is a list of dicts for a model of transformers.

    """
    if isinstance(batch, Mapping):
        return _run_on_mapping(model, batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, tuple | list) and batch:
        if all(isinstance(item, Mapping) for item in batch):
            if "pixel_values" in forward_parameters(model):
                raise ValueError(
                    "tap: batch must be a mapping for a model of transformers, got a list of dicts, Meta's format; "
                    "pass tap(model, call=lambda model, batch: ...)"
                )
            multimask = forward_parameters(model).get("multimask_output")
            required = multimask is not None and multimask.default is inspect.Parameter.empty
            return model(list(batch), multimask_output=False) if required else model(list(batch))
        return model(*batch)
    raise TypeError(
        f"tap: batch must be a mapping, a tensor, a tuple, or a list of dicts, got {type(batch).__name__}; "
        "for anything else pass tap(model, call=lambda model, batch: ...)"
    )


def runs_of_step(model: nn.Module, step: Step, call: CallFunction | None) -> list[Callable[[], Any]]:
    """Return what there is to run for a model to see what the student saw in a step.

    A function of the user's gets the batch that the loss was given. Without one the student's calls are repeated, as
    they were made; image features that the student's own encoder computed are replaced by the images of the batch.

    Raises:
        RuntimeError: what the student ran on was overwritten since.
        ValueError: nothing says what to run on.

    """
    for ran in step.ran:
        if any(value is not None and value.changed() for value in (ran.batch, ran.arguments)):
            raise RuntimeError(
                "tap: what the student ran on must stay as it is until the loss is computed, got tensors that were "
                "overwritten in place; give each step tensors of its own, and compute the loss before they are changed"
            )
    if call is not None:
        batches = [step.given] if step.given is not None else _batches(step.ran)
        if batches:
            return [lambda batch=batch: call(model, batch) for batch in batches]  # type: ignore[misc]
    elif step.ran:
        return [_run_again(model, ran, step) for ran in step.ran]
    elif step.given is not None:
        return [lambda: run_model(model, step.given)]
    raise ValueError(
        "InfoSAMLoss: batch must be given for the teacher to run on, got None; pass what the student ran on, "
        "or run the student through its tap: student(batch)"
    )


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the forward; of the wrapped model where a wrapper passes all through."""
    return {
        name: parameter
        for name, parameter in inspect.signature(unwrapped(model).forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def positional_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what the forward takes by position; ``*`` stands for any more."""
    kinds = {"POSITIONAL_ONLY": "{}", "POSITIONAL_OR_KEYWORD": "{}", "VAR_POSITIONAL": "*"}
    parameters = inspect.signature(unwrapped(model).forward).parameters.items()
    return tuple(kinds[each.kind.name].format(name) for name, each in parameters if each.kind.name in kinds)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that pass on all that they are given: DDP, FSDP, compile, peft, checkpoint."""
    for kind in type(model).__mro__:
        inner = getattr(model, _TRANSPARENT.get(kind.__name__, ""), None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to eval mode and every module back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        # train() reaches the children too, and parents come first in modules().
        for module, training in modes:
            if module.training != training:
                module.train(training)


@contextmanager
def named_errors(role: str, model: nn.Module) -> Iterator[None]:
    """Add to an error of the model whose it is."""
    try:
        yield
    except Exception as error:
        # Python 3.10 has no notes.
        add_note = getattr(error, "add_note", None)
        if add_note is not None and not str(error).startswith(("tap:", "InfoSAMLoss:", "CachedTeacher:")):
            parameter = next(model.parameters(), None)
            where = "" if parameter is None else f", {parameter.dtype} on {parameter.device}"
            add_note(
                f"tap: raised while the {role} ran ({type(model).__name__}{where}); where dtypes or devices do not "
                f"fit, move it: {role}.model.to(device, dtype)"
            )
        raise


def _run_on_mapping(model: nn.Module, batch: Mapping[Any, Any]) -> Any:
    signature = inspect.signature(unwrapped(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    # Those of transformers name all that they take, and pass the rest on to attention.
    if takes_any and not type(unwrapped(model)).forward.__module__.startswith("transformers."):
        return model(**batch)
    names = forward_parameters(model)
    known = {name: value for name, value in batch.items() if name in names}
    if known:
        _hint_at_names(set(names) - set(known), [str(name) for name in batch if name not in known], set(known))
        return model(**known)
    required = [
        parameter
        for parameter in signature.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) == 1 and required[0].annotation not in (Tensor, "Tensor", "torch.Tensor"):
        return model(batch)
    raise ValueError(
        f"tap: batch must hold arguments of the model's forward, got the names {sorted(map(str, batch))} where "
        f"it takes {sorted(signature)}; rename them, or pass tap(model, call=lambda model, batch: ...)"
    )


def _hint_at_names(absent: set[str], left_out: list[str], passed: set[str]) -> None:
    """Warn where no prompt is passed and a name that is left out nearly is that of one."""
    prompts = {name for name in absent | passed if any(kind in name for kind in ("point", "box"))}
    if not prompts or prompts & passed:
        return
    for name in left_out:
        meant = next((each for each in prompts if each.endswith(f"_{name}") or name.endswith(f"_{each}")), None)
        near = [meant] if meant else difflib.get_close_matches(name, sorted(prompts), 1, 0.8)
        if near:
            warnings.warn(
                f"tap: {name!r} of the batch is left out, as the forward does not take it, and no prompt is passed; if "
                f"{near[0]!r} is meant, rename it",
                stacklevel=2,
            )


def _batches(ran: tuple[Call, ...]) -> list[Any]:
    """Return the batches that the student's tap was run on, each once."""
    batches = {id(call.batch): call.batch.value for call in ran if call.batch is not None}
    return list(batches.values())


def _run_again(model: nn.Module, ran: Call, step: Step) -> Callable[[], Any]:
    """Return a function that makes the student's call with this model."""
    if ran.own_embeddings:
        return _run_with_images(model, ran, step.given)
    if ran.arguments is not None and _takes(model, ran):
        return lambda: model(*ran.args, **ran.kwargs)
    batch = ran.batch
    if batch is not None:
        return lambda: run_model(model, batch.value)
    if step.given is not None and len(step.ran) == 1:
        return lambda: run_model(model, step.given)
    raise ValueError(
        f"tap: the teacher must take what the student was called with, got {type(unwrapped(model)).__name__}, whose "
        "forward does not; wrap it as the student is, or say how it runs: tap(model, call=lambda model, batch: ...)"
    )


def _run_with_images(model: nn.Module, ran: Call, given: Any) -> Callable[[], Any]:
    """Return a function that makes a call with the images of the given batch in place of the student's embeddings."""
    if given is not None and not isinstance(given, Mapping):
        return lambda: run_model(model, given)
    names = list(inspect.signature(unwrapped(model).forward).parameters)
    kept = {name: value for name, value in ran.named().items() if "embedding" not in name and value is not None}
    images = {
        name: value
        for name, value in (given or {}).items()
        if name in names and name not in kept and "embedding" not in name and ("pixel" in name or "image" in name)
    }
    if not images:
        raise ValueError(
            "InfoSAMLoss: the teacher must see the images, got image features that the student's own encoder computed; "
            "pass the loss a batch with the images under the name that the teacher's forward takes, or say how the "
            "teacher runs: tap(model, call=lambda model, batch: ...); after image features were computed in advance, "
            "call clear() on the student's tap"
        )
    return lambda: model(**kept, **images)


def _takes(model: nn.Module, ran: Call) -> bool:
    """Return whether the forward takes a call, what was passed by position under the same names."""
    if positional_names(model)[: len(ran.args)] != ran.names[: len(ran.args)]:
        return False
    try:
        inspect.signature(unwrapped(model).forward).bind(*ran.args, **ran.kwargs)
    except TypeError:
        return False
    return True
