"""The command: python -m jepa_jax.report --workdir=runs/cpu [--workdir=runs/other]

Prints the path of the page it wrote. Every error a person can act on is one line on stderr and a
non-zero exit.
"""

from collections.abc import Sequence

from jepa_jax import device
from jepa_jax.command import Parser, ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.report import write_report

_DESCRIPTION = """\
Writes report.html about a run or a sweep, with its figures as PNGs in report/ beside it; several
runs give a comparison. The page is one file and needs no network.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    parser = Parser(prog="python -m jepa_jax.report", description=_DESCRIPTION)
    parser.add_argument(
        "--workdir",
        required=True,
        action="append",
        help="a run's folder, which may be given again, or a sweep's",
    )
    parser.add_argument(
        "--out", help="where to write; the run's folder, or runs/comparison for several"
    )
    arguments = parser.parse_args(argv)
    with errors_as_lines("interrupted; the page was not written"):
        print(write_report(arguments.workdir, out=arguments.out))


if __name__ == "__main__":
    with_huge_pages()
    device.select("auto")
    with ends_at_once():
        main()
