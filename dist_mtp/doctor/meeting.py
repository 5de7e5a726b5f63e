"""The way between hosts, tried out: the first one listens where the nodes of a run would meet, all others connect.

Each side is a process on its host, ``python -m dist_mtp.doctor.meeting listen PORT`` or ``connect HOST PORT``. The listener
ends with its standard input, so with the doctor that started it, and after :data:`LISTEN_S` in any case.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_mtp.doctor.finding import Finding, completed

LISTEN_S = 120.0
CONNECT_S = 5.0
"""Without an answer for this long, packets are dropped on the way."""
START_S = 20.0
"""For ssh and Python, on a busy host."""
_BYTES = 1 << 16
"""Sent each way: many packets, as some ways drop only large ones."""
_AT_A_TIME = 64
_LISTENS = "dist_mtp listens"

Command = Callable[[str, Sequence[str]], list[str]]
"""From a host and what to run there to a command of this machine."""


def check_way(host: str, first: str, endpoint: tuple[str, int], answer: Mapping[str, Any]) -> Finding | None:
    """None if ``host`` reaches the first one.

    Args:
        endpoint: by which it tried.
        answer: ``seconds`` that the exchange took, or the ``problem``, and whether the ``name`` could not be looked up.
    """
    if "problem" not in answer:
        return None
    where, port = endpoint
    if answer.get("name"):
        fix = f"correct launcher.rendezvous, or add {where} to /etc/hosts there"
    else:
        fix = f"open port {port} of {first} for it, or set launcher.rendezvous to an address of {first} that it reaches"
    return Finding(f"{host}: way", "error", f"{where}:{port} was not reached: {answer['problem']}", fix)


def way_findings(hosts: Sequence[str], endpoint: tuple[str, int], command: Command) -> list[Finding]:
    """Whether the hosts can meet: one finding that counts if all can, else one for each that cannot.

    Args:
        hosts: the first one listens.
        endpoint: host, by the name that the others use, and port.
        command: runs the two sides on their hosts.
    """
    first, others = hosts[0], hosts[1:]
    where, port = endpoint
    with _listening(command(first, [*_THIS, "listen", str(port)])) as problem:
        if problem is not None:
            fix = "end the port's owner there (ss -ltnp), or set launcher.rendezvous=HOST:PORT"
            return [Finding(f"{first}: port {port}", "error", f"cannot be listened on: {problem}", fix)]
        with ThreadPoolExecutor(max_workers=_AT_A_TIME) as pool:
            connect = [*_THIS, "connect", where, str(port)]
            answers = dict(zip(others, pool.map(lambda host: _answer(command(host, connect)), others), strict=True))
    found = [check_way(host, first, endpoint, answer) for host, answer in answers.items()]
    if problems := [finding for finding in found if finding is not None]:
        return problems
    slowest = max(answer["seconds"] for answer in answers.values())
    what = f"{len(others)} of {len(others)} other hosts reach {where}:{port}, {_BYTES >> 10} KiB there and back in {1e3 * slowest:.0f} ms"
    return [Finding("way between hosts", "ok", what)]


def exchange(host: str, port: int) -> float:
    """Seconds until bytes that were sent to the listener came back.

    Raises:
        OSError: they did not.
    """
    began, sent, received = time.monotonic(), secrets.token_bytes(_BYTES), bytearray()
    with socket.create_connection((host, port), timeout=CONNECT_S) as connected:
        connected.sendall(sent)
        while len(received) < len(sent) and (piece := connected.recv(len(sent))):
            received += piece
    if received != sent:
        raise ConnectionError("another program answers there")
    return time.monotonic() - began


class _SendBack(socketserver.StreamRequestHandler):
    timeout = CONNECT_S

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever connected is gone, and reports it
            self.wfile.write(self.rfile.read(_BYTES))


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256


def main(arguments: Sequence[str]) -> int:
    """One side."""
    if arguments[0] == "connect":
        host, port = arguments[1], int(arguments[2])
        try:
            print(json.dumps({"seconds": exchange(host, port)}))
        except OSError as error:
            said = error.strerror or str(error)
            print(json.dumps({"problem": said, "name": isinstance(error, socket.gaierror)}))
        return 0
    try:
        listener = _Listener(("", int(arguments[1])), _SendBack)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return 1
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    print(_LISTENS, flush=True)
    select.select([sys.stdin], [], [], LISTEN_S)  # readable when it ends
    return 0


_THIS = [sys.executable, "-m", "dist_mtp.doctor.meeting"]


@contextlib.contextmanager
def _listening(command: Sequence[str]) -> Iterator[str | None]:
    """While the block runs there is a listener, or it gets the reason why there is none."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        yield f"{command[0]} cannot be run ({error})"
        return
    assert process.stdin is not None
    assert process.stdout is not None
    patience = threading.Timer(START_S, process.kill)
    patience.start()
    listens = any(line.strip() == _LISTENS for line in process.stdout)  # shells may greet before
    patience.cancel()
    try:
        yield None if listens else _last_line(process.communicate()[1]) or f"no listener within {START_S:.0f} s"
    finally:
        try:
            process.communicate(timeout=CONNECT_S)  # ends its standard input
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _answer(command: Sequence[str]) -> dict[str, Any]:
    """Of one that connects."""
    try:
        done = completed(command, START_S + 2 * CONNECT_S)
    except subprocess.TimeoutExpired as error:
        return {"problem": f"no answer within {error.timeout:.0f} s"}
    except OSError as error:
        return {"problem": str(error)}
    try:
        answer: dict[str, Any] = json.loads(_last_line(done.stdout))
    except ValueError:
        return {"problem": _last_line(done.stderr) or f"exit code {done.returncode}"}
    return answer


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
