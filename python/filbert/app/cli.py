"""The command line: ``filbert embed``, ``filbert report`` and ``filbert info``.

Exit status: 0 done, 1 it failed and the message says why, 2 the command itself is wrong,
130 stopped by Ctrl-C. A user's mistake never shows a traceback.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .embedding import BATCH_TOKENS, EmbedError, EmbedJob, run_job

__all__ = ["main"]

_EMBED_HELP = """\
Embeds every text of INPUT with the model in the folder MODEL, padding-free.

INPUT is UTF-8, or what its byte order mark names: one text per line (row i of OUTPUT is line i; an
empty line is an empty text), or with a name in .jsonl one JSON object per line. OUTPUT ends in .npy
(float32 [texts, N]) or in .parquet (columns row and embedding). Killed at any moment, the same
command continues where it stopped; until it is done, what there is lies in OUTPUT.partial and
OUTPUT.state.json, and OUTPUT.lock says which process is at work.
"""


def _positive(word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}, need a whole number above 0")
    return value


def _output(word: str) -> Path:
    path = Path(word)
    if path.suffix not in (".npy", ".parquet"):
        raise argparse.ArgumentTypeError(f"got {word!r}, need a name in .npy or .parquet")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="filbert", description="Faster BERT-type encoders.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    embed = commands.add_parser(
        "embed",
        help="embed a file of texts with a model folder",
        description=_EMBED_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    embed.add_argument("model", metavar="MODEL", type=Path, help="model folder on this disk")
    embed.add_argument("input", metavar="INPUT", type=Path, help="text file, lines or jsonl")
    embed.add_argument(
        "output", metavar="OUTPUT", type=_output, help="OUTPUT.npy or OUTPUT.parquet"
    )
    embed.add_argument(
        "--pooling",
        choices=["mean", "cls"],
        help="how token rows become one vector (default: what the folder says, else mean)",
    )
    embed.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="embeddings of unit length (default: what the folder says, else no)",
    )
    batch = embed.add_mutually_exclusive_group()
    batch.add_argument(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help=f"most tokens that run together (default: {BATCH_TOKENS})",
    )
    batch.add_argument(
        "--batch-size", type=_positive, metavar="N", help="most texts that run together"
    )
    embed.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens kept of each text (default: what the folder says)",
    )
    embed.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    embed.add_argument(
        "--format", choices=["lines", "jsonl"], help="of INPUT (default: by its name)"
    )
    embed.add_argument("--field", metavar="NAME", help="jsonl field with the text (default: text)")
    embed.add_argument("--threads", type=_positive, metavar="N", help="CPU threads")
    embed.add_argument(
        "--convert",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-convert runs the model as transformers does, padded and slower",
    )
    embed.add_argument(
        "--restart", action="store_true", help="begin again, replacing whatever is there"
    )
    embed.add_argument("--quiet", action="store_true", help="no progress bar, no closing line")

    report = commands.add_parser(
        "report",
        help="what filbert would change in a model",
        description="Converts the model in the folder MODEL in memory and prints what each module "
        "became, or why it was left alone. Writes nothing.",
        allow_abbrev=False,
    )
    report.add_argument("model", metavar="MODEL", type=Path, help="model folder on this disk")
    report.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")

    commands.add_parser(
        "info",
        help="versions, instruction set, operators and why one is missing",
        description="Prints what this installation of filbert can run, and why not the rest.",
    )
    return parser


def _embed(args: argparse.Namespace) -> int:
    names = {field.name for field in fields(EmbedJob)}
    result = run_job(EmbedJob(**{name: vars(args)[name] for name in names}))
    if args.quiet:
        return 0
    shape = f"{result.rows:,} embeddings of {result.dimension} values"
    if result.already_complete:
        print(f"{args.output} is already complete ({shape}); nothing to do")
        return 0
    earlier = result.rows - result.new_rows
    rate = result.tokens / result.seconds if result.seconds else 0.0
    print(
        f"{args.output}: {shape}; {result.new_rows:,} texts, {result.tokens:,} tokens in "
        f"{result.seconds:.1f} s ({rate:,.0f} tokens/s)"
        + (f", {earlier:,} texts from an earlier run" if earlier else "")
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from ..conversion.in_place import report
    from .embedder import Embedder, ModelFolder

    embedder = Embedder.load(ModelFolder.read(args.model), dtype=args.dtype, pooling="mean")
    print(report(embedder.model))
    return 0


def _info(args: argparse.Namespace) -> int:
    from ..info import info
    from ..nn.dense.linear import choices

    print(info())
    print("dense layers of a model, by the dtype of their weights:")
    print(textwrap.indent(str(choices()), "  "))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; with no command it prints ``info``.

    Args:
        argv: the words after the program's name; None takes them from ``sys.argv``.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the usage error
        return stop.code if isinstance(stop.code, int) else 2
    if args.version:
        from .. import __version__

        print(f"filbert {__version__}")
        return 0
    command = args.command or "info"
    try:
        return {"embed": _embed, "report": _report, "info": _info}[command](args)
    except KeyboardInterrupt:
        kept = "; what was done is kept, the same command continues it"
        print(f"filbert {command}: stopped{kept if command == 'embed' else ''}", file=sys.stderr)
        return 130
    except EmbedError as error:
        message = str(error)
    except OSError as error:
        kept = "; what was done is kept, try the same command again when that is mended"
        message = f"{error}{kept if command == 'embed' else ''}"
    except ValueError as error:
        if not hasattr(error, "reasons"):  # only a refused conversion carries its reasons
            raise
        message = str(error)
    print(f"filbert {command}: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
