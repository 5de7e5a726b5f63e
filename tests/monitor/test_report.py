"""The end report says the numbers that decide whether a run was worth it, and where its files are."""

import doctest
import re

import pytest

from dist_mtp.monitor import depths, formatting, report, tags

FIRST = {"step": 1, "tokens": 2048, "loss_main": 5.5512, "loss_mtp_1": 5.5634, "loss_mtp_2": 5.5778}
LAST = {
    "step": 300, "tokens": 614_400, "loss_main": 2.1034, "loss_mtp_1": 2.6021, "loss_mtp_2": 3.4056,
    "accept_mtp_1": 0.5, "accept_mtp_2": 0.25,
}  # fmt: skip
CORPUS = {"unigram_entropy_nats": 3.3100, "validation_unigram_cross_entropy_nats": 3.4000}
EVAL = {
    "eval_loss_main": 2.2071, "eval_loss_mtp_1": 2.7093, "eval_loss_mtp_2": 3.5083,
    "eval_accept_mtp_1": 0.4, "eval_accept_mtp_2": 0.2,
}  # fmt: skip


LOADS = {1: [20.0, 4.0, 8.0, 8.0], 10: [5.0, 10.0, 12.5, 12.5]}
"""Means of 10 tokens: the extremes are expert 0 (twice the mean) and expert 1 (0.4 of it), both of layer 1."""


def final_report(eval_metrics, corpus=CORPUS, last=LAST, expert_loads=None):
    lines = report.final_report(
        FIRST,
        last,
        eval_metrics,
        corpus,
        "runs/x",
        median_tokens_per_s=3938.5,
        last_checkpoint="runs/x/c/step_00000300",
        expert_loads=expert_loads or {},
    )
    return "\n".join(lines)


@pytest.mark.parametrize(
    "said",
    [
        *("300 steps", "614,400 tokens", "3.9k tokens/s", "3.4000 on held-out text"),
        *("5.5512    2.1034    2.2071  1.1929 better", "5.5634    2.6021    2.7093  0.6907 better"),
        *("5.5778    3.4056    3.5083  0.1083 worse", "40.0%", "20.0%", "decoding step: 1.48"),
        *(
            "tensorboard --logdir runs/x/tensorboard",
            "runs/x/plan.png",
            "runs/x/metrics.jsonl",
            "runs/x/c/step_00000300",
        ),
    ],
)
def test_report_says(said):
    """First, last and held-out loss of every head, its gain on unigrams, agreement, speed and all places are named."""
    text = final_report(EVAL)
    assert said in text, f"{said!r} is not in\n{text}"


def test_report_without_evaluation_uses_training_numbers():
    """A run without evaluation compares training losses with the training text, and agreement is that of training."""
    text = final_report({})
    for said in ("3.3100 on training text", "1.2066 better", "0.0956 worse", "50.0%", "decoding step: 1.62"):
        assert said in text, f"{said!r} is not in\n{text}"


def test_report_of_a_plain_model_has_no_mtp_lines():
    """Depth 0, no experts and an unknown corpus leave nothing to say about agreement, balance or unigrams."""
    text = final_report({}, corpus={}, last={"step": 3, "tokens": 9, "loss_main": 2.5})
    for absent in ("mtp", "agrees", "decoding", "unigram", "expert"):
        assert absent not in text, f"{absent!r} is in\n{text}"


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        (
            LOADS,
            "max violation 1.00 over 2 layers (layer 1, expert 0), least load 0.40 of the mean (layer 1, expert 1)",
        ),
        # More tokens but nearer to their layer's mean: loads of different layers compare only as shares.
        (
            {**LOADS, 10: [500.0, 100.0, 700.0, 700.0]},
            "max violation 1.00 over 2 layers (layer 1, expert 0), least load 0.20 of the mean (layer 10, expert 1)",
        ),
        ({3: [9.0, 11.0]}, "max violation 0.10 over 1 layer (layer 3, expert 1), least load 0.90"),
    ],
)
def test_report_names_the_extreme_experts(loads, said):
    """One line names the most and the least loaded expert relative to their layers' means, and the size of the biases."""
    text = final_report({}, last=LAST | {"router_bias_norm": 0.3}, expert_loads=loads)
    (line,) = [line for line in text.splitlines() if line.startswith("experts  ")]
    assert said in line, f"{said!r} is not in {line!r}"
    assert line.endswith(", router bias norm 0.3"), line


def test_median_speed_ignores_the_first_step():
    """One slow step, such as the first, does not change the reported speed."""
    rows = [{"tokens_per_s": speed} for speed in (1.0, 100.0, 101.0, 102.0, 100.5)]
    speed = report.median_tokens_per_s(rows)
    assert speed == 100.5, f"{speed}, expected 100.5"


def test_parameter_table_sums_to_the_total():
    """Shares are of the sum of all parts, and the columns line up for small and large parts."""
    lines = report.parameter_table([("embedding", 8_224_000), ("trunk", 90_000_000), ("mtp", 512)])
    assert re.search(r"total +98,224,512  100.0%$", lines[-1]), lines
    assert re.search(r"trunk +90,000,000 +91.6%$", lines[2]), lines
    assert len({len(line) for line in lines}) == 1, lines


@pytest.mark.parametrize("module", [depths, formatting, report, tags])
def test_examples_in_docstrings(module):
    """The worked examples that readers trust are true."""
    failed, tried = doctest.testmod(module)
    assert tried > 0, f"{module.__name__} has no examples"
    assert failed == 0, f"{failed} of {tried} examples of {module.__name__} are wrong"
