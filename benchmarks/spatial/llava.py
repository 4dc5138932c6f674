# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5's two stages with CLIP, SigLIP, SigLIP 2 or AIMv2, with and without 2D RoPE in the tower.

    accelerate launch --multi_gpu benchmarks/spatial/llava.py --stage pretrain --encoder siglip2 --rope axial \\
        --data blip_laion_cc_sbu_558k.json --images images --output out/pretrain
    accelerate launch --multi_gpu benchmarks/spatial/llava.py --stage finetune --model out/pretrain \\
        --config benchmarks/spatial/configs/fsdp.yaml \\
        --data llava_v1_5_mix665k.json --images data --output out/finetune

The first stage trains the projector on captions, the second also the language model, on conversations. A learned
encoding (``--start identity``) is trained in both, the rest of the tower only with ``--tune-tower``. The saved model is
loaded again at the end, and must be patched as requested and compute what the model in memory does; else the exit
status is 1. README.md in this folder says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import PartialState
from llava_data import CHAT_TEMPLATE, Collator, Conversations, DataError, Encoder, read
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import spatial_pe
from spatial_pe._utils import environment
from spatial_pe.towers.fused_attention import FusedAttention

# ------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Tower:
    """Sizes of a tower. ``prefix``: tokens before the patches, which LLaVA drops."""

    checkpoint: str
    prefix: int = 0


# The sizes are those of arXiv 2601.09954
TOWERS = {
    "clip": Tower("openai/clip-vit-large-patch14-336", prefix=1),
    "siglip": Tower("google/siglip-base-patch16-256"),
    "siglip2": Tower("google/siglip2-base-patch16-256"),
    "aimv2": Tower("apple/aimv2-large-patch14-224"),
}
LAYER = -2  # layer whose output is projected
ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "axial": {"rope": "axial"},
    "mixed": {"rope": "mixed"},
    "2601.09954": {"legacy": "2601.09954"},  # the paper's public code, which is no rotation
}

# LLaVA-1.5's settings for 8 GPUs (arXiv 2310.03744 and its scripts); --config overrides any of them
COMMON: dict[str, Any] = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of all
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "dataloader_num_workers": 4,
    "ddp_find_unused_parameters": False,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "report_to": "none",
}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"learning_rate": 1e-3, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1},
    "finetune": {"learning_rate": 2e-5, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
}


class RecipeError(Exception):
    """An error that the user can fix; the message says how."""


# --------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    options = _options()
    try:
        run(options)
    except (RecipeError, DataError) as error:
        print(f"llava.py: {error}", file=sys.stderr)
        return 2
    except UnverifiedError as error:
        print(f"llava.py: the saved model is not what was trained: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    _check(options)
    arguments = _arguments(options)
    set_seed(options.seed)
    last = get_last_checkpoint(str(options.output)) if options.output.is_dir() else None
    if options.resume and last is None:
        raise RecipeError(f"--resume: no checkpoint in --output {str(options.output)!r}")
    # Trainer of transformers 5.24 resumes from a LLaVA checkpoint with its initial weights: it looks for the names of
    # its own modules, the file has those of the hub. So the weights are loaded here.
    start = last if options.resume else options.model
    model, processor = _loaded(Path(start)) if start else _assembled(options)
    encoder = Encoder(
        processor.tokenizer,
        processor.image_processor,
        model.config.image_seq_length,
        options.max_length,
        plain=options.stage == "pretrain",
    )
    if options.max_length <= encoder.tokens:
        raise RecipeError(f"--max-length {options.max_length} must be above the {encoder.tokens} tokens of a picture")
    examples = read(options.data, options.images)
    trained = _freeze(model, options, encoder)
    model.config.use_cache = False
    collate = Collator(encoder)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Conversations(examples, encoder),
        data_collator=collate,
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=last if options.resume else None)
    probe = collate([trainer.train_dataset[0]])
    before = _logits(trainer.model_wrapped, probe, trainer)  # all processes: its weights may be sharded
    trainer.save_model(str(options.output))
    if trainer.is_world_process_zero():
        report = {
            "options": {name: str(value) for name, value in vars(options).items() if value is not None},
            "training": {
                k: v for k, v in arguments.to_dict().items() if k in {*COMMON, *STAGES[options.stage], "seed"}
            },
            "processes": arguments.world_size,
            "examples": len(examples),
            "trained": trained,
            "steps": result.global_step,
            "loss": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
            "versions": {"transformers": transformers.__version__, **environment.describe()["versions"]},
        }
        report["verified"] = _verify(options, probe, before, trainer)
        (options.output / "run.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"Saved and verified: {options.output}")
    trainer.accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------------------------------ options


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--encoder", choices=TOWERS, help="pretrain: the tower")
    parser.add_argument("--encoder-path", metavar="M", help="a folder or hub id of that family, instead of the default")
    parser.add_argument("--lm", metavar="M", help="pretrain: the language model (default: lmsys/vicuna-7b-v1.5)")
    parser.add_argument("--rope", choices=ROPES, help="pretrain: 2D RoPE added to the tower (default: none)")
    parser.add_argument("--start", choices=("identity", "full"), help="see spatial_pe.patch (default: identity)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="finetune: output of --stage pretrain")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="conversations in LLaVA's JSON format")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of its picture files")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of transformers.TrainingArguments")
    parser.add_argument("--tune-tower", action="store_true", help="train the whole tower, not only an added encoding")
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="tokens of a sequence (default: 2048)"
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after so many steps")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --output")
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    made = {"--encoder": options.encoder, "--encoder-path": options.encoder_path, "--lm": options.lm}
    made |= {"--rope": options.rope, "--start": options.start}
    if options.stage == "finetune":
        if options.model is None:
            raise RecipeError("--stage finetune needs --model, the --output of --stage pretrain")
        if not (options.model / "config.json").is_file():
            raise RecipeError(f"--model {str(options.model)!r} holds no model (config.json)")
        given = [name for name, value in made.items() if value is not None]
        if given:
            raise RecipeError(f"{given[0]} is determined by --model: leave it out")
        return
    if options.model is not None:
        raise RecipeError("--model is for --stage finetune")
    if options.encoder is None:
        raise RecipeError(f"--stage pretrain needs --encoder, one of {', '.join(TOWERS)}")
    if options.start is not None and options.rope not in ("axial", "mixed"):
        raise RecipeError("--start is for --rope axial or mixed")


def _arguments(options: argparse.Namespace) -> TrainingArguments:
    settings = {**COMMON, **STAGES[options.stage], **_settings(options.config)}
    settings |= {"output_dir": str(options.output), "seed": options.seed, "remove_unused_columns": False}
    if options.max_steps is not None:
        settings["max_steps"] = options.max_steps
    unknown = sorted({*settings} - {field.name for field in fields(TrainingArguments)})
    if unknown:
        raise RecipeError(f"--config {str(options.config)!r}: TrainingArguments has no {unknown[0]!r}")
    deepspeed = settings.get("deepspeed")
    if isinstance(deepspeed, dict) and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise RecipeError("--config: ZeRO-3 splits the weights before they can be patched: stage 2, or FSDP")
    return TrainingArguments(**settings)


def _settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"bf16": True} if torch.cuda.is_available() else {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"--config {str(path)!r} must be a mapping of transformers.TrainingArguments")
    return found


# -------------------------------------------------------------------------------------------------------------- model


def _assembled(options: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a LLaVA model from a tower, a new projector and a language model."""
    row = TOWERS[options.encoder]
    source = options.encoder_path or row.checkpoint
    tower = _tower(source)
    language = AutoModelForCausalLM.from_pretrained(options.lm or "lmsys/vicuna-7b-v1.5", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.lm or "lmsys/vicuna-7b-v1.5")
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise RecipeError("--lm: its tokenizer must be a fast one, with an end-of-sequence token")
    new = ["<image>"] if tokenizer.pad_token is not None else ["<image>", "<pad>"]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<pad>"
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=patches,
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default" if row.prefix else "full",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # no weights: it is built from the loaded parts
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.generation_config = language.generation_config
    spatial_pe.patch(model, **_how(options))
    images = AutoImageProcessor.from_pretrained(source)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=row.prefix,
    )
    return model, processor


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``spatial_pe.patch``."""
    how = ROPES[options.rope or "none"]
    return {**how, "start": options.start} if options.start else how


def _tower(source: str) -> nn.Module:
    """Return the vision tower alone, also of a checkpoint of two towers."""
    config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)
    with torch.device("meta"):
        cls = type(AutoModel.from_config(config))
    return cls.from_pretrained(source, config=config, dtype=torch.float32)


def _loaded(path: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model = spatial_pe.from_pretrained(LlavaForConditionalGeneration, path, dtype=torch.float32)
    return model, LlavaProcessor.from_pretrained(path)


def _freeze(model: LlavaForConditionalGeneration, options: argparse.Namespace, encoder: Encoder) -> list[str]:
    """Freeze all but the trained parts of the stage; return their names, shortened."""
    model.requires_grad_(False)
    tower = model.model.vision_tower
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(options.tune_tower or _is_rope(name))
    _freeze_unused(tower, encoder)
    model.model.multi_modal_projector.requires_grad_(True)
    if options.stage == "finetune":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if options.tune_tower or any(p.requires_grad for p in tower.parameters()):
        model.enable_input_require_grads()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = (_part(name) for name in learning)
    return list(dict.fromkeys(parts))


def _is_rope(name: str) -> bool:
    return ".rope." in f".{name}"


def _part(name: str) -> str:
    for part in ("multi_modal_projector", "language_model", "lm_head"):
        if part in name:
            return part
    return "vision_tower, encoding" if _is_rope(name) else "vision_tower"


def _freeze_unused(tower: nn.Module, encoder: Encoder) -> None:
    """Freeze layers after the last one that LLaVA reads: they get no gradient, which data parallelism waits for."""
    learning = [p for p in tower.parameters() if p.requires_grad]
    if not learning:
        return
    from PIL import Image

    pixels = encoder.pixels(Image.new("RGB", (8, 8)))[None]
    out = tower(pixels, output_hidden_states=True).hidden_states[LAYER]
    for parameter, grad in zip(learning, torch.autograd.grad(out.sum(), learning, allow_unused=True), strict=True):
        parameter.requires_grad_(grad is not None)


# ------------------------------------------------------------------------------------------------------- verification


class UnverifiedError(Exception):
    """The saved model differs from the trained one; the message says how."""


def _verify(options: argparse.Namespace, probe: dict[str, Tensor], before: Tensor, trainer: Trainer) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that the paper's variant is no rotation was shown before
        try:
            model = spatial_pe.from_pretrained(LlavaForConditionalGeneration, options.output, dtype=torch.float32)
        except ValueError as error:
            raise UnverifiedError(str(error)) from error
    noted = model.model.vision_tower.config.spatial_pe
    attention = [m for m in model.model.vision_tower.modules() if isinstance(m, FusedAttention)]
    asked = _asked(options)
    differing = {key: noted.get(key) for key, value in asked.items() if noted.get(key) != value}
    if differing or not attention:
        raise UnverifiedError(
            f"asked for {asked}, config.json says {differing}, {len(attention)} attention modules patched"
        )
    model.to(trainer.args.device)
    after = _logits(model, probe, trainer)
    error = ((after - before).norm() / before.norm()).item()
    allowed = 2e-2 if trainer.args.bf16 or trainer.args.fp16 else 1e-5
    if not error <= allowed:
        raise UnverifiedError(f"its logits differ by {error:.1e} of their norm, allowed are {allowed:.0e}")
    return {"patched": noted, "attention_modules": len(attention), "logits_error": error, "allowed": allowed}


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the tower's config must contain: in the second stage, that of the first."""
    if options.model:
        config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        return config["vision_config"]["spatial_pe"]
    how = _how(options)
    return {"rope": how.get("rope"), "start": how.get("start", "identity"), "legacy": how.get("legacy")}


@torch.no_grad()
def _logits(model: nn.Module, probe: dict[str, Tensor], trainer: Trainer) -> Tensor:
    """Return (L, vocabulary) float32 on the CPU, of one example."""
    model.eval()
    inputs = {name: tensor.to(trainer.args.device) for name, tensor in probe.items() if name != "labels"}
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        return model(**inputs).logits[0].float().cpu()


if __name__ == "__main__":
    status = main()
    if PartialState._shared_state:
        PartialState().destroy_process_group()
    sys.exit(status)
