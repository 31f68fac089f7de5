"""`tnxctl completion`: the script that teaches a shell to complete this tool's commands and options."""

from __future__ import annotations

import os

import click
from click.shell_completion import BashComplete, add_completion_class, get_completion_class, split_arg_string

VARIABLE = "_TNXCTL_COMPLETE"
"""The variable that a shell sets when it wants words completed."""

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' breaks="" prefix="" each type value completion
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##*[[:space:]]}"

    # bash replaces only what follows the last of these in a word.
    for each in @ : =; do
        [[ $COMP_WORDBREAKS == *"$each"* ]] && breaks+="$each"
    done
    [[ -n $breaks ]] && prefix="${word%%"${word##*[$breaks]}"}"

    for completion in $(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) COMPREPLY=(); compopt -o dirnames ;;
            file) COMPREPLY=(); compopt -o default ;;
            plain) COMPREPLY+=("${value#"$prefix"}") ;;
        esac
    done
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace

    return 0
}

%(complete_func)s_setup() {
    complete -o nosort -F %(complete_func)s %(prog_name)s
}

%(complete_func)s_setup;
"""


class _Bash(BashComplete):
    """Completion for bash, which takes words apart at "@", ":" and "=": here, they are whole."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = "" if line[-1:].isspace() or len(words) < 2 else words.pop()
        return words[1:], incomplete


def register() -> None:
    """Have click use this module's completion for bash."""
    add_completion_class(_Bash)


@click.command("completion", short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell. It completes commands and options, and the models, versions and devices
    of the daemon, where one answers at --host or TNX_HOST.

    \b
    Switch completion on, for good:
      bash   tnxctl completion bash > ~/.local/share/bash-completion/completions/tnxctl
      zsh    tnxctl completion zsh > ~/.zfunc/_tnxctl   # ~/.zfunc in fpath, before compinit
      fish   tnxctl completion fish > ~/.config/fish/completions/tnxctl.fish
    For this shell only: eval "$(tnxctl completion bash)"
    """
    register()
    completion = get_completion_class(shell)
    assert completion is not None, shell  # the choices above are the shells that click knows
    click.echo(completion(ctx.find_root().command, {}, "tnxctl", VARIABLE).source())
