"""Nodes of a run meet, watch each other and end together; here every node is a thread that talks over loopback."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RANK_FAILURE, EXIT_TERMINATED, ConfigError
from dist_mtp.launch import membership, roll_call
from dist_mtp.launch.membership import Membership, RefusedError
from dist_mtp.launch.messages import Connection, Message
from dist_mtp.launch.roll_call import RollCall

RUN = "runs/owls"
WAIT_S = 10.0
"""For anything; all of it takes less than two seconds."""
SILENCE_S = 0.6


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (roll_call, membership):
        monkeypatch.setattr(module, "BEAT_S", 0.1)
        monkeypatch.setattr(module, "SETTLE_S", 0.4)


class Node:
    """One node's launcher without ranks."""

    def __init__(self, port: int, *, host: str, **announced: Any) -> None:
        self.host = host
        self.stopped: list[Message] = []
        self.membership = Membership(("127.0.0.1", port), node_timeout_s=SILENCE_S)
        self.membership.on_stop = self.stopped.append
        self.announced = {
            "run": RUN,
            "token": "",
            "host": host,
            "node_rank": None,
            "ranks": 2,
            "facts": {"torch": "2.13.0"},
            "config": {"train": {"seed": 1, "steps": 9}},
        } | announced
        self.error: Exception | None = None
        self.verdict: Message | None = None

    def join(self) -> None:
        """Join and wait for the start; keeps an error."""
        try:
            self.membership.join(self.announced, WAIT_S)
            self.membership.wait_for_start()
        except Exception as error:
            self.error = error

    def end(self, code: int, message: str = "", blame: int = 0, *, agreed: bool = True) -> None:
        self.verdict = self.membership.finish(code, message, blame, agreed=agreed)


class Meeting:
    """A roll call and its nodes."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.nodes: list[Node] = []
        self.call: RollCall | None = None

    def open(
        self,
        nodes: int,
        *,
        min_nodes: int | None = None,
        join_timeout_s: float = WAIT_S,
        token: str = "",
        expected: Sequence[str] = (),
    ) -> RollCall:
        self.call = RollCall(
            self.port,
            run=RUN,
            nodes=nodes,
            min_nodes=min_nodes or nodes,
            token=token,
            join_timeout_s=join_timeout_s,
            node_timeout_s=SILENCE_S,
            expected=expected,
        )
        return self.call

    def node(self, host: str, **announced: Any) -> Node:
        self.nodes.append(Node(self.port, host=host, **announced))
        return self.nodes[-1]

    def together(self, do: Callable[[Node], object], nodes: list[Node] | None = None) -> None:
        """Do it for all nodes at a time."""
        threads = [threading.Thread(target=do, args=(node,)) for node in (nodes or self.nodes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a node waits for something that never comes"

    def begin(self, count: int) -> list[Node]:
        """``count`` nodes that have started their ranks, in the order of ranks."""
        call = self.open(count)
        nodes = [self.node(f"node{rank}", node_rank=rank) for rank in range(count)]
        starter = threading.Thread(target=lambda: (call.gather(), call.start(config={})))
        starter.start()
        self.together(Node.join)
        starter.join()
        assert [node.error for node in nodes] == [None] * count
        return nodes

    def stopped(self, node: Node) -> list[Message]:
        """Waits for the word that ends a node's ranks."""
        deadline = time.monotonic() + WAIT_S
        while not node.stopped:
            assert time.monotonic() < deadline, f"{node.host} was never stopped"
            time.sleep(0.01)
        return node.stopped

    def refusal(self, count: int, **settings: Any) -> tuple[str, list[Exception | None]]:
        """What the first node raises and what all the others get."""
        call = self.call or self.open(count, **settings)
        found: list[ConfigError] = []

        def gather() -> None:
            try:
                call.gather()
            except ConfigError as error:
                found.append(error)

        first = threading.Thread(target=gather)
        first.start()
        self.together(Node.join)
        first.join(WAIT_S)
        assert found, "nothing was refused"
        return str(found[0]), [node.error for node in self.nodes]


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    meeting = Meeting()
    yield meeting
    for node in meeting.nodes:
        node.membership.close()
    if meeting.call is not None:
        meeting.call.close()


class TestGathering:
    """All nodes of a run, and no others, start together, or none does and all are told why."""

    def test_ranks_as_asked_and_as_they_come(self, meeting: Meeting) -> None:
        call = meeting.open(3)
        early, late = meeting.node("early"), meeting.node("first", node_rank=0)
        meeting.node("third", node_rank=2)
        starter = threading.Thread(target=lambda: (call.gather(), call.start(config={})))
        starter.start()
        meeting.together(Node.join)
        starter.join()
        assert (late.membership.node_rank, early.membership.node_rank) == (0, 1)
        assert [node["host"] for node in early.membership.nodes] == ["first", "early", "third"]

    def test_too_few(self, meeting: Meeting) -> None:
        meeting.node("node0")
        said, (told,) = meeting.refusal(3, join_timeout_s=0.5)
        assert "1 of 3 nodes came within launcher.join_timeout_s=0.5: node0 (127.0.0.1)" in said
        assert isinstance(told, RefusedError)
        assert (str(told), told.exit_code) == (said, EXIT_CONFIG)

    def test_who_is_missing(self, meeting: Meeting) -> None:
        """By the name that the user gave, whatever the machines that came call themselves."""
        meeting.node("a.example.org", node_rank=0)
        meeting.node("b.example.org", node_rank=2)
        said, _ = meeting.refusal(3, join_timeout_s=0.5, expected=["node0", "10.0.0.2", "10.0.0.3"])
        assert "; missing: 10.0.0.2. Start" in said, said

    def test_enough_without_all(self, meeting: Meeting) -> None:
        call = meeting.open(3, min_nodes=2, join_timeout_s=0.5)
        meeting.node("node0", node_rank=0)
        meeting.node("node2", node_rank=2)
        starter = threading.Thread(target=lambda: (call.gather(), call.start(config={})))
        starter.start()
        meeting.together(Node.join)
        starter.join()
        assert [node.membership.node_rank for node in meeting.nodes] == [0, 1], "node 2 does not move up"

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (
                {"config": {"train": {"seed": 2, "steps": 9}}},
                "odd composed another configuration than node0 (train.seed 2 instead of 1): give the same command",
            ),
            (
                {"facts": {"torch": "2.11.0"}},
                "torch differs between nodes: 2.13.0 on node0 (node 0); 2.11.0 on odd (node 1)",
            ),
            ({"ranks": 4}, "node0 2, odd 4: set launcher.ranks_per_node"),
            ({"node_rank": 0}, "node0 and odd were both started with launcher.node_rank=0"),
        ],
        ids=["configuration", "version", "ranks", "node_rank"],
    )
    def test_nodes_that_differ(self, meeting: Meeting, other: dict[str, Any], words: str) -> None:
        call = meeting.open(2)
        meeting.node("node0", node_rank=0)
        meeting.together(lambda node: node.membership.join(node.announced, WAIT_S))
        while not call.members:
            time.sleep(0.01)
        odd = meeting.node("odd", **other)
        meeting.nodes.remove(odd)
        first, meeting.nodes = meeting.nodes[0], [odd]
        said, (told,) = meeting.refusal(2)
        meeting.nodes.append(first)
        assert words in said
        assert str(told) == said
        with pytest.raises(RefusedError, match=re.escape(words)):
            first.membership.wait_for_start()

    @pytest.mark.parametrize(
        ("stranger", "words"),
        [
            ({"run": "runs/mice"}, "gathers the nodes of 'runs/owls', not of 'runs/mice'"),
            ({"token": "guessed"}, "another launch of this run uses the same rendezvous"),
        ],
        ids=["run", "token"],
    )
    def test_strangers_are_turned_away(self, meeting: Meeting, stranger: dict[str, Any], words: str) -> None:
        call = meeting.open(1, token="secret")
        outsider = meeting.node("outsider", **{"token": "secret"} | stranger)
        outsider.join()
        assert words in str(outsider.error)
        with socket.create_connection(("127.0.0.1", meeting.port)) as noise:
            noise.sendall(b'GET / HTTP/1.1\r\n\r\n{"kind": "join"}\n' + b"x" * 4096)
        own = meeting.node("node0", token="secret")
        starter = threading.Thread(target=lambda: (call.gather(), call.start(config={})))
        starter.start()
        own.join()
        starter.join()
        assert own.error is None, own.error
        assert [member.host for member in call.members] == ["node0"]
        late = meeting.node("late", token="secret")
        late.join()
        assert "has its 1 nodes already: it began without late" in str(late.error)

    def test_welcome_comes_before_start(self, meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last node to come is what the start was waiting for."""
        send = Connection.send

        def hesitate(connection: Connection, kind: str, **content: Any) -> bool:
            time.sleep(0.2 if kind == "welcome" else 0)
            return send(connection, kind, **content)

        monkeypatch.setattr(Connection, "send", hesitate)
        (node,) = meeting.begin(1)
        assert node.membership.node_rank == 0

    def test_nobody_listens(self, meeting: Meeting) -> None:
        node = meeting.node("node1")
        with pytest.raises(
            ConfigError, match=rf"launcher.rendezvous=127.0.0.1:{meeting.port} was not reached from .*=0.3: "
        ):
            node.membership.join(node.announced, 0.3)

    def test_another_program_listens(self, meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
        """It accepts and never says a word, for which nobody waits as long as for other nodes."""
        monkeypatch.setattr(membership, "WELCOME_S", 0.3)
        began = time.monotonic()
        with socket.create_server(("127.0.0.1", meeting.port)):
            node = meeting.node("node1")
            words = "no launcher of dist_mtp: end it, or choose another port with launcher.rendezvous=127.0.0.1:PORT"
            with pytest.raises(ConfigError, match=re.escape(words)):
                node.membership.join(node.announced, WAIT_S)
        assert time.monotonic() - began < WAIT_S / 2, f"took {time.monotonic() - began:.1f} s"

    def test_a_name_that_nobody_knows(self, meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine that is just starting gets a share of the time to join; a misspelt name does not take all of it."""
        asked = []

        def unknown(*endpoint: object, timeout_s: float) -> None:
            asked.append(time.monotonic())
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(membership, "connect", unknown)
        node = meeting.node("node1")
        with pytest.raises(ConfigError, match="is not known on"):
            node.membership.join(node.announced, 1.8)
        assert 0.5 < asked[-1] - asked[0] < 1.5, f"asked for {asked[-1] - asked[0]:.1f} s of 1.8 s"

    def test_the_port_is_free_afterwards(self, meeting: Meeting) -> None:
        for _ in range(2):
            meeting.open(1).close()


class TestEnd:
    """One verdict for all nodes: the cause, not what followed from it."""

    def test_all_done(self, meeting: Meeting) -> None:
        nodes = meeting.begin(3)
        meeting.together(lambda node: node.end(EXIT_DONE))
        assert [node.verdict for node in nodes] == [{"code": EXIT_DONE, "message": ""}] * 3
        assert [node.stopped for node in nodes] == [[], [], []]

    def test_a_signal_lets_the_others_end_by_themselves(self, meeting: Meeting) -> None:
        nodes = meeting.begin(2)
        first = threading.Thread(target=nodes[0].end, args=(EXIT_TERMINATED,))
        first.start()
        time.sleep(2 * SILENCE_S)
        assert nodes[1].stopped == [], "it was killed while it saved"
        nodes[1].end(EXIT_TERMINATED)
        first.join(WAIT_S)
        assert nodes[0].verdict == {"code": EXIT_TERMINATED, "message": ""}

    def test_a_signal_before_training_ends_all(self, meeting: Meeting) -> None:
        """The other ranks wait for those that will never come, and agree to nothing."""
        nodes = meeting.begin(2)
        first = threading.Thread(target=lambda: nodes[0].end(EXIT_TERMINATED, "stopped", agreed=False))
        first.start()
        (told,) = meeting.stopped(nodes[1])
        nodes[1].end(5, "rank 2 was killed by SIGKILL", 1)
        first.join(WAIT_S)
        expected = {"code": EXIT_TERMINATED, "message": "stopped"}
        assert [told, nodes[0].verdict, nodes[1].verdict] == [expected] * 3

    def test_the_cause_wins(self, meeting: Meeting) -> None:
        """A rank was killed; its peers on other nodes fail first, because of that."""
        nodes = meeting.begin(3)
        reports = {nodes[0]: (5, "rank 0 failed", 3), nodes[1]: (5, "rank 3 was killed by SIGKILL", 1)}
        ends = [threading.Thread(target=node.end, args=report) for node, report in reports.items()]
        for end in ends:
            end.start()
            time.sleep(0.1)
        meeting.stopped(nodes[2])  # its ranks wait for the others
        nodes[2].end(5, "rank 4 was killed by SIGKILL", 1)
        for end in ends:
            end.join(WAIT_S)
        expected = {"code": EXIT_RANK_FAILURE, "message": "rank 3 was killed by SIGKILL"}
        assert [node.verdict for node in nodes] == [expected] * 3

    def test_a_launcher_is_killed(self, meeting: Meeting) -> None:
        nodes = meeting.begin(2)
        connection = nodes[1].membership._connection
        assert connection is not None
        nodes[1].membership._decided.set()  # no further beats
        connection.close()
        nodes[0].end(5, "rank 0 failed", 3)
        assert nodes[0].verdict is not None
        assert "the launcher on node 1 (node1, 127.0.0.1) ended without a word" in nodes[0].verdict["message"]

    @pytest.mark.parametrize("lost", [[1], [1, 2]], ids=["one", "all"])
    def test_silence(self, meeting: Meeting, lost: list[int]) -> None:
        """As when a cable is cut: connections stay open and nothing comes."""
        nodes = meeting.begin(3)
        for rank in lost:
            nodes[rank].membership._decided.set()  # ends the beats
        (verdict,) = meeting.stopped(nodes[0])
        message = verdict["message"]
        if len(lost) == 1:
            assert (
                "no sign of life from node 1 (node1, 127.0.0.1) for 1 s: the link between node0 and node1 is broken"
                in message
            )
        else:
            assert "no sign of life from any of the 2 other nodes for 1 s: the link of node0 is broken" in message

    def test_the_first_node_falls_silent(self, meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
        nodes = meeting.begin(2)
        for member in meeting.call.members if meeting.call else []:
            monkeypatch.setattr(member.connection, "send", lambda *_, **__: True)
        nodes[1].end(5, "rank 2 failed", 3)
        assert nodes[1].verdict is not None
        assert "no sign of life from node 0 (node0, 127.0.0.1)" in nodes[1].verdict["message"]
        assert len(nodes[1].stopped) == 1, "its ranks were not ended once"

    def test_two_others_lose_each_other(self, meeting: Meeting) -> None:
        """Both reach the first node, which so hears nothing of it."""
        nodes = meeting.begin(3)
        nodes[1].membership._reaches = lambda rank: rank != 2  # type: ignore[method-assign]
        meeting.together(lambda node: node.end(5, f"a rank of {node.host} failed", 3))
        for node in nodes:
            assert node.verdict is not None
            said = "a rank of node1 failed; node 1 (node1, 127.0.0.1) cannot reach node 2 (node2, 127.0.0.1)"
            assert node.verdict["message"] == said

    def test_a_lost_neighbour_is_noticed_without_a_failure(self, meeting: Meeting) -> None:
        nodes = meeting.begin(3)
        nodes[2].membership._prober.shutdown(socket.SHUT_RDWR)
        nodes[2].membership._prober.close()
        for node in nodes:
            (verdict,) = meeting.stopped(node)
            assert "node 1 (node1, 127.0.0.1) has not reached node 2 (node2, 127.0.0.1)" in verdict["message"]
