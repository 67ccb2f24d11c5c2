"""Microbenchmarks: one measurement a call, with a record that holds the result of every combination.

  sweep      throughput of a model and its pruned variants by precision, attention kernel and batch size
  blocks     latency of one block by token count: the cost of counts that are not aligned
  profile    where the time of a forward pass goes
  scoring    tokens scored with one vector, against all queries scored and summed
  training   time of a training step, memory of training and of inference

Without --spec, the paper's ViT-L/16 and Cropr at R=8 (training: a ViT-S at R=16; scoring: EVA-02-L at 512 px, R=40).
For what the device cannot run, the record holds the reason. Run nothing else on the machine meanwhile.

examples:
  python -m workflow.paper.microbench sweep --set precisions='["fp32", "bf16"]' --set attentions='["math", "flash"]'
  python -m workflow.paper.microbench sweep --set model.name=vit_base_patch16_224 --set batch_sizes='[1, 8, 32, 128]'
  python -m workflow.paper.microbench blocks --set tokens='[191, 192, 193, 197]' --set precision=bf16 --device cuda
  python -m workflow.paper.microbench profile --set image_size=448 --out profile
  python -m workflow.paper.microbench training --spec results/laptop/microbench/0f2a91c07d/record.json --out again
"""

import argparse

from cropr.cli.spec_flags import add_record_flags, make_spec, measured, read_values, show_cells
from workflow.paper.microbench import MEASURES

_KEYS = (
    "variant", "precision", "attention", "batch_size", "tokens", "images_per_s", "speedup", "speedup_over_mac_ratio",
    "over_all_queries", "gain", "mfu", "block_s", "total_s", "pruning_share", "step_ms", "training_memory_mb",
    "inference_memory_mb",
)  # fmt: skip
"""What the terminal shows of a cell. The record has more."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write the record if asked to. Status 2 for a wrong file or value, in one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=sorted(MEASURES), help="what to measure")
    text = "change one value of the specification, such as image_size=448"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    add_record_flags(parser, parser, "specification")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    values = read_values(args.spec) if args.spec else {}
    if values.setdefault("measure", args.measure) != args.measure:
        raise ValueError(f"microbench {args.measure}: --spec is of a measurement of kind {values['measure']}")
    spec = make_spec(values, args.set, MEASURES[args.measure])

    from workflow.paper.microbench.measure import measure

    record = measured(args, spec, measure)
    show_cells(f"{spec.measure}: {spec.model.name}, {spec.image_size} px", record, _KEYS)


if __name__ == "__main__":
    main()
