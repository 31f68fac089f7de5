"""`tnxctl completion`: the script that teaches a shell to complete this tool's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion", short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Switch completion on, for good:
      bash   tnxctl completion bash > ~/.local/share/bash-completion/completions/tnxctl
      zsh    tnxctl completion zsh > ~/.zfunc/_tnxctl   # ~/.zfunc in fpath, before compinit
      fish   tnxctl completion fish > ~/.config/fish/completions/tnxctl.fish
    For this shell only: eval "$(tnxctl completion bash)"
    """
    completion = get_completion_class(shell)
    assert completion is not None, shell  # the choices above are the shells that click knows
    click.echo(completion(ctx.find_root().command, {}, "tnxctl", "_TNXCTL_COMPLETE").source())
