"""Types of ``svcdp._core.fragment``; the docstrings are in ``fragment.pyx``."""

from typing_extensions import Buffer

def fragment(packet: Buffer, mtu: int, identification: int | None = None) -> list[bytes]: ...
