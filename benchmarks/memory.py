"""What does a training step of each method need? Writes docs/memory.md; takes minutes.

    python benchmarks/memory.py

Forecasts only (`train/memory/forecast.py`): no data, no weights, no GPU, and the same bytes every time.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

from mdpd_deploy.config import Config, load_config
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train import MemoryRow, default_entries, entry_configs, forecast_methods

COMMAND = "python benchmarks/memory.py"
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Setting:
    """One table: a backbone, a batch and a width of the side networks.

    Attributes:
        title: Backbone and input, for the heading.
        backbone: `backbone.name`.
        reduction: r.
        outputs: C.
    """

    title: str
    backbone: str
    reduction: int
    outputs: int

    @property
    def heading(self) -> str:
        return f"## {self.title}, r = {self.reduction}"

    def rows(
        self, words: Sequence[str], precision: str, options: Sequence[str] = ()
    ) -> tuple[MemoryRow, ...]:
        """Forecast methods in one precision."""
        configs = entry_configs(self.config(precision, options), words)
        return forecast_methods(configs, Classify.numbered(self.outputs))

    def config(self, precision: str, options: Sequence[str] = ()) -> Config:
        """Return what every row of the table shares; batch and text length are the defaults."""
        fixed = {
            "backbone.name": self.backbone,
            "backbone.pretrained": False,
            "side.reduction": self.reduction,
            "train.precision": precision,
        }
        return load_config(None, fixed, list(options))


def settings(folder: Path) -> list[Setting]:
    """Return the tables of the page; text architectures are written below a folder."""
    vit = "ViT-B/16, 224 × 224 pixels, batch 32, 100 classes"
    base = "BERT-base, 128 tokens, batch 32, 2 classes"
    large = "BERT-large, 128 tokens, batch 32, 2 classes"
    wide = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    bert_base = str(write_bert(folder / "base"))
    bert_large = str(write_bert(folder / "large", **wide, intermediate_size=4096))
    return [
        Setting(vit, "timm:vit_base_patch16_224", 2, 100),
        Setting(vit, "timm:vit_base_patch16_224", 8, 100),
        Setting(base, bert_base, 8, 2),
        Setting(large, bert_large, 8, 2),
    ]


def write_bert(folder: Path, **shape: int) -> Path:
    """Write a BERT's config.json (the base size by default) and the least of tokenizers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, PreTrainedTokenizerFast

    BertConfig(**shape).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "a"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    ).save_pretrained(folder)
    return folder


def gigabytes(row: MemoryRow) -> float:
    assert row.forecast is not None, row
    return row.forecast.peak_bytes / 1e9


def table(setting: Setting, words: Sequence[str]) -> str:
    """Return the table of a setting, least memory first, and why some methods are not in it."""
    columns = [setting.rows(words, precision) for precision in PRECISIONS]
    names = " | ".join(f"{precision}, GB" for precision in PRECISIONS)
    known = any(row.papers for row in columns[0])
    papers = [" papers, GB |", "---|"] if known else ["", ""]
    lines = [
        f"| method | trained | changed or added when deployed | {names} |{papers[0]}",
        f"|---|--:|--:|{'--:|' * len(PRECISIONS)}{papers[1]}",
    ]
    rows = list(zip(*columns, strict=True))
    fitting = [cells for cells in rows if all(cell.forecast for cell in cells)]
    for cells in sorted(fitting, key=lambda cells: gigabytes(cells[0])):
        need = cells[0].forecast
        assert need is not None
        measures = " | ".join(f"{gigabytes(cell):.2f}" for cell in cells)
        line = f"| `{cells[0].method}` | {need.trained:,} | {need.deployed_delta:,} | {measures} |"
        if known:
            line += f" {cells[0].papers or '–'} |"
        lines.append(line)
    unfit = {cell.method: cell.reason for cells in rows for cell in cells if cell.reason}
    lines += ["", *(f"`{name}` does not fit: {reason}" for name, reason in unfit.items())]
    return "\n".join(lines).rstrip()


def norm_gradients(setting: Setting) -> str:
    """Return what the ways to give the norms their gradient need, exact ones and a short one."""
    names = " | ".join(f"{precision}, GB" for precision in PRECISIONS)
    lines = [f"| method | `train.norm_grad` | {names} |", f"|---|---|{'--:|' * len(PRECISIONS)}"]
    for word in ("norms", "mdpd:unipt"):
        for mode in ("late:2", "recompute-halves", "recompute", "full"):
            options = [f"train.norm_grad={mode}"]
            found = [setting.rows([word], precision, options)[0] for precision in PRECISIONS]
            measures = " | ".join(f"{gigabytes(row):.2f}" for row in found)
            lines.append(f"| `{word}` | `{mode}` | {measures} |")
    return "\n".join(lines)


def summary(wide: Setting, narrow: Setting) -> str:
    """Return what the first tables say of MDPD, in sentences whose numbers are theirs."""
    words = ["mdpd:unipt", "mdpd:sherl", "full", "norms", "probe"]
    (unipt, sherl, full, norms, probe), (thin, thin_sherl, *_) = (
        [gigabytes(row) for row in setting.rows(words, "fp32")] for setting in (wide, narrow)
    )
    half, thin_half = (gigabytes(setting.rows(words[:1], "bf16")[0]) for setting in (wide, narrow))
    r, s = wide.reduction, narrow.reduction
    return (
        f"On {wide.title} in float32, MDPD over UniPT trains in {unipt:.2f} GB at r = {r} and "
        f"{thin:.2f} GB at r = {s} ({sherl:.2f} and {thin_sherl:.2f} GB over SHERL), "
        f"{100 * unipt / full:.0f} % and {100 * thin / full:.0f} % of full fine-tuning's {full:.2f} GB. Tuning the "
        f"norms alone by the same gradient takes {norms:.2f} GB, a linear probe {probe:.2f} GB. "
        f"With the frozen weights held in bf16, MDPD over UniPT takes {half:.2f} and "
        f"{thin_half:.2f} GB."
    )


def without_dropout(setting: Setting) -> str:
    """Return what a text backbone's own dropout costs here, and why not everywhere."""
    words = ["mdpd:unipt", "bitfit", "full"]
    found = setting.rows(words, "fp32", ["backbone.dropout_active=false"])
    figures = ", ".join(f"`{row.method}` {gigabytes(row):.2f}" for row in found)
    return (
        "The backbone's own dropout is on. On a CPU, attention with dropout keeps its "
        "probabilities [B, heads, N, N], which CUDA's fused kernels do not. With "
        f"`backbone.dropout_active=false`, in float32: {figures} GB."
    )


def page(tables: Sequence[Setting], words: Sequence[str]) -> str:
    """Return docs/memory.md; the first two settings are those of the papers.

    Args:
        tables: From `settings`.
        words: The methods of every table.
    """
    made_with = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    how = (
        f"Written by `{COMMAND}` ({made_with}); do not edit. A figure is the peak of live tensors "
        "of one process in an optimiser step: weights, batch, gradients, AdamW's state and "
        "activations; 1 GB = 1e9 bytes. A CUDA context and the allocator's rounding come on top. "
        "All are forecasts: the code that trains, on tensors without values, with a CPU's kernels "
        "and autocast (`train/memory/forecast.py`); `tests/test_forecast.py` holds them within 2 % of real "
        "steps of small models."
    )
    words_of_tables = (
        "bf16 is `train.precision=bf16`: frozen weights held in bf16, trained ones in float32 "
        "under autocast. `side:NAME` keeps its side "
        "network at inference. r divides a side network's width; DTL and methods without a side "
        "network have none. `mdpd train --dry-run --all-methods` prints this table for your "
        "backbone and data."
    )
    parts = ["# Training memory, method by method", how, summary(*tables[:2]), words_of_tables]
    for setting in tables:
        parts += [setting.heading, table(setting, words)]
        if setting in tables[:2]:
            parts.append(
                "The papers measured on CUDA, each in a harness of its own; on BitFit they differ "
                "from one another. Compare within a column. Our UniPT and SHERL are not of the sizes "
                "that MDPD's paper has (at r = 2, without the head, 4.74 M against 5.19 and 7.39 M against "
                "5.08): its versions of them for ViT are unreleased."
            )
        else:
            parts.append(without_dropout(setting))
    parts += [
        f"## How the norms get their gradient: {tables[0].heading.removeprefix('## ')}",
        norm_gradients(tables[0]),
    ]
    return "\n\n".join(map(wrapped, parts)) + "\n"


def wrapped(part: str) -> str:
    """Wrap a paragraph; headings and tables stay."""
    if part.startswith(("#", "|")):
        return part
    return fill(part, 100, break_on_hyphens=False, break_long_words=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    words = [entry.label for entry in default_entries()]
    with tempfile.TemporaryDirectory() as folder:
        text = page(settings(Path(folder)), words)
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
