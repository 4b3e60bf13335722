"""Which interface leads to the other ranks."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.actors import net
from headrace.workers.actors.net import interface_towards, is_loopback, loopback_listener, own_address, use_interface


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in net.INTERFACES:
        monkeypatch.setenv(name, "before")  # so that it is put back
        monkeypatch.delenv(name)


def by_first_address() -> dict[str, str]:
    """Interface by IPv4 address."""
    there = psutil.net_if_addrs().items()
    return {each.address: name for name, all in there for each in all if each.family == socket.AF_INET}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.3", "localhost", "::1"])
def test_nodes_on_loopback_addresses_use_the_loopback_interface(host: str) -> None:
    assert is_loopback(host)
    assert use_interface(host) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert {name: os.environ[name] for name in net.INTERFACES} == use_interface(host)


def test_the_interface_is_that_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several interfaces, and several addresses of one, the one that the packets leave from."""
    entry = psutil.net_if_addrs()["lo"][0]
    there = {"docker0": ["172.17.0.1"], "eth0": ["10.0.0.2", "10.9.0.2"], "ib0": ["fe80::2%ib0", "10.1.0.2"]}
    table = {name: [entry._replace(address=address) for address in all] for name, all in there.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: table)
    for own, name in (("10.9.0.2", "eth0"), ("10.1.0.2", "ib0"), ("fe80::2", "ib0")):
        monkeypatch.setattr(net, "_address_towards", lambda host, own=own: own)
        assert interface_towards("10.0.0.1") == name
    monkeypatch.setattr(net, "_address_towards", lambda host: "10.7.0.2")
    with pytest.raises(MachineError, match=r"10\.7\.0\.2, which is no interface's.*cluster\.interface"):
        use_interface("10.0.0.1")


def test_this_machine_reaches_itself_by_the_interface_of_its_address() -> None:
    if (own := own_address()) == "127.0.0.1":
        pytest.skip("there is no network")
    assert interface_towards(own) == by_first_address()[own]


def test_no_route_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route(host: str) -> str:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(net, "_address_towards", no_route)
    with pytest.raises(MachineError, match=r"no route to 10\.0\.0\.1.*unreachable"):
        use_interface("10.0.0.1")


def test_the_key_overrides_and_a_wrong_name_is_refused_with_those_that_are_there(monkeypatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert use_interface("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^docker"}
    assert use_interface("10.0.0.1", "lo") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    with pytest.raises(InputError, match=r"cluster\.interface=eth99: .*choose one of .*\blo\b"):
        use_interface("127.0.0.1", "eth99")


def test_a_loopback_listener_is_not_reached_by_another_address() -> None:
    with loopback_listener("127.0.0.3", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.3"
        with socket.create_connection(listener.getsockname()[:2]):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
