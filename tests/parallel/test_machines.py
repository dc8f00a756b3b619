"""Several machines, and what is told where they cannot meet; here all of them are this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_parallel_run as runs
import torch.distributed as dist

from torchlocal.cli import commands as cli
from torchlocal.parallel import machines, meet
from torchlocal.parallel.channels import PeerLost
from torchlocal.parallel.machines import Machines, roll_call

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def together(*calls: Callable[[], Any]) -> list[str]:
    """What calls that wait for each other end with: nothing, or an error."""
    told = [""] * len(calls)

    def run(i: int, call: Callable[[], Any]) -> None:
        try:
            call()
        except (ValueError, PeerLost) as error:
            told[i] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return told


# --- machines, before their ranks start ---


def machine(number: int, port: int, count: int = 2) -> Machines:
    return Machines.of(count, number, f"{LOOPBACK}:{port}")


def test_machines_meet_in_any_order() -> None:
    for order in ((0, 1, 2), (2, 1, 0)):
        port = free_port()
        calls = [lambda n=n, port=port: roll_call(machine(n, port, 3), 6, 30) for n in order]
        assert together(*calls) == ["", "", ""]


def test_machines_that_differ_are_told_so_on_both() -> None:
    port = free_port()
    told = together(lambda: roll_call(machine(0, port), 2, 30), lambda: roll_call(machine(1, port), 4, 30))
    sentence = f"ranks is 4 on machine 1 ({LOOPBACK}) and 2 on machine 0: give the same on all machines"
    assert told == [f"ValueError: {sentence}"] * 2


def test_two_machines_of_one_number_are_refused() -> None:
    port = free_port()
    calls = [lambda n=n: roll_call(machine(n, port, 3), 3, 20) for n in (0, 1, 1)]
    assert all(
        "comes as machine 1, which is another one: give every machine its own" in t for t in together(*calls)[:1]
    )


def test_a_machine_that_does_not_come_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_SOON", 0.1)
    port = free_port()
    with pytest.raises(PeerLost, match=f"machine 1 has not come to {LOOPBACK}:{port} for 1 s: start the same command"):
        roll_call(machine(0, port), 2, 1)
    assert "waiting at" in capsys.readouterr().err
    with pytest.raises(PeerLost, match=r"machine 0 cannot be reached at .* for 1 s \(connection refused"):
        roll_call(machine(1, port), 2, 1)
    assert capsys.readouterr().err.count("waiting for machine 0") == 1


def test_places_that_are_no_good_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(ValueError, match=r"this one, cannot listen there \(Address already in use\)")
    with socket.create_server((LOOPBACK, 0)) as taken, refused:
        roll_call(machine(0, taken.getsockname()[1]), 2, 1)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.1.1", *rest, **more))
    with pytest.raises(ValueError, match=r"alpha is 127.0.1.1 on this machine, where no other finds it"):
        roll_call(Machines.of(2, 0, "alpha:29500"), 2, 1)


def test_a_stranger_at_the_door_does_no_harm() -> None:
    port = free_port()

    def knock() -> None:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n\n", b"[]\n"):
            for _ in range(100):
                try:
                    with socket.create_connection((LOOPBACK, port), timeout=5) as connection:
                        connection.sendall(said)
                    break
                except ConnectionRefusedError:
                    continue
        roll_call(machine(1, port), 2, 30)

    assert together(lambda: roll_call(machine(0, port), 2, 30), knock) == ["", ""]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ranks", "2", "--machines", "2"], "--meet None: give an address of machine 0 and a TCP port"),
        (["--ranks", "2", "--machines", "2", "--meet", "a:b"], "--meet a:b: give an address"),
        (["--ranks", "2", "--machines", "2", "--machine", "2"], "--machine 2 must be from 0 to 1"),
        (["--ranks", "3", "--machines", "2", "--meet", "a:1"], "--ranks 3 must be a multiple of --machines 2"),
        (["--machines", "2"], "--machines 2: give the number of all their processes as --ranks"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--out", str(tmp_path / "run"), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_of_two_machines_is_that_of_one(tmp_path: Path) -> None:
    options = [*runs.OPTIONS, "--epochs", "1", "--quiet"]
    alone, out, place = tmp_path / "alone", tmp_path / "run", f"{LOOPBACK}:{free_port()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = []
    for number in (1, 0):
        command = ["fit", *options, "--out", str(out), "--ranks", "2", "--machines", "2"]
        command += ["--machine", str(number), "--meet", place]
        start = [sys.executable, "-m", "torchlocal", *command]
        processes.append(subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert cli.main(["fit", *options, "--out", str(alone)]) == 0
    runs.assert_same_run(out, alone)


# --- ranks, before they are connected ---


def test_the_interface_that_leads_somewhere_is_found() -> None:
    assert LOOPBACK in meet.addresses()["lo"] and meet.interface_to(LOOPBACK) == "lo"
    assert meet.way_to(LOOPBACK) == LOOPBACK
    assert meet.interface_to("203.0.113.1") is None
    assert meet.misleads("alpha", "127.0.1.1") and not meet.misleads("alpha", "10.0.0.1")
    assert not meet.misleads(LOOPBACK, LOOPBACK) and not meet.misleads("localhost", LOOPBACK)


def apart(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """Be ranks of two machines."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", LOOPBACK)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts = iter(["alpha", "beta"])
    monkeypatch.setattr(meet.socket, "gethostname", lambda: next(hosts))


def meeting() -> list[str]:
    store = dist.HashStore()
    limit = timedelta(seconds=20)
    return together(*(lambda rank=rank: meet.meet(store, rank, 2, limit) for rank in range(2)))


def test_ranks_that_reach_each_other_use_the_interface_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    apart(monkeypatch)
    assert meeting() == ["", ""]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    apart(monkeypatch, GLOO_SOCKET_IFNAME="eth99")
    for told in meeting():
        assert "GLOO_SOCKET_IFNAME=eth99: this machine has no interface 'eth99' with an address, it has lo" in told


def test_a_mistake_of_one_rank_is_told_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    apart(monkeypatch)
    answers = iter([LOOPBACK, ValueError("no way out")])

    def choose(_: bool) -> str:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    monkeypatch.setattr(meet, "_choose", choose)
    told = sorted(meeting())
    assert told[1] == "ValueError: no way out"
    assert told[0].startswith("PeerLost: rank ") and told[0].endswith(" cannot take part: no way out")


def test_ranks_that_cannot_reach_each_other_say_so_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    apart(monkeypatch)
    real = socket.create_server

    def deaf(*arguments: Any, **options: Any) -> socket.socket:  # a port that nobody listens at
        listening = real(*arguments, **options)
        port = listening.getsockname()[1]
        listening.close()
        closed: Any = type("Closed", (), {"getsockname": lambda _: (LOOPBACK, port), "close": lambda _: None})()
        return closed

    monkeypatch.setattr(meet.socket, "create_server", deaf)
    first, second = meeting()
    assert first == second
    assert first.startswith("PeerLost: rank 0 on ") and "cannot reach rank 1 on" in first
    assert f"at {LOOPBACK} (Connection refused): have the firewall there let all TCP ports through" in first
