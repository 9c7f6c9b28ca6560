"""The command group and how errors look."""

from __future__ import annotations

import importlib
import os
import sys

import click

from svcdp.errors import ConfigError, PlatformError, SvcdpError

__all__ = ["cli", "run"]

_SUMMARIES = {
    "run": "Serve this node's Services until stopped.",
    "kube-proxy": "Serve this node, told by kube-proxy's flags and file.",
    "check": "Say what this host can do, and the effective configuration.",
    "get": "List what a running daemon serves.",
    "describe": "Say all that is known of a Service.",
    "top": "Show what each Service does now.",
    "ipvs": "List services as ipvsadm does; take its rules over.",
    "trace": "Say where a packet would go, and why.",
    "replay": "Send the packets of a capture file through the dataplane.",
    "validate": "Find all mistakes in a folder of manifests.",
    "env": "Print the environment variables that tell a container of Services.",
    "controller": "Give a cluster's load balancers addresses from its pools.",
    "dns": "Answer DNS questions for the names of Services.",
    "decap": "Be the real server of a tunnel: take packets out of it.",
    "rules": "Show, apply or remove the capture rules.",
    "demo": "Real clients, servers and traffic, in network namespaces.",
    "version": "Print the version.",
}


class _Verbs(click.Group):
    """Loads ``svcdp.cli.<verb>`` when it is needed, so that every verb starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUMMARIES:
            return None
        command: click.Command = importlib.import_module(
            f"svcdp.cli.{cmd_name.replace('-', '_')}"
        ).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Kubernetes Services on a node: balance, rewrite, explain."""


def run(arguments: list[str] | None = None) -> int:
    """Run one command and give the exit status. Errors are one line on stderr."""
    try:
        status = cli.main(arguments, prog_name="svcdp", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "svcdp"
        return _fail(f"{error.format_message().rstrip('.')} (see '{where} --help')", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # Whoever read stdout has seen enough; let the interpreter's last flush succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        return _fail(error, 2)
    except PlatformError as error:
        return _fail(error.strerror or error, 1)  # without "[Errno 1]"
    except (SvcdpError, OSError) as error:
        return _fail(error, 1)


def _fail(message: object, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
