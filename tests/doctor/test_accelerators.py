"""GPUs, NVLink and InfiniBand, from what drivers print and the kernel shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_mtp.doctor.accelerators import adapter_ports, check_gpus, check_links, check_nvlink_status, check_ports

H100 = "H100, 570.1, 9.0, 81920, 81000"
A100 = "A100, 570.1, 8.0, 40960, 40000"


def matrix(*rows: str) -> str:
    """As ``nvidia-smi topo -m`` prints, with its underlined header and its legend."""
    names = "\t".join(f"GPU{index}" for index in range(len(rows)))
    lines = "".join(f"GPU{index}\t{row}\t0-15\t0\n" for index, row in enumerate(rows))
    return f"\t\x1b[4m{names}\tCPU Affinity\x1b[0m\n{lines}NIC0\tNODE\n\nLegend:\n\n  X    = Self\n"


@pytest.mark.parametrize(
    ("listing", "usable", "device", "expected"),
    [
        (None, 0, "auto", ["note none"]),
        (None, 0, "cuda", ["error none"]),
        (f"0, {H100}\n1, {H100}\n", 2, "auto", ["ok 2 x H100"]),
        (f"WARNING: infoROM is corrupted at gpu 0\n0, {H100}\n1, {H100}\n", 2, "auto", ["ok 2 x H100"]),
        (f"0, {H100}\n1, {A100}\n", 2, "auto", ["ok 1 x H100", "ok 1 x A100", "warning different kinds"]),
        (f"0, {H100}\n1, {H100}\n", 1, "auto", ["ok 2 x H100", "warning 1 of 2"]),
        (f"0, {H100}\n1, {H100}\n", 1, "cuda", ["ok 2 x H100", "error 1 of 2"]),
        (f"0, {H100}\n1, {H100}\n", 1, "cpu", ["ok 2 x H100"]),
        ("0, H100, 570.1, 9.0, 81920, 70000\n", 2, "auto", ["ok 1 x H100", "warning GPU 0 has 68 GiB of 80 GiB free"]),
        ("0, H100, 570.1, 9.0, [N/A], [N/A]\n", 2, "auto", ["ok 1 x H100"]),
    ],
)
def test_gpus(listing: str | None, usable: int, device: str, expected: list[str]) -> None:
    """For two ranks. Warnings that drivers print between the rows are no GPUs."""
    found = [f"{finding.level} {finding.what}" for finding in check_gpus(listing, 2, usable, device=device)]
    assert len(found) == len(expected), found
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


class TestOthersGpus:
    """What ``CUDA_VISIBLE_DEVICES`` leaves out is somebody else's: its kind, memory and links are not judged."""

    def test_kinds_and_memory(self) -> None:
        listing = f"0, {H100}\n1, {A100}\n2, H100, 570.1, 9.0, 81920, 1000\n10, {A100}\n"
        found = check_gpus(listing, 1, 1, device="cuda", chosen=[0])
        assert [(finding.level, finding.what[:8]) for finding in found] == [("ok", "1 x H100")], found
        found = check_gpus(listing, 1, 1, device="cuda", chosen=[2])
        assert [finding.level for finding in found] == ["ok", "warning"], found

    def test_parts_of_a_gpu(self) -> None:
        found = check_gpus("0, H100, 570.1, 9.0, 81920, 1000", 1, 1, device="cuda", is_divided=True)
        assert [finding.level for finding in found] == ["ok"], "the other parts are in use by others"

    def test_none_left(self) -> None:
        (found,) = check_gpus(f"0, {H100}\n", 1, 0, device="cuda", chosen=[])
        assert (found.level, found.what) == ("error", "CUDA_VISIBLE_DEVICES names none of the 1 GPUs, but device=cuda")
        assert found.fix.startswith("unset it"), found

    def test_links(self) -> None:
        topology = matrix("X\tSYS\tNV4", "SYS\tX\tSYS", "NV4\tSYS\tX")
        found = {chosen: check_links(topology, chosen) for chosen in ((0, 2), (1, 2), (1,))}
        shown = {chosen: finding and f"{finding.level} {finding.what}" for chosen, finding in found.items()}
        assert shown == {
            (0, 2): "ok joins all 1 pairs of GPUs (1 NV4)",
            (1, 2): "note none, GPUs reach each other over PCIe (1 SYS)",
            (1,): None,
        }

    def test_links_that_are_down(self) -> None:
        status = "".join(
            f"GPU {n}: H100 (UUID: {n})\n\t Link 0: {said}\n" for n, said in ((0, "26 GB/s"), (1, "<inactive>"))
        )
        levels = {n: found.level for n in (0, 1) if (found := check_nvlink_status(status, [n])) is not None}
        assert levels == {0: "ok", 1: "warning"}
        assert check_nvlink_status(status, []) is None


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (None, None),
        (matrix("X"), None),
        (matrix("X\tNV18\tNV18", "NV18\tX\tNV18", "NV18\tNV18\tX"), "ok joins all 3 pairs"),
        (matrix("X\tNV4\tSYS", "NV4\tX\tSYS", "SYS\tSYS\tX"), "warning joins 1 of 3 pairs of GPUs (2 SYS, 1 NV4)"),
        (matrix("X\tPHB", "PHB\tX"), "note none"),
    ],
)
def test_links(topology: str | None, expected: str | None) -> None:
    found = check_links(topology)
    shown = found and f"{found.level} {found.what}"
    assert (shown is None) if expected is None else (shown or "").startswith(expected), shown


def test_links_that_are_down() -> None:
    assert check_nvlink_status(None) is None
    up = check_nvlink_status("GPU 0: H100\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n")
    down = check_nvlink_status("GPU 0: H100\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n")
    assert up is not None
    assert (up.level, up.what) == ("ok", "2 links up, 26.562 GB/s each")
    assert down is not None
    assert (down.level, down.what) == ("warning", "1 of 2 links are down")


@pytest.mark.parametrize(
    ("states", "link_layer", "expected"),
    [
        ([], "InfiniBand", "note none"),
        (["4: ACTIVE", "1: DOWN"], "InfiniBand", "ok 1 of 2 ports active: 1 x InfiniBand 400 Gb/sec (4X NDR)"),
        (["4: ACTIVE"], "Ethernet", "ok 1 of 1 ports active: 1 x RoCE"),
        (["2: INIT", "1: DOWN"], "InfiniBand", "warning no port is active: mlx5_0/1 2: INIT, mlx5_1/1 1: DOWN"),
    ],
)
def test_infiniband(states: list[str], link_layer: str, expected: str, tmp_path: Path) -> None:
    """Read from a copy of the kernel's tree."""
    for index, state in enumerate(states):
        port = tmp_path / f"mlx5_{index}" / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", link_layer)):
            (port / name).write_text(text + "\n")
    found = check_ports(adapter_ports(tmp_path), several_nodes=True)
    assert f"{found.level} {found.what}".startswith(expected), found
    assert bool(found.fix) == (found.level == "warning"), found
