"""Where page and endpoint listen, and who may use them; checked before anything is loaded."""

import dataclasses
import ipaddress
import socket

from utils.console import UserError

FIRST_PORT = 7860
PORTS = 100  # how many are tried from there


@dataclasses.dataclass(frozen=True)
class Address:
    """Where to listen (port None: the first free one from 7860), who may see the page (user and password; None: everyone),
    whether it gets a public link, and the key that other programs need."""

    name: str
    port: int | None
    auth: tuple[str, str] | None
    share: bool
    api_key: str = ""

    @property
    def is_open(self) -> bool:
        """True if other machines can reach it."""
        return self.share or not is_local(self.name)

    def taken(self) -> "Address":
        """The address with a currently free port. Raises UserError if there is none, or the address cannot be used."""
        ports = [self.port] if self.port else range(FIRST_PORT, FIRST_PORT + PORTS)
        problem = ""
        for port in ports:
            try:
                family, kind, protocol, _, where = socket.getaddrinfo(self.name, port, type=socket.SOCK_STREAM)[0]
                with socket.socket(family, kind, protocol) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(where)
                return dataclasses.replace(self, port=port)
            except OSError as error:
                problem = error.strerror or str(error)
        raise UserError(f"--server_name {self.name} --server_port {self.port}: {problem}; choose another")


def is_local(name: str) -> bool:
    """True for an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
