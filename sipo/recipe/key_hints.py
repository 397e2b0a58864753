"""Finds the key that was probably meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Sequence

from sipo.fields import nearest

# Our keys, and their counterparts: in the training scripts of diffusers and Diffusion-DPO, in TRL's DPOConfig with
# transformers' TrainingArguments, and short names that people try. Names whose letters or words lead
# to the key from any section are left out. One with a section is meant in that section only.
_OTHER_NAMES = {
    "model.family": "sdxl",
    "model.pretrained_model_name_or_path": (
        "model.path base_model model_name_or_path pretrained_vae_model_name_or_path unet_init"
    ),
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype",
    "model.tuning": "use_peft train_method",
    "model.lora.rank": "r lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.target_modules": "lora_layers lora_target_modules",
    "model.reference=copy": "force_use_ref_model",
    "model.shift": "flow_shift",
    "data.dataset_name": "data.path train_data_dir instance_data_dir dataset",
    "data.dataset_split_name": "split dataset_train_split",
    "data.sizes": "resolution image_size height width height_buckets width_buckets",
    "data.frames": "num_frames max_num_frames frame_buckets",
    "data.cache": "cache_latents",
    "data.center_crop=false": "random_crop",
    "data.random_flip": "no_hflip",
    "data.enable_tiling": "vae_tiling",
    "data.max_pairs": "max_train_samples",
    "data.num_workers": "dataset_num_proc",
    "data.reference_errors": "precompute_ref_log_probs",
    "data.seed": "data_seed",
    "loss.beta": "beta_dpo",
    "loss.loss_type": "link f_divergence_type",
    "loss.method=sft": "sft",
    "loss.safeguard": "winner_preserving",
    "samples.validation_prompts": "generate_during_eval num_validation_images",
    "training.max_train_steps": "num_train_epochs num_epochs epochs max_steps",
    "training.output_dir": "logging_dir run_name tracker_name tracker_project_name",
    "training.train_batch_size": "batch_size per_device_train_batch_size",
    "training.optimizer": "optim use_adafactor",
    "training.optimizer=adamw8bit": "use_8bit_adam",
    "training.learning_rate": "lr scale_lr",
    "training.adam_beta1 and training.adam_beta2": "betas",
    "training.adam_epsilon": "eps",
    "training.adam_weight_decay": "weight_decay",
    "training.lr_scheduler": "lr_scheduler_type",
    "training.lr_warmup_steps": "warmup_ratio",
    "training.max_grad_norm": "clip",
    "training.mixed_precision=bf16": "bf16",
    "training.mixed_precision=fp16": "fp16",
    "training.proportion_empty_prompts": "caption_dropout",
    "training.timestep_distribution": "weighting_scheme timestep_bias_strategy",
    "training.logging_steps": "log_every logging_strategy",
    "training.validation_steps": (
        "eval_steps eval_strategy evaluation_strategy run_validation validate_every validation_epochs"
    ),
    "training.checkpointing_steps": "checkpoint_every save_every save_steps save_strategy",
    "training.checkpoints_total_limit": "keep_checkpoints save_total_limit",
    "training.progress": "disable_tqdm",
    "training.report_to": "tensorboard trackers wandb",
    "sipo label": "choice_model",
    "sipo train --overwrite": "overwrite overwrite_output_dir",
    "sipo train --resume": "resume resume_from_checkpoint",
    "accelerate launch --use_fsdp": "fsdp fsdp_config",
    "hf upload": "push_to_hub hub_model_id hub_token",
    "the environment variable HF_DATASETS_CACHE": "cache_dir",
}
_MEANT = {name: meant for meant, names in _OTHER_NAMES.items() for name in names.split()}


def probable_key(key: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> str | None:
    """Returns the key that was probably meant, or ``None``.

    A key of the same section may be merely similar. One of another section must be the same or nearly the same, except
    where the name stands outside all sections.

    Args:
        key: one that does not exist, with its sections.
        paths: all that do.
    """
    name = key[-1]
    beside = [path for path in paths if path[:-1] == key[:-1]]
    return (
        _MEANT.get(".".join(key[-2:]))
        or _MEANT.get(name)
        or _with_words(name, beside)
        or next((".".join(path) for path in paths if path[-1] == name), None)
        or _alike(name, beside, 0.75)
        or (_with_words(name, paths) if len(key) == 1 else None)
        or _alike(name, paths, 0.85)
    )


def _with_words(name: str, paths: Sequence[tuple[str, ...]]) -> str | None:
    """Returns the first key with all words of a name, in their order: ``prompts`` is in ``validation_prompts``."""
    return next((".".join(path) for path in paths if f"_{name}_" in f"_{path[-1]}_"), None)


def _alike(name: str, paths: Sequence[tuple[str, ...]], least: float) -> str | None:
    """Returns the key that is spelt most like a name, if the two are at least this similar (from 0 to 1)."""
    close = nearest(name, (path[-1] for path in paths), least)
    return next((".".join(path) for path in paths if path[-1] == close), None)
