"""The command line, ``python -m cropr``: one module a verb in ``cropr.cli``, loaded when it is called for."""

import argparse
import logging
import sys
from importlib import import_module

VERBS = {
    "data": "write the embedded data set or a public one, or check a folder of images",
    "train": "train or fine-tune a model, pruned or not, and evaluate it",
    "evaluate": "evaluate trained weights",
    "predict": "predict images or folders: a CSV, and pictures of what was pruned",
    "bench": "measure throughput of a pruned model against the unpruned one",
    "plan": "find the schedule that reaches a speed-up",
    "export": "write a deployed model as torch.export and ONNX, and check the file",
    "show": "draw the pruning maps of a trained model on images",
    "doctor": "print versions, device, threads and data roots, for a bug report",
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser. It has the flags of the named verb only: importing the modules of all takes longer."""
    text = "Token Cropr: train, prune, measure. Each verb has its own --help with examples."
    parser = argparse.ArgumentParser("cropr", description=text, epilog="example: python -m cropr train --help")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        child = verbs.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        child.description = summary
        if name == verb:
            command = import_module(f"cropr.cli.{name}")
            child.description = command.__doc__
            command.add_arguments(child)
            child.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0; 2 for a wrong command, file or value, in one message; 130: Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    verb, log = next((word for word in argv if word in VERBS), None), logging.getLogger("cropr")
    log.setLevel(logging.INFO)  # of other packages, warnings alone
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself, and would print each twice
    try:
        args = build_parser(verb).parse_args(argv)
        args.run(args)
    except (ValueError, OSError) as error:
        place, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        log.error("error: %s", f"{place}: {reason}" if place and reason else reason or error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
