"""``svcdp run``"""

from __future__ import annotations

from typing import Any

import click

from svcdp.cli.options import config_options, manifests_option

__all__ = ["command"]


@click.command("run")
@manifests_option(required=False)
@config_options()
def command(config_file: str | None, **flags: Any) -> None:
    """Serve this node's Services until stopped.

    A setting is taken from a flag, else from the environment (SVCDP_ and the flag's name,
    such as SVCDP_POD_CIDRS), else from the file, else it is the default.
    """
    from svcdp.node import daemon, logs
    from svcdp.node.config import LoadedConfig, load

    def read() -> LoadedConfig:
        return load(config_file, flags=flags)

    loaded = read()
    logs.configure(loaded.config.log_level, loaded.config.log_format)
    logs.warn(loaded.notes)
    daemon.run(loaded.config, lambda: read().config)
