"""``svcdp kube-proxy``"""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command(
    "kube-proxy",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Serve this node's Services, told by kube-proxy's flags and configuration file.

    What has no counterpart is a warning, or an error where it would change what is forwarded.
    Settings of svcdp's own are taken from the environment (SVCDP_...).
    """
    from svcdp.node import daemon, logs
    from svcdp.node.config import load

    if arguments == ("--version",):
        from svcdp._version import __version__

        click.echo(f"svcdp {__version__}")
        return
    loaded = load(kube_proxy=arguments)
    logs.configure(loaded.config.log_level, loaded.config.log_format)
    logs.warn(loaded.notes)
    daemon.run(loaded.config, lambda: load(kube_proxy=arguments).config)
