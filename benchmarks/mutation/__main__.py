"""Change the package in one place after the other, and see which changes no test notices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas
import tyro

from benchmarks import measure
from benchmarks.files import whole_file
from benchmarks.markdown import markdown
from benchmarks.mutation.mutants import Mutant, mutants
from benchmarks.mutation.reach import Reach, measured
from benchmarks.mutation.trials import Outcome, change, copy_of, in_fork, prepare, trial

PROGRAM = "python -m benchmarks.mutation"
ROOT = Path(__file__).parent.parent.parent
EQUIVALENT = Path(__file__).with_name("equivalent.csv")
# Tests that are fast enough, and run what they test in their own process.
FAST = (
    *("accumulation", "bank", "cache_files", "entropy", "feature_entropy", "forms", "forward_arguments", "golden"),
    *(
        "gradient_share",
        "gram",
        "hazards",
        "loss",
        "models_that_change",
        "named_mistakes",
        "odd_batches",
        "odd_numbers",
    ),
    *(
        "odd_states",
        "other_devices",
        "parts",
        "pitfalls",
        "plans",
        "plot",
        "public_api",
        "relation_directions",
        "report",
    ),
    *("families", "same_inputs", "samples_of_images", "share_control", "tap", "taps_in_any_order", "teacher"),
)
# What only processes of their own run, whose lines nobody watches.
OF_PROCESSES = {
    "renyi_kd/samples/": ("tests/test_columns.py", "tests/test_faults.py"),
    "renyi_kd/sam/rehearsal.py": ("tests/test_columns.py",),
    "renyi_kd/sam/recording.py": ("tests/test_concurrency.py",),
    "renyi_kd/sam/tap.py": ("tests/test_concurrency.py",),
    "renyi_kd/sam/threads.py": ("tests/test_concurrency.py",),
    "renyi_kd/functional.py": ("tests/test_columns.py", "tests/test_faults.py"),
    "renyi_kd/loss.py": ("tests/test_columns.py", "tests/test_faults.py"),
    "renyi_kd/share_control.py": ("tests/test_columns.py", "tests/test_faults.py"),
    "renyi_kd/feature_entropy.py": ("tests/test_entropies_of_processes.py",),
    "renyi_kd/ops/gram_moment/ring.py": ("tests/test_entropies_of_processes.py",),
    "renyi_kd/ops/gram_moment/shards.py": ("tests/test_entropies_of_processes.py",),
    "renyi_kd/accumulation.py": ("tests/test_resume.py",),
}
OF_SIGNATURES = ("tests/test_public_api.py",)
# Of a trial: so many times what its tests take, and so many seconds more.
PATIENCE, GRACE = 5, 30


@dataclasses.dataclass(frozen=True)
class Where:
    """Where results are kept.

    Attributes:
        out: folder of what is known so far.

    """

    out: Path = Path("runs/mutation")


@dataclasses.dataclass(frozen=True)
class Reached(Where):
    """Find out which tests reach which lines.

    Attributes:
        tests: modules of tests; all that are fast if left out. What was known of others is kept.

    """

    tests: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()


@dataclasses.dataclass(frozen=True)
class Changed(Where):
    """Change modules, and run the tests that reach each change.

    Attributes:
        modules: files of the package.
        mutants: try so many of each module, drawn by the seed; 0 for all.
        seed: of the draw.
        tests: names of tests, or how they begin, that are run before all others.
        seconds: run tests of a change for so long, as they take without it: those that reach it, one case of each
            first; then others of their modules for a quarter of it.
        afresh: try those again that were killed before.

    """

    modules: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    mutants: int = 30
    seed: int = 0
    tests: tuple[str, ...] = ()
    seconds: float = 15
    afresh: bool = False


@dataclasses.dataclass(frozen=True)
class Shown(Where):
    """Print what came of it, and write it down.

    Attributes:
        csv: file of the rows; none is written if left out.

    """

    csv: Path | None = None


def reach(options: Reached) -> int:
    """Run the tests once, and keep which lines of the package each of them reaches."""
    tests = [str(path) for path in options.tests] or [f"tests/test_{name}.py" for name in FAST]
    prepare()
    file = options.out.resolve() / "reach.json"
    with copy_of(ROOT) as copy:

        def work() -> int:
            found = measured(copy, tests)
            Reach.read(file).merged(found).write(file)
            print(f"{len(found.seconds)} tests pass, in {sum(found.seconds.values()):.0f} s")
            return 0

        status, said = in_fork(copy, work, seconds=3600)
    print(said[-2000:])
    return 1 if status else 0


def run(options: Changed) -> int:
    """Try the mutants of every module that are not known to be noticed; what is known by then is never lost."""
    known = Reach.read(options.out / "reach.json")
    if not known.seconds:
        raise ValueError(f"{options.out} must hold what tests reach, got nothing; run {PROGRAM} reach")
    prepare()
    for module in options.modules:
        with copy_of(ROOT) as copy:
            try_module(options, known, copy, module.resolve().relative_to(ROOT).as_posix())
    return 0


def try_module(options: Changed, known: Reach, copy: Path, module: str) -> None:
    """Try the mutants of a module in a copy of the repository."""
    source = (ROOT / module).read_text()
    count, chosen = mutants(source, options.mutants, options.seed)
    file = options.out / f"{module.replace('/', '.')}.json"
    state = {"module": module, "source": digest(source), "mutants": count, "tried": {}}
    before = json.loads(file.read_text()) if file.is_file() else state
    if before["source"] == state["source"] and not options.afresh:
        explained = explanations()
        # A test that was added may notice what survived, and a machine with less to do what timed out.
        state["tried"] = {
            name: one
            for name, one in before["tried"].items()
            if one["outcome"] == "killed" or key_of(module, one) in explained
        }
    killers = Counter(one["test"] for one in state["tried"].values() if one["test"] in known.seconds)
    for index, mutant in enumerate(chosen, 1):
        if mutant.name in state["tried"]:
            continue
        change(copy / module, mutant.source)
        outcome = try_mutant(options, known, copy, module, mutant, killers)
        if outcome.test in known.seconds:
            killers[outcome.test] += 1
        said = {"line": mutant.line, "before": mutant.before, "after": mutant.after, "outcome": outcome.said}
        state["tried"][mutant.name] = {**said, "test": outcome.test, "seconds": outcome.seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(state, indent=1))
        print(f"{module} {index}/{len(chosen)} {outcome.said} in {outcome.seconds} s: {mutant.after[:90]}", flush=True)
    change(copy / module, source)


def try_mutant(
    options: Changed, known: Reach, copy: Path, module: str, mutant: Mutant, killers: Counter[str]
) -> Outcome:
    """Return what the tests that reach a change say of it; then those beside them; then those of processes."""
    seconds = options.seconds
    nearest = known.tests(module, mutant.line)
    # What noticed other changes of the module may notice this one.
    nearest.sort(key=lambda test: -killers[test])
    asked = [test for test in known.seconds if test.startswith(options.tests)] if options.tests else []
    nearest = list(dict.fromkeys([*asked, *nearest]))
    # Parameters and their defaults are run by an import, and no line says which tests read them.
    others = [test for test in known.beside([*nearest, *OF_SIGNATURES]) if test not in set(nearest)]
    others.sort(key=lambda test: not test.startswith(OF_SIGNATURES))
    outcome = Outcome("survived", "", 0.0)
    for tests in (known.within(nearest, seconds), known.within(others, seconds / 4)):
        if tests and outcome.said == "survived":
            expected = sum(known.seconds[test] for test in tests)
            outcome = longer(outcome, trial(copy, tests, GRACE + PATIENCE * expected))
    for start, tests in OF_PROCESSES.items():
        if module.startswith(start) and outcome.said == "survived":
            outcome = longer(outcome, trial(copy, tests, seconds=600))
    return outcome


def longer(first: Outcome, second: Outcome) -> Outcome:
    """Return what the second of two trials says, with the seconds of both."""
    return second._replace(seconds=round(first.seconds + second.seconds, 2))


def table(options: Shown) -> int:
    """Print the share of mutants that were noticed, by module, and every one that was not."""
    states = [json.loads(path.read_text()) for path in sorted(options.out.glob("renyi_kd.*.json"))]
    if not states:
        raise ValueError(f"{options.out} must hold what came of mutants, got nothing; run {PROGRAM} run MODULE")
    explained = explanations()
    rows = [row_of(state, explained) for state in states]
    shown = pandas.DataFrame(rows).set_index("module")
    print(markdown(shown.astype(str)))
    for state in states:
        for mutant in state["tried"].values():
            if mutant["outcome"] == "survived" and key_of(state["module"], mutant) not in explained:
                print(f"{state['module']}:{mutant['line']}: {mutant['before']}  ->  {mutant['after']}")
    if options.csv is not None:
        with whole_file(options.csv) as temporary:
            pandas.DataFrame([{**row, **measure.environment()} for row in rows]).to_csv(temporary, index=False)
    return 0


def row_of(state: dict[str, Any], explained: set[tuple[str, str, str]]) -> dict[str, Any]:
    """Return how many of a module's mutants were tried and noticed; those that change nothing are counted apart."""
    said = Counter(
        "equivalent" if one["outcome"] == "survived" and key_of(state["module"], one) in explained else one["outcome"]
        for one in state["tried"].values()
    )
    tried = len(state["tried"])
    counted = tried - said["equivalent"]
    return {
        "module": state["module"],
        "mutants": state["mutants"],
        "tried": tried,
        "killed": said["killed"],
        "timed out": said["timed out"],
        "equivalent": said["equivalent"],
        "survived": said["survived"],
        "noticed %": round(100 * (said["killed"] + said["timed out"]) / counted, 1) if counted else 100.0,
    }


def explanations() -> set[tuple[str, str, str]]:
    """Return the mutants that somebody has read and found to change nothing that a user could see."""
    if not EQUIVALENT.is_file():
        return set()
    read = pandas.read_csv(EQUIVALENT, keep_default_na=False)
    return {(row.module, row.before, row.after) for row in read.itertuples()}


def key_of(module: str, mutant: dict[str, Any]) -> tuple[str, str, str]:
    """Return what an explanation is looked up by, which other lines of the module do not change."""
    return module, mutant["before"], mutant["after"]


def digest(source: str) -> str:
    """Return what tells a module from an earlier state of it."""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 1 if it could not be done."""
    commands: dict[str, Callable[..., int]] = {command.__name__: command for command in (reach, run, table)}
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog=PROGRAM, description=__doc__, args=argv, config=(tyro.conf.OmitArgPrefixes,)
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
