"""Model cards: the templates of `hub_cards/`, filled with what a folder and the record of its run say, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_green_swin import GreenSwinConfig, as_pair
from .run_record import LICENCE_ENTRIES, total_energy, total_seconds

# kind of a result: template, task on the Hub
TASKS = {
    "pretrained": "image-feature-extraction",
    "backbone": "image-feature-extraction",
    "classification": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
}
PICTURES = {
    "reconstructions.png": "Held-out images: original, visible part, reconstruction",
    "loss_curve.png": "Loss during pretraining",
    "predictions.png": "Predictions",
    "training_curve.png": "Training curve",
    "detections.png": "Annotated beside detected",
    "training_curves.png": "Training curves",
    "curve.png": "Training curve",
}
_TRAINING_TYPES = {"pretraining": "pre-training", "classification": "fine-tuning"}


@dataclass(frozen=True)
class CardFacts:
    """What a card is filled with.

    Attributes:
        kind: key of `TASKS`.
        repo_id: `user/name`, for the snippets.
        config: entries of `config.json`, of a detector those of its backbone.
        classes: names of the classes; none for a pretrained model.
        recipe: keys of the recipe; empty without one.
        record: of the run, as `run_record.read_record` returns it.
        files: names of the files that are uploaded beside the card.
        license, base_model: as given by the publisher, before what the record says.
    """

    kind: str
    repo_id: str
    config: dict[str, Any]
    classes: tuple[str, ...]
    recipe: dict[str, Any]
    record: dict[str, Any]
    files: frozenset[str]
    license: str | None = None
    base_model: str | None = None


def templates_folder() -> Path:
    """`hub_cards/`: inside the installed package, or at the top of a checkout."""
    installed = Path(__file__).resolve().parent / "hub_cards"
    return installed if installed.is_dir() else installed.parents[1] / "hub_cards"


def render_card(facts: CardFacts) -> ModelCard:
    """The card of a result: metadata and text."""
    text = _environment().get_template(f"{facts.kind}.md").render(card_values(facts))
    return ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}")


def render_export_card(
    name: str, library: str, kind: str, config: GreenSwinConfig, comparison: str, record: dict[str, Any]
) -> ModelCard:
    """The card of weights in the format of another library: what they are, how to load them, whose they are.

    Args:
        name: its heading.
        library: "transformers" or "timm".
        kind: "encoder", "classifier" or "backbone".
        config: of the exported model.
        comparison: how its outputs compare with the model's, in words.
        record: of the conversion.
    """
    task = TASKS["classification" if kind == "classifier" else "pretrained"]
    data = ModelCardData(
        library_name=library, pipeline_tag=task, tags=["swin", "vision"], **_known(_origin_entries(record))
    )
    rows, columns = as_pair(config.image_size)
    values = {"name": name, "library": library, "kind": kind, "config": config, "rows": rows, "columns": columns}
    values |= {"comparison": comparison, "has_code": False}
    text = _environment().get_template("exported.md").render(**values, **_origin_values(record))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(duration=_duration, figure=_figure, number=lambda value: f"{value:,}")
    return environment


def card_values(facts: CardFacts) -> dict[str, Any]:
    """The names that templates use."""
    record = facts.record
    config = GreenSwinConfig.from_dict(facts.config)
    origin = _origin_values(record, facts.license, facts.base_model)
    return {
        **origin,
        "repo_id": facts.repo_id,
        "name": facts.repo_id.rpartition("/")[2],
        "config": config,
        "has_decoder": facts.config.get("architectures") == ["GreenSwinForMaskedImageModeling"],
        "is_grey": config.num_channels == 1,
        "has_processor": "preprocessor_config.json" in facts.files,
        "classes": facts.classes,
        "recipe": yaml.safe_dump(facts.recipe, sort_keys=False, default_flow_style=None) if facts.recipe else None,
        "is_without_labels": origin["is_from_random"] and record["kind"] == "pretraining",
        "parameters": record.get("model", {}).get("parameters"),
        "data": record.get("data"),
        "training": record.get("training"),
        "metrics": record.get("metrics", []),
        "changed_settings": record.get("changed_settings", []),
        "starts": record.get("starts", []),
        "last_start": record["starts"][-1] if record.get("starts") else {},
        "seconds": total_seconds(record),
        "energy": total_energy(record),
        "pictures": {name: text for name, text in PICTURES.items() if name in facts.files},
        "has_code": "modeling_green_swin.py" in facts.files,
    }


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata; what is not known has no entry."""
    data = facts.record.get("data", {})
    entries: dict[str, Any] = {
        **_origin_entries(facts.record, facts.license, facts.base_model),
        "datasets": [data["name"]] if data.get("on_hub") else None,
        "co2_eq_emissions": _emissions(facts.record),
    }
    results = [_eval_result(facts, data, entry) for entry in facts.record.get("metrics", [])]
    return ModelCardData(
        library_name="green-swin-hf" if facts.kind == "detection" else "transformers",
        pipeline_tag=TASKS[facts.kind],
        tags=["green-swin", "swin", "vision", "arxiv:2205.13515"],
        model_name=facts.repo_id.rpartition("/")[2],
        eval_results=results or None,
        **_known(entries),
    )


def _known(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def _origin_entries(
    record: dict[str, Any], license: str | None = None, base_model: str | None = None
) -> dict[str, str | None]:
    """Licence of the weights, and the model on the Hub that they derive from; None where not known.

    Args:
        record: of the run.
        license, base_model: as given by the publisher, before what the record says.
    """
    start = record.get("start_from", {})
    source = {"license": license} if license else record if record.get("license") else start
    licence = {entry: source.get(entry) for entry in LICENCE_ENTRIES}
    return {**licence, "base_model": base_model or start.get("base_model")}


def _origin_values(record: dict[str, Any], license: str | None = None, base_model: str | None = None) -> dict[str, Any]:
    """The names that the part on licence and origin uses."""
    entries = _origin_entries(record, license, base_model)
    return {
        **entries,
        "start": record.get("start_from"),
        "is_converted": record.get("kind") == "conversion",
        "is_from_random": _is_from_random(record) and not entries["base_model"],
    }


def _is_from_random(record: dict[str, Any]) -> bool:
    """Whether the record says that a run trained the weights from random ones: each of its starts is in it."""
    starts = record.get("starts", [])
    return bool(starts) and all(starts) and "start_from" not in record and record["kind"] != "conversion"


def _emissions(record: dict[str, Any]) -> dict[str, Any] | None:
    energy = total_energy(record)
    if "co2_eq_grams" not in energy:
        return None
    machine = record["starts"][-1].get("machine", {})
    hardware = machine.get("gpus") or [machine.get("processor")]
    return {
        "emissions": round(energy["co2_eq_grams"], 6),
        "source": energy["source"],
        "training_type": _TRAINING_TYPES.get(record["kind"], "fine-tuning"),
        "geographical_location": energy["country"],
        **({"hardware_used": ", ".join(hardware)} if all(hardware) else {}),
    }


def _eval_result(facts: CardFacts, data: dict[str, Any], entry: dict[str, Any]) -> EvalResult:
    name = data.get("name", "unnamed")
    return EvalResult(
        task_type=TASKS[facts.kind],
        dataset_type=name,
        dataset_name=name,
        dataset_split=entry["split"],
        metric_type=entry["type"],
        metric_name=entry["name"],
        metric_value=entry["value"],
    )


def _duration(seconds: float) -> str:
    """ "75 s", "12.5 minutes", "3.2 hours"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _figure(value: float) -> str:
    return f"{value:.4g}"


__all__ = [
    "PICTURES",
    "TASKS",
    "CardFacts",
    "card_data",
    "card_values",
    "render_card",
    "render_export_card",
    "templates_folder",
]
