"""One node's part of a run on several nodes: meet the others, start this node's ranks, end together.

The command on every node, ssh and Slurm all come here::

    python -m dist_mtp.launch.agent --config FILE --corpus FOLDER --config-hash SHA256 \\
        --nodes 2 --node-rank 0 --rendezvous node0:29500

With ``--stdin`` the configuration comes as the first line of standard input; later lines ``signal NUMBER`` are passed on,
and its end means that the launcher is gone.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_mtp.config import Config, from_mapping, resolve, to_dict
from dist_mtp.data.corpus import prepare
from dist_mtp.data.tokenizers import tokenizer_vocab_size
from dist_mtp.errors import EXIT_CONFIG, EXIT_RANK_FAILURE, ConfigError, DistMtpError
from dist_mtp.launch.cluster import settled
from dist_mtp.launch.command import rank_arguments
from dist_mtp.launch.facts import free_port, node_facts, token_file
from dist_mtp.launch.hosts import is_this_machine
from dist_mtp.launch.membership import Membership, RefusedError
from dist_mtp.launch.messages import Message
from dist_mtp.launch.outcome import STOPPED, Outcome, report, stopped_before_training
from dist_mtp.launch.ranks import Place, kill_ranks, run_ranks
from dist_mtp.launch.roll_call import RollCall
from dist_mtp.launcher_checks import parse_endpoint
from dist_mtp.run_folder import CONFIG_FILE, prepare_run_folder, read_config
from dist_mtp.signals import handled

BEGAN = "the launchers have met"
"""Told to the launcher that has started this one by ssh, and so can tell a host that it lost from one it never reached."""
SHARED_S = 10.0
"""Network file systems may show a new file this late."""
EXIT_S = 10.0
"""torchrun may sit in a rendezvous that nobody will come to; after this long the process ends without it."""


@dataclasses.dataclass(frozen=True)
class Node:
    """What a node's launcher knows before it has met the others."""

    config: Config
    """Composed and checked; ``parallel.dp`` may be open."""
    nodes: int
    ranks: int
    """That each node starts."""
    endpoint: tuple[str, int]
    node_rank: int | None = None
    corpus: Path | None = None
    """Folder of the tokenised corpus; None lets the first node prepare it."""
    token: str = ""
    """Secret of this launch, when one launcher has started all nodes."""
    quiet: bool = False
    """Leave it to the first node to say how the run ended."""
    is_led: bool = False
    """The launcher that has started this one speaks to it through standard input."""


class _Stopped(BaseException):
    """A signal came before there were ranks to pass it on to."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_node(node: Node) -> int:
    """Take part in the run from roll call to verdict; returns the run's exit code, the same on all nodes.

    Raises:
        DistMtpError: the nodes did not come together, or the first one could not prepare the run.
    """
    roll_call = membership = None
    with handled(_raise_stopped):
        try:
            if node.is_led:
                threading.Thread(target=_follow_launcher, name="lifeline", daemon=True).start()
            # Seconds of work that would hold up this node's beats later.
            import torch.distributed.launcher.api  # noqa: F401

            roll_call = _open_roll_call(node)
            # The ranks meet where the launchers did: that node is the first, whoever announces itself before. Its own name
            # may not be known to itself yet.
            wanted_rank, host = (node.node_rank, node.endpoint[0]) if roll_call is None else (0, "127.0.0.1")
            membership = Membership((host, node.endpoint[1]), node_timeout_s=node.config.launcher.node_timeout_s)
            membership.join(_announcement(node, wanted_rank), node.config.launcher.join_timeout_s)
            if roll_call is not None:
                _start_all(node, roll_call)
            ended = threading.Event()
            membership.on_stop = lambda verdict: threading.Thread(
                target=_end_ranks, args=(node, membership, ended, verdict), daemon=True
            ).start()
            assignment = membership.wait_for_start()
        except _Stopped as stopped:
            end = stopped_before_training(128 + stopped.number)
            if membership is not None:
                membership.leave(end.code, end.message)
            _leave(membership, roll_call, "the first node was stopped by a signal", end.code)
            if not node.quiet:
                print(end.message, file=sys.stderr)
            return end.code
        except BaseException as error:
            _leave(
                membership,
                roll_call,
                str(error) or type(error).__name__,
                getattr(error, "exit_code", EXIT_RANK_FAILURE),
            )
            raise
        if node.is_led:
            print(BEGAN, file=sys.stderr, flush=True)
        try:
            outcome = _run(node, membership, assignment)
        except _Stopped as stopped:
            outcome = stopped_before_training(128 + stopped.number)
        ended.set()
        with handled(lambda number, frame: None):  # the ranks have ended; the verdict is near
            message = outcome.message or _said_elsewhere(outcome)
            verdict = membership.finish(outcome.code, message, outcome.blame, agreed=outcome.agreed)
    time.sleep(0.2 if roll_call is not None else 0)  # let the verdict leave
    membership.close()
    if roll_call is not None:
        roll_call.close()
        token_file(node.config.run_dir, assignment["shared_token"]).unlink(missing_ok=True)
    own_word = outcome.code == verdict["code"] and not outcome.message
    final = outcome if own_word else Outcome(verdict["code"], verdict["message"])
    _tell(node, membership, final)
    return final.code


def _leave(membership: Membership | None, roll_call: RollCall | None, reason: str, code: int) -> None:
    """Before ranks were started; the first node takes the others along."""
    if roll_call is not None:
        roll_call.refuse(reason, code)
        time.sleep(0.2)  # let the refusals leave
        roll_call.close()
    if membership is not None:
        membership.close()


def _tell(node: Node, membership: Membership, final: Outcome) -> None:
    """Say how the run ended."""
    if membership.node_rank == 0:
        report(node.config, final)
    elif not node.quiet and final.message:
        print(f"error: {final.message}" if final.code not in STOPPED else final.message, file=sys.stderr)


def _open_roll_call(node: Node) -> RollCall | None:
    """The roll call, if this is the node where it is held."""
    host, port = node.endpoint
    if node.node_rank not in (None, 0) or (node.node_rank is None and not is_this_machine(host)):
        return None
    launcher = node.config.launcher
    try:
        return RollCall(
            port,
            run=node.config.run_dir,
            nodes=node.nodes,
            min_nodes=launcher.min_nodes or node.nodes,
            token=node.token,
            join_timeout_s=launcher.join_timeout_s,
            node_timeout_s=launcher.node_timeout_s,
            expected=launcher.hosts,
        )
    except OSError as error:
        if node.node_rank is None and error.errno == errno.EADDRINUSE:
            return None  # another node of this run on the same machine was first; else joining will tell
        raise ConfigError(
            f"port {port} of this machine ({socket.gethostname()}) cannot be used for the rendezvous ({error.strerror}): end the "
            f"program that has it, or choose another with launcher.rendezvous={host}:PORT"
        ) from error


def _announcement(node: Node, wanted_rank: int | None) -> dict[str, Any]:
    config = settled(node.config, node.nodes)
    # Nodes may know the first one by different names.
    config = dataclasses.replace(config, launcher=dataclasses.replace(config.launcher, rendezvous=None))
    return {
        "run": node.config.run_dir,
        "token": node.token,
        "host": socket.gethostname(),
        "node_rank": wanted_rank,
        "ranks": node.ranks,
        "facts": node_facts(),
        "config": to_dict(config),
    }


def _start_all(node: Node, roll_call: RollCall) -> None:
    """The first node's duties once all have come: resolve, prepare data and run folder, give the word."""
    members = roll_call.gather()
    config, world_size = settled(node.config, len(members)), sum(member.ranks for member in members)
    if config.world_size != world_size:  # fewer nodes came than were asked for
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=None))
    config = resolve(config, vocab_size=tokenizer_vocab_size(config.tokenizer), world_size=world_size)
    corpus = node.corpus or prepare(config.data, config.tokenizer).folder
    prepare_run_folder(config)
    shared_token = secrets.token_hex(16)
    token_file(config.run_dir, shared_token).touch()
    print(f"run folder {config.run_dir}, {config.world_size} ranks on {len(members)} nodes", file=sys.stderr)
    for member in members:
        print(f"  {member.name}", file=sys.stderr)
    roll_call.start(config=to_dict(config), corpus=str(corpus), shared_token=shared_token, master_port=free_port())


def _run(node: Node, membership: Membership, assignment: dict[str, Any]) -> Outcome:
    """This node's ranks, unless it does not see the first node's files."""
    place = Place(
        nodes=len(membership.nodes),
        node_rank=membership.node_rank,
        ranks=node.ranks,
        master=(membership.nodes[0]["address"], assignment["master_port"]),
    )
    config = from_mapping(assignment["config"])
    shared = token_file(config.run_dir, assignment["shared_token"])
    deadline = time.monotonic() + SHARED_S
    while not shared.is_file():
        if time.monotonic() > deadline:
            return Outcome(
                EXIT_CONFIG,
                f"{socket.gethostname()} does not see the run folder that the first node wrote ({shared.parent.absolute()}): "
                "all nodes need run.dir on a shared file system, and the same working folder if it is a relative path",
            )
        time.sleep(0.2)
    arguments = rank_arguments(config, Path(config.run_dir) / CONFIG_FILE, Path(assignment["corpus"]))
    try:
        return run_ranks(config, arguments, place)
    except Exception as error:  # the rendezvous of torchrun: another node did not come
        return Outcome(EXIT_RANK_FAILURE, f"the ranks of {socket.gethostname()} could not be started: {error}", blame=4)


def _end_ranks(node: Node, membership: Membership, ended: threading.Event, verdict: Message) -> None:
    """After a verdict from outside: the ranks cannot end by themselves, their peers are gone."""
    deadline = time.monotonic() + EXIT_S
    while not ended.is_set():
        kill_ranks()
        if time.monotonic() > deadline:
            _tell(node, membership, Outcome(verdict["code"], verdict["message"]))
            sys.stderr.flush()
            os._exit(verdict["code"])
        ended.wait(0.2)


def _said_elsewhere(outcome: Outcome) -> str:
    return "" if outcome.code in (0, *STOPPED) else f"rank 0 ended with exit code {outcome.code}: it has said why"


def _raise_stopped(number: int, frame: object) -> NoReturn:
    for other in (signal.SIGTERM, signal.SIGINT):  # a second one must not interrupt what the first one began
        signal.signal(other, signal.SIG_IGN)
    raise _Stopped(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point on a node."""
    parser = argparse.ArgumentParser(prog="dist_mtp.launch.agent", allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--config-hash")
    parser.add_argument("--stdin", action="store_true")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node-rank", type=int)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args(argv)
    try:
        token = ""
        if given.stdin:
            first = json.loads(sys.stdin.readline())
            token, config = first["token"], from_mapping(first["config"])
        else:
            config = read_config(given.config, given.config_hash)
        node = Node(
            config=config,
            nodes=given.nodes,
            ranks=given.ranks or config.launcher.ranks_per_node or config.world_size // given.nodes,
            endpoint=parse_endpoint(given.rendezvous),
            node_rank=given.node_rank,
            corpus=given.corpus,
            token=token,
            quiet=given.quiet,
            is_led=given.stdin,
        )
        return run_node(node)
    except DistMtpError as error:
        if not (given.quiet and isinstance(error, RefusedError)):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _follow_launcher() -> None:
    """Pass on signals that the launcher sends through standard input; without a launcher, stop."""
    for line in sys.stdin:
        word, _, number = line.partition(" ")
        if word == "signal" and number.strip().isdecimal():
            os.kill(os.getpid(), int(number))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
