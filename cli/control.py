"""`marketsync pause`, `resume`, `cancel`, `schedule`: the user's word on when a plan runs."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Config
from cli.output import put


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("cancel")(cancel)
    app.command("schedule")(schedule)


Plan = Annotated[str, typer.Argument(help="The plan.")]


def pause(plan: Plan, config: Config = Path("upstream.yml")) -> None:
    """Stop a plan at its next page, on every machine, until it is resumed; schedules respect it."""
    _desire(plan, config, "pause")


def resume(plan: Plan, config: Config = Path("upstream.yml")) -> None:
    """Let a paused plan run again."""
    _desire(plan, config, "run")


def cancel(plan: Plan, config: Config = Path("upstream.yml")) -> None:
    """Stop a plan's runs at their next page and forget what they still had to ask; the next sync starts anew."""
    _desire(plan, config, "cancel")


def _desire(plan: str, config: Path, desired: str) -> None:
    from marketsync.ledger import Desired
    from tasks.inquiry import set_desired
    from tasks.workspace import open_workspace

    put(set_desired(open_workspace(config), plan, Desired(desired)))


class Form(StrEnum):
    """What a schedule is printed for."""

    CRON = "cron"
    SYSTEMD = "systemd"


def schedule(
    form: Annotated[Form, typer.Option("--print", help="What to print an entry for.")],
    plan: Annotated[str | None, typer.Argument(help="The plan; every plan with a schedule when none is named.")] = None,
    config: Config = Path("upstream.yml"),
) -> None:
    """Print an entry for cron or systemd that runs the plans on their `schedule`."""
    from marketsync.errors import ConfigurationError
    from tasks.workspace import open_workspace

    workspace = open_workspace(config)
    plans = workspace.loaded.configuration.plans
    names = [plan] if plan else [name for name, one in plans.items() if one.schedule]
    if not names:
        raise ConfigurationError(f"no plan of {config} has a schedule; add `schedule: 0 19 * * 1-5` and `zone:` to one")
    program = Path(sys.argv[0]).resolve()
    for name in names:
        one = workspace.plan(name)
        if one.schedule is None:
            raise ConfigurationError(f"plan {name} has no schedule; add `schedule: 0 19 * * 1-5` to it")
        command = shlex.join([str(program), "sync", name, "-c", str(config.resolve()), "--local", "--wait"])
        if form is Form.CRON:
            put(f"CRON_TZ={one.zone}\n{one.schedule} {command}")
        else:
            put(_systemd(name, command, one.schedule, one.zone, config.resolve().parent))


def _systemd(name: str, command: str, cron: str, zone: str, folder: Path) -> str:
    return (
        f"# ~/.config/systemd/user/marketsync-{name}.service\n"
        f"[Unit]\nDescription=MarketSync plan {name}\n\n"
        f"[Service]\nType=oneshot\nWorkingDirectory={folder}\nExecStart={command}\n"
        "# 3: findings, 4: paused, 75: waiting; none of them is a failed service\nSuccessExitStatus=3 4 75\n\n"
        f"# ~/.config/systemd/user/marketsync-{name}.timer\n"
        f"[Unit]\nDescription=Schedule of MarketSync plan {name}\n\n"
        f"[Timer]\nOnCalendar={on_calendar(cron, zone)}\nPersistent=true\n\n[Install]\nWantedBy=timers.target\n"
    )


_DAYS = {"0": "Sun", "1": "Mon", "2": "Tue", "3": "Wed", "4": "Thu", "5": "Fri", "6": "Sat", "7": "Sun"}

_NUMBERS = {name: number for number, name in _DAYS.items() if number != "7"}


def on_calendar(cron: str, zone: str) -> str:
    """Write a cron expression of five fields as systemd's OnCalendar; ConfigurationError for what it cannot say."""
    from marketsync.errors import ConfigurationError

    fields = cron.split()
    if len(fields) != 5:
        raise ConfigurationError(f"schedule '{cron}': a cron expression has five fields: minute hour day month weekday")
    minute, hour, day, month, weekday = fields
    if day != "*" and weekday != "*":
        raise ConfigurationError(f"schedule '{cron}': systemd cannot say 'this day OR that weekday'; use --print cron")

    def part(text: str) -> str:
        return ",".join(piece.replace("-", "..").replace("*/", "0/") for piece in text.split(","))

    def week(text: str) -> str:
        if text == "*":
            return ""
        named = []
        for piece in text.split(","):
            days, _, step = piece.partition("/")
            ends = ["0", "6"] if days == "*" else days.split("-")
            if step or ends[0] in ("0", "sun", "Sun", "SUN"):  # systemd's week has no steps, and begins on Monday
                first, last = (_NUMBERS.get(end.capitalize(), end) for end in (ends[0], ends[-1]))
                last = "6" if step and len(ends) == 1 else last
                named.extend(_DAYS[str(day)] for day in range(int(first), int(last) + 1, int(step or 1)))
            else:
                named.append("..".join(_DAYS.get(end, end.capitalize()) for end in ends))
        return ",".join(named) + " "

    return f"{week(weekday)}*-{part(month)}-{part(day)} {part(hour)}:{part(minute)}:00 {zone}"
