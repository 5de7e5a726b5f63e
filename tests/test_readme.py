"""Commands in README.md and docs/ are ones that a reader can type, and generated pages are up to date."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from dist_mtp.cli import plot
from dist_mtp.cli.bench import BENCHMARKS
from dist_mtp.cli.compose import compose
from dist_mtp.cli.main import VERBS
from dist_mtp.cli.measure import take_measure
from dist_mtp.config import resolve
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.errors import ConfigError
from dist_mtp.launch.cluster import plan_cluster

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {"git", "cd", "python3", "pip", "source", "kubectl", "ssh", "tensorboard"}
"""Programs whose arguments are not ours to check."""


def commands(page: Path) -> list[str]:
    """Lines of the page's ``sh`` blocks, continuations joined, ``a && b`` apart."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def check(command: str) -> None:
    """Raise unless ``command`` would be accepted."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, arguments = words[0], words[1:]
    if program == "dist-mtp":
        check_dist_mtp(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "torchrun":
        ranks = int(option(arguments, "--nproc-per-node")) * int(option(arguments, "--nnodes", "1"))
        check_ranks(arguments[arguments.index("dist_mtp.train") + 1 :], ranks)
    elif program == "deepspeed":
        check_ranks(arguments[arguments.index("dist_mtp.train") + 1 :], int(option(arguments, "--num_accelerators")))
    elif program == "sbatch":
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} does not exist"
        compose(arguments[1:])
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} does not exist"
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK), f"{program} is not an executable file"
    else:
        assert program in FOREIGN, f"{program} is no command that this test knows"


def option(arguments: list[str], name: str, default: str | None = None) -> str:
    if name not in arguments and default is not None:
        return default
    return arguments[arguments.index(name) + 1]


def check_dist_mtp(arguments: list[str]) -> None:
    verb, overrides = arguments[0], arguments[1:]
    assert verb in VERBS, f"dist-mtp has no verb {verb}"
    if verb == "plot":
        plot.parse(overrides)
        return
    if verb == "bench":
        assert overrides.pop(0) in BENCHMARKS, f"dist-mtp bench has no {arguments[1]}"
    if verb == "plan":
        _, overrides = take_measure(overrides)
    # The file is there once the command before it has been run.
    overrides = [word for word in overrides if not word.startswith("pipeline.unit_times_file=")]
    sweeps = "-m" in overrides
    for point in points([word for word in overrides if word != "-m"]) if sweeps else [overrides]:
        config = compose(point)
        if verb == "doctor":
            plan_cluster(config, gpus=0)  # a reader may try it on a laptop


def points(overrides: list[str]) -> list[list[str]]:
    """One list of overrides per value that a sweep names, other keys at their first value."""
    choices = [values_of(override) for override in overrides]
    first = [values[0] for values in choices]
    return [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(choices) for value in values]


def values_of(override: str) -> list[str]:
    """One override per value that a sweep tries; of an interval its two ends."""
    parsed = OverridesParser.create().parse_override(override)
    key, value = override.partition("=")[0], parsed.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={text}" for text in parsed.sweep_string_iterator()] if parsed.is_sweep_override() else [override]


def check_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for argument in arguments:
        variable, _, value = argument.partition("=")
        if argument == variable:
            assert argument in targets, f"make has no target {argument}"
        else:
            assert re.search(rf"^{variable} \?=", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), argument
            if variable == "ARGS" and {"train", "plan"} & set(arguments):
                compose(shlex.split(value))


def check_ranks(overrides: list[str], ranks: int) -> None:
    config = compose(overrides)
    resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer), world_size=ranks)


class TestCommands:
    """Every command line is complete and its overrides compose. A renamed key, group, verb, target or file fails here."""

    @pytest.mark.parametrize(
        ("page", "command"),
        [pytest.param(page, command, id=f"{page.name}-{command[:60]}") for page in PAGES for command in commands(page)],
    )
    def test_is_valid(self, page: Path, command: str) -> None:
        check(command)

    def test_ways_to_train_are_shown(self) -> None:
        """The extraction found what the README is for; an empty list would pass all of the above."""
        text = "\n".join(commands(ROOT / "README.md"))
        for start in (
            "make train",
            "dist-mtp train",
            "torchrun --nproc-per-node 8",
            "launcher=torchrun launcher.hosts=",
            "deepspeed ",
        ):
            assert start in text, f"README.md shows no '{start}' command"

    @pytest.mark.parametrize(
        "command",
        [
            "dist-mtp train mtp.dpeth=2",
            "dist-mtp train -m mtp.depth=0,1 'train.sede=range(1,6)'",
            "dist-mtp fly",
            "dist-mtp doctor launcher=torchrun launcher.hosts=[node0,node1]",
            "make tea",
            "torchrun --nproc-per-node 3 -m dist_mtp.train parallel.pp=2",
            "python no/such/file.py",
        ],
    )
    def test_wrong_commands_are_noticed(self, command: str) -> None:
        with pytest.raises((AssertionError, ConfigError)):
            check(command)


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_lead_somewhere(self, page: Path) -> None:
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
        assert not broken, f"{page.name} links to {broken}"

    def test_configuration_page_is_generated(self) -> None:
        path = ROOT / "docs" / "generate_configuration.py"
        spec = importlib.util.spec_from_file_location("generate_configuration", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        expected = module.page()
        assert module.PAGE.read_text(encoding="utf-8") == expected, "run python docs/generate_configuration.py"

    def test_makefile_documents_its_targets(self) -> None:
        text = (ROOT / "Makefile").read_text()
        (phony,) = re.findall(r"^\.PHONY: (.*)", text, flags=re.MULTILINE)
        missing = [
            t for t in phony.split() if t != "help" and not re.search(rf"^# make {t}\b", text, flags=re.MULTILINE)
        ]
        assert not missing, f"Makefile says nothing about {missing}"
