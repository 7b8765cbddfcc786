"""The model card of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moeprune.anatomy.sizes import PrunedSizes
from moeprune.errors import ExportError
from moeprune.format import count, size
from moeprune.plan.plan import Plan

if TYPE_CHECKING:
    from huggingface_hub import CardData, ModelCardData


BODY = """\
# {title}

[{base}]({link}) with **{kept} of {experts} experts** in each of its {layers} expert layers and **{k} of {k0} active
experts** a token, pruned without retraining by [moeprune](https://pypi.org/project/moeprune/) {version}. Every tensor
that is left is a byte-for-byte copy of the original.

| | original | this model | |
|---|---:|---:|---:|
| experts a layer | {experts} | {kept} | {r_experts:.0%} |
| active experts a token | {k0} | {k} | {r_k:.0%} |
| parameters | {p0} | {p1} | {r_p:.0%} |
| active parameters | {a0} | {a1} | {r_a:.0%} |
| size on disk | {b0} | {b1} | {r_b:.0%} |

## How the experts were chosen

{method}

The kept experts of every layer, and all settings, are in `moeprune.json`.

{warnings}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```

```bash
vllm serve {path}
moeprune verify {path} --against {base}   # compares every tensor and the logits with the original
```

Pruned experts carry knowledge that calibration text may not have shown. Measure what you need before you deploy.
"""


def read_card(path: Path) -> CardData:
    """The front matter of a model card; empty if there is no card.

    Raises:
        ExportError: If it is not YAML. It may hold the licence, so it is not passed over.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if not path.is_file():
        return ModelCardData()
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"{path}: its front matter is not YAML ({reason}). Mend or delete it.") from error


def write_card(path: Path, *, plan: Plan, sizes: PrunedSizes, source_card: CardData, name: str, version: str) -> None:
    """Write README.md with front matter that the Hub understands.

    Args:
        path: The file to write.
        plan: What was done.
        sizes: Before and after.
        source_card: Front matter of the source, whose licence, languages and task carry over.
        name: Name of the pruned model (its folder).
        version: Version of moeprune.
    """
    from huggingface_hub import ModelCard

    model = plan.model
    base = Path(model.name).name if Path(model.name).exists() else model.name
    on_hub = model.name.count("/") == 1 and not Path(model.name).exists()
    body = BODY.format(
        title=name,
        base=base,
        link=f"https://huggingface.co/{model.name}" if on_hub else "#how-the-experts-were-chosen",
        kept=plan.num_experts, experts=model.num_experts, r_experts=plan.num_experts / model.num_experts,
        k=plan.top_k, k0=model.top_k, r_k=plan.top_k / model.top_k,
        layers=len(model.layers), version=version, path=name,
        p0=count(sizes.parameters_before), p1=count(sizes.parameters_after),
        r_p=sizes.parameters_after / sizes.parameters_before,
        a0=count(sizes.active_before), a1=count(sizes.active_after), r_a=sizes.active_after / sizes.active_before,
        b0=size(sizes.bytes_before), b1=size(sizes.bytes_after), r_b=sizes.bytes_after / sizes.bytes_before,
        method=_method(plan),
        warnings="## Warnings\n\n" + "\n".join(f"- {w}" for w in plan.warnings) + "\n\n" if plan.warnings else "",
    )  # fmt: skip
    data = _front_matter(source_card, base_model=model.name if on_hub else source_card.get("base_model"))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(path)


def _front_matter(source: CardData, *, base_model: str | None) -> ModelCardData:
    from huggingface_hub import ModelCardData

    tags = [*(source.get("tags") or []), "moe", "expert-pruning", "moeprune"]
    return ModelCardData(
        language=source.get("language"),
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        library_name="transformers",
        pipeline_tag=source.get("pipeline_tag") or "text-generation",
        base_model=base_model,
        tags=list(dict.fromkeys(tags)),
    )


def _method(plan: Plan) -> str:
    method = plan.method
    if plan.num_experts == plan.model.num_experts:
        return "All experts stay; only the number of active experts is lower."
    if not method:
        return "By a plan written by hand."
    domains = method.get("domains")
    mix = ", ".join(f"{name} {share:g}" for name, share in domains.items()) if domains else "as calibrated"
    return (
        f"Saliency: `{method.get('score')}` ({method.get('formula')}; {method.get('source')}), on "
        f"{method.get('calibration_tokens', 0):,} calibration tokens, domains: {mix}."
    )
