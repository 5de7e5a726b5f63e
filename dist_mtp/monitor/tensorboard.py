"""The TensorBoard folder of a run. Losing it must never cost training, so write failures end here."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from dist_mtp.monitor.charts import chart_layout
from dist_mtp.monitor.expert_loads import is_looked_at
from dist_mtp.monitor.tags import LOAD_SHARE_TAG, scalars

FLUSH_SECONDS = 10
"""TensorBoard's default of 120 s hides a short run until it is over."""
HISTOGRAM_BINS = 30
"""As many as TensorBoard shows. Its usual bins grow by 10 % each, too coarse for loads near the mean."""


class TensorBoard:
    """Writes metrics, settings and the plan to ``folder``; after the first failing write it does nothing.

    Args:
        has_mtp: whether the model has MTP modules; they get charts then.
        has_experts: whether it has MoE layers; likewise.
        aux_losses: whether its routers have auxiliary losses; likewise.
        ep: ranks that share one set of experts; from 2 on there are charts of their all-to-all.
        fp8: whether layers multiply in FP8; there are charts of what it loses then.
        timelines: whether steps are measured; there are charts of their bubble then.
        config_text: resolved configuration, shown as preformatted text.
        plan_text: pipeline plan, likewise.
        hparams: flat settings for the HParams tab; None is left out, what is no number, string or bool becomes a string.
        purge_step: first step that will be written again after a resume; TensorBoard hides what it had from there on.
        report: told once, in words, when TensorBoard can no longer be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        has_mtp: bool,
        has_experts: bool,
        aux_losses: bool,
        ep: int,
        fp8: bool,
        timelines: bool,
        config_text: str,
        plan_text: str,
        hparams: Mapping[str, Any],
        purge_step: int | None,
        report: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._report = report
        self._writer: SummaryWriter | None = None
        # Texts of a resumed run stand beside those of its first start, each at the step it began from.
        start = 0 if purge_step is None else purge_step - 1

        def describe_run(writer: SummaryWriter) -> None:
            layout = chart_layout(
                has_mtp=has_mtp, has_experts=has_experts, aux_losses=aux_losses, ep=ep, fp8=fp8, timelines=timelines
            )
            writer.add_custom_scalars(layout)
            writer.add_text("config", _preformatted(config_text), start)
            writer.add_text("plan", _preformatted(plan_text), start)
            _write_hparams(writer, hparams)
            writer.flush()

        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)
        except OSError as error:
            self._give_up(error)
        self._attempt(describe_run)

    def write(self, row: Mapping[str, float]) -> None:
        """Draw one step's metrics at ``row["step"]``."""

        # One event for all of them; with SummaryWriter.add_scalar each would be an event of its own, milliseconds together.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        self._add_summary(Summary(value=values), int(row["step"]))

    def write_expert_loads(self, step: int, layers: Sequence[int], load_LE: Tensor) -> None:
        """Draw each layer's spread of loads, if the step :func:`~dist_mtp.monitor.expert_loads.is_looked_at`; others copy
        nothing.

        Args:
            layers: indices of the MoE layers, [L].
            load_LE: tokens of each expert, [L, E], on any device.
        """
        if self._writer is None or not is_looked_at(step):
            return
        share_LE = (load_LE / load_LE.mean(dim=1, keepdim=True)).cpu()

        def add_histograms(writer: SummaryWriter) -> None:
            for layer, share_E in zip(layers, share_LE, strict=True):
                writer.add_histogram(LOAD_SHARE_TAG.format(k=layer), share_E, step, bins=HISTOGRAM_BINS)

        self._attempt(add_histograms)

    def add_image(self, tag: str, png_path: str | Path, step: int = 0) -> None:
        """Show a PNG file; a missing or damaged one is reported and left out."""
        try:
            image = _encoded(Path(png_path))
        except OSError as error:
            self._report(f"TensorBoard goes without the picture {png_path}: {error}")
            return
        self._add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def close(self) -> None:
        """Write what is pending; calls after the first do nothing."""
        self._attempt(lambda writer: writer.close())
        self._writer = None

    def _add_summary(self, summary: Summary, step: int) -> None:
        def add(writer: SummaryWriter) -> None:
            file_writer: Any = writer.file_writer  # torch annotates it as None, which it is only after close()
            file_writer.add_summary(summary, step)

        self._attempt(add)

    def _attempt(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:  # also what the writer's own thread met, raised at the next call
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self._report(f"TensorBoard stops at {self._folder}: {error}; training goes on, metrics.jsonl has every step")


def _encoded(png_path: Path) -> Summary.Image:
    """The file as it is: ``SummaryWriter.add_image`` would compress the pixels again, which takes longer than drawing them.

    Raises:
        OSError: no such file, or no picture.
    """
    content = png_path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        channels = len(picture.getbands())
    return Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)


def _preformatted(text: str) -> str:
    """The Text tab renders Markdown, which would fold a YAML file into one paragraph."""
    return f"```\n{text}\n```"


def _write_hparams(writer: SummaryWriter, hparams: Mapping[str, Any]) -> None:
    """Put the run on the HParams tab under its own folder, from its start, so that crashed sweep points show too.

    ``SummaryWriter.add_hparams`` would make a time-stamped sub-run instead. Of its three summaries two are left out. The
    experiment's would fix the table's columns to this run's: without it TensorBoard compares all runs, and shows first the
    settings in which they differ, and every scalar is a column to choose. The session's end always says success;
    ``result.json`` says how a run ended.
    """
    shown = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in hparams.items()
        if value is not None
    }
    _, session_start, _ = hparams_summaries(shown, {})
    file_writer: Any = writer.file_writer  # torch annotates it as None, which it is only after close()
    file_writer.add_summary(session_start)
