"""The parts of ``svcdp demo``. Servers and clients are programs: each runs in its namespace."""
