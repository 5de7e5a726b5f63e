"""Ranks on nodes: places and traffic against a count over all pairs of ranks, and the warnings' advice against itself."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest

from dist_mtp.cli.compose import compose
from dist_mtp.cli.plan import main, summary
from dist_mtp.config import resolve
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.pipeline.memory import RankMemory
from dist_mtp.pipeline.node_traffic import data_traffic, embedding_traffic, expert_traffic, pipeline_traffic
from dist_mtp.pipeline.nodes import NodePlan, on_nodes, place_on_nodes, placement_warnings, ranks_per_node
from dist_mtp.pipeline.plan import make_plan

LAYOUTS = [
    (1, 1, 1, 8),
    (4, 4, 2, 8),
    (4, 4, 4, 2),
    (2, 6, 3, 4),
    (3, 8, 4, 16),
    (2, 4, 4, 3),
    (8, 1, 1, 2),
    (2, 4, 1, 2),
]
"""pp, dp, ep and ranks in a node: fitting ones, groups larger than nodes, and ones that straddle."""


def v_shape(pp: int) -> list[int]:
    return [*range(pp), *reversed(range(pp))]


def memory(rank: int, dense: int, expert: int) -> RankMemory:
    return RankMemory(rank, dense, expert, 0, 4 * (dense + expert), 0, 0)


def counted(plan: NodePlan, sends: list[tuple[int, int, float]]) -> tuple[int, int, int, int]:
    """Links, crossing ones, their bytes and those of the busiest node, from (sender, receiver, bytes) of global ranks."""
    crossing = [
        (a // plan.ranks_per_node, size) for a, b, size in sends if a // plan.ranks_per_node != b // plan.ranks_per_node
    ]
    by_node: Counter[int] = Counter()
    for node, size in crossing:
        by_node[node] += size  # type: ignore[assignment]
    total = sum(size for _, size in crossing)
    return len(sends), len(crossing), round(total), round(max(by_node.values(), default=0))


class TestPlaces:
    """Every rank is on one node, with the pipeline and data ranks that the mesh gives it."""

    @pytest.mark.parametrize(("pp", "dp", "ep", "size"), LAYOUTS)
    def test_cover_every_rank(self, pp: int, dp: int, ep: int, size: int) -> None:
        plan = place_on_nodes(pp, dp, ep, size)
        found = [
            pp_rank * dp + data_rank
            for node in plan.nodes
            for pp_rank, data_ranks in zip(node.pipeline_ranks, node.data_ranks, strict=True)
            for data_rank in data_ranks
        ]
        assert found == [rank for node in plan.nodes for rank in node.ranks] == list(range(pp * dp)), found
        for index, node in enumerate(plan.nodes):
            assert {plan.node_of(rank) for rank in node.ranks} == {index}

    def test_example(self) -> None:
        """The one of :class:`NodePlan`."""
        plan = place_on_nodes(4, 4, 1, 8)
        assert [node.pipeline_ranks for node in plan.nodes] == [range(2), range(2, 4)]
        assert all(node.data_ranks == (range(4), range(4)) for node in plan.nodes)
        assert data_traffic(plan, [memory(rank, 3, 0) for rank in range(4)]).crossing == "none"
        messages = pipeline_traffic(plan, v_shape(4), 1)
        assert (messages.crossing_links, messages.links) == (2 * 2 * 4, 2 * 6 * 4), messages


class TestTraffic:
    """Equal to a count over all pairs of ranks."""

    @pytest.mark.parametrize(("pp", "dp", "ep", "size"), LAYOUTS)
    def test_is_that_of_all_pairs(self, pp: int, dp: int, ep: int, size: int) -> None:
        plan = place_on_nodes(pp, dp, ep, size)
        messages, gradients, tokens = [], [], []
        copies_of = [(d, (pp - 1) * dp + d) for d in range(dp)]
        embeddings = [(a, b, 30.0) for pair in copies_of for a, b in (pair, pair[::-1])]
        for a, b in zip(v_shape(pp), v_shape(pp)[1:], strict=False):
            for d in range(dp) if a != b else ():
                messages += [(a * dp + d, b * dp + d, 10.0), (b * dp + d, a * dp + d, 10.0)]
        for p in range(pp):
            for d in range(dp):
                if dp > 1:
                    num = 4 * 600 + (4 * 120 if ep == 1 else 0)
                    gradients.append((p * dp + d, p * dp + (d + 1) % dp, 2 * num * (dp - 1) / dp))
                if ep > 1 and (copies := dp // ep) > 1:
                    after = (d + ep) % dp
                    gradients.append((p * dp + d, p * dp + after, 2 * 4 * 120 * (copies - 1) / copies))
                tokens += [
                    (p * dp + d, p * dp + other, 7.0 / (ep - 1))
                    for other in range(d // ep * ep, d // ep * ep + ep)
                    if other != d
                ]
        for found, expected in (
            (pipeline_traffic(plan, v_shape(pp), 10), counted(plan, messages)),
            (data_traffic(plan, [memory(p, 600, 120) for p in range(pp)]), counted(plan, gradients)),
            (embedding_traffic(plan, 30), counted(plan, embeddings)),
            (expert_traffic(plan, [7] * pp if ep > 1 else []), counted(plan, tokens)),
        ):
            seen = (found.links, found.crossing_links, found.crossing_bytes, found.busiest_node_bytes)
            assert seen == expected, f"{found.kind}: {seen} != {expected}"

    @pytest.mark.parametrize(("pp", "dp", "ep", "size"), [layout for layout in LAYOUTS if layout[2] > 1])
    def test_agrees_with_the_planner(self, pp: int, dp: int, ep: int, size: int) -> None:
        """The rule by which costs and ``ExpertPlan.within_node`` choose a bandwidth is the count's ``none``."""
        config = resolve(
            compose(["model=tiny", "model.n_group=1", "model.n_routed_experts=12", f"parallel.pp={pp}", f"parallel.dp={dp}", f"parallel.ep={ep}", f"launcher.ranks_per_node={size}"]),
            vocab_size=257,
        )  # fmt: skip
        plan = make_plan(config)
        assert plan.experts is not None
        tokens = plan.traffic[-1]
        assert (tokens.kind, plan.experts.within_node) == ("experts", tokens.crossing == "none"), tokens

    def test_figures_by_hand(self) -> None:
        """Two nodes of two ranks, one pipeline rank on each: 8 microbatches of 4 x 128 tokens, 128 wide, in fp32."""
        layout = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "launcher.ranks_per_node=2"]
        common = ["model=tiny", "mtp.depth=1", "train.micro_batch_size=4", "train.seq_len=128", "train.micro_batches=8"]
        last = ["pipeline.placement=last", "pipeline.schedule=1f1b"]
        hidden = 8 * 4 * 128 * 128 * 4
        embedding = 257 * 128 * 4
        for more, links, from_a_node in (
            # From each data rank of a node: hidden states over one of the V's two joints, gradients over the other.
            ([], {"pipeline": 8, "data": 4, "experts": 4}, {"pipeline": 2 * 2 * hidden}),
            # One joint: hidden states leave the first node, as many gradients the second one.
            (last, {"pipeline": 4, "embedding": 4, "data": 4, "experts": 4}, {"pipeline": 2 * hidden, "embedding": 2 * embedding}),
        ):  # fmt: skip
            plan = make_plan(resolve(compose([*common, *layout, *more]), vocab_size=257))
            assert {traffic.kind: traffic.links for traffic in plan.traffic} == links
            found = {t.kind: t.busiest_node_bytes for t in plan.traffic if t.crossing_links}
            assert found == from_a_node, f"{plan.placement}: {found} != {from_a_node}"
            assert all(t.crossing_bytes == 2 * t.busiest_node_bytes for t in plan.traffic), "both nodes send as much"
            assert ("embedding copies    all cross nodes" in summary(plan)) == bool(more), summary(plan)

    def test_of_2048_ranks_is_quick(self) -> None:
        plan = place_on_nodes(16, 128, 64, 8)
        started = time.perf_counter()
        traffic = expert_traffic(plan, [1] * 16), data_traffic(plan, [memory(rank, 9, 9) for rank in range(16)])
        took = time.perf_counter() - started
        assert took < 2, f"{took:.2f} s"
        # A rank shares its group with 7 ranks of its node and 56 of others.
        assert traffic[0].crossing_links == 2048 * 56, traffic[0]


class TestRanksPerNode:
    """What the launcher is told, else what the profile's machines have."""

    @pytest.mark.parametrize(
        ("overrides", "profile", "expected"),
        [
            ([], "cpu", 12),
            ([], "h100", 8),
            (["launcher=torchrun", "launcher.nodes=3", "launcher.rendezvous=a"], "h100", 4),
            (["launcher=torchrun", "launcher.hosts=[a,b]"], "cpu", 6),
            (["launcher=slurm", "launcher.nodes=2", "launcher.ranks_per_node=6"], "h100", 6),
        ],
    )
    def test_sources(self, overrides: list[str], profile: str, expected: int) -> None:
        config = resolve(compose(["model=tiny", "parallel.pp=2", "parallel.dp=6", *overrides]), vocab_size=257)
        assert ranks_per_node(config, PROFILES[profile]) == expected
        assert on_nodes(PROFILES[profile], config).node_ranks == expected

    def test_hostfile_decides_the_shown_plan(self, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
        """Two hosts of two slots are four ranks: dp=2 follows from pp=2."""
        (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
        (tmp_path / "hosts").chmod(0o600)
        launcher = ["launcher=torchrun", f"launcher.hostfile={tmp_path / 'hosts'}"]
        assert main(["model=tiny", "parallel.pp=2", *launcher, f"run.dir={tmp_path / 'run'}"]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"^ *1 +2-3 +1 +0-1$", shown, flags=re.MULTILINE), shown
        assert "gradient rings      none cross nodes" in shown, shown


class TestWarnings:
    """Said only where other values help, and the values they name raise no warning."""

    @pytest.mark.parametrize(
        ("pp", "dp", "ep", "size", "expected"),
        [
            (4, 4, 4, 8, []),
            (1, 6, 3, 8, []),  # one node
            (2, 8, 8, 4, ["parallel.ep=4 or 2"]),
            (2, 6, 1, 4, ["parallel.dp=4 or 8"]),
            (2, 6, 6, 4, ["parallel.ep=2", "parallel.dp=12"]),
            (5, 4, 1, 8, ["4 of 8 places"]),
        ],
    )
    def test_name_the_values(self, pp: int, dp: int, ep: int, size: int, expected: list[str]) -> None:
        warnings = placement_warnings(place_on_nodes(pp, dp, ep, size), num_experts=24)
        assert len(warnings) == len(expected), warnings
        for warning, words in zip(warnings, expected, strict=True):
            assert words in warning, f"{words!r} is not in {warning!r}"
            for key, values in re.findall(r"parallel\.(ep|dp)=([\d, or]+) would", warning):
                for value in map(int, re.findall(r"\d+", values)):
                    degrees = {"dp": dp, "ep": ep} | {key: value}
                    again = placement_warnings(place_on_nodes(pp, degrees["dp"], degrees["ep"], size), num_experts=24)
                    assert not [w for w in again if f"groups of parallel.{key}=" in w], f"{key}={value}: {again}"

    def test_experts_divide_evenly(self) -> None:
        """8 of 24 data ranks would fit a node, but not 12 experts on 8 ranks."""
        (warning,) = placement_warnings(place_on_nodes(1, 24, 12, 8), num_experts=12)
        assert "parallel.ep=4 or 2 would" in warning, warning

    def test_experts_that_no_node_holds(self) -> None:
        """Nodes of one rank: no other ``ep`` above 1 stays inside, so there is nothing to advise."""
        assert placement_warnings(place_on_nodes(1, 4, 4, 1), num_experts=8) == []

    def test_are_shown_and_stored(self) -> None:
        overrides = ["model=tiny", "parallel.pp=2", "parallel.dp=4", "parallel.ep=4", "launcher.ranks_per_node=2"]
        plan = make_plan(resolve(compose(overrides), vocab_size=257))
        nodes = plan.to_json()["nodes"]
        (warning,) = nodes["warnings"]
        assert f"warning: {warning}" in " ".join(summary(plan).split())
        assert nodes["places"][1] == {"ranks": [2, 3], "pipeline_ranks": [0, 0], "data_ranks": [[2, 3]]}
        assert nodes["traffic"]["experts"]["crossing_links"] == 2 * 2 * 2 * 4 // 2
