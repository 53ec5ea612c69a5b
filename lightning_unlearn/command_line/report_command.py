"""The command that writes a finished run's report again."""

from __future__ import annotations

from pathlib import Path

from lightning_unlearn.command_line.plain_parser import plain_parser


def report(arguments: list[str]) -> None:
    """Write a finished run's report.

    Args:
        arguments: Options.
    """
    parser = plain_parser("report", "Write the report of a finished run again.")
    parser.add_argument("--folder", type=str, default="attribution", help="The run's folder.")
    parser.add_argument("--top", type=int, default=12, help="How many images are shown for each query.")
    parser.add_argument(
        "--groups",
        type=str | list[str],
        default=[],
        help="Fields of the training images' json (artist, licence, domain), whose values' shares of the ranked "
        "evidence are told: one, or a list.",
    )
    parser.add_argument("--allow_pipe", type=bool, default=False, help="Whether shards may be commands (`pipe:`).")
    config = parser.parse_args(arguments)

    # Only now, so that --help answers at once.
    from lightning_unlearn.command_line.command_parts import check_top
    from lightning_unlearn.command_line.quiet import quiet
    from lightning_unlearn.command_line.run_report import write_report

    check_top(config.top)
    with quiet():
        groups = [config.groups] if isinstance(config.groups, str) else config.groups
        write_report(Path(config.folder), config.top, groups=groups, allow_pipe=config.allow_pipe)
