"""What the numbers of an artefact were made with: scale, images, models, schedules, machine and code.

Read from the records, so that it is true of whatever was run; every function returns Markdown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workflow.paper.load import Artefact, Record
from workflow.paper.names import schedules


def scope(artefact: Artefact) -> str:
    """What the numbers of this scale can be used for."""
    scale = artefact.manifest.scale
    if scale == "ci":
        return "**The scale `ci` only tests that everything runs. Its accuracies, speeds and verdicts mean nothing.**"
    if not artefact.runs:
        return (
            "Times and memory are those of one machine, of models with random weights: what can be compared with "
            "another machine is a ratio, not the numbers."
        )
    if scale == "paper":
        return "This scale trains the paper's model on the paper's images."
    return (
        f"At the scale `{scale}` the accuracies belong to other models and images than the paper's: what can be "
        "compared is the order of methods, not the numbers."
    )


def setting(artefact: Artefact) -> str:
    """What the numbers were made with, as a table, and what they can be used for."""
    body = "\n".join(f"| {name} | {text} |" for name, text in settings(artefact))
    return f"{scope(artefact)}\n\n**How the numbers were made**\n\n| | |\n| :-- | :-- |\n{body}"


def settings(artefact: Artefact) -> list[tuple[str, str]]:
    """Scale, data, model, training, speed measurement, machine and code; several values stand on lines of their own."""
    manifest = artefact.manifest
    trained = [record for records in artefact.runs.values() for record in records.values()]
    benched = list(artefact.benches.values())
    lines = [("Scale", f"`{manifest.scale}`"), ("Seeds", _seeds(manifest.seeds))]
    if trained:
        lines += [
            ("Accuracy: images", _unique(_images(r) for r in trained)),
            ("Accuracy: model", _unique(_model(r["spec"]["model"]) for r in trained)),
            ("Accuracy: training", _unique(_training(r) for r in trained)),
        ]
    if benched:
        lines.append(("Speed: model", _unique(_bench(r) for r in benched)))
    if pairs := schedules(artefact):
        lines.append(("Schedules", "<br>".join(pairs)))
    if trained or benched:
        lines += [
            ("Machine", _unique(_machine(r) for r in trained + benched)),
            ("Code", _unique(map(_code, trained + benched))),
        ]
    return lines


def _unique(texts: Iterable[str]) -> str:
    """Each text once, the most frequent first; many of them are counted."""
    found = [text for text, _ in Counter(texts).most_common()]
    return "<br>".join(found[:4]) + (f"<br>and {len(found) - 4} more" if len(found) > 4 else "")


def _seeds(seeds: Sequence[int]) -> str:
    return "one (no intervals over seeds)" if len(seeds) == 1 else ", ".join(map(str, seeds))


def _images(record: Record) -> str:
    data = record["spec"]["data"]
    size, scenes = data["image_size"], data.get("scenes")
    if not scenes:
        count = record["metrics"].get("val_images")
        return f"{data['num_classes']} classes, {size} px" + (f", {int(count):,} for validation" if count else "")
    return f"`scenes` (generated), {size} px, {scenes['train']:,} for training, {scenes['val']:,} for validation"


def _model(model: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in model.get("args", {}).items() if "pool" not in key}
    arguments = ", ".join(f"{key}={value}" for key, value in shown.items())
    return f"`{model['name']}`" + (f" with {arguments}" if arguments else "")


def _training(record: Record) -> str:
    spec, metrics = record["spec"], record["metrics"]
    start = {"random": "random weights", "timm": "timm's pretrained weights"}.get(
        spec["init"], "the weights of the pretraining run"
    )
    seen = f"{int(metrics['images']):,} images" if "images" in metrics else f"{spec['recipe']['epochs']} epochs"
    return f"{seen} from {start}, batches of {spec['recipe']['batch_size']}, {spec['recipe']['precision']}"


def _bench(record: Record) -> str:
    spec = record["spec"]
    if record["kind"] == "lab":
        batches = ", ".join(map(str, spec.get("batch_sizes", [spec.get("batch_size")])))
        return f"{_model(spec['model'])} at {spec['image_size']} px, random weights, batches of {batches}"
    windows = f", windows of {detector['window']} patches a side" if (detector := spec.get("detector")) else ""
    return (
        f"{_model(spec['model'])} at {spec['image_size']} px{windows}, random weights, "
        f"batches of {spec['batch_size']}, {spec['precision']}, median of {spec['rounds']} rounds, unpruned and pruned "
        "interleaved in one process"
    )


def _machine(record: Record) -> str:
    origin = record["provenance"]
    device = origin.get("device") or "unknown device"
    name = origin.get("cpu") or "CPU of unknown name" if device == "cpu" else device
    threads = origin.get("threads", "?")
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def _code(record: Record) -> str:
    origin = record["provenance"]
    commit = f"commit {str(origin['commit'])[:10]}" if origin.get("commit") else "no git checkout"
    versions = origin.get("packages", {})
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)
    return (
        f"{commit}{' with local changes' if origin.get('dirty') else ''}; Python {origin.get('python', '?')}, {shown}"
    )
