"""The losses and gradients of a dumped step, computed a second time from the formulas alone.

``python tests/oracle/reference.py RUN_DIR STEP`` reads ``config.yaml`` and ``dumps/step_K.safetensors`` of a run, prints
each loss and the worst gradient differences, and exits with 1 when one exceeds ``TOLERANCE``.

Nothing is imported from ``dist_mtp``: one row at a time, one head, token and expert at a time, everything in float64,
plain autograd over the mean losses of the whole batch. Formulas: DeepSeek-V3 report (arXiv 2412.19437) sections 2.1
and 2.2, YaRN (arXiv 2309.00071), and where those are silent the ``deepseek_v3`` model of Hugging Face transformers.

Shapes: T positions of a row, D model width, R rotary width, E experts. Names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

TOLERANCE = 2e-5
"""Largest accepted difference, relative to the reference: of a loss, and of a gradient in the 2-norm of its tensor."""

LATENT_NORM_EPS = 1e-6
"""Of ``q_a_layernorm`` and ``kv_a_layernorm``, which transformers builds without ``rms_norm_eps``."""

Dump = dict[str, Tensor]


class Reference:
    """The model of one dump. A textbook step is one method, so that a test can get a single step wrong on purpose.

    Args:
        dump: tensors of ``step_K.safetensors``.
        config: the run's resolved ``config.yaml``.
    """

    def __init__(self, dump: Dump, config: dict[str, Any]) -> None:
        self.model, self.mtp, self.config = config["model"], config["mtp"], config
        self.params = {
            key.removeprefix("param/"): tensor.double().requires_grad_()
            for key, tensor in dump.items()
            if key.startswith("param/")
        }
        self.biases = {key.removeprefix("bias/"): t.double() for key, t in dump.items() if key.startswith("bias/")}
        self.input_ids, self.document_ids = dump["batch/input_ids"], dump["batch/document_ids"]
        self.used: set[str] = set()
        self.objective = math.nan
        self.selection_margin = math.inf
        """Smallest lead of a chosen expert or group over the best one that was not: below float32 rounding of a score
        (about 1e-7), a float32 run may rightly have chosen otherwise."""

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.params[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weight(name).T

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        """RMSNorm (arXiv 1910.07467) over the last dimension."""
        eps = self.model["rms_norm_eps"] if eps is None else eps
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.weight(name)

    # --- attention -------------------------------------------------------------------------------------------------

    def rotary_frequencies(self) -> list[float]:
        """Radians per position of each of the R/2 pairs; YaRN slows those that turn seldom in the original context."""
        scaling, theta, width = self.model["rope_scaling"], self.model["rope_theta"], self.model["qk_rope_head_dim"]

        def pair_of(turns: float) -> float:
            """The (fractional) dimension that turns this often in the original context."""
            wavelength = scaling["original_max_position_embeddings"] / turns
            return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_of(scaling["beta_fast"])), 0)
        high = min(math.ceil(pair_of(scaling["beta_slow"])), width - 1)
        high = high + 0.001 if low == high else high
        frequencies = []
        for pair in range(width // 2):
            frequency = theta ** (-2 * pair / width)
            slowed = min(max((pair - low) / (high - low), 0.0), 1.0)
            frequencies.append((1 - slowed) * frequency + slowed * frequency / scaling["factor"])
        return frequencies

    def temperature(self, mscale: float) -> float:
        """YaRN's growth of attention scores, with DeepSeek's weight ``mscale`` of the logarithm."""
        factor = self.model["rope_scaling"]["factor"]
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    def rotary_stretch(self) -> float:
        """Length by which rotated vectors grow; transformers takes 0 for either mscale as "not given"."""
        scaling = self.model["rope_scaling"]
        if scaling["mscale"] and scaling["mscale_all_dim"]:
            return self.temperature(scaling["mscale"]) / self.temperature(scaling["mscale_all_dim"])
        return self.temperature(1.0)

    def rotate(self, x: Tensor) -> Tensor:
        """Turn pair ``(x[2j], x[2j+1])`` of the vector at position p by ``p * frequency[j]``. [T, R] -> [T, R]."""
        stretch = self.rotary_stretch()
        frequencies = torch.tensor(self.rotary_frequencies(), dtype=torch.float64)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
        cos, sin = angle.cos() * stretch, angle.sin() * stretch
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(1)

    def may_attend(self, documents: Tensor) -> Tensor:
        """[T, T], whether position i reads position j: not later, and in the same document."""
        position = torch.arange(len(documents))
        return (position[None, :] <= position[:, None]) & (documents[None, :] == documents[:, None])

    def attention(self, x: Tensor, documents: Tensor, name: str) -> Tensor:
        """Multi-head latent attention (report, equations 1 to 11). [T, D] -> [T, D]."""
        m = self.model
        nope, rope, heads = m["qk_nope_head_dim"], m["qk_rope_head_dim"], m["num_attention_heads"]
        if m["q_lora_rank"] is None:
            query = self.linear(x, f"{name}.q_proj")
        else:
            latent = self.norm(self.linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm", LATENT_NORM_EPS)
            query = self.linear(latent, f"{name}.q_b_proj")
        latent, key_rope = self.linear(x, f"{name}.kv_a_proj_with_mqa").split([m["kv_lora_rank"], rope], dim=-1)
        latent = self.norm(latent, f"{name}.kv_a_layernorm", LATENT_NORM_EPS)
        key_value = self.linear(latent, f"{name}.kv_b_proj")
        key_rope = self.rotate(key_rope)

        scale = self.temperature(m["rope_scaling"]["mscale_all_dim"]) ** 2 / math.sqrt(nope + rope)
        forbidden = ~self.may_attend(documents)
        outputs = []
        for q_head, kv_head in zip(query.chunk(heads, -1), key_value.chunk(heads, -1), strict=True):
            query_nope, query_rope = q_head.split([nope, rope], dim=-1)
            key_nope, value = kv_head.split([nope, m["v_head_dim"]], dim=-1)
            score = (query_nope @ key_nope.T + self.rotate(query_rope) @ key_rope.T) * scale
            outputs.append(score.masked_fill(forbidden, -math.inf).softmax(-1) @ value)
        return self.linear(torch.cat(outputs, -1), f"{name}.o_proj")

    # --- feed-forward ----------------------------------------------------------------------------------------------

    def swiglu(self, x: Tensor, name: str) -> Tensor:
        gated = silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(gated, f"{name}.down_proj")

    def best(self, scores: dict[int, float], count: int) -> list[int]:
        """The ``count`` keys of largest score."""
        ranking = sorted(scores, key=lambda key: -scores[key])
        if count < len(ranking):
            self.selection_margin = min(self.selection_margin, scores[ranking[count - 1]] - scores[ranking[count]])
        return ranking[:count]

    def choose(self, affinity: Tensor, bias: Tensor) -> list[int]:
        """Experts of one token: the best of the best groups by affinity + bias; a group counts its two best."""
        biased = dict(enumerate((affinity + bias).tolist()))
        size = len(biased) // self.model["n_group"]
        members = {group: range(group * size, (group + 1) * size) for group in range(self.model["n_group"])}
        group_score = {g: sum(sorted((biased[e] for e in experts), reverse=True)[:2]) for g, experts in members.items()}
        allowed = [e for group in self.best(group_score, self.model["topk_group"]) for e in members[group]]
        return self.best({e: biased[e] for e in allowed}, self.model["num_experts_per_tok"])

    def mixture(self, x: Tensor, name: str) -> Tensor:
        """DeepSeekMoE (report, equations 12 to 16): the bias selects, the affinity alone weighs. [T, D] -> [T, D]."""
        logits = self.linear(x, f"{name}.gate")
        affinity_TE = logits.sigmoid() if self.model["scoring_func"] == "sigmoid" else logits.softmax(-1)
        bias = self.biases[f"{name}.gate.e_score_correction_bias"]
        chosen_TK = torch.tensor([self.choose(affinity, bias) for affinity in affinity_TE.detach()])
        gate_TE = affinity_TE
        if self.model["norm_topk_prob"]:
            gate_TE = affinity_TE / affinity_TE.gather(1, chosen_TK).sum(-1, keepdim=True)
        output = self.swiglu(x, f"{name}.shared_experts") if self.model["n_shared_experts"] else torch.zeros_like(x)
        for expert in range(self.model["n_routed_experts"]):
            tokens = (chosen_TK == expert).any(-1).nonzero().flatten()
            gate = gate_TE[tokens, expert, None] * self.model["routed_scaling_factor"]
            output = output.index_add(0, tokens, gate * self.swiglu(x[tokens], f"{name}.experts.{expert}"))
        return output

    def decoder_layer(self, x: Tensor, documents: Tensor, layer: int, mixture: bool) -> Tensor:
        name = f"model.layers.{layer}"
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), documents, f"{name}.self_attn")
        feed_forward = self.mixture if mixture else self.swiglu
        return x + feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")

    def is_mixture(self, layer: int) -> bool:
        return self.model["n_routed_experts"] > 0 and layer >= self.model["first_k_dense_replace"]

    # --- heads and losses ------------------------------------------------------------------------------------------

    def concatenate(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Input of ``eh_proj``: released DeepSeek-V3 weights expect the embedding first (equation 21 writes it last)."""
        return torch.cat([embedding, hidden], dim=-1)

    def is_target(self, documents: Tensor, position: int, shift: int) -> bool:
        """Whether t_{position+shift} is a target of ``position``: one real document holds all that lies between."""
        span = set(documents[position : position + shift + 1].tolist())
        return len(span) == 1 and min(span) >= 0

    def target_losses(self, hidden: Tensor, row: int, shift: int) -> Tensor:
        """Cross-entropy of every valid target t_{i+shift} given ``hidden`` [T, D]."""
        head = "model.embed_tokens" if self.model["tie_word_embeddings"] else "lm_head"
        log_probability = self.linear(hidden, head).log_softmax(-1)
        documents = self.document_ids[row]
        positions = torch.tensor(
            [i for i in range(len(hidden)) if self.is_target(documents, i, shift)], dtype=torch.int64
        )
        return -log_probability[positions, self.input_ids[row, positions + shift]]

    def row_losses(self, row: int) -> list[Tensor]:
        """Losses of one row's valid targets, of the main head and then of each depth."""
        length, num_layers = self.config["train"]["seq_len"], self.model["num_layers"]
        tokens, documents = self.input_ids[row], self.document_ids[row, :length]
        x = self.weight("model.embed_tokens")[tokens[:length]]
        for layer in range(num_layers):
            x = self.decoder_layer(x, documents, layer, self.is_mixture(layer))
        final = self.norm(x, "model.norm")
        losses = [self.target_losses(final, row, shift=1)]

        previous = final if self.mtp["hidden"] == "post_norm" else x
        block_is_mixture = self.mtp["block"] == "like_trunk" and self.is_mixture(num_layers - 1)
        for depth in range(1, self.mtp["depth"] + 1):
            layer = num_layers if self.mtp["share_depths"] else num_layers + depth - 1
            name = f"model.layers.{layer}"
            embedding = self.weight("model.embed_tokens")[tokens[depth : depth + length]]
            joined = self.concatenate(self.norm(embedding, f"{name}.enorm"), self.norm(previous, f"{name}.hnorm"))
            x = self.decoder_layer(self.linear(joined, f"{name}.eh_proj"), documents, layer, block_is_mixture)
            previous = self.norm(x, f"{name}.shared_head.norm")
            losses.append(self.target_losses(previous, row, shift=1 + depth))
        return losses

    def batch_losses(self) -> dict[str, Tensor]:
        """Losses of all valid targets of the batch, of ``main`` and each ``mtp_K``."""
        rows = [self.row_losses(row) for row in range(len(self.input_ids))]
        return {
            f"mtp_{depth}" if depth else "main": torch.cat(parts) for depth, parts in enumerate(zip(*rows, strict=True))
        }

    def loss_weight(self, step: int) -> float:
        """lambda of step ``step`` (from 1), which depends on the tokens trained on before it."""
        tokens = (step - 1) * len(self.input_ids) * self.config["train"]["seq_len"]
        weight = self.mtp["loss_weight"]
        for threshold, later in self.mtp["loss_weight_steps"]:
            weight = later if tokens >= threshold else weight
        return weight

    def backward(self, step: int) -> dict[str, float]:
        """Mean loss per valid target by name (0 without any); ``objective`` and every ``params[...].grad`` are set.

        The objective is main + lambda/D * sum of depth losses. ``mtp.normalize=paper`` divides a depth's sum by
        rows * T in there (equation 24), and changes nothing in the means, which stay comparable between depths.
        """
        losses = self.batch_losses()
        means = {name: each.sum() / max(len(each), 1) for name, each in losses.items()}
        positions = len(self.input_ids) * self.config["train"]["seq_len"]
        objective = means["main"]
        for depth in range(1, self.mtp["depth"] + 1):
            paper = losses[f"mtp_{depth}"].sum() / positions
            loss = paper if self.mtp["normalize"] == "paper" else means[f"mtp_{depth}"]
            objective = objective + self.loss_weight(step) / self.mtp["depth"] * loss
        objective.backward()
        self.objective = objective.item()
        return {name: mean.item() for name, mean in means.items()}


# --- comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    name: str
    found: float
    """The run's loss, or the 2-norm of its gradient."""
    expected: float
    """The reference's."""
    relative: float
    """Size of the difference relative to the reference; infinite where only one of the two exists."""

    def __str__(self) -> str:
        return (
            f"{self.name:<64} run {self.found:<22.15g} reference {self.expected:<22.15g} relative {self.relative:.2e}"
        )


@dataclass(frozen=True)
class Comparison:
    losses: list[Difference]
    gradients: list[Difference]
    """Worst first."""
    objective: float
    """The reference's."""
    selection_margin: float
    """See :class:`Reference`."""

    @property
    def worst(self) -> Difference:
        return max(self.losses + self.gradients, key=lambda difference: difference.relative)

    @property
    def agrees(self) -> bool:
        return self.worst.relative <= TOLERANCE


def difference(name: str, found: Tensor | None, expected: Tensor | None, whole: float = 0.0) -> Difference:
    """Compare two tensors in the 2-norm. NaN counts as infinitely far.

    ``whole`` is the norm of all gradients. A gradient that vanishes by cancellation (that of a router with one expert
    per token, whose normalised weight is always 1) is only rounding, in float64 below 1e-13 of the whole; a float32
    run is then held to a share of the whole instead.
    """
    if found is None or expected is None or found.shape != expected.shape:
        norms = [math.nan if tensor is None else tensor.double().norm().item() for tensor in (found, expected)]
        return Difference(name, norms[0], norms[1], math.inf)
    found, expected = found.double(), expected.double()
    size, distance = expected.norm().item(), (found - expected).norm().item()
    unit = 1e-3 * whole if 0 < size < 1e-13 * whole else size
    relative = 0.0 if distance == 0 else distance / unit if unit else math.inf
    return Difference(name, found.norm().item(), size, math.inf if math.isnan(relative) else relative)


def compare(dump: Dump, config: dict[str, Any], step: int, reference: type[Reference] = Reference) -> Comparison:
    """Recompute a dump and compare every loss and gradient, also those that only one side has."""
    model = reference(dump, config)
    expected_losses = {name: torch.tensor(loss, dtype=torch.float64) for name, loss in model.backward(step).items()}
    expected_gradients = {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in model.params.items()
        if name.removesuffix(".weight") in model.used
    }
    found_losses = {key.removeprefix("loss/"): tensor for key, tensor in dump.items() if key.startswith("loss/")}
    found_gradients = {key.removeprefix("grad/"): tensor for key, tensor in dump.items() if key.startswith("grad/")}

    whole = math.hypot(*(gradient.norm().item() for gradient in expected_gradients.values()))

    def differences(found: Dump, expected: Dump, names: set[str], whole: float) -> list[Difference]:
        rows = [difference(name, found.get(name), expected.get(name), whole) for name in names]
        return sorted(rows, key=lambda row: (-row.relative, row.name))

    return Comparison(
        losses=differences(found_losses, expected_losses, set(found_losses) | set(expected_losses), 0.0),
        gradients=differences(found_gradients, expected_gradients, set(found_gradients) | set(model.params), whole),
        objective=model.objective,
        selection_margin=model.selection_margin,
    )


def load_config(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def load_dump(run_dir: Path, step: int) -> Dump:
    return load_file(run_dir / "dumps" / f"step_{step}.safetensors")


def main(run_dir: Path, step: int) -> int:
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    comparison = compare(load_dump(run_dir, step), load_config(run_dir), step)
    for row in sorted(comparison.losses, key=lambda row: row.name) + comparison.gradients[:5]:
        print(row)
    print(f"{len(comparison.gradients)} gradients; smallest lead of a chosen expert {comparison.selection_margin:.1e}")
    print(f"worst relative difference {comparison.worst.relative:.2e}, accepted {TOLERANCE:.0e}")
    return 0 if comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
