"""Groups of commands: a mistyped command is answered with the one that was probably meant."""

from __future__ import annotations

from difflib import get_close_matches

import click


class SuggestingGroup(click.Group):
    """A group that suggests a similar command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, commands = args[0], self.list_commands(ctx)
        if name not in commands and not ctx.resilient_parsing and not name.startswith("-"):
            near = get_close_matches(name, commands, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(commands)}"
            ctx.fail(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)
