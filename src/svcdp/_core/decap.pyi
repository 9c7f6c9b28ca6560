"""Types of ``svcdp._core.decap``; the docstrings are in ``decap.pyx``."""

from typing_extensions import Buffer

def decapsulate(packet: Buffer, port: int = 6080) -> bytes | None: ...
def decapsulate_payload(
    payload: Buffer, protocol: int, traffic_class: int = 0
) -> bytes | None: ...
